"""`regrad query`, `regrad delete`, `regrad stats`: what a bank holds."""

from __future__ import annotations

import argparse
import json
from typing import Any

from regrad_vllm.arguments import whole
from regrad_vllm.cli.connection import add_bank_flags, connect, each_there
from regrad_vllm.cli.console import UsageError, note, one_line, say
from regrad_vllm.cli.filters import HELP, METAVAR, filter_flag, filter_of
from regrad_vllm.naming import RETRIEVALS

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
    query.add_argument("--json", action="store_true", help="one JSON object a line")
    add_bank_flags(query)
    query.set_defaults(run=run_query)

    delete = commands.add_parser("delete", help="documents out of a bank")
    delete.add_argument("ids", nargs="+", metavar="ID")
    delete.add_argument(
        "--purge", action="store_true", help="erase their past versions, too, also of those that are deleted already"
    )
    add_bank_flags(delete)
    delete.set_defaults(run=run_delete)

    stats = commands.add_parser("stats", help="the counts of a bank, as JSON")
    add_bank_flags(stats, namespace=False)
    stats.set_defaults(run=run_stats)


def run_query(args: argparse.Namespace) -> int:
    from bank_service.wire.generated import bank_pb2

    if not args.text.strip():
        raise UsageError(f"TEXT must hold what to search for, got {args.text!r}")
    request = bank_pb2.QueryRequest(
        namespace=args.namespace,
        text=args.text,
        top_k=args.top_k,
        min_score=args.min_score,
        include_text=True,
        retrieval=args.retrieval.upper(),
        filter=filter_of(args.filter),
        as_of=args.as_of,
    )
    with connect(args.bank) as stub:
        answer = stub.Query(request)
    note(f"{'' if answer.hits else 'no document matches, '}as of sequence {answer.sequence}")
    for hit in answer.hits:
        if args.json:
            found = {"id": hit.id, "version": hit.version, "score": round(hit.score, 4), "cosine": round(hit.cosine, 4)}
            found |= {"title": hit.title, "text": hit.text, "sequence": answer.sequence}
            say(json.dumps(found, ensure_ascii=False))
        else:
            text = " ".join(f"{hit.title}: {hit.text}".split() if hit.title else hit.text.split())
            cut = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
            say(f"{hit.score:6.3f}  {one_line(hit.id)}  {cut}")
    return 0


def run_delete(args: argparse.Namespace) -> int:
    """Deletes what is there; ids that are not are named at the end, with exit status 1."""
    from bank_service.wire.generated import bank_pb2

    done = "purged" if args.purge else "deleted"
    with connect(args.bank) as stub:

        def delete(id: str) -> Any:
            request = bank_pb2.DeleteDocumentRequest(namespace=args.namespace, id=id, purge=args.purge)
            return stub.DeleteDocument(request)

        for id, answer in each_there(args.ids, args.namespace, delete):
            say(f"{done} {one_line(id)} (version {answer.version}, sequence {answer.sequence})")
    return 0


def run_stats(args: argparse.Namespace) -> int:
    from google.protobuf.json_format import MessageToDict

    from bank_service.wire.generated import bank_pb2

    with connect(args.bank) as stub:
        answer = stub.GetStats(bank_pb2.GetStatsRequest())
    # protobuf writes 64-bit integers as strings; these fit JSON's numbers.
    plain = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    numbers = {field.name for field in answer.DESCRIPTOR.fields if isinstance(getattr(answer, field.name), int)}
    plain |= {name: int(plain[name]) for name in numbers - {"cache_available"}}
    plain["namespaces"] = {entry.namespace: entry.num_documents for entry in answer.namespaces}
    say(json.dumps(plain, indent=1))
    return 0
