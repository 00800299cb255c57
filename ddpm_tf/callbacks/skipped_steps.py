"""Skipped steps, whose loss or gradient was not finite: a log line for each, and the end of a run with too many of them."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from ddpm_tf.callbacks.base import StepCallback
from ddpm_tf.errors import NumericsError


class SkippedSteps(StepCallback):
    """Logs every step that the model skipped, and stops the run after `model.max_skipped_steps` skipped steps in a row.

    Args:
        folder: where the inputs and weights of the last skipped step are written when the run stops, as `step_k.npz`.
            None on a worker that is not the chief, which writes nothing.
        replay: replay(step) -> {name: array}, what the step was computed from: indices, image, t, eps, dropout_seed, ...
    """

    def __init__(self, start_step: int, *, folder: str | None, replay: Callable[[int], dict[str, np.ndarray]]) -> None:
        super().__init__(start_step)
        self.folder, self.replay = folder, replay

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        self.num_logged = int(self.model.skipped.total.numpy())

    def on_step(self, step: int, logs: Mapping[str, float]) -> None:
        total = int(logs["skipped"])
        num_new, self.num_logged = total - self.num_logged, total
        if not num_new:
            return
        for skipped in self.model.skipped.steps.numpy()[-num_new:].tolist():
            inputs = self.replay(skipped)
            self._log(skipped, inputs, logs if skipped == step - 1 else None)
        in_a_row = int(self.model.skipped.in_a_row.numpy())
        if in_a_row >= self.model.max_skipped_steps:
            inputs = {**inputs, "loss_scale": np.array(logs["loss_scale"])}
            raise self._too_many(in_a_row, skipped, inputs)

    def _log(self, skipped: int, inputs: dict[str, Any], logs: Mapping[str, float] | None) -> None:
        """logs: the metrics of the skipped step; None if they are those of a later step of the same execution."""
        metrics = f"loss {logs['loss']:.4g}, gradient norm {logs['grad_norm']:.4g}; " if logs else ""
        is_bad = self.model.not_finite_at.numpy() == skipped  # [replicas]
        replicas = ", ".join(map(str, np.flatnonzero(is_bad)))
        where = f" on replica {replicas} of {is_bad.size}" if replicas else ""
        logging.warning(
            "Step %d was skipped: its loss or gradient is not finite%s (%st = %s, examples %s).",
            skipped,
            where,
            metrics,
            inputs["t"].tolist(),
            inputs["indices"].tolist(),
        )

    def _too_many(self, in_a_row: int, last: int, inputs: dict[str, Any]) -> NumericsError:
        path = self._dump(self.folder, last, inputs) if self.folder else "The chief's nan_dump/"
        return NumericsError(
            f"The loss or gradient of {in_a_row} steps in a row, up to step {last}, was not finite. These steps changed no "
            f"weight and were not saved. {path} holds what step {last} was computed from. Lower optimizer.learning_rate and "
            "start again: training resumes from the last checkpoint."
        )

    def _dump(self, folder: str, step: int, inputs: dict[str, Any]) -> str:
        """Write the inputs of a step and the weights; returns the file's path."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"step_{step}.npz")
        weights = {f"network/{v.path}": v.numpy() for v in self.model.network.variables}
        arrays: dict[str, Any] = {"step": step, **inputs, **weights}
        np.savez(path, **arrays)
        return path
