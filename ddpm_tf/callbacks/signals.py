"""SIGTERM and SIGINT as they arrive, also while the main thread is in a C++ call."""

import select
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Takes the place of the handlers of SIGTERM and SIGINT until `release`. Only the main thread may make one.

    Python runs a handler only after the main thread's C++ call has returned. Another thread learns of a signal at once: it
    waits for a byte that Python's C handler writes into a socket.

    Args:
        handler: as `signal.signal` takes it.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], None]) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous: dict[int, Any] = {s: signal.signal(s, handler) for s in SIGNALS}
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def next(self, timeout: float | None = None) -> int | None:
        """Wait for the next signal: its number, 0 after `timeout` seconds without one, None after `release`."""
        while select.select([self._reader], [], [], timeout)[0]:
            byte = self._reader.recv(1)
            if not byte:
                return None
            if byte[0] in SIGNALS:
                return byte[0]
        return 0

    def release(self) -> None:
        """Install the previous handlers again; a second call does nothing."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(-1)
            self._previous = {}
            self._writer.close()
