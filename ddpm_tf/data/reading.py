"""Opening what a user names: regular files alone, so that nothing waits for ever."""

import os
import stat
from typing import IO

from ddpm_tf import text
from ddpm_tf.errors import DataNotFoundError, InputError
from ddpm_tf.paths import kind_of


def open_regular(path: str, expected: str) -> IO[bytes]:
    """Open a regular file to read; opening a named pipe would wait for somebody who writes into it.

    Args:
        expected: how the path is given, for the message, such as "npz:PATH".

    Raises:
        DataNotFoundError: there is nothing at the path.
        InputError: it is no regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise DataNotFoundError(f"The file {text.printable(path)} does not exist; expected {expected}.") from e
    except (OSError, ValueError) as e:
        raise InputError(f"The file {text.printable(path)} cannot be read ({e}); expected {expected}.") from e
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError(f"{text.printable(path)} is {kind_of(mode)}, not a file; expected {expected}.")
    return open(descriptor, "rb")
