"""Errors that a user can act on, and the exit codes the command lines leave with.

The message says what was found, what was expected and what to do. The command lines print it without a traceback.
"""

import errno
import resource
from collections.abc import Iterable


class RunError(Exception):
    """What ends a program with `exit_code` and one message."""

    exit_code = 1


class InputError(RunError, ValueError):
    """Something the user gave cannot be used: a flag, a config field, a file, an argument."""

    exit_code = 2


class DataNotFoundError(InputError):
    """The data are not there: not prepared, not downloaded, no such file."""


class BadDataError(RunError):
    """Data that turned out to be unusable in the middle of a run."""

    exit_code = 65


class PeerLostError(RunError):
    """Another worker of a run on several machines is gone: start all of them again."""

    exit_code = 69


class NumericsError(RunError):
    """Numbers that are not finite, and nothing sensible left to do."""

    exit_code = 70


class WorkdirError(RunError):
    """A workdir that cannot be written to, or that another process trains in."""

    exit_code = 73


class StorageError(RunError):
    """A write that failed: no space, an I/O error."""

    exit_code = 74


class NoValidCheckpointError(RunError):
    """Checkpoint folders exist, and none of them verifies."""

    exit_code = 76


class Interrupted(RunError):
    """A signal ended the run after its state was saved; exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def storage_advice(error: Exception) -> str:
    """What to do about an error of the file system, as a sentence."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"At most {limit} files may be open: raise that by ulimit -n 4096, and start again with the same command."
        )
    return "Make room or see to the device, and start again with the same command."


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a table of choices."""
    return InputError(f"Unknown {kind} {name!r}; expected one of {sorted(known)}.")
