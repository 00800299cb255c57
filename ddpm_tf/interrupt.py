"""Ctrl-C while a program still imports: one line and exit code 130, no traceback.

A program imports this module before all others, since it acts when it is imported; nothing else imports it. `app.run` puts
Python's own handler back. A handler that raised would not do here: code of other libraries, C++ among it, may catch what is
raised in the middle of an import, or crash.
"""

import os
import signal
from types import FrameType

_STDERR = os.dup(2)  # stderr may be held back when the signal comes, see app.py


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(_STDERR, b"Stopped by SIGINT.\n")
    os._exit(128 + number)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it, as for "command &"
    signal.signal(signal.SIGINT, _leave)
