"""Tables of choices: an entry says how it is built, and which settings it has."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_tf.checks import known
from ddpm_tf.errors import InputError, unknown_name


class Choice(NamedTuple):
    """An entry of a table.

    build: makes the choice. It takes every setting as a keyword; the keyword's default is the setting's default.
    settings: the names of those keywords.
    """

    build: Callable[..., Any]
    settings: tuple[str, ...] = ()

    def defaults(self) -> dict[str, Any]:
        """{setting: default}."""
        parameters = inspect.signature(self.build).parameters
        return {name: parameters[name].default for name in self.settings}


Table = Mapping[str, Choice]


def choose(kind: str, name: str, table: Table, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The entry `name` of a table, as a function that has its settings already.

    Args:
        kind: what the table is a table of, for messages.
        settings: {setting: value}. A setting that only other entries have must be at its default; a setting that is not
            given has its default.

    Raises:
        InputError: an unknown name or setting, or a setting that this entry does not have.
    """
    known(kind, name, table)
    entry = table[name]
    for setting, value in settings.items():
        defaults = {owner: choice.defaults()[setting] for owner, choice in table.items() if setting in choice.settings}
        if not defaults:
            raise unknown_name(
                f"setting of a {kind}", setting, {s for choice in table.values() for s in choice.settings}
            )
        if name not in defaults and not any(np.array_equal(value, default) for default in defaults.values()):
            raise InputError(
                f"{setting} is a setting of the {kind} {', '.join(defaults)}; {name} has no such setting, and "
                f"{setting}={value} was given. Leave it out."
            )
    own = {setting: value for setting, value in settings.items() if setting in entry.settings}
    return functools.partial(entry.build, **own)


def one_of(values: Mapping[str, tuple[object, Sequence[object]]]) -> None:
    """Refuse values outside their lists.

    Args:
        values: {name for the message: (value, the list of those allowed)}.

    Raises:
        InputError
    """
    for name, (value, allowed) in values.items():
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(str, allowed))}.")
