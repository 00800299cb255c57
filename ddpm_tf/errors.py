"""Errors that a user can act on, and the exit codes the command lines leave with."""


class InputError(ValueError):
    """Something the user gave cannot be used: a flag, a config field, a file, an argument.

    The message says what was found, what was expected and what to do. The command lines print it
    without a traceback and leave with `exit_code`.
    """

    exit_code = 2


def unknown_name(kind, name, known):
    """The error for a name that is not in a table of choices."""
    return InputError(f"Unknown {kind} {name!r}; expected one of {sorted(known)}.")
