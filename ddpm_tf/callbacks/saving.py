"""Checkpoints, written while training goes on."""

import concurrent.futures
import time

import numpy as np

from ddpm_tf.callbacks.base import StepCallback, is_due
from ddpm_tf.storage import checkpoints


class Checkpoints(StepCallback):
    """A checkpoint every `every` steps, every `minutes` and at the end, written by a thread of its own while training goes on.

    The tensors are copied between two steps; an error of the writing thread is raised after the step it is seen at.
    """

    def __init__(self, start_step, *, folder, every, minutes, num_steps, keep, keep_every, meta):
        super().__init__(start_step)
        self.folder, self.every, self.minutes, self.num_steps = folder, every, minutes, num_steps
        self.meta, self.keeping = meta, {"keep": keep, "keep_every": keep_every}
        self._last_time = time.monotonic()
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._pending, self._saved_step = None, start_step

    def on_step(self, step, logs):
        if self._pending is not None and self._pending.done():
            self.wait()
        waited = time.monotonic() - self._last_time
        if is_due(step, self.every) or step >= self.num_steps or (self.minutes and waited >= 60 * self.minutes):
            self.save(step)

    def save(self, step):
        """Begin to write the checkpoint of `step`, unless that has been done; one at a time."""
        if step == self._saved_step:
            return
        self.wait()
        tensors = {name: np.array(v) for name, v in checkpoints.variables_by_name(self.model).items()}
        self._saved_step, self._last_time = step, time.monotonic()
        meta = {**self.meta, "time": time.time()}
        self._pending = self._writer.submit(checkpoints.save, self.folder, step, tensors, meta, **self.keeping)

    def wait(self):
        """Until nothing is being written; raises what the writing raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def on_train_end(self, logs=None):
        self.wait()
