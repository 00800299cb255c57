"""The metrics of a run: rows in metrics.jsonl, and TensorBoard events."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf
from absl import logging

from ddpm_tf.callbacks.base import StepCallback, is_due
from ddpm_tf.errors import StorageError, storage_advice
from ddpm_tf.files import write_text


class Metrics(StepCallback):
    """Writes a row of metrics.jsonl and TensorBoard scalars every `log_every` steps.

    A row depends on its step alone, except for `seconds` and `images_per_s`. When a run is resumed, the rows after
    `start_step` are cut off.

    Args:
        summaries: Summaries.
    """

    def __init__(
        self, start_step: int, *, workdir: str, batch_size: int, log_every: int, summaries: "Summaries"
    ) -> None:
        super().__init__(start_step)
        self.path = os.path.join(workdir, "metrics.jsonl")
        self.batch_size, self.log_every, self.summaries = batch_size, log_every, summaries

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        write_text(self.path, "".join(self._rows_so_far()))
        self.file = open(self.path, "a")
        self.last_step, self.last_time = self.start_step, time.monotonic()

    def _rows_so_far(self) -> Iterator[str]:
        """The lines of metrics.jsonl up to `start_step`."""
        if not os.path.exists(self.path):
            return
        with open(self.path, errors="replace") as f:
            for number, line in enumerate(f, 1):
                try:
                    if json.loads(line)["step"] <= self.start_step and line.endswith("\n"):
                        yield line
                except (ValueError, KeyError, TypeError):
                    logging.warning("%s: line %d is damaged and dropped: %r", self.path, number, line[:80])

    def on_step(self, step: int, logs: Mapping[str, float]) -> None:
        if not is_due(step, self.log_every):
            return
        now = time.monotonic()
        rate = (step - self.last_step) * self.batch_size / max(now - self.last_time, 1e-9)
        row = {
            "step": step,
            **{name: value if math.isfinite(value) else None for name, value in logs.items()},  # JSON has no NaN
            "images_per_s": round(rate, 1),
            "seconds": round(now - self.last_time, 3),
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())  # before the checkpoint of this step is written
        for name in logs:
            if math.isfinite(logs[name]):
                self.summaries.scalar(name, logs[name], step)
        self.summaries.scalar("images_per_s", rate, step)
        self.last_step, self.last_time = step, now

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        self.file.close()
        self.summaries.flush()


class Summaries:
    """Writes TensorBoard events into a folder. If TensorBoard is not installed, it logs that once and writes nothing."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            logging.info("TensorBoard is not installed: no event files (pip install tensorboard).")
            self._writer = None
        else:
            with _as_storage_error(folder):
                self._writer = tf.summary.create_file_writer(folder)

    def scalar(self, name: str, value: float, step: int) -> None:
        if self._writer:
            with _as_storage_error(self._folder), self._writer.as_default():
                tf.summary.scalar(name, value, step=step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Write one image, uint8 [H, W, C]."""
        if self._writer:
            with _as_storage_error(self._folder), self._writer.as_default():
                tf.summary.image(name, image[None], step=step)

    def flush(self) -> None:
        if self._writer:
            with _as_storage_error(self._folder):
                self._writer.flush()


@contextlib.contextmanager
def _as_storage_error(folder: str) -> Iterator[None]:
    """Raise TensorFlow's error of writing TensorBoard events as StorageError."""
    try:
        yield
    except tf.errors.OpError as e:
        raise StorageError(f"{folder} cannot be written to: {e.message}. {storage_advice(e)}") from e
