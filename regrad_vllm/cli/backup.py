"""The commands that protect a bank's documents: `regrad snapshot`, `regrad restore`, `regrad scrub`."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bank_service.values.config import BankConfig
from regrad_vllm.cli.bank import DATA_DIR, default_data_dir
from regrad_vllm.cli.connection import add_credential_flags, connect
from regrad_vllm.console import CommandError, count, note, say

if TYPE_CHECKING:
    from bank_service.backup.snapshot import Progress
    from regrad_vllm.client import SnapshotProgress

_SNAPSHOT = """Copies a whole bank while it runs: one consistent state of its catalog, and every gradient in it. The
target is a folder, or an object store such as s3://BUCKET/PREFIX. A second snapshot to the same target copies only new
gradients. Until it is whole, the snapshot before stays valid."""
_RESTORE = """Makes a new bank's folder of a snapshot. Every byte is verified by its digest. It is all or nothing."""
_SCRUB = """Reads every gradient of a stopped bank. Damaged ones are made again from the texts of their documents.
Uploaded gradients can't be made again, so they are counted as lost. A running bank mends the damage that it meets. With
--scrub-mib-per-second it also looks for damage."""


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("snapshot", help="a copy of a whole bank, while it runs", description=_SNAPSHOT)
    parser.add_argument("target", metavar="TARGET", help="folder or URL, as the bank's machine has it")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data-dir", type=Path, help=f"a bank's folder ({DATA_DIR})")
    where.add_argument("--bank", metavar="HOST:PORT", help="a running bank, instead")
    add_credential_flags(parser)
    parser.set_defaults(run=_snapshot)
    parser = commands.add_parser("restore", help="a bank out of a snapshot", description=_RESTORE)
    parser.add_argument("source", metavar="SOURCE", help="folder or URL of a snapshot")
    parser.add_argument("--data-dir", type=Path, help=f"absent or empty ({DATA_DIR})")
    parser.add_argument(
        "--objects", metavar="URL", help="empty object store for the gradients, such as s3://BUCKET/PREFIX"
    )
    parser.set_defaults(run=_restore)
    parser = commands.add_parser("scrub", help="verify and mend a bank's gradients", description=_SCRUB)
    parser.add_argument("--data-dir", type=Path, help=f"a bank's folder ({DATA_DIR})")
    parser.add_argument("--catalog", help="postgresql:// URL of the bank's catalog, where it has one")
    parser.add_argument("--objects", metavar="URL", help="its object store, where the folder was lost and is empty")
    parser.add_argument("--model", help="base model: a Hugging Face folder or hub id (the default model)")
    parser.add_argument("--learner", type=Path, help="learner folder (the one that ships for the default model)")
    parser.set_defaults(run=_scrub)


def _snapshot(args: argparse.Namespace) -> int:
    from bank_service.backup.snapshot import snapshot_folder
    from bank_service.errors import BankInUseError
    from bank_service.runtime.data_dir import read_address

    target = absolute_place(args.target)
    if args.bank is not None:
        _online(args.bank, target)
        return 0
    data_dir = (args.data_dir or default_data_dir()).absolute()
    try:
        last = followed(snapshot_folder(data_dir, target))
    except BankInUseError as error:
        # The lock is tried before the address, because a killed bank leaves its address but not its lock.
        running = read_address(data_dir)
        if running is None:
            raise CommandError(f"{error}; it is starting, try again when it is ready") from error
        _online(running.target, target)
        return 0
    _report(target, last.num_copied, last.num_gradients, last.manifest.sequence if last.manifest else 0)
    return 0


def _online(address: str, target: str) -> None:
    last: SnapshotProgress | None = None
    with connect(address) as bank:
        for part in bank.snapshot(target):
            _note_progress(last.num_done if last else 0, part.num_done, part.num_gradients)
            last = part
    if last is None or not last.is_whole:
        raise CommandError(f"the snapshot at {target} must be whole, the bank ended before it was; try again")
    _report(target, last.num_copied, last.num_gradients, last.sequence)


def _report(target: str, num_copied: int, num_gradients: int, sequence: int) -> None:
    say(f"{target}: snapshot at change {sequence:,}, {count(num_gradients, 'gradient')}, {num_copied:,} of them copied")


def _restore(args: argparse.Namespace) -> int:
    from bank_service.backup.restore import restore

    data_dir = (args.data_dir or default_data_dir()).absolute()
    last = followed(restore(absolute_place(args.source), data_dir, args.objects))
    assert last.manifest is not None
    say(
        f"{data_dir}: restored at change {last.manifest.sequence:,}, {count(last.num_gradients, 'gradient')}; "
        f"start it with `regrad bank --data-dir {data_dir}`"
    )
    return 0


def _scrub(args: argparse.Namespace) -> int:
    from bank_service.errors import BankInUseError, CatalogDamagedError, CollectionMismatchError
    from bank_service.service.offline import scrub
    from regrad_vllm.default_model import resolve_model, shipped_learner
    from regrad_vllm.encode.gradient_encoder import GradientEncoder

    config = BankConfig(data_dir=args.data_dir or default_data_dir(), catalog=args.catalog, objects=args.objects)
    if not config.data_dir.is_dir():
        raise CommandError(
            f"{config.data_dir} must be the folder of a bank, it does not exist; name it with --data-dir"
        )
    encoder = GradientEncoder.load(resolve_model(args.model), args.learner or shipped_learner())
    try:
        counts = asyncio.run(scrub(config, encoder))
    except (BankInUseError, CatalogDamagedError, CollectionMismatchError) as error:
        raise CommandError(str(error)) from error
    say(
        f"{config.data_dir}: {count(counts.num_gradients, 'gradient')} read, {counts.num_repaired:,} made again, "
        f"{counts.num_lost:,} lost"
    )
    return 1 if counts.num_lost else 0


def followed(steps: Iterator[Progress]) -> Progress:
    """Reports the progress and returns the last of ``steps``. CommandError if a step fails."""
    from bank_service.errors import CatalogDamagedError, CollectionMismatchError, SnapshotError

    last: Progress | None = None
    try:
        for step in steps:
            _note_progress(last.num_done if last else 0, step.num_done, step.num_gradients)
            last = step
    except (CatalogDamagedError, CollectionMismatchError, SnapshotError) as error:
        raise CommandError(str(error)) from error
    assert last is not None
    return last


def _note_progress(before: int, done: int, total: int) -> None:
    """Prints a line at each tenth of the work."""
    if total and done * 10 // total > before * 10 // total:
        note(f"{done:,} of {total:,} gradients")


def absolute_place(place: str) -> str:
    """The path as an absolute one without "..", because a bank may run in another folder. URLs stay unchanged."""
    return place if "://" in place else os.path.abspath(place)
