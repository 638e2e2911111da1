# ruff: noqa
# mypy: ignore-errors
"""Short trials of the learner that ships, without training: what other ways of composing its gradients give.

    python -m benchmarks.trials --data FOLDER --out FILE --variants as_is steps_3 …

Asks the questions of ``benchmarks.knowledge``. Variants of the right document's adapter:

- as_is: the learner's own.
- steps_1, steps_3, steps_4: so many inner steps; more repeat the last one's sizes.
- gamma_075, gamma_125: the gradient times so much.
- phi_085, phi_070, phi_050: φ* times so much, without another gradient.
- pieces_1, pieces_2, pieces_all: windows of about 64 tokens that overlap by half, each with the title
  and a gradient of its own. The nearest one or two to the question are composed, or the mean of all.
- with_piece: the document's gradient, and half of its nearest window's.
- facts: the document's gradient, and half of the mean of its sentences', each a sequence of its own with the title.
- where_down, where_upper, where_lower: the gradient of the down projections alone, of the upper or lower half of the
  adapted layers alone. φ* stays whole.

Variants of three documents that were found among all of the split (their names begin with k3):

- k3_first: the first one alone. k3_as_is: the learner's own weights. k3_equal: all weights 1. k3_mean: all a third.
- k3_norm: as k3_as_is, but the sum is no longer than its longest part. k3_orthogonal: of each gradient only
  the part that is orthogonal to those before it. k3_gate: as k3_as_is, φ* alone where the best score is in the lowest fifth.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bank_service.values.embedder import default_embedder, embedded_text
from bank_service.values.sentences import split_sentences
from benchmarks import knowledge
from regrad_vllm.compose import compose
from regrad_vllm.data.questions import SourceDocument
from regrad_vllm.default_model import resolve_model, shipped_learner
from regrad_vllm.evaluate.datasets import load_clean, question_sets
from regrad_vllm.evaluate.in_process import InProcess
from regrad_vllm.learn.cues import Cues
from regrad_vllm.learn.training_hits import embed_all
from regrad_vllm.learner import Learner

Array = NDArray[np.float32]
WINDOW, STRIDE = 48, 24  # words, of about 64 and 32 tokens


class Trial(knowledge.Answerer):
    """A variant of the learner."""

    variant = "as_is"
    low = -1.0

    def __init__(self, process: InProcess, learner: Learner) -> None:
        super().__init__(process, learner)
        self._embedder = default_embedder()
        self._pieces: dict[str, tuple[Array, list[Array]]] = {}
        self._sizes = process.encoder._step_sizes
        self._by_steps: dict[int, dict[str, Array]] = {len(self._sizes): self._deltas}

    def _encode(self, documents) -> None:
        steps = int(self.variant[6:]) if self.variant.startswith("steps_") else len(self._sizes)
        self._deltas = self._by_steps.setdefault(steps, {})
        more = [self._sizes[-1:]] * max(0, steps - len(self._sizes))
        self._process.encoder._step_sizes = torch.cat([self._sizes[:steps], *more])
        for key, document in documents.items():
            if key not in self._deltas:
                (found,) = self._process.encoder.encode([(document.title, document.text)])
                self._deltas[key] = half(found.values)
        self._process.encoder._step_sizes = self._sizes
        if "piece" in self.variant or self.variant == "facts":
            for key, document in documents.items():
                if key not in self._pieces:
                    cut = split_sentences(document.text) if self.variant == "facts" else windows(document)
                    texts = list(cut) or [document.text]
                    vectors = embed_all([embedded_text(document.title, text) for text in texts], self._embedder)
                    found = self._process.encoder.encode([(document.title, text) for text in texts])
                    self._pieces[key] = np.stack(list(vectors)), [half(each.values) for each in found]

    def _mask(self, where: str) -> Array:
        layers = sorted({int(tensor.module.split(".")[2]) for tensor in self._learner.layout.tensors})
        middle = layers[len(layers) // 2]
        mask = np.zeros_like(self._learner.phi)
        for tensor in self._learner.layout.tensors:
            layer, last = int(tensor.module.split(".")[2]), tensor.module.rpartition(".")[2]
            if {"down": last == "down_proj", "upper": layer >= middle, "lower": layer < middle}[where]:
                mask[tensor.offset : tensor.offset + int(np.prod(tensor.shape))] = 1
        return mask

    def _compose(self, entry: knowledge.Asked) -> Array:
        phi, config = self._learner.phi, self._learner.config
        deltas = [whole(self._deltas[document.id]) for document in entry.documents]
        weights: Sequence[float] = config.weights(entry.scores)
        gamma = config.gamma
        name, _, value = self.variant.partition("_")
        if name == "gamma":
            gamma *= int(value) / 100
        elif name == "phi":
            phi = phi * np.float32(int(value) / 100)
        elif name == "where":
            deltas = [delta * self._mask(value) for delta in deltas]
        elif name in ("pieces", "with", "facts"):
            vector = self._embedder.embed(entry.question.question)
            found = [
                (float(v @ vector), whole(d))
                for doc in entry.documents
                for v, d in zip(*self._pieces[doc.id], strict=True)
            ]
            found.sort(key=lambda pair: -pair[0])
            if self.variant == "facts":
                deltas, weights = [*deltas, np.mean([delta for _, delta in found], 0)], [*weights, 0.5]
            elif name == "with":
                deltas, weights = [*deltas, found[0][1]], [*weights, 0.5]
            else:
                number = len(found) if value == "all" else int(value)
                deltas = [delta for _, delta in found[:number]]
                weights = [1 / len(deltas)] * len(deltas) if value == "all" else [1.0] * len(deltas)
        elif name == "k3":
            if value == "first":
                deltas, weights = deltas[:1], weights[:1]
            elif value == "equal":
                weights = [1.0] * len(deltas)
            elif value == "mean":
                weights = [1 / len(deltas)] * len(deltas)
            elif value == "orthogonal":
                deltas = orthogonal(deltas)
            elif value == "gate" and entry.scores[0] < self.low:
                deltas, weights = [], []
            elif value == "norm":
                total = sum((np.float32(w) * d for w, d in zip(weights, deltas, strict=True)), np.zeros_like(phi))
                longest = max(float(np.linalg.norm(w * d)) for w, d in zip(weights, deltas, strict=True))
                deltas, weights = [total], [min(1.0, longest / float(np.linalg.norm(total)))]
        return compose(phi, deltas, list(weights), gamma)


def half(delta: Array) -> NDArray[np.float16]:
    """In half of the memory. Scaled, because small values lose bits."""
    return (delta * 256).astype(np.float16)


def whole(delta: NDArray[np.float16]) -> Array:
    return delta.astype(np.float32) / 256


def orthogonal(deltas: Sequence[Array]) -> list[Array]:
    found: list[Array] = []
    for delta in deltas:
        rest = delta.copy()
        for other in found:
            rest -= np.float32((rest @ other) / (other @ other)) * other
        found.append(rest)
    return found


def windows(document: SourceDocument) -> Iterator[str]:
    words = document.text.split()
    for start in range(0, max(1, len(words) - STRIDE), STRIDE):
        yield " ".join(words[start : start + WINDOW])


def retrieved(args: argparse.Namespace, asked: Sequence[knowledge.Asked]) -> list[knowledge.Asked]:
    """The same questions with the three nearest documents of all sets asked about."""
    split = load_clean(args.data, "validation")
    documents = question_sets(split, args.sets, args.num_questions, args.num_distractors, args.seed).documents
    embedder = default_embedder()
    vectors = np.stack(list(embed_all([embedded_text(d.title, d.text) for d in documents], embedder)))
    cues, found = Cues(embedder, args.cue_sentences), []
    for entry in asked:
        cosines = vectors @ embedder.embed(entry.question.question)
        best = [documents[index] for index in np.argsort(-cosines, kind="stable")[:3]]
        scores = tuple(sorted((float(value) for value in cosines), reverse=True)[:3])
        cue = cues.nearest(entry.question.question, [(document.title, document.text) for document in best])
        found.append(replace(entry, documents=tuple(best), scores=scores, cue=cue))
    sys.stderr.write(f"{len(documents)} documents are searched\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--sets", nargs="+", default=list(knowledge.SETS))
    parser.add_argument("--ways", nargs="+", default=["blind", "cue"])
    parser.add_argument("--cue-sentences", type=int, default=2)
    parser.add_argument("--num-questions", type=int, default=60)
    parser.add_argument("--num-distractors", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    given = knowledge.load(args)
    learner = Learner.load(shipped_learner())
    trial = Trial(InProcess(resolve_model("default"), learner, {}, dtype=torch.bfloat16), learner)
    searched = retrieved(args, given) if any(each.startswith("k3") for each in args.variants) else []
    trial.low = float(np.quantile([entry.scores[0] for entry in searched], 0.2)) if searched else -1.0
    for variant in args.variants:
        trial.variant = variant
        asked = searched if variant.startswith("k3") else given
        for way in args.ways:
            known = {(r["learner"], r["way"], r["id"]) for r in knowledge.records(args.out)}
            waiting = [entry for entry in asked if (variant, way, entry.question.id) not in known]
            started = time.monotonic()
            with args.out.open("a", encoding="utf-8") as file:
                for found in trial.answer(waiting, way, "gradients"):
                    entry = next(each for each in asked if each.question.id == found["id"])
                    record = {"learner": variant, "way": way, **found, "document": entry.question.documents[0]}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            sys.stderr.write(f"{variant} {way}: {len(waiting)} questions, {time.monotonic() - started:.0f} s\n")
    found = knowledge.summary(list(knowledge.records(args.out)), {entry.question.id for entry in given})
    kept = {}
    for name, difference in found["differences"].items():
        one, other = name.split(" − ")
        if one.split()[1] == other.split()[1] and {one.split()[0], other.split()[0]} & {
            "as_is",
            "k3_first",
            "k3_as_is",
        }:
            kept[name] = difference
    sys.stdout.write(knowledge.table(found["methods"], kept) + "\n")


if __name__ == "__main__":
    main()
