"""`regrad recode`: every gradient of a running bank in another codec."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from regrad_vllm.cli.connection import add_bank_flags, connect
from regrad_vllm.console import CommandError, count, note, say

if TYPE_CHECKING:
    from regrad_vllm.client import RecodeProgress

_DESCRIPTION = """Gives every gradient of a running bank another codec, while it serves. Each document gets a new
version. New documents have the new codec at once. The bank goes on if this command is interrupted, and after a restart.
The same command again shows the progress. More components don't bring back what fewer have lost."""


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("recode", help="a bank's gradients in another codec", description=_DESCRIPTION)
    parser.add_argument("codec", metavar="CODEC", help="factors-P-Q-BITS, such as factors-4-1-8")
    add_bank_flags(parser, namespace=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns 0, or 1 if a gradient kept its codec."""
    last: RecodeProgress | None = None
    with connect(args.bank) as bank:
        for last in bank.recode(args.codec):
            note(f"{last.num_done:,} of {count(last.num_documents, 'document')}")
    if last is None or not last.finished:
        raise CommandError("the bank ended before it was done; it goes on when it is started again")
    say(f"{args.codec}: {last.num_recoded:,} of {count(last.num_done, 'gradient')} recoded, {last.num_failed:,} failed")
    return int(bool(last.num_failed))
