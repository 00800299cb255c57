"""Tables of choices: an entry says how it is built, and which settings it has."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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


def all_settings(table: Table) -> dict[str, Any]:
    """{setting: default} of every entry of a table. Entries that share a setting share its default."""
    return {name: value for choice in table.values() for name, value in choice.defaults().items()}


def choose(kind: str, name: str, table: Table, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The entry `name` of a table, as a function that has its settings already.

    Args:
        kind: what the table is a table of, for messages.
        settings: {setting: value}. A setting of another entry must be at its default; one that is not given has its default.

    Raises:
        InputError: an unknown name or setting, or a setting that this entry does not have.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    foreign = foreign_settings(name, table, settings)
    if foreign:
        setting = foreign[0]
        owners = [owner for owner, choice in table.items() if setting in choice.settings]
        raise InputError(
            f"{setting} is a setting of the {kind} {' and '.join(owners)}; {name} has no such setting and was given "
            f"{setting}={settings[setting]}. Leave it at {all_settings(table)[setting]}."
        )
    build, own = table[name].build, {s: settings[s] for s in table[name].settings if s in settings}
    return lambda *args, **kwargs: build(*args, **own, **kwargs)


def foreign_settings(name: str, table: Table, settings: Mapping[str, Any]) -> list[str]:
    """The settings that are not at their default and that the entry `name` does not have.

    Raises:
        InputError: a setting that no entry has.
    """
    defaults = all_settings(table)
    unknown = sorted(settings.keys() - defaults.keys())
    if unknown:
        raise unknown_name("setting", unknown[0], defaults)
    own = table[name].settings
    return [s for s, value in settings.items() if s not in own and value != defaults[s]]
