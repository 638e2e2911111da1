"""The expected content of the bank, as its writers know it, and a log of all calls."""

from __future__ import annotations

import random
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np

from bank_service.testing.client import upload_of
from bank_service.wire.errors import BankError, status_code
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, GradientSpec, encode_gradient, record_digest

_WORDS = [f"word{number}" for number in range(2_000)]
PAIRS = {"shelf": 10, "topic": 200}  # metadata: one document in so many has a value


@dataclass(frozen=True, slots=True)
class SeededContent:
    """A document's content. All of it depends on ``seed``, except for ``note``, which may change alone."""

    seed: int
    note: str = ""

    @property
    def text(self) -> str:
        return " ".join(random.Random(self.seed).choices(_WORDS, k=25))

    @property
    def metadata(self) -> dict[str, str]:
        return {**{name: str(self.seed % one_in) for name, one_in in PAIRS.items()}, "note": self.note}

    def vector(self, dimension: int) -> list[float]:
        values: list[float] = np.random.default_rng(self.seed).standard_normal(dimension).tolist()
        return values

    def record(self, spec: GradientSpec) -> bytes:
        values = np.random.default_rng([self.seed, 1]).standard_normal(spec.num_values, np.float32)
        return encode_gradient(values, spec, DEFAULT_CODEC)

    def upload(self, namespace: str, id: str, spec: GradientSpec, dimension: int) -> list[pb.IngestGradientsRequest]:
        document = pb.Document(namespace=namespace, id=id, text=self.text, metadata=self.metadata)
        return upload_of(document, self.record(spec), embedding=self.vector(dimension), chunk_bytes=2**20)


@dataclass(frozen=True, slots=True)
class Stored:
    """A document as the bank has acknowledged it."""

    content: SeededContent
    version: int
    digest: str


@dataclass(slots=True)
class Space:
    """One namespace. Each id has one writer, which alone changes its entry."""

    name: str
    target: int  # documents, about
    documents: dict[str, Stored] = field(default_factory=dict)


def digest_of(content: SeededContent, spec: GradientSpec) -> str:
    return record_digest(content.record(spec))


class Log:
    """Calls by kind and third of the run; errors by kind and code. Memory grows by four bytes a call."""

    def __init__(self, seconds: float) -> None:
        self._started = time.monotonic()
        self._seconds = seconds
        self.times: dict[tuple[str, int], array[float]] = defaultdict(lambda: array("f"))
        self.expected: Counter[str] = Counter()  # by "kind CODE"
        self.errors: Counter[str] = Counter()
        self.wrong: list[str] = []  # wrong answers

    def start(self) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        return self.elapsed > self._seconds

    @property
    def num_operations(self) -> int:
        return sum(map(len, self.times.values())) + self.expected.total()

    @asynccontextmanager
    async def call(self, kind: str, *expected: grpc.StatusCode) -> AsyncIterator[None]:
        """Logs one call, made inside the context. expected: error codes that a race with other calls may cause."""
        started = time.perf_counter()
        third = min(2, int(3 * self.elapsed / self._seconds))
        try:
            yield
        except BankError as error:
            code = status_code(error)
            (self.expected if code in expected else self.errors)[f"{kind} {code.name}"] += 1
            if code not in expected:
                self.is_wrong(f"{kind}: {error}", counted=True)
        else:
            self.times[kind, third].append(1e3 * (time.perf_counter() - started))

    def is_wrong(self, what: str, *, counted: bool = False) -> None:
        """Notes a wrong answer. counted: also counts it as an error."""
        if not counted:
            self.errors["wrong answer"] += 1
        if len(self.wrong) < 50:
            self.wrong.append(f"at {self.elapsed:.1f} s: {what}")
