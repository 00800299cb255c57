"""What every callback of a run is: something that is done after a step, which is counted from the start of the run."""

import keras


class StepCallback(keras.callbacks.Callback):
    """A callback that counts completed steps of the whole run, `start_step` included."""

    def __init__(self, start_step):
        super().__init__()
        self.start_step = start_step

    def on_train_batch_end(self, batch, logs=None):
        self.on_step(self.start_step + batch + 1, logs)

    def on_step(self, step, logs):
        """step: completed steps; logs: of the last one."""
        raise NotImplementedError


def is_due(step, every):
    return every > 0 and step % every == 0
