"""The README's settings tables, made from the dataclasses: ``python -m tests.house.settings_table`` writes them."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING
from importlib import import_module
from pathlib import Path

from bank_service.values.config import BankConfig
from regrad_vllm.cli.bank import defaults
from regrad_vllm.flags import Setting, add_flags, settings_of
from regrad_vllm.serve.launch import _parser as _serve_parser
from regrad_vllm.serve.settings import variable

README = Path(__file__).parents[2] / "README.md"
# As the command line has them, with the data folder as it is where XDG_DATA_HOME is unset.
_BANK_DEFAULTS = defaults() | {"data_dir": "~/.local/share/regrad/bank"}
_BLOCK = re.compile(r"(<!-- settings: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(readme: str) -> str:
    """The README with each table as its dataclass has it now."""
    return _BLOCK.sub(lambda block: block[1] + render_table(block[2]) + block[3], readme)


def render_table(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    settings = settings_of(getattr(import_module(module), name), _BANK_DEFAULTS if name == "BankConfig" else {})
    lines = ["| flag | default | |", "|---|---|---|"]
    if name == "Settings":
        lines = ["| flag | environment | default | |", "|---|---|---|---|"]
    for setting in settings:
        names = [f"`{_flags(name)[setting.name]}`"]
        if name == "Settings":
            names.append(f"`{variable(setting.name)}`")
        lines.append("| " + " | ".join([*names, _default(setting), setting.help]) + " |")
    return "\n".join(lines) + "\n"


def _flags(class_name: str) -> dict[str, str]:
    """Setting → its flag, as the command's own parser has it."""
    parser = argparse.ArgumentParser()
    if class_name == "Settings":
        parser = _serve_parser()
    else:
        add_flags(parser, BankConfig)
    return {action.dest: action.option_strings[0] for action in parser._actions}


def _default(setting: Setting) -> str:
    if setting.default is MISSING:
        return "required"
    return setting.default_text or "–"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), "utf-8")
