"""`regrad export`: an adapter, composed of documents in a bank, as a folder that Hugging Face PEFT loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_vllm.cli.connection import add_bank_flags, add_timeout_flag, connect
from regrad_vllm.console import CommandError, UsageError, count, say

if TYPE_CHECKING:
    from bank_service.wire.record import GradientSpec


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("export", help="documents as a plain PEFT adapter", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--document", action="append", required=True, metavar="ID", help="repeat for several")
    parser.add_argument("--learner", type=Path, help="learner folder (the one that ships for the default model)")
    parser.add_argument("--gamma", type=float, help="strength of the documents (the learner's own)")
    parser.add_argument("--base-model", default="", help="name to write as base_model_name_or_path")
    add_bank_flags(parser)
    add_timeout_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UsageError(f"{args.out} must be absent or an empty folder; choose another")

    from bank_service.wire.record import decode_gradient
    from regrad_vllm.compose import compose
    from regrad_vllm.default_model import shipped_learner
    from regrad_vllm.learner import Learner, save_adapter

    learner = Learner.load(args.learner or shipped_learner())
    spec = learner.spec
    records = fetch_records(args.bank, args.namespace, spec, args.document, timeout_ms=args.timeout * 1000)
    deltas = [decode_gradient(record, spec) for record in records]
    gamma = learner.config.gamma if args.gamma is None else args.gamma
    adapter = compose(learner.phi, deltas, [1.0] * len(deltas), gamma)
    save_adapter(args.out, learner, adapter, args.base_model)
    say(f"{args.out}: adapter of {count(len(deltas), 'document')}, rank {learner.layout.rank}")
    return 0


def fetch_records(
    address: str, namespace: str, spec: GradientSpec, document_ids: Sequence[str], *, timeout_ms: int
) -> list[bytes]:
    """The gradient record of each document. CommandError if one is unknown, damaged or from another learner.

    timeout_ms: for each of the two calls to the bank.
    """
    from bank_service.wire.record import record_digest
    from regrad_vllm.client import Query

    with connect(address, spec, timeout_ms) as bank:
        hits = bank.query(Query(namespace=namespace, document_ids=tuple(document_ids), newest=True)).hits
        digests = [hit.gradient_digest for hit in hits]
        records = dict(bank.fetch(list(dict.fromkeys(digests))))
    for digest, record in records.items():
        if record_digest(record) != digest:
            raise CommandError(f"the bank sent a damaged gradient for digest {digest}; check its storage")
    return [records[digest] for digest in digests]
