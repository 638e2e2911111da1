"""Makes command-line flags from a settings dataclass, so that each setting is defined in one place."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_FIELD = re.compile(r"^    (\w+): [^#\n]+#\s*(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a settings dataclass."""

    name: str
    kind: str  # annotation, without "| None"
    default: Any  # MISSING: the setting is required
    help: str  # the comment beside the field

    @property
    def default_text(self) -> str:
        """The default as a flag spells it. Empty without a default."""
        return "" if self.default in (None, MISSING) else as_text(self.default)


def as_text(value: object) -> str:
    """A setting's value as flags and environment variables spell it."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def on_or_off(text: str) -> bool:
    """The value of a switch. ValueError with the rule."""
    known = {"on": True, "1": True, "true": True, "yes": True, "off": False, "0": False, "false": False, "no": False}
    if text.lower() not in known:
        raise ValueError("on or off")
    return known[text.lower()]


_KINDS: Mapping[str, Callable[[str], Any]] = {"Path": Path, "str": str, "int": int, "float": float, "bool": on_or_off}


def settings_of(config_class: type, defaults: Mapping[str, Any] = _NOTHING) -> tuple[Setting, ...]:
    """The fields of a dataclass, described by the comments beside them. ``defaults`` override the dataclass's own."""
    comments = dict(_FIELD.findall(inspect.getsource(config_class)))
    return tuple(
        Setting(
            entry.name,
            str(entry.type).split(" | ")[0],
            defaults.get(entry.name, entry.default),
            comments.get(entry.name, "").replace("None:", "left out:"),
        )
        for entry in fields(config_class)
    )


def add_flags(parser: argparse.ArgumentParser, config_class: type, defaults: Mapping[str, Any] = _NOTHING) -> None:
    """Adds a flag for each setting: --data-dir for data_dir. A flag that isn't given is absent from the result."""
    for setting in settings_of(config_class, defaults):
        default = f" ({setting.default_text})" if setting.default_text else ""
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            dest=setting.name,
            type=_KINDS[setting.kind],
            default=argparse.SUPPRESS,
            help=(setting.help + default).replace("%", "%%"),
        )


def given(args: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The settings that the user gave on the command line."""
    return {entry.name: getattr(args, entry.name) for entry in fields(config_class) if hasattr(args, entry.name)}
