"""Codecs: bytes, answers and speed, on questions whose documents were in no training.

    make bench-codec           (python -m benchmarks.codec_costs [--data FOLDER --split validation] [--questions N] …)

Each question is answered with the gradient of the passage that holds its answer, once for each codec. The gradient is
encoded, decoded and composed with φ*, and the answer is greedy. All codecs get the same float32 gradient and the same
batches, so differences come from the codec alone. A document of 512 tokens is two passages, each with its own gradient,
as in a bank.

- EM and F1 are in percent, with 95% bootstrap intervals over documents. Invented facts and real text count together.
  "f1_delta" is paired with fp32, over all lengths. "f1_delta_of_real_text" leaves the invented facts out.
- "answer_kl" is the mean Kullback-Leibler divergence from the model under the float32 gradient, in nats per token of
  the known answer. It shows differences that a few hundred right or wrong answers can't show.
- "…-unweighted" is a low-rank codec without the learner's sensitivity.
- Speeds are MB/s of float32 values, over the first gradients of the last length. The time of a composition is in ms
  for a slot from three gradients, as in a worker. Codecs take turns. Figures are medians with least and greatest.

--without-answers leaves out EM and F1, which take most of the time. Without --data it uses the sample that ships and
invented facts of the test split. Don't choose a codec by these; give data with a validation split for that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bank_service.wire.record import CODECS, DEFAULT_CODEC, decode_gradient, encode_gradient, record_digest
from regrad_vllm.adapt.arena import Arena
from regrad_vllm.adapt.compose import compose
from regrad_vllm.adapt.document_cache import load_gradient
from regrad_vllm.adapt.loops.compose_slot import compose_slot
from regrad_vllm.adapt.slot_table import SlotTable, whole
from regrad_vllm.arguments import whole as whole_number
from regrad_vllm.data.questions import EvalData, Question
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.encode.gradient_encoder import GradientEncoder
from regrad_vllm.evaluate.datasets import SAMPLE, fresh_facts, load_clean, question_sets
from regrad_vllm.evaluate.growth import sized
from regrad_vllm.evaluate.in_process import InProcess
from regrad_vllm.evaluate.scoring import exact_match, score
from regrad_vllm.learner import Learner
from regrad_vllm.load.corpora import filling
from regrad_vllm.reporting.intervals import bootstrap_interval, spread
from regrad_vllm.reporting.machine import describe

_REFERENCE = "fp32"
_UNWEIGHTED = "-unweighted"
_OF_THE_LAST_LINE = ("bytes", "bytes_ratio_to_fp32", "em", "f1", "f1_delta", "answer_kl", "questions")
_BATCH = 16
_TIMED = 12  # gradients
_DOCUMENTS = 3  # of a composed slot


def main() -> None:
    args = _parser().parse_args()
    started = time.monotonic()
    codecs = list(dict.fromkeys([_REFERENCE, DEFAULT_CODEC, *args.codecs]))
    if unknown := [name for name in codecs if name.removesuffix(_UNWEIGHTED) not in CODECS]:
        raise SystemExit(f"--codecs must be among {', '.join(CODECS)}, got {', '.join(unknown)}")
    learner = Learner.load(shipped_learner())
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    runner = InProcess(ensure_default_model(), learner, {}, dtype=dtype)
    data, others = _data(args), filling(args.data or SAMPLE, args.split)
    lengths: dict[str, Any] = {}
    scores: dict[str, list[_Score]] = {name: [] for name in codecs}
    speeds: dict[str, Any] = {}
    for length in args.lengths:
        at = sized(data, length, others, args.seed)
        deltas = _gradients(runner.encoder, at)
        expected = _Expected(runner, at.questions)
        found = {
            name: _answered(runner, learner, at.questions, deltas, name, expected, generates=not args.without_answers)
            for name in codecs
        }
        lengths[f"{length} tokens"] = {name: _row(own, found[_REFERENCE]) for name, own in found.items()}
        for name, own in found.items():
            scores[name] += own
        errors = {name: _error(list(deltas.values())[:_TIMED], learner, name) for name in codecs}
        for name, error in errors.items():
            lengths[f"{length} tokens"][name]["relative_error"] = error
        speeds = _speeds(list(deltas.values())[:_TIMED], learner, codecs, args.repeats)
        sys.stdout.write(json.dumps({f"{length} tokens": lengths[f"{length} tokens"]}, indent=1) + "\n")
        sys.stdout.flush()
    table = {name: {**speeds[name], **_row(scores[name], scores[_REFERENCE])} for name in codecs}
    report = {
        "machine": describe("torch", "transformers", "numpy"), "learner": learner.fingerprint[:16], "dtype": args.dtype,
        "seed": args.seed, "split": args.split, "by_length": lengths, "all": table,
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    last = {
        "default_codec": DEFAULT_CODEC,
        "bytes_ratio_to_fp32": table[DEFAULT_CODEC]["bytes_ratio_to_fp32"],
        "f1_delta": None if args.without_answers else table[DEFAULT_CODEC]["f1_delta"][0],
        "table": {name: {key: row[key] for key in _OF_THE_LAST_LINE} for name, row in table.items()},
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(last) + "\n")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, metavar="FOLDER", help="see regrad_vllm/data/questions.py")
    made.add_argument("--split", choices=("validation", "test"), default="test")
    made.add_argument("--sets", nargs="+", default=["squad", "nq", "qamr"])
    made.add_argument("--questions", type=whole_number(1), default=40, help="of each set, at each length")
    made.add_argument("--fresh", type=whole_number(0), default=180, help="questions about invented facts, besides")
    made.add_argument("--lengths", type=whole_number(8), nargs="+", default=[32, 128, 512], help="tokens")
    made.add_argument("--codecs", nargs="+", default=list(CODECS), metavar="CODEC")
    made.add_argument("--without-answers", action="store_true", help="no EM and F1")
    made.add_argument("--repeats", type=whole_number(5), default=5, help="of the timing")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    made.add_argument("--seed", type=int, default=0)
    return made


def _data(args: argparse.Namespace) -> EvalData:
    real = question_sets(load_clean(args.data or SAMPLE, args.split), args.sets, args.questions, 0, args.seed)
    return fresh_facts(args.fresh, args.seed, args.split).merged(real)


def _gradients(encoder: GradientEncoder, data: EvalData) -> dict[str, NDArray[np.float32]]:
    """Passage → its float32 δ, for the passages that answer a question."""
    wanted = {question.documents[0] for question in data.questions}
    documents = [document for document in data.documents if document.id in wanted]
    made = encoder.encode([(document.title, document.text) for document in documents])
    return {document.id: encoded.values for document, encoded in zip(documents, made, strict=True)}


@dataclass(frozen=True, slots=True)
class _Score:
    """The scores of one question. EM and F1 are in percent, or NaN without a generated answer."""

    em: float
    f1: float
    kl: float
    document: str


class _Expected:
    """The token distributions of the float32 adapters for each known answer. The first call stores them."""

    def __init__(self, runner: InProcess, questions: Sequence[Question]) -> None:
        self._runner = runner
        self._questions = questions
        self._reference: dict[int, NDArray[np.float32]] = {}

    def divergence(self, indices: Sequence[int], adapters: Sequence[NDArray[np.float32]]) -> list[float]:
        """Mean Kullback-Leibler divergence from the reference over the answer's tokens, in nats."""
        asked = [self._questions[index] for index in indices]
        prompts = [self._runner.builder.question(question.question) for question in asked]
        found = self._runner.expectations(prompts, [question.answers[0] for question in asked], adapters)
        values = []
        for index, own in zip(indices, found, strict=True):
            reference = self._reference.setdefault(index, own)
            values.append(float((np.exp(reference) * (reference - own)).sum(axis=1).mean()))
        return values


