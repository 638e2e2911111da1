"""`regrad query`, `regrad delete`, `regrad stats`: the documents and the figures of a bank."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from typing import Any

from bank_service.wire.limits import MAX_CUE_SENTENCES
from regrad_vllm.arguments import whole
from regrad_vllm.cli.connection import add_bank_flags, add_timeout_flag, connect, each_there
from regrad_vllm.cli.filters import HELP, METAVAR, conditions_of, filter_flag
from regrad_vllm.client.values import RETRIEVALS
from regrad_vllm.console import UsageError, note, one_line, say, say_json

_SHOWN_CHARACTERS = 80


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    query = commands.add_parser("query", help="the documents nearest to a text")
    query.add_argument("text", metavar="TEXT")
    query.add_argument("--top-k", type=int, default=3, help="documents at most (%(default)s)")
    query.add_argument("--min-score", type=float, help="leave out documents below this cosine")
    query.add_argument(
        "--retrieval", choices=RETRIEVALS, default="dense", help="by embedding, by words (BM25), or both (%(default)s)"
    )
    query.add_argument("--filter", action="append", type=filter_flag, default=[], metavar=METAVAR, help=HELP)
    query.add_argument(
        "--as-of",
        type=whole(0, 2**64 - 1),
        metavar="SEQUENCE",
        help="as it was after that change: a sequence number of the past",
    )
    query.add_argument(
        "--cue",
        type=whole(0, MAX_CUE_SENTENCES),
        default=0,
        metavar="N",
        help=f"also the N sentences of all documents that are nearest to TEXT, at most {MAX_CUE_SENTENCES}",
    )
    query.add_argument("--json", action="store_true", help="one JSON object a line")
    add_bank_flags(query)
    add_timeout_flag(query)
    query.set_defaults(run=run_query)

    delete = commands.add_parser("delete", help="documents out of a bank")
    delete.add_argument("ids", nargs="*", metavar="ID")
    delete.add_argument("--all", action="store_true", help="all documents of the namespace, in place of ids")
    delete.add_argument(
        "--purge", action="store_true", help="erase their past versions, too, also of those that are deleted already"
    )
    add_bank_flags(delete)
    add_timeout_flag(delete)
    delete.set_defaults(run=run_delete)

    stats = commands.add_parser("stats", help="the counts of a bank, as JSON")
    add_bank_flags(stats, namespace=False)
    add_timeout_flag(stats)
    stats.set_defaults(run=run_stats)


def run_query(args: argparse.Namespace) -> int:
    from regrad_vllm.client import Query

    if not args.text.strip():
        raise UsageError(f"TEXT must hold what to search for, got {args.text!r}")
    query = Query(
        args.text,
        namespace=args.namespace,
        top_k=args.top_k,
        min_score=args.min_score,
        with_text=True,
        retrieval=args.retrieval,
        conditions=conditions_of(args.filter),
        as_of=args.as_of,
        with_cue=args.cue,
    )
    with connect(args.bank, timeout_ms=args.timeout * 1000) as bank:
        answer = bank.query(query)
    note(f"{'' if answer.hits else 'no document matches, '}as of sequence {answer.sequence}")
    for hit in answer.hits:
        if args.json:
            found = {"id": hit.id, "version": hit.version, "score": round(hit.score, 4), "cosine": round(hit.cosine, 4)}
            found |= {"title": hit.title, "text": hit.text, "sequence": answer.sequence}
            if args.cue:
                found["cue"] = [{**asdict(sentence), "score": round(sentence.score, 4)} for sentence in hit.cue]
            say_json(found)
        else:
            text = " ".join(f"{hit.title}: {hit.text}".split() if hit.title else hit.text.split())
            cut = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
            say(f"{hit.score:6.3f}  {one_line(hit.id)}  {cut}")
            for sentence in hit.cue:
                say(f"{sentence.score:14.3f}  {sentence.start}–{sentence.end}  {one_line(sentence.text)}")
    return 0


def run_delete(args: argparse.Namespace) -> int:
    """Deletes the documents. If some ids are unknown, it names them at the end and exits with 1."""
    if bool(args.ids) == args.all:
        raise UsageError("either ID or --all must be given; --all deletes every document of the namespace")
    done = "purged" if args.purge else "deleted"
    with connect(args.bank, timeout_ms=args.timeout * 1000) as bank:
        ids = [entry.id for entry in bank.list(namespace=args.namespace)] if args.all else args.ids
        delete = partial(bank.delete, namespace=args.namespace, purge=args.purge)
        for id, answer in each_there(ids, args.namespace, delete):
            say(f"{done} {one_line(id)} (version {answer.version}, sequence {answer.sequence})")
    return 0


def run_stats(args: argparse.Namespace) -> int:
    with connect(args.bank, timeout_ms=args.timeout * 1000) as bank:
        say(json.dumps(asdict(bank.stats()), indent=1))
    return 0
