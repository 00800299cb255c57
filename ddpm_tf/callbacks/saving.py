"""Checkpoints, written while training goes on."""

import concurrent.futures
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_tf.callbacks.base import StepCallback, is_due
from ddpm_tf.storage import checkpoints


class Checkpoints(StepCallback):
    """Saves a checkpoint every `every` steps, after `minutes` without one, and at the end.

    The tensors are copied between two steps, and a thread writes them while training goes on. If writing fails, its error is
    raised after the next step.

    Args:
        folder: the workdir's `ckpt`.
        minutes: 0: none are saved by the clock.
        keep, keep_every, meta: as in `checkpoints.save`.
    """

    def __init__(
        self,
        start_step: int,
        *,
        folder: str,
        every: int,
        minutes: float,
        num_steps: int,
        keep: int,
        keep_every: int,
        meta: Mapping[str, Any],
    ) -> None:
        super().__init__(start_step)
        self.folder, self.every, self.minutes, self.num_steps = folder, every, minutes, num_steps
        self.keep, self.keep_every, self.meta = keep, keep_every, meta
        self._last_time, self._saved_step = time.monotonic(), start_step
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._pending: concurrent.futures.Future | None = None

    def on_step(self, step: int, logs: Mapping[str, float]) -> None:
        if self._pending is not None and self._pending.done():
            self.wait()
        passed = time.monotonic() - self._last_time
        if is_due(step, self.every) or step >= self.num_steps or (self.minutes and passed >= 60 * self.minutes):
            self.save(step)

    def save(self, step: int) -> None:
        """Begin to write the checkpoint of `step`, after the one that is being written; once per step."""
        if step == self._saved_step:
            return
        self.wait()
        tensors = {name: np.array(v) for name, v in self.model.state().items()}
        self._saved_step, self._last_time = step, time.monotonic()
        self._pending = self._writer.submit(
            checkpoints.save,
            self.folder,
            step,
            tensors,
            {**self.meta, "time": time.time()},
            keep=self.keep,
            keep_every=self.keep_every,
        )

    def wait(self) -> None:
        """Wait until nothing is being written; raises the error of writing, if there was one."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        self.wait()