def _answered(
    runner: InProcess, learner: Learner, questions: Sequence[Question], deltas: Mapping[str, NDArray[np.float32]],
    codec: str, expected: _Expected, *, generates: bool,
) -> list[_Score]:  # fmt: skip
    prompts = [runner.builder.question(question.question) for question in questions]
    order = sorted(range(len(questions)), key=lambda index: len(prompts[index]))  # little padding
    found: dict[int, _Score] = {}
    for start in range(0, len(order), _BATCH):
        some = order[start : start + _BATCH]
        adapters = []
        for index in some:
            delta = _decoded(deltas[questions[index].documents[0]], learner, codec)
            adapters.append(compose(learner.phi, [delta], learner.config.weights([1.0]), learner.config.gamma))
        divergences = expected.divergence(some, adapters)
        texts = runner.generate([prompts[index] for index in some], adapters) if generates else [None] * len(some)
        for index, text, kl in zip(some, texts, divergences, strict=True):
            asked = questions[index]
            em = f1 = math.nan
            if text is not None:
                em = 100 * exact_match(text, asked.answers)
                f1 = 100 * score(text, asked.answers, asked.kind)
            found[index] = _Score(em, f1, kl, f"{asked.set_name}/{asked.documents[0]}")
    return [found[index] for index in range(len(questions))]


