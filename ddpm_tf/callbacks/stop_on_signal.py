"""SIGTERM and SIGINT: the step is finished, its state is saved, and training ends."""

import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType

from ddpm_tf.callbacks.base import StepCallback
from ddpm_tf.callbacks.saving import Checkpoints
from ddpm_tf.callbacks.signals import Signals
from ddpm_tf.cluster.cluster import Cluster


class StopOnSignal(StepCallback):
    """After a signal, finishes the step, saves a checkpoint and ends `fit`. `signal` is the signal's number, or None.

    The process exits at once, without saving, after a second signal or at the end of the grace period. A checkpoint that is
    being written then stays half-written. That is harmless: the one before it is the newest that verifies.

    Several workers stop after the same step: each adds its wish to stop to what the step all-reduces. Only the chief saves.

    Args:
        checkpoints: Checkpoints on the chief, None on the other workers.
        grace_period_s: how many seconds after a signal the step may take.
        cluster: Cluster; None: one process.
    """

    def __init__(
        self,
        start_step: int,
        *,
        checkpoints: Checkpoints | None,
        grace_period_s: float,
        cluster: Cluster | None = None,
    ) -> None:
        super().__init__(start_step)
        self.checkpoints, self.grace_period_s = checkpoints, grace_period_s
        self.signal: int | None = None
        self.is_alone = cluster is None or cluster.size == 1
        self._signals: Signals | None = None

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        self._signals = Signals(self._on_signal)
        threading.Thread(target=self._watch, daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _watch(self) -> None:
        """End the process after a second signal, or when the grace period after the first one is over."""
        assert self._signals is not None
        first = self._signals.next()
        if first is None:
            return
        second = self._signals.next(self.grace_period_s)
        if second == 0:
            text = (
                f"{signal.Signals(first).name}: the step did not end within --grace_period_s={self.grace_period_s:g}; left "
                "without saving. The last checkpoint is kept, and the same command resumes from it.\n"
            )
            os.write(2, text.encode())
        if second is not None:
            os._exit(128 + (second or first))

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        if self.signal is not None and not self.is_alone:
            self.model.stop_wish.assign(1)

    def on_step(self, step: int, logs: Mapping[str, float]) -> None:
        if self.signal is not None if self.is_alone else self.model.stop_votes.numpy():
            self.stop(step)

    def stop(self, step: int) -> None:
        """End `fit` after this step, and save its state. All workers must call this after the same step."""
        if self.signal is None:
            self.signal = signal.SIGTERM  # another worker got a signal
        if self.checkpoints:
            self.checkpoints.save(step)
        self.model.stop_training = True

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        self.release()

    def release(self) -> None:
        """Install the previous signal handlers again. Call it also after an error that ended `fit`."""
        if self._signals:
            self._signals.release()
