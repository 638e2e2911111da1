"""`regrad list`, `regrad get`: list a namespace's documents, and read documents by id."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from regrad_vllm.cli.connection import add_bank_flags, add_timeout_flag, connect, each_there
from regrad_vllm.cli.filters import HELP, METAVAR, conditions_of, filter_flag
from regrad_vllm.console import count, note, one_line, say, say_json


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    listing = commands.add_parser(
        "list",
        help="a namespace's documents",
        description="The documents of a namespace in order of id. A change meanwhile may show or not.",
    )
    listing.add_argument("--filter", action="append", type=filter_flag, default=[], metavar=METAVAR, help=HELP)
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    add_bank_flags(listing)
    add_timeout_flag(listing)
    listing.set_defaults(run=run_list)

    get = commands.add_parser(
        "get",
        help="documents as they were ingested",
        description="Documents as lines of JSON that `regrad ingest` takes.",
    )
    get.add_argument("ids", nargs="+", metavar="ID")
    add_bank_flags(get)
    add_timeout_flag(get)
    get.set_defaults(run=run_get)


def run_list(args: argparse.Namespace) -> int:
    num_documents = 0
    with connect(args.bank, timeout_ms=args.timeout * 1000) as bank:
        for entry in bank.list(namespace=args.namespace, conditions=conditions_of(args.filter)):
            num_documents += 1
            if args.json:
                fields = {"id": entry.id, "version": entry.version, "title": entry.title}
                fields |= {"num_text_bytes": entry.num_text_bytes, "gradient_digest": entry.gradient_digest}
                fields["metadata"] = dict(entry.metadata)
                say_json(fields)
            else:
                title = f"  {' '.join(entry.title.split())}" if entry.title else ""
                size = count(entry.num_text_bytes, "byte")
                say(f"{one_line(entry.id)}  version {entry.version}, {size} of text{title}")
    note(f"{count(num_documents, 'document')} in namespace {args.namespace!r}")
    return 0


def run_get(args: argparse.Namespace) -> int:
    """Prints the documents. If some ids are unknown, it names them at the end and exits with 1."""
    with connect(args.bank, timeout_ms=args.timeout * 1000) as bank:
        get = partial(bank.get, namespace=args.namespace)
        for id, answer in each_there(args.ids, args.namespace, get):
            document = answer.document
            fields = {"id": id, "title": document.title, "text": document.text, "metadata": dict(document.metadata)}
            say_json(fields)
            when = answer.updated_at.replace(tzinfo=None).isoformat(" ", "seconds")
            cut = ", longer than the learner reads" if answer.truncated else ""
            note(
                f"{one_line(id)}: version {answer.version}, sequence {answer.sequence}, {when} UTC, "
                f"{count(answer.num_tokens, 'token')}{cut}"
            )
    return 0
