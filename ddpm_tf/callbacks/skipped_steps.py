"""Steps whose loss or gradient is not finite: told, dumped, and the end of a run that has too many of them."""

import os

import numpy as np
from absl import logging

from ddpm_tf.callbacks.base import StepCallback
from ddpm_tf.errors import NumericsError


class SkippedSteps(StepCallback):
    """Logs every step that the model skipped, and stops the run when `max_skipped_steps` were skipped in a row.

    Args:
        folder: where the last step that was skipped is dumped then, as `step_k.npz`; None: nowhere.
        replay: replay(step) -> {name: array}, what the step was computed from: indices, image, t, eps, dropout_seed, ...
    """

    def __init__(self, start_step, *, folder, replay):
        super().__init__(start_step)
        self.folder, self.replay = folder, replay

    def on_train_begin(self, logs=None):
        self.seen = int(self.model.skipped_total.numpy())

    def on_step(self, step, logs):
        new, self.seen = int(logs["skipped"]) - self.seen, int(logs["skipped"])
        if not new:
            return
        for skipped in self.model.skipped_steps.numpy()[-new:].tolist():
            inputs = self.replay(skipped)
            last = f"loss {logs['loss']:.4g}, gradient norm {logs['grad_norm']:.4g}; " if skipped == step - 1 else ""
            is_bad = self.model.not_finite_at.numpy() == skipped  # [replicas]
            where = (
                f" on replica {', '.join(map(str, np.flatnonzero(is_bad)))} of {is_bad.size}" if is_bad.any() else ""
            )
            logging.warning(
                "Step %d was skipped: its loss or gradient is not finite%s (%st = %s, examples %s).",
                skipped, where, last, inputs["t"].tolist(), inputs["indices"].tolist(),
            )  # fmt: skip
        in_a_row = int(self.model.skipped_in_a_row.numpy())
        if in_a_row >= self.model.max_skipped_steps:
            path = (
                self._dump(skipped, {**inputs, "loss_scale": logs["loss_scale"]})
                if self.folder
                else "The chief's nan_dump/"
            )
            raise NumericsError(
                f"The loss or gradient of {in_a_row} steps in a row, up to step {skipped}, was not finite. They changed "
                f"nothing and were not saved. {path} holds what step {skipped} was computed from. Lower "
                "optimizer.learning_rate and start again: training goes on from the last checkpoint."
            )

    def _dump(self, step, inputs):
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, f"step_{step}.npz")
        weights = {f"network/{v.path}": v.numpy() for v in self.model.network.variables}
        np.savez(path, step=step, **inputs, **weights)
        return path
