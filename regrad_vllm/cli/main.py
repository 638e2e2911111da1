"""The parser of all commands. Only here an error becomes a line and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from bank_service.errors import BankError
from regrad_vllm.cli import (
    backup,
    bank,
    bench,
    demo,
    doctor,
    documents,
    encode,
    export,
    ingest,
    learning,
    listing,
    mcp,
    model,
    move,
    questions,
    recode,
    serve,
    sync,
    token,
    upgrade,
)  # fmt: skip
from regrad_vllm.console import CommandError, end_output, note, prepare_output
from regrad_vllm.local.processes import ServiceFailure

_INTERRUPTED = 130
# Commands that pass all further arguments to their own parsers.
_PASS_ON = ("serve", "eval", "growth", "bench")
# Command → the extra with the packages that it imports. Other commands need no extra.
_EXTRAS = {
    "bank": "bank,train",
    "snapshot": "bank",
    "restore": "bank",
    "move": "bank",
    "scrub": "bank,train",
    "serve": "cpu",
    "ingest": "bank",
    "encode": "train,ray",
    "sync": "bank,files",
    "mcp": "mcp",
    "questions": "train",
    "train": "bank,train",
    "eval": "bank,train",
    "growth": "bank,train",
    "bench": "cpu,bank,train",
    "demo": "cpu,bank",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 after an error, 2 after wrong usage."""
    try:
        prepare_output()
    except CommandError as error:
        note(f"regrad: {error}")
        return error.exit_status
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as ended:  # of argparse, after help, the version or wrong usage
        if end_output(failed=bool(ended.code)):
            return 1
        raise
    except BaseException:  # of --debug
        end_output(failed=True)
        raise
    lost = end_output(failed=status != 0)
    return status or lost


def _run(arguments: list[str]) -> int:
    name = next((index for index, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    own = name + 1 if name < len(arguments) and arguments[name] in _PASS_ON else len(arguments)
    args = build_parser().parse_args(arguments[:own], argparse.Namespace(rest=arguments[own:]))
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        note("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        return 1  # the reader of the output has ended
    # The packages raise ValueError for bad input, OSError or RuntimeError for missing resources, and BankError for
    # errors of a bank.
    except (CommandError, BankError, ModuleNotFoundError, ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        wrong = _no_utf8(args, error) if isinstance(error, UnicodeEncodeError) else ""
        note(f"regrad {args.command}: {wrong or explained(args.command, error)}")
        return error.exit_status if isinstance(error, CommandError) else 1


def _no_utf8(args: argparse.Namespace, error: UnicodeEncodeError) -> str:
    """The text for an argument that isn't UTF-8; empty if no argument has the text at fault."""
    text = repr(error.object)
    name = next((name for name, value in vars(args).items() if text[1:-1] in repr(value)), "")
    return f"{name.removesuffix('s')} must be UTF-8, got {text}" if name else ""


def explained(command: str, error: Exception) -> str:
    """The text for an error. It is one line, except for errors whose message has several."""
    if isinstance(error, CommandError | ServiceFailure):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is None:  # of transformers, which hides the cause
        return (
            "transformers can't be imported; torchvision must be built for the installed torch, so try "
            f"pip uninstall torchvision torchaudio torchcodec ({error})"
        )
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get(command, "cpu")
        return f"the package {error.name} must be installed; run pip install '.[{extra}]' in the project's folder"
    return " ".join(str(error).split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regrad", description="New knowledge per request: documents as gradients, served by vLLM."
    )
    parser.add_argument("--version", action="version", version=f"regrad {_version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        demo,
        doctor,
        bank,
        token,
        backup,
        move,
        recode,
        upgrade,
        serve,
        ingest,
        encode,
        sync,
        documents,
        listing,
        export,
        mcp,
        model,
        questions,
        learning,
        bench,
    ):
        module.add(commands)
    return parser


def _version() -> str:
    try:
        return version("regrad-vllm")
    except PackageNotFoundError:
        return "(not installed)"