def _row(own: Sequence[_Score], reference: Sequence[_Score]) -> dict[str, Any]:
    clusters = [each.document.partition("#")[0] for each in own]  # its passages, at every length

    def interval(values: list[float], digits: int = 2) -> list[float]:
        found = bootstrap_interval(values, clusters)
        return [round(value, digits) for value in (found.mean, found.low, found.high)]

    fresh = [document.startswith("fresh/") for document in clusters]
    row: dict[str, Any] = {"em": None, "f1": None, "f1_delta": None, "f1_delta_of_real_text": None}
    if not any(math.isnan(each.em) for each in own):
        deltas = [mine.f1 - other.f1 for mine, other in zip(own, reference, strict=True)]
        real = [delta for delta, is_fresh in zip(deltas, fresh, strict=True) if not is_fresh]
        row = {
            "em": interval([each.em for each in own]),
            "f1": interval([each.f1 for each in own]),
            "f1_delta": interval(deltas),
            "f1_delta_of_real_text": round(sum(real) / len(real), 2) if real else None,
        }
    kl = [each.kl for each in own]
    return {
        **row,
        "answer_kl": interval(kl, 5),
        "questions": len(own),
        "questions_of_real_text": fresh.count(False),
    }


def _encoded(delta: NDArray[np.float32], learner: Learner, codec: str) -> bytes:
    if codec.endswith(_UNWEIGHTED):
        return encode_gradient(delta, replace(learner.spec, sensitivity=None), codec.removesuffix(_UNWEIGHTED))
    return encode_gradient(delta, learner.spec, codec)


def _decoded(delta: NDArray[np.float32], learner: Learner, codec: str) -> NDArray[np.float32]:
    return decode_gradient(_encoded(delta, learner, codec), learner.spec)


def _error(deltas: Sequence[NDArray[np.float32]], learner: Learner, codec: str) -> float:
    """Median of ‖decoded − δ‖ / ‖δ‖."""
    decoded = [_decoded(delta, learner, codec) for delta in deltas]
    found = [np.linalg.norm(own - delta) / np.linalg.norm(delta) for own, delta in zip(decoded, deltas, strict=True)]
    return round(float(np.median(found)), 4)


def _speeds(
    deltas: Sequence[NDArray[np.float32]], learner: Learner, codecs: Sequence[str], repeats: int
) -> dict[str, dict[str, Any]]:
    """The bytes of a record and the speeds of encoding, decoding and composing, for each codec, measured in turns."""
    import tempfile

    spec = learner.spec
    records = {name: [_encoded(delta, learner, name) for delta in deltas] for name in codecs}
    table = SlotTable.build(learner.layout, whole(learner.layout), learner.layout.rank)
    slot = torch.empty(table.num_values, dtype=torch.bfloat16)
    ms: dict[str, dict[str, list[float]]] = {name: {"encode": [], "decode": [], "compose": []} for name in codecs}
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena.open(Path(folder), 2**30)
        try:
            stored = {name: _stored(arena, own[:_DOCUMENTS], learner) for name, own in records.items()}
            for repeat in range(repeats + 1):  # the first warms up
                for name in codecs if repeat % 2 else list(reversed(codecs)):
                    times = [time.perf_counter()]
                    for delta in deltas:
                        _encoded(delta, learner, name)
                    times.append(time.perf_counter())
                    for record in records[name]:
                        decode_gradient(record, spec)
                    times.append(time.perf_counter())
                    compose_slot(slot, learner.phi, stored[name], [1.0] * _DOCUMENTS, table, learner.scaling)
                    times.append(time.perf_counter())
                    if repeat:
                        for what, seconds in zip(ms[name], np.diff(times), strict=True):
                            ms[name][what].append(1000 * float(seconds))
        finally:
            arena.close()
    megabytes = 4 * spec.num_values * len(deltas) / 1e6
    return {
        name: {
            "bytes": round(sum(map(len, own)) / len(own)),
            "bytes_ratio_to_fp32": round(len(own[0]) / (4 * spec.num_values), 5),
            "encode_mb_s": spread([1000 * megabytes / value for value in ms[name]["encode"]]),
            "decode_mb_s": spread([1000 * megabytes / value for value in ms[name]["decode"]]),
            "compose_ms": spread(ms[name]["compose"]),
        }
        for name, own in records.items()
    }


def _stored(arena: Arena, records: Sequence[bytes], learner: Learner) -> list[Any]:
    hold = arena.hold()
    for record in records:
        hold.put(record_digest(record), record)
    return [load_gradient(str(arena.folder), record_digest(record), learner.spec)[0] for record in records]


if __name__ == "__main__":
    main()
