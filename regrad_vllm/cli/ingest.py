"""`regrad ingest`: puts files and folders into a bank. It reports unusable input before it sends anything.

A document's id is its file's path, as you give it, or relative to the folder that you give. "#2" is the file's second
passage, or the second line of a .jsonl file without an "id".

Each PATH is a source. An ingest removes passages and lines that the source held before and whose file no longer holds
them. It names other documents that the source no longer holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bank_service.wire.limits import MAX_ID_BYTES
from regrad_vllm.cli.connection import add_bank_flags, connect, describe_failure
from regrad_vllm.client.corpus import ENDINGS, BadInput, CorpusFile, find_files, read_corpus
from regrad_vllm.client.leftovers import Held, Leftovers
from regrad_vllm.client.upload import UploadError, UploadOutcome, upload
from regrad_vllm.console import CommandError, UsageError, count, note, one_line, say
from regrad_vllm.data.token_counts import CountTokens, count_tokens, tokenizer_of
from regrad_vllm.default_model import resolve_model

_MAX_LISTED = 20


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("ingest", help="documents into a bank", description=__doc__)
    add_corpus_flags(parser)
    parser.add_argument(
        "--model", help="cut texts by this base model's tokens: 'default', a folder or a hub id (default: an estimate)"
    )
    parser.add_argument("--in-flight", type=int, default=64, help="documents sent ahead of the answers (%(default)s)")
    parser.set_defaults(run=run)


def add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the paths, the bank, and what happens to input that can't be used or is no longer there."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=f"{', '.join(ENDINGS)} files, or folders")
    add_bank_flags(parser)
    parser.add_argument("--skip-bad", action="store_true", help="leave out what can't be used, instead of stopping")
    parser.add_argument(
        "--delete-missing",
        action="store_true",
        help="delete all documents that a source no longer holds: those that brought an id, and those of files that "
        "are gone",
    )
    parser.add_argument(
        "--source",
        type=source_name,
        metavar="NAME",
        help="a name for the source of all PATHs, the same wherever they lie (each PATH's own absolute path)",
    )


@dataclass(frozen=True, slots=True)
class CheckedCorpus:
    """A corpus that was read once, before anything is sent."""

    files: Sequence[CorpusFile]
    bad: Sequence[BadInput]
    held: Held
    num_documents: int


def run(args: argparse.Namespace) -> int:
    if args.in_flight < 1:
        raise UsageError(f"--in-flight must be at least 1, got {args.in_flight}")
    counter = count_tokens if args.model is None else tokenizer_of(resolve_model(args.model))
    corpus = checked_corpus(args, counter)
    outcome = _upload(args, corpus, counter)
    status = report(args, corpus, outcome)
    has_texts = any(file.path.suffix.lower() != ".jsonl" for file in corpus.files)
    if outcome.counts["truncated"] and has_texts and args.model is None:
        note("texts are cut by an estimate of tokens; name the bank's base model with --model to have them counted")
    return status


def checked_corpus(args: argparse.Namespace, counter: CountTokens) -> CheckedCorpus:
    """Reads the whole corpus, and names what can't be used. UsageError for such input without --skip-bad."""
    files, left_out, bad = find_files(args.paths, args.source or "")
    if left_out:
        shown = ", ".join(str(path) for path in left_out[:3])
        note(f"left out {count(len(left_out), 'file')} with other endings than {', '.join(ENDINGS)}: {shown} …")
    held = Held(files, bad)
    num_documents = 0
    mended: dict[str, int] = {}
    for document in held.noting(read_corpus(files, counter)):
        num_documents += 1
        if document.num_mended:
            mended[document.place] = document.num_mended
    bad += held.unusable
    note_mended(mended)
    _name_bad(bad)
    if bad and not args.skip_bad:
        raise UsageError(
            f"{count(len(bad), 'input')} can't be used, nothing was ingested; mend them or pass --skip-bad"
        )
    if not num_documents:
        raise UsageError("nothing to ingest: the paths named hold no document that can be used")
    return CheckedCorpus(files, bad, held, num_documents)


def report(args: argparse.Namespace, corpus: CheckedCorpus, outcome: UploadOutcome) -> int:
    """Prints the outcome. The exit status: 1 if the bank lacks a part of the corpus."""
    _report_left_out(outcome, args.bank)
    _report_left(outcome.left, args)
    say(outcome.summary())
    if outcome.sequence:
        note(f"as of sequence {outcome.sequence}")
    return 1 if outcome.refused or outcome.unusable or corpus.bad else 0


def note_mended(mended: Mapping[str, int]) -> None:
    """Reports the control characters that were mended: place → their number."""
    if mended:
        number, first = sum(mended.values()), next(iter(mended))
        note(f"mended {count(number, 'control character')}: read as Windows-1252 or dropped; the first in {first}")


def source_name(name: str) -> str:
    """An argument's type: the name of a source."""
    if not name.strip() or not name.isprintable() or len(name.encode()) > MAX_ID_BYTES:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_ID_BYTES} bytes of printable text, got {name!r}")
    return name


def _upload(args: argparse.Namespace, corpus: CheckedCorpus, counter: CountTokens) -> UploadOutcome:
    from tqdm import tqdm

    with connect(args.bank) as bank, tqdm(total=corpus.num_documents, unit="doc", desc="ingest") as bar:
        try:
            return upload(
                bank,
                corpus.files,
                namespace=args.namespace,
                in_flight=args.in_flight,
                skip_bad=args.skip_bad,
                delete_missing=args.delete_missing,
                bad=corpus.bad,
                progress=bar.update,
                count=counter,
            )
        except UploadError as failure:
            raise CommandError(failure.told(describe_failure(args.bank, failure.error))) from failure


def _name_bad(bad: Sequence[BadInput]) -> None:
    for item in bad[:_MAX_LISTED]:
        note(str(item))
    if len(bad) > _MAX_LISTED:
        note(f"… and {len(bad) - _MAX_LISTED:,} more")


def _report_left_out(outcome: UploadOutcome, bank: str) -> None:
    """Names the input that passed the check and isn't in the bank."""
    for refusal in outcome.refused:
        note(f"{refusal.place}: {describe_failure(bank, refusal.error)}")
    _name_bad(outcome.unusable)
    if outcome.unusable:
        note(f"{count(len(outcome.unusable), 'input')} became unusable after the check; mend and ingest again")


def _report_left(left: Leftovers, args: argparse.Namespace) -> None:
    """Names the documents that stay although no file of the ingest holds them."""
    if left.unknown:
        note(f"documents that the files no longer hold were not looked for: {left.unknown}")
    if left.missing:
        remedy = "some of its input can't be used" if args.delete_missing else "--delete-missing removes them"
        note(f"no longer held by their source, but not removed: {names(left.missing)}; {remedy}")
    if left.others:
        note(f"of another source or an earlier version, so not removed: {names(left.others)}")


def names(ids: Sequence[str]) -> str:
    """The first ids, and the number of the others."""
    more = f" and {len(ids) - _MAX_LISTED:,} more" if len(ids) > _MAX_LISTED else ""
    return ", ".join(map(one_line, ids[:_MAX_LISTED])) + more
