"""What happens between steps: progress, metrics, checkpoints, sample grids."""

import concurrent.futures
import json
import math
import os
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm

from ddpm_tf.files import write_text
from ddpm_tf.training import checkpoints


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


class Progress(StepCallback):
    """A bar with loss, images/s and time left; plain lines where there is no terminal."""

    def __init__(self, start_step, *, num_steps, batch_size, log_every):
        super().__init__(start_step)
        self.num_steps, self.batch_size, self.log_every = num_steps, batch_size, log_every

    def on_train_begin(self, logs=None):
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.num_steps * self.batch_size, initial=self.start_step * self.batch_size, unit=" images",
            unit_scale=True, disable=not self.is_terminal, desc="training",
        )  # fmt: skip
        self.last_step, self.last_time = self.start_step, time.monotonic()

    def on_step(self, step, logs):
        self.bar.set_postfix(step=f"{step}/{self.num_steps}", loss=f"{logs['loss']:.4f}", refresh=False)
        self.bar.update(step * self.batch_size - self.bar.n)
        if not self.is_terminal and (is_due(step, self.log_every) or step >= self.num_steps):
            now = time.monotonic()
            rate = (step - self.last_step) / max(now - self.last_time, 1e-9)
            minutes, seconds = divmod(round((self.num_steps - step) / rate), 60)
            logging.info(
                "step %d/%d  loss %.4f  %.0f images/s  %d:%02d left",
                step, self.num_steps, logs["loss"], rate * self.batch_size, minutes, seconds,
            )  # fmt: skip
            self.last_step, self.last_time = step, now

    def on_train_end(self, logs=None):
        self.bar.close()


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


class SampleGrids(StepCallback):
    """Draws a grid every `every` steps and at the end, unless training is being stopped.

    Args:
        draw: draw(step) -> what is drawn, without talking to other workers.
        show: show(step, drawn), writes it.
        is_drawn: is_drawn(step), whether its pictures are there; a run that was stopped while drawing draws them first.
        stop: StopOnSignal.
        cluster: Cluster; all workers draw, and stop drawing, together.

    A grid takes long. It is drawn by a thread of its own, so that a signal is answered meanwhile: the state after the
    step is saved and the grid given up.
    """

    def __init__(self, start_step, *, every, num_steps, draw, show, is_drawn, stop, cluster):
        super().__init__(start_step)
        self.every, self.num_steps, self.stop, self.cluster = every, num_steps, stop, cluster
        self.draw, self.show, self.is_drawn = draw, show, is_drawn

    def on_train_begin(self, logs=None):
        if self.start_step and not self.is_drawn(self.start_step):
            self.on_step(self.start_step, logs)

    def on_step(self, step, logs):
        if not (is_due(step, self.every) or step >= self.num_steps) or self.model.stop_training:
            return
        drawing = concurrent.futures.Future()
        threading.Thread(target=self._draw_into, args=(drawing, step), daemon=True).start()
        done = 0
        while done < self.cluster.size:
            concurrent.futures.wait([drawing], timeout=0.1)
            state = np.array([drawing.done(), self.stop.signal is not None], np.int64)
            done, wishes = self.cluster.all_reduce(state)
            if wishes:
                self.stop.stop(step)
                return
        self.show(step, drawing.result())

    def _draw_into(self, drawing, step):
        try:
            drawing.set_result(self.draw(step))
        except BaseException as e:
            drawing.set_exception(e)


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
