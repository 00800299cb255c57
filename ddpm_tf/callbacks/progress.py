"""How far training is: a progress bar, or lines in the log."""

import sys
import time
from collections.abc import Mapping

from absl import logging
from tqdm import tqdm

from ddpm_tf.callbacks.base import StepCallback, is_due


class Progress(StepCallback):
    """Shows a bar with loss, images/s and time left. Without a terminal it logs lines instead."""

    def __init__(self, start_step: int, *, num_steps: int, batch_size: int, log_every: int) -> None:
        super().__init__(start_step)
        self.num_steps, self.batch_size, self.log_every = num_steps, batch_size, log_every

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.num_steps * self.batch_size,
            initial=self.start_step * self.batch_size,
            unit=" images",
            unit_scale=True,
            disable=not self.is_terminal,
            desc="training",
        )
        self.last_step, self.last_time = self.start_step, time.monotonic()

    def on_step(self, step: int, logs: Mapping[str, float]) -> None:
        self.bar.set_postfix(step=f"{step}/{self.num_steps}", loss=f"{logs['loss']:.4f}", refresh=False)
        self.bar.update(step * self.batch_size - self.bar.n)
        if not self.is_terminal and (is_due(step, self.log_every) or step >= self.num_steps):
            now = time.monotonic()
            rate = (step - self.last_step) / max(now - self.last_time, 1e-9)
            minutes, seconds = divmod(round((self.num_steps - step) / rate), 60)
            logging.info(
                "step %d/%d  loss %.4f  %.0f images/s  %d:%02d left",
                step,
                self.num_steps,
                logs["loss"],
                rate * self.batch_size,
                minutes,
                seconds,
            )
            self.last_step, self.last_time = step, now

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        self.bar.close()
