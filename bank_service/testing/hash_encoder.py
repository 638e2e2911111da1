"""An encoder and an embedder without a model. Text, and the encoder's learner, seed a generator, which draws the
values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bank_service.values.encoder import EncodedDocument
from bank_service.values.vectors import unit
from bank_service.wire.record import FloatArray, GradientSpec

SHAPES = ((4, 8), (16, 4), (4, 7))  # 124 values: the last int8 block is not full
MAX_WORDS = 100
NO_TOKENS = "(nothing to learn)"
BROKEN = "(the encoder breaks here)"


def spec_of(learner: str = "a learner") -> GradientSpec:
    fingerprint = hashlib.sha256(learner.encode()).hexdigest()
    return GradientSpec(fingerprint, hashlib.sha256(b"a layout").hexdigest()[:16], SHAPES)


class HashEncoder:
    """Equal documents give equal gradients, different ones different."""

    def __init__(self, learner: str = "a learner") -> None:
        self.learner = learner
        self.spec = spec_of(learner)
        self.batches: list[list[str]] = []  # the texts of each call

    def of_learner(self, folder: Path) -> HashEncoder:
        """The learner has the folder's name."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} must be a learner's folder, it does not exist")
        return HashEncoder(folder.name)

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        self.batches.append([text for _, text in documents])
        return [self._encode_one(title, text) for title, text in documents]

    def _encode_one(self, title: str, text: str) -> EncodedDocument:
        if NO_TOKENS in text:
            raise ValueError(f"document {title!r} has no token")
        if BROKEN in text:
            raise RuntimeError("out of memory")
        seeded = f"{self.spec.fingerprint}\0{title}\0{text}"
        seed = int.from_bytes(hashlib.sha256(seeded.encode()).digest()[:8], "big")
        values = np.random.default_rng(seed).standard_normal(self.spec.num_values).astype(np.float32)
        words = len(text.split())
        return EncodedDocument(values, min(words, MAX_WORDS), words > MAX_WORDS)


class HashEmbedder:
    """The sum of a vector for each word."""

    name = "hash"
    dimension = 32

    def embed(self, text: str) -> FloatArray:
        vectors = [np.random.default_rng(list(word.encode())).standard_normal(self.dimension) for word in text.split()]
        return unit(np.sum(vectors, axis=0).astype(np.float32))

    def reads_all(self, text: str) -> bool:
        return True
