"""`regrad encode`: encodes a corpus on a Ray cluster, and uploads the gradients to a bank.

It reads files as `regrad ingest` does, with the same ids and sources. Texts are cut by the base model's tokens. A
document that the bank has with the same title, text and metadata is left as it is. So a second run goes on where the
first one ended. `regrad ingest` does the same without Ray, and the bank encodes.

Model, learner and the bank's credentials must lie at the same paths on all machines of the cluster.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bank_service.errors import InvalidArgumentError
from bank_service.wire.credentials import BankCredentials
from regrad_vllm.cli.connection import connect
from regrad_vllm.cli.ingest import CheckedCorpus, add_corpus_flags, checked_corpus, report
from regrad_vllm.client.leftovers import remove_leftovers
from regrad_vllm.client.upload import Refusal, UploadOutcome
from regrad_vllm.console import CommandError, UsageError, count, note
from regrad_vllm.data.token_counts import tokenizer_of
from regrad_vllm.default_model import resolve_model, shipped_learner

if TYPE_CHECKING:
    from regrad_vllm.client import Bank
    from regrad_vllm.distributed.encoding_worker import EncodingJob

_LOCAL = "local"


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("encode", help="a corpus into a bank, encoded by a Ray cluster", description=__doc__)
    add_corpus_flags(parser)
    parser.add_argument(
        "--ray",
        nargs="?",
        const=_LOCAL,
        required=True,
        metavar="ADDRESS",
        help="a running Ray cluster, 'auto' for the one of this machine; without ADDRESS a Ray is started for this run",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="actors that encode, each with a base model of its own (one a GPU; without GPUs one a core)",
    )
    parser.add_argument("--model", help="base model: a Hugging Face folder or hub id (the default model)")
    parser.add_argument("--learner", type=Path, help="the bank's learner (the one that ships for the default model)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers must be at least 1, got {args.workers}")
    model = resolve_model(args.model).absolute()
    corpus = checked_corpus(args, tokenizer_of(model))
    with connect(args.bank) as bank:
        outcome = _encode(args, corpus, bank, _job(args, model, bank))
    return report(args, corpus, outcome)


def _job(args: argparse.Namespace, model: Path, bank: Bank) -> EncodingJob:
    """The workers' job. It checks here, once, whatever would fail on each of them. CommandError, LearnerError."""
    from regrad_vllm.distributed.encoding_worker import EncodingJob
    from regrad_vllm.encode.gradient_encoder import check_base
    from regrad_vllm.learner import Learner

    folder = (args.learner or shipped_learner()).absolute()
    learner = Learner.load(folder)
    check_base(learner, model)
    stats = bank.stats()
    if stats.learner_fingerprint != learner.fingerprint:
        raise CommandError(
            f"the bank at {args.bank} has the learner {stats.learner_fingerprint}, {folder} is {learner.fingerprint}; "
            "name the bank's learner with --learner"
        )
    return EncodingJob(model, folder, args.bank, BankCredentials.from_environment(), args.namespace, stats.codec)


def _encode(args: argparse.Namespace, corpus: CheckedCorpus, bank: Bank, job: EncodingJob) -> UploadOutcome:
    from tqdm import tqdm

    from regrad_vllm.distributed.ray_encoding import encode_on_ray

    counts: Counter[str] = Counter()
    refused: list[Refusal] = []
    sequence = 0
    results = encode_on_ray(job, corpus.files, corpus.bad, address=args.ray, num_workers=args.workers)
    with redirect_stdout(sys.stderr):  # Ray's messages about lost workers are no part of the result
        for result in tqdm(results, total=corpus.num_documents, unit="doc", desc="encode"):
            if result.refusal:
                refused.append(Refusal(result.place, InvalidArgumentError(result.refusal, field="document")))
            counts[result.outcome] += 1
            counts["truncated"] += result.truncated
            counts["encoded"] += result.was_encoded
            sequence = max(sequence, result.sequence)
    note(f"encoded {count(counts['encoded'], 'document')}")
    left = remove_leftovers(bank, args.namespace, corpus.held, delete_missing=args.delete_missing)
    return UploadOutcome(counts, tuple(refused), max(sequence, left.sequence), left, ())
