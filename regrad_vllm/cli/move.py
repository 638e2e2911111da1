"""`regrad move`: a stopped bank in another place."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from regrad_vllm.cli.backup import followed
from regrad_vllm.console import CommandError, count, say

_MOVE = """Carries a stopped bank into a new folder, and perhaps its catalog to PostgreSQL and its gradients to an
object store, or back. The source is only read. Every gradient and every table is compared with the source. A move that
was interrupted goes on when it is run again."""


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("move", help="a stopped bank in another place", description=_MOVE)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR", help="folder of the bank")
    parser.add_argument("--from-catalog", metavar="URL", help="postgresql:// URL of its catalog, where it has one")
    parser.add_argument(
        "--from-objects", metavar="URL", help="its object store, where that folder is a new one in place of a lost one"
    )
    parser.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="DIR", help="folder of the new bank, absent or empty"
    )
    parser.add_argument(
        "--to-catalog", metavar="URL", help="postgresql:// URL of a database or schema without a catalog"
    )
    parser.add_argument("--to-objects", metavar="URL", help="empty object store for the gradients: s3://BUCKET/PREFIX")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bank_service.backup.move import BankPlace, MoveProgress, move
    from bank_service.errors import BankInUseError

    source = BankPlace(args.source.absolute(), args.from_catalog, args.from_objects)
    target = BankPlace(args.target.absolute(), args.to_catalog, args.to_objects)
    try:
        last = followed(move(source, target))
    except BankInUseError as error:
        raise CommandError(str(error)) from error
    assert isinstance(last, MoveProgress)
    rows = f"{count(sum(last.num_rows.values()), 'row')} of {count(len(last.num_rows), 'table')}"
    say(
        f"{target.data_dir}: the bank at change {last.sequence:,}, {count(last.num_gradients, 'gradient')}, "
        f"{last.num_copied:,} of them copied, {rows} compared; start it with:"
    )
    flags = ["--data-dir", str(target.data_dir)]
    if target.shown_catalog is not None:
        flags += ["--catalog", target.shown_catalog]
    say(shlex.join(["regrad", "bank", *flags]))
    return 0
