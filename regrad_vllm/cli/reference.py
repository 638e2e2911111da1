"""Generates the reference in docs/ from the code. ``make docs`` runs it.

A page has the comments ``<!-- made: NAME -->`` and ``<!-- end -->``. The lines between them are generated here.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path

from bank_service.values.config import BankConfig
from regrad_vllm.cli.bank import SHOWN_DEFAULTS
from regrad_vllm.cli.main import build_parser
from regrad_vllm.flags import settings_of
from regrad_vllm.serve.settings import Settings, variable

_BLOCK = re.compile(r"(<!-- made: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_CREDENTIALS = ("--bank-token-file", "--bank-ca", "--bank-cert", "--bank-key")
_SETTINGS: Mapping[str, type] = {"bank": BankConfig, "serve": Settings}  # commands with a table of their own


def main(argv: Sequence[str]) -> int:
    """Writes the reference into every page of a folder, by default docs/, and openapi.json beside them."""
    folder = Path(argv[0] if argv else "docs")
    for page in sorted(folder.glob("*.md")):
        before = page.read_text("utf-8")
        after = with_reference(before)
        if after != before:
            page.write_text(after, "utf-8")
            sys.stdout.write(f"{page}\n")
    (folder / "openapi.json").write_text(document_schema(), "utf-8")
    return 0


def with_reference(page: str) -> str:
    """The page's text with each marked part generated again. KeyError for a mark with an unknown name."""
    return _BLOCK.sub(lambda block: block[1] + _PARTS[block[2]]() + block[3], page)


def bank_settings() -> str:
    """The table of the bank's settings: a row for each field of BankConfig."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for setting in settings_of(BankConfig, SHOWN_DEFAULTS):
        flag = _flags(command_parsers()["bank"])[setting.name]
        rows.append(f"| `{flag}` | {setting.default_text or '–'} | {setting.help} |")
    return "\n".join(rows) + "\n"


def serve_settings() -> str:
    """The table of the plugin's settings: a row for each field of Settings."""
    rows = ["| flag | environment | default | meaning |", "|---|---|---|---|"]
    for setting in settings_of(Settings):
        flag = _flags(command_parsers()["serve"])[setting.name]
        default = "required" if setting.default is MISSING else setting.default_text or "–"
        rows.append(f"| `{flag}` | `{variable(setting.name)}` | {default} | {setting.help} |")
    return "\n".join(rows) + "\n"


def document_schema() -> str:
    """The OpenAPI schema of the routes for documents, as the server gives it at /openapi.json beside vLLM's own."""
    from fastapi import FastAPI

    from regrad_vllm.serve.documents.document_routes import document_routes

    app = FastAPI(title="ReGrad: documents over HTTP", version=version("regrad-vllm"))
    app.include_router(document_routes())
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


def commands() -> str:
    """A section for each command of ``regrad``."""
    summaries = {action.dest: f"{action.help}." for action in _subparsers()._choices_actions}
    return "\n".join(_section(name, parser, summaries[name]) for name, parser in command_parsers().items()) + "\n"


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Command → the parser of its arguments, in the order of ``regrad --help``."""
    from regrad_vllm.evaluate.eval_command import build_parser as evaluate
    from regrad_vllm.evaluate.growth_command import build_parser as growth
    from regrad_vllm.load.options import parser as load
    from regrad_vllm.serve.launch import build_parser as serve

    own_parsers = {"serve": serve, "eval": evaluate, "growth": growth, "bench": load}
    return {
        name: own_parsers[name]() if name in own_parsers else parser for name, parser in _subparsers().choices.items()
    }


def _subparsers() -> argparse._SubParsersAction[argparse.ArgumentParser]:
    (table,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return table


_PARTS: Mapping[str, Callable[[], str]] = {
    "bank-settings": bank_settings,
    "serve-settings": serve_settings,
    "commands": commands,
}


def _section(name: str, parser: argparse.ArgumentParser, summary: str) -> str:
    """A command's heading and description, with a row for each argument that no other page lists."""
    settings = {field.name for field in fields(_SETTINGS[name])} if name in _SETTINGS else set()
    actions = [action for action in parser._actions if action.dest not in settings]
    credentials = [action for action in actions if action.option_strings and action.option_strings[0] in _CREDENTIALS]
    rows = [row for action in actions if action not in credentials for row in _row(parser, action)]
    lines = [f"## {parser.prog}", "", *_prose(parser.description or summary)]
    if rows:
        lines += ["| argument | meaning |", "|---|---|", *rows, ""]
    if settings:
        lines += [f"Besides, it has a flag for each of [its settings](settings.md#regrad-{name}).", ""]
    if credentials:
        lines += ["Besides, it has [the flags of a bank's clients](security.md#clients).", ""]
    if parser.epilog:
        lines += ["    " + line if line else "" for line in parser.epilog.splitlines()] + [""]
    return "\n".join(lines)


def _prose(description: str) -> list[str]:
    text = inspect.cleandoc(description)
    first = text if text.startswith("vLLM") else f"{text[:1].upper()}{text[1:]}"
    return [*first.splitlines(), ""]


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    if isinstance(action, argparse._HelpAction):
        return
    value = "" if action.nargs == 0 else _value(action)
    name = f"{action.option_strings[0]} {value}".strip() if action.option_strings else value
    must = "required; " if action.option_strings and action.required else ""
    meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
    text = (must + meaning).replace("|", r"\|")
    yield f"| `{name}` | {text} |".replace("|  |", "| |")


def _value(action: argparse.Action) -> str:
    """The placeholder for an argument's value, as in its usage line."""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper().replace("_", "-")
    if action.choices is not None and action.metavar is None:
        metavar = ", ".join(map(str, action.choices))
    return metavar.replace("|", r"\|") + (" …" if action.nargs in ("+", "*") else "")


def _flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Setting → its flag."""
    return {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
