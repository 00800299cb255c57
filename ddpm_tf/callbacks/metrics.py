"""metrics.jsonl and TensorBoard."""

import json
import math
import os
import time

import tensorflow as tf
from absl import logging

from ddpm_tf.callbacks.base import StepCallback, is_due
from ddpm_tf.files import write_text


class Metrics(StepCallback):
    """Rows in metrics.jsonl and TensorBoard scalars. A row depends on its step alone, `seconds` and `images_per_s`
    excepted; rows after the step a run goes on from are cut off."""

    def __init__(self, start_step, *, workdir, batch_size, log_every, summaries):
        super().__init__(start_step)
        self.path = os.path.join(workdir, "metrics.jsonl")
        self.batch_size, self.log_every, self.summaries = batch_size, log_every, summaries

    def on_train_begin(self, logs=None):
        write_text(self.path, "".join(self._rows_so_far()))
        self.file = open(self.path, "a")
        self.last_step, self.last_time = self.start_step, time.monotonic()

    def _rows_so_far(self):
        if not os.path.exists(self.path):
            return
        with open(self.path, errors="replace") as f:
            for number, line in enumerate(f, 1):
                try:
                    if json.loads(line)["step"] <= self.start_step and line.endswith("\n"):
                        yield line
                except (ValueError, KeyError, TypeError):
                    logging.warning("%s: line %d is damaged and dropped: %r", self.path, number, line[:80])

    def on_step(self, step, logs):
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
        os.fsync(self.file.fileno())  # no later than the checkpoint that follows
        for name in logs:
            if math.isfinite(logs[name]):
                self.summaries.scalar(name, logs[name], step)
        self.summaries.scalar("images_per_s", rate, step)
        self.last_step, self.last_time = step, now

    def on_train_end(self, logs=None):
        self.file.close()
        self.summaries.flush()


class Summaries:
    """TensorBoard events in a folder; where TensorBoard is not installed it says so once and writes nothing."""

    def __init__(self, folder):
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            logging.info("TensorBoard is not installed: no event files (pip install tensorboard).")
            self._writer = None
        else:
            self._writer = tf.summary.create_file_writer(folder)

    def scalar(self, name, value, step):
        if self._writer:
            with self._writer.as_default():
                tf.summary.scalar(name, value, step=step)

    def image(self, name, image, step):
        """image: uint8 [H, W, C]."""
        if self._writer:
            with self._writer.as_default():
                tf.summary.image(name, image[None], step=step)

    def flush(self):
        if self._writer:
            self._writer.flush()
