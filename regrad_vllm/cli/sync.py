"""`regrad sync`: makes a bank hold what a folder holds.

It reads files as `regrad ingest` does, with the same ids, so an unchanged document costs nothing. It deletes nothing
without --delete, and then only documents that this folder's sync or ingest put there. Input that can't be used is named
with the reason, and the rest goes on. The exit status is 1 if there was such input.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_vllm.cli.connection import add_bank_flags, connect, describe_failure
from regrad_vllm.cli.ingest import names, source_name
from regrad_vllm.client.corpus import ENDINGS
from regrad_vllm.client.folder_reader import FolderReader
from regrad_vllm.client.folder_sync import Action, FolderSync, SyncOutcome
from regrad_vllm.client.upload import UploadError, truncated_note
from regrad_vllm.console import CommandError, UsageError, count, note, one_line, say
from regrad_vllm.data.token_counts import count_tokens, tokenizer_of
from regrad_vllm.default_model import resolve_model

if TYPE_CHECKING:
    from regrad_vllm.client import Bank

_ACTIONS: tuple[Action, ...] = ("created", "updated", "unchanged", "deleted")
_NO_DOCUMENT = "needs a folder with a document, this may be a drive that isn't mounted; `regrad delete` deletes any"
_WOULD = {"created": "would create", "updated": "would update", "deleted": "would delete"}


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("sync", help="a bank that holds what a folder holds", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only show what would be done")
    how.add_argument("--watch", action="store_true", help="go on, and sync whenever the folder changes; end by Ctrl-C")
    parser.add_argument("--delete", action="store_true", help="delete documents that the folder no longer holds")
    parser.add_argument(
        "--settle",
        type=_seconds,
        default=1.0,
        metavar="SECONDS",
        help="delete a document when two looks so far apart agree that it is gone; with --watch, read a file when it "
        "has stayed the same for so long (%(default)s)",
    )
    add_bank_flags(parser)
    parser.add_argument(
        "--model", help="cut texts by this base model's tokens: 'default', a folder or a hub id (default: an estimate)"
    )
    parser.add_argument(
        "--source",
        type=source_name,
        metavar="NAME",
        help="a name for the source, the same wherever FOLDER lies (its absolute path)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise UsageError(f"FOLDER must be a folder, got {args.folder}")
    counter = count_tokens if args.model is None else tokenizer_of(resolve_model(args.model))
    reader = FolderReader(counter, args.settle if args.watch else None)
    sync = FolderSync(args.folder, args.source or "", args.namespace, reader, args.settle)
    with connect(args.bank) as bank:
        if args.watch:
            return _watch(args, sync, bank)
        try:
            outcome = sync.run(bank, delete=args.delete, dry_run=args.dry_run, tell=_teller(args.dry_run))
        except UploadError as failure:
            raise CommandError(failure.told(describe_failure(args.bank, failure.error))) from failure
    _report(outcome, args, set())
    say(_summary(outcome.counts, args.dry_run))
    return 1 if outcome.has_failed or (args.delete and outcome.gone) else 0


def _watch(args: argparse.Namespace, sync: FolderSync, bank: Bank) -> int:
    from regrad_vllm.client.folder_watch import watch_folder

    told: set[str] = set()
    is_first = True

    def again() -> bool:
        nonlocal is_first
        outcome = sync.run(bank, delete=args.delete, dry_run=False, tell=_teller(dry_run=False))
        _report(outcome, args, told)
        if is_first or any(outcome.counts[action] for action in _ACTIONS if action != "unchanged"):
            say(_summary(outcome.counts, dry_run=False))
        if is_first:
            note(f"watching {args.folder}; Ctrl-C ends it")
        is_first = False
        return sync.has_unsettled

    try:
        watch_folder(
            args.folder,
            again,
            settle_s=args.settle,
            away=lambda error: note(f"{describe_failure(args.bank, error)}; trying again until it is"),
            back=lambda: note(f"the bank at {args.bank} is there again"),
        )
    except KeyboardInterrupt:
        note(f"no longer watching {args.folder}")
    except UploadError as failure:
        raise CommandError(failure.told(describe_failure(args.bank, failure.error))) from failure
    return 0


def _teller(dry_run: bool) -> Callable[[Action, str], None]:
    return lambda action, id: say(f"{_WOULD[action] if dry_run else action} {one_line(id)}")


def _report(outcome: SyncOutcome, args: argparse.Namespace, told: set[str]) -> None:
    """Names the input that isn't in the bank, and the documents that are left there. Nothing in ``told`` twice."""
    lines = [f"skipped {item}" for item in outcome.bad]
    lines += [f"refused {item.place}: {describe_failure(args.bank, item.error)}" for item in outcome.refused]
    endings: dict[str, list[str]] = {}
    for path in outcome.left_out:
        endings.setdefault(path.suffix.lower(), []).append(str(path))
    for ending, paths in sorted(endings.items()):
        what = count(len(paths), f"{ending} file" if ending else "file without an ending")
        lines.append(f"skipped {what}: the ending must be one of {', '.join(ENDINGS)}; {names(paths)}")
    if outcome.gone:
        remedy = f"--delete {_NO_DOCUMENT}" if args.delete else "--delete deletes them"
        lines.append(f"no longer in the folder, but not deleted: {names(outcome.gone)}; {remedy}")
    if outcome.unknown:
        lines.append(f"documents that the folder no longer holds were not looked for: {outcome.unknown}")
    for line in lines:
        if line not in told:
            note(line)
    told.clear()
    told.update(lines)
    if outcome.counts["mended"]:
        number = count(outcome.counts["mended"], "control character")
        note(f"mended {number}: read as Windows-1252 or dropped")


def _summary(counts: Counter[str], dry_run: bool) -> str:
    parts = [f"{counts[action]:,} {action}" for action in _ACTIONS]
    if counts["truncated"]:
        parts.append(truncated_note(counts["truncated"]))
    return ("dry run, nothing changed: " if dry_run else "") + ", ".join(parts)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"must be seconds in 0.05..3600, got {text!r}")
    return value
