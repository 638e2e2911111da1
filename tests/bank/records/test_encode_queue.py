from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from bank_service.errors import InternalError, InvalidArgumentError, UnavailableError
from bank_service.records.encode_queue import EncodeQueue
from bank_service.runtime.metrics import BankMetrics
from bank_service.testing.hash_encoder import BROKEN, NO_TOKENS, HashEncoder, spec_of
from bank_service.values.encoder import EncodedDocument
from bank_service.wire.record import DEFAULT_CODEC, verify_record


class GatedEncoder(HashEncoder):
    """Waits at a gate, so that documents gather behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        assert self.gate.wait(10)
        return super().encode(documents)


@pytest.fixture
def encoder() -> GatedEncoder:
    return GatedEncoder()


@pytest.fixture
def metrics() -> BankMetrics:
    return BankMetrics()


@pytest.fixture
def queue(encoder: GatedEncoder, metrics: BankMetrics) -> Iterator[EncodeQueue]:
    made = EncodeQueue(encoder, DEFAULT_CODEC, batch_size=4, wait_ms=1, metrics=metrics)
    yield made
    encoder.gate.set()
    made.close()


def test_documents_that_wait_together_are_encoded_together(
    queue: EncodeQueue, encoder: GatedEncoder, metrics: BankMetrics
) -> None:
    def num_waiting() -> float | None:
        return metrics.registry.get_sample_value("regrad_bank_encode_waiting")

    futures = [queue.submit("", f"text {number}") for number in range(10)]
    assert 6 <= (num_waiting() or 0) <= 10, "a batch of 4 may be at the gate"
    encoder.gate.set()
    for future in futures:
        assert verify_record(future.result(10).record, spec_of()).codec == DEFAULT_CODEC
    assert sum(map(len, encoder.batches)) == 10 and num_waiting() == 0
    assert len(encoder.batches) <= 4 and max(map(len, encoder.batches)) == 4


def test_bad_documents_fail_alone_and_each_with_its_own_error(queue: EncodeQueue, encoder: GatedEncoder) -> None:
    texts = ["fine", NO_TOKENS, "also fine", BROKEN]
    futures = [queue.submit("", text) for text in texts]
    encoder.gate.set()
    assert futures[0].result(10).num_tokens == 1 and futures[2].result(10).num_tokens == 2
    with pytest.raises(InvalidArgumentError, match="no token") as caught:
        futures[1].result(10)
    assert caught.value.field == "document.text"
    with pytest.raises(InternalError, match="RuntimeError: out of memory"):
        futures[3].result(10)


def test_a_cancelled_document_is_not_encoded(queue: EncodeQueue, encoder: GatedEncoder) -> None:
    first = [queue.submit("", f"first {number}") for number in range(4)]
    second = queue.submit("", "second")
    third = queue.submit("", "third")
    assert second.cancel()
    encoder.gate.set()
    third.result(10)
    assert all(future.result(10) for future in first)
    assert "second" not in {text for batch in encoder.batches for text in batch}


@pytest.mark.parametrize(
    "values", [np.zeros(3, np.float32), np.full(124, np.nan, np.float32), np.zeros(124, np.float64)]
)
def test_an_encoder_that_returns_nonsense_is_an_internal_error(values: np.ndarray) -> None:
    class Nonsense(HashEncoder):
        def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
            return [EncodedDocument(values, 1, False) for _ in documents]

    queue = EncodeQueue(Nonsense(), DEFAULT_CODEC, batch_size=4, wait_ms=1, metrics=BankMetrics())
    with pytest.raises(InternalError, match="gradient is unusable"):
        queue.submit("", "x").result(10)
    queue.close()


def test_an_encoder_that_returns_no_gradients_at_all_does_not_end_the_queue() -> None:
    class Absent(HashEncoder):
        def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
            encoded = super().encode(documents)
            return [None if text == BROKEN else made for (_, text), made in zip(documents, encoded, strict=True)]  # type: ignore[misc]

        def _encode_one(self, title: str, text: str) -> EncodedDocument:
            return super()._encode_one(title, text.replace(BROKEN, "x"))

    queue = EncodeQueue(Absent(), DEFAULT_CODEC, batch_size=4, wait_ms=1, metrics=BankMetrics())
    bad, good = queue.submit("", BROKEN), queue.submit("", "fine")
    with pytest.raises(InternalError, match="the encoder failed: AttributeError"):
        bad.result(10)
    assert good.result(10).num_tokens == 1
    queue.close()


def test_an_encoder_that_returns_too_few_is_an_internal_error() -> None:
    class Forgetful(HashEncoder):
        def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
            return []

    queue = EncodeQueue(Forgetful(), DEFAULT_CODEC, batch_size=4, wait_ms=1, metrics=BankMetrics())
    with pytest.raises(InternalError, match="must return 1 gradients, got 0"):
        queue.submit("", "x").result(10)
    queue.close()


def test_a_closed_queue_finishes_what_it_has_and_takes_nothing_more(queue: EncodeQueue, encoder: GatedEncoder) -> None:
    futures = [queue.submit("", f"text {number}") for number in range(10)]
    encoder.gate.set()
    queue.close()
    assert all(future.done() and future.result().record for future in futures)
    with pytest.raises(UnavailableError):
        queue.submit("", "late")
