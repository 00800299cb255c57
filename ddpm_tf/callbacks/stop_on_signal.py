"""SIGTERM and SIGINT: the step is finished, its state saved, and training ends."""

import os
import select
import signal
import socket
import threading

from ddpm_tf.callbacks.base import StepCallback

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(StepCallback):
    """After a signal the step is finished, a checkpoint saved, and `fit` ends; `signal` says which came.

    A second signal leaves at once, as does the end of the grace period; a checkpoint that is being written then is left
    half-written, which is harmless: the one before it is the newest that verifies.

    Several workers stop at one step: the wish goes round with the step's gradients, and the chief alone saves.

    Args:
        checkpoints: Checkpoints, of the chief; None on the others.
        cluster: Cluster; None: one process.
    """

    def __init__(self, start_step, *, checkpoints, grace_period_s, cluster=None):
        super().__init__(start_step)
        self.checkpoints, self.grace_period_s, self.signal = checkpoints, grace_period_s, None
        self.is_alone = cluster is None or cluster.size == 1
        self._previous = {}

    def on_train_begin(self, logs=None):
        # Python's handlers wait until the main thread's C++ call returns; the byte in this socket does not.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = {s: signal.signal(s, self._on_signal) for s in _SIGNALS}
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def _on_signal(self, number, frame):
        self.signal = number

    def _watch(self):
        first = self._next_signal(None)
        if first is None:
            return
        second = self._next_signal(self.grace_period_s)
        if second == 0:
            text = (
                f"{signal.Signals(first).name}: the step did not end within --grace_period_s={self.grace_period_s:g}; left "
                "without saving. The last checkpoint is kept, and the same command goes on from it.\n"
            )
            os.write(2, text.encode())
        if second is not None:
            os._exit(128 + (second or first))

    def _next_signal(self, timeout):
        """The number of the next signal; 0 when the time is over, None when training has ended."""
        while select.select([self._reader], [], [], timeout)[0]:
            byte = self._reader.recv(1)
            if not byte:
                return None
            if byte[0] in _SIGNALS:
                return byte[0]
        return 0

    def on_train_batch_begin(self, batch, logs=None):
        if self.signal is not None and not self.is_alone:
            self.model.stop_wish.assign(1)

    def on_step(self, step, logs):
        if self.signal is not None if self.is_alone else self.model.stop_votes.numpy():
            self.stop(step)

    def stop(self, step):
        """End `fit` after this step, and save its state; every worker comes here at the same step."""
        if self.signal is None:
            self.signal = signal.SIGTERM  # of another worker
        if self.checkpoints:
            self.checkpoints.save(step)
        self.model.stop_training = True

    def on_train_end(self, logs=None):
        self.release()

    def release(self):
        """Give the signals back to whom they belonged; also after an error that ended `fit`."""
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            self._previous = {}
            self._writer.close()
