"""The base of the callbacks: something that is done after a step, where steps are counted from the start of the run."""

from collections.abc import Mapping

import keras


class StepCallback(keras.callbacks.Callback):
    """A callback that counts the completed steps of the whole run.

    Args:
        start_step: how many steps earlier starts of the run have completed.
    """

    def __init__(self, start_step: int) -> None:
        super().__init__()
        self.start_step = start_step

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        self.on_step(self.start_step + batch + 1, logs or {})

    def on_step(self, step: int, logs: Mapping[str, float]) -> None:
        """Act after a step.

        Args:
            step: completed steps of the run.
            logs: the metrics of the last one.
        """
        raise NotImplementedError


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after this one; 0: never."""
    return every > 0 and step % every == 0
