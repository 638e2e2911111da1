"""Codecs: bytes of a document against answers, on questions whose documents were in no training.

    make bench-codec           (python -m benchmarks.codec_costs [--data FOLDER --split validation] [--documents N] …)

Each question gets the adapter of the passage that holds its answer, once for each codec. The known answer is given
token by token. All codecs get the same float32 gradient and the same batches, so differences come from the codec alone.

- "nll" is the negative log likelihood of an answer's tokens, in nats. "tokens" is the share of them that are the
  likeliest, "first" the same for the first token. Each is the mean over questions.
- "…_delta" is paired with fp32, with a 95% bootstrap interval over documents.
- "answer_kl" is the mean Kullback-Leibler divergence of the tokens' distributions from those of fp32, in nats. It shows
  differences that a few hundred right or wrong tokens can't show.
- "error" is the median of ‖decoded − δ‖ / ‖δ‖. "encode_ms", "check_ms" and "decode_ms" are for one document: the median
  with least and greatest. The codecs take turns.

--minutes ends the run early, with the documents done by then. Without --data it uses the sample that ships and invented
facts of the test split. Don't choose a codec by these; give data with a validation split for that.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from bank_service.wire.record import DEFAULT_CODEC, codec_named, decode_gradient, encode_gradient, verify_record
from regrad_vllm.arguments import whole
from regrad_vllm.base_model import load_base_model
from regrad_vllm.compose import compose
from regrad_vllm.data.questions import DataSplit, Question, SourceDocument, in_passages
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.gradient_encoder import GradientEncoder, check_base
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.evaluate.datasets import SAMPLE, fresh_facts, load_clean
from regrad_vllm.learner import Learner
from regrad_vllm.reporting.intervals import bootstrap_interval, spread
from regrad_vllm.reporting.machine import describe

_REFERENCE = "fp32"
_CODECS = (
    "factors-1-0-8", "factors-1-1-8", "factors-2-0-8", "factors-2-1-8", "factors-2-1-4", "factors-4-0-8",
    "factors-4-0-4", "factors-4-1-8", "factors-4-1-4", "factors-4-2-8", "factors-8-1-8", "factors-8-1-4",
    "factors-8-2-8",
)  # fmt: skip
_AT_ONCE = 4  # documents whose questions are one batch
_ANSWERS = ("nll", "tokens", "first")

Asked = tuple[SourceDocument, list[Question]]


def main() -> None:
    args = _parser().parse_args()
    started = time.monotonic()
    codecs = list(dict.fromkeys([_REFERENCE, DEFAULT_CODEC, *args.codecs]))
    for name in codecs:
        codec_named(name)
    bench = _Bench(ensure_default_model(), Learner.load(shipped_learner()), codecs)
    asked = _asked(args)
    for start in tqdm(range(0, len(asked), _AT_ONCE), unit="batch", desc="codecs"):
        bench.add(asked[start : start + _AT_ONCE])
        if time.monotonic() - started > 60 * args.minutes:
            break
    table = {name: bench.row(name) for name in codecs}
    report = {
        "machine": describe("torch", "transformers", "numpy"), "learner": bench.learner.fingerprint[:16],
        "seed": args.seed, "split": args.split, "documents": bench.num_documents, "questions": bench.num_questions,
        "table": table, "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    last = {
        "default_codec": DEFAULT_CODEC,
        "questions": bench.num_questions,
        "bytes_ratio_to_fp32": table[DEFAULT_CODEC]["bytes_ratio_to_fp32"],
        "tokens_delta": table[DEFAULT_CODEC]["tokens_delta"],
        "answer_kl": table[DEFAULT_CODEC]["answer_kl"],
        "answer_kl_of": {name: row["answer_kl"][0] for name, row in table.items()},
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(last) + "\n")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, metavar="FOLDER", help="see regrad_vllm/data/questions.py")
    made.add_argument("--split", choices=("validation", "test"), default="test")
    made.add_argument("--sets", nargs="+", default=["squad", "nq", "qamr"])
    made.add_argument("--documents", type=whole(1), default=24, help="of each set")
    made.add_argument("--per-document", type=whole(1), default=4, help="questions, at most")
    made.add_argument("--fresh", type=whole(0), default=24, help="invented facts, besides")
    made.add_argument("--codecs", nargs="+", default=list(_CODECS), metavar="CODEC")
    made.add_argument("--minutes", type=float, default=float("inf"))
    made.add_argument("--seed", type=int, default=0)
    return made


def _asked(args: argparse.Namespace) -> list[Asked]:
    """Documents with their questions. The sets take turns, so that an early end leaves a share of each."""
    data = in_passages(load_clean(args.data or SAMPLE, args.split))
    fresh = fresh_facts(args.fresh, args.seed, args.split)
    fresh_data = DataSplit({document.id: document for document in fresh.documents}, fresh.questions)
    rng = random.Random(f"benchmarks.codec_costs.{args.seed}")
    sets = [_of_set(data, name, args.documents, args.per_document, rng) for name in args.sets]
    sets.append(_of_set(fresh_data, "fresh", args.fresh, args.per_document, rng))
    turns = range(max(map(len, sets)))
    return [own[turn] for turn in turns for own in sets if turn < len(own)]


def _of_set(data: DataSplit, name: str, documents: int, per_document: int, rng: random.Random) -> list[Asked]:
    by_document: dict[str, list[Question]] = {}
    for question in data.questions:
        if question.set_name == name:
            by_document.setdefault(question.documents[0], []).append(question)
    chosen = rng.sample(sorted(by_document), min(documents, len(by_document)))
    return [
        (data.documents[key], rng.sample(by_document[key], min(per_document, len(by_document[key])))) for key in chosen
    ]


@dataclass(frozen=True, slots=True)
class _Score:
    """One question under one codec."""

    document: str
    nll: float
    tokens: float
    first: float
    kl: float


class _Bench:
    """The scores of all codecs, one batch of documents after another."""

    def __init__(self, model_folder: Path, learner: Learner, codecs: Sequence[str]) -> None:
        check_base(learner, model_folder)
        base, tokenizer = load_base_model(model_folder, dtype=torch.float32, device="cpu")
        self.learner = learner
        self._model = AdaptedModel(base, learner.layout, learner.scaling)
        self._builder = PromptBuilder(tokenizer, learner.config.prompts)
        self._encoder = GradientEncoder(self._model, self._builder, learner)
        self._codecs = list(codecs)
        self._scores: dict[str, list[_Score]] = {name: [] for name in codecs}
        self._errors: dict[str, list[float]] = {name: [] for name in codecs}
        self._bytes: dict[str, list[int]] = {name: [] for name in codecs}
        self._ms: dict[str, dict[str, list[float]]] = {
            name: {"encode_ms": [], "check_ms": [], "decode_ms": []} for name in codecs
        }
        self.num_documents = 0

    @property
    def num_questions(self) -> int:
        return len(self._scores[_REFERENCE])

    @torch.no_grad()
    def add(self, asked: Sequence[Asked]) -> None:
        with torch.enable_grad():
            made = self._encoder.encode([(document.title, document.text) for document, _ in asked])
        members = [
            [(self._builder.question(each.question), self._builder.answer(each.answers[0])) for each in questions]
            for _, questions in asked
        ]
        batch = TokenBatch.pack([[(ask + answer, len(ask)) for ask, answer in own] for own in members])
        answers = [
            (document.id.partition("#")[0], len(answer))
            for (document, _), own in zip(asked, members, strict=True)
            for _, answer in own
        ]
        lower = self._model.lower(batch)
        reference: Tensor | None = None
        self._codecs = [_REFERENCE, *reversed(self._codecs[1:])]  # they take turns
        for codec in self._codecs:
            adapters = np.stack([self._adapter(each.values, codec) for each in made])
            final = self._model.upper(lower, self._model.split(torch.from_numpy(adapters)), batch)
            counted = batch.targets != -100
            found = self._model.logits(final[counted]).log_softmax(-1)
            reference = found if reference is None else reference
            self._scores[codec] += _scores(answers, batch.targets[counted], found, reference)
        self.num_documents += len(asked)

    def row(self, codec: str) -> dict[str, Any]:
        own, reference = self._scores[codec], self._scores[_REFERENCE]
        clusters = [each.document for each in own]

        def interval(values: list[float], digits: int = 4) -> list[float]:
            found = bootstrap_interval(values, clusters)
            return [round(value, digits) for value in (found.mean, found.low, found.high)]

        row: dict[str, Any] = {
            "bytes": round(statistics.fmean(self._bytes[codec])),
            "bytes_ratio_to_fp32": round(sum(self._bytes[codec]) / sum(self._bytes[_REFERENCE]), 5),
            "error": round(statistics.median(self._errors[codec]), 4),
            "answer_kl": interval([each.kl for each in own], 6),
        }
        for name in _ANSWERS:
            row[name] = round(statistics.fmean(getattr(each, name) for each in own), 4)
            pairs = zip(own, reference, strict=True)
            row[f"{name}_delta"] = interval([getattr(mine, name) - getattr(other, name) for mine, other in pairs])
        return row | {name: spread(values) for name, values in self._ms[codec].items()}

    def _adapter(self, delta: NDArray[np.float32], codec: str) -> NDArray[np.float32]:
        """The adapter of one document, its gradient encoded and decoded."""
        spec = self.learner.spec
        times = [time.perf_counter()]
        record = encode_gradient(delta, spec, codec)
        times.append(time.perf_counter())
        verify_record(record, spec)
        times.append(time.perf_counter())
        decoded = decode_gradient(record, spec)
        times.append(time.perf_counter())
        for name, seconds in zip(self._ms[codec], np.diff(times), strict=True):
            self._ms[codec][name].append(1000 * float(seconds))
        self._bytes[codec].append(len(record))
        self._errors[codec].append(float(np.linalg.norm(decoded - delta) / np.linalg.norm(delta)))
        config = self.learner.config
        return compose(self.learner.phi, [decoded], config.weights([1.0]), config.gamma)


def _scores(answers: Sequence[tuple[str, int]], targets: Tensor, found: Tensor, reference: Tensor) -> list[_Score]:
    """answers: (document, number of tokens), in the order of ``targets`` (tokens,).

    found, reference: log probabilities (tokens, vocabulary).
    """
    per_token: Mapping[str, Tensor] = {
        "nll": -found.gather(1, targets[:, None])[:, 0],
        "tokens": (found.argmax(1) == targets).float(),
        "kl": (reference.exp() * (reference - found)).sum(1),
    }
    parts = {name: values.split([size for _, size in answers]) for name, values in per_token.items()}
    return [
        _Score(
            document,
            nll=float(parts["nll"][row].mean()),
            tokens=float(parts["tokens"][row].mean()),
            first=float(parts["tokens"][row][0]),
            kl=float(parts["kl"][row].mean()),
        )
        for row, (document, _) in enumerate(answers)
    ]


if __name__ == "__main__":
    main()
