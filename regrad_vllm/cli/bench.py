"""`regrad bench`: the cost of serving with ReGrad, compared with its alternatives."""

from __future__ import annotations

import argparse
from typing import Any

from regrad_vllm.console import UsageError

_WHAT = ("load", "report")


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    bench = commands.add_parser("bench", help="load on a server: ReGrad, RAG and others", add_help=False)
    bench.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.rest or args.rest[0] not in _WHAT:
        raise UsageError(f"regrad bench must be followed by {' or '.join(_WHAT)}; see regrad bench load --help")
    from regrad_vllm.load.load_command import main, report

    return main(args.rest[1:]) if args.rest[0] == "load" else report(args.rest[1:])
