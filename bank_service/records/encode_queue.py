"""Encodes documents in batches. A batch has documents of all ingests under way."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

from bank_service.errors import InternalError, InvalidArgumentError, UnavailableError
from bank_service.runtime.metrics import BankMetrics
from bank_service.values.encoder import EncodedDocument, Encoder
from bank_service.wire.record import GradientFormatError, GradientSpec, encode_gradient


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A document's gradient, ready to store."""

    record: bytes
    num_tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class _Job:
    title: str
    text: str
    future: Future[EncodedRecord]


class EncodeQueue:
    """Encodes documents into records, in one thread. If the encoder refuses a document, the rest of its batch is still
    encoded."""

    def __init__(self, encoder: Encoder, codec: str, batch_size: int, wait_ms: float, metrics: BankMetrics) -> None:
        self.encoder = encoder  # of later batches
        self.codec = codec  # the codec of later records
        self._batch_size = batch_size
        self._wait_seconds = wait_ms / 1000
        self._metrics = metrics
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bank-encoder", daemon=True)
        self._thread.start()

    def submit(self, title: str, text: str) -> Future[EncodedRecord]:
        """Queues a document. The future raises InvalidArgumentError for a document without tokens, and InternalError if
        the encoder fails."""
        job = _Job(title, text, Future())
        with self._lock:
            if self._closed:
                raise UnavailableError("the encoder is closed; the bank is stopping")
            self._queue.put(job)
            self._metrics.encode_waiting.inc()
        return job.future

    def close(self) -> None:
        """Encodes the queued documents and ends the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch, more = self._collect()
            self._metrics.encode_waiting.dec(len(batch))
            # Leave out cancelled jobs before any work.
            batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if batch:
                self._encode(batch)
            if not more:
                return

    def _collect(self) -> tuple[list[_Job], bool]:
        """(the next batch, whether more may come)."""
        job = self._queue.get()
        batch: list[_Job] = []
        deadline = time.monotonic() + self._wait_seconds
        while job is not None:
            batch.append(job)
            if len(batch) == self._batch_size:
                return batch, True
            try:
                job = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return batch, True
        return batch, False

    def _encode(self, batch: list[_Job]) -> None:
        started = time.monotonic()
        encoder = self.encoder
        try:
            encoded = encoder.encode([(job.title, job.text) for job in batch])
            if len(encoded) != len(batch):
                raise InternalError(f"the encoder must return {len(batch)} gradients, got {len(encoded)}")
        except Exception as error:  # noqa: BLE001 - any error of the encoder becomes the document's error
            if len(batch) > 1:
                for job in batch:
                    self._encode([job])
            else:
                batch[0].future.set_exception(_translated(error))
            return
        self._metrics.encoded(len(batch), time.monotonic() - started)
        for job, document in zip(batch, encoded, strict=True):
            self._finish(job, document, encoder.spec)

    def _finish(self, job: _Job, document: EncodedDocument, spec: GradientSpec) -> None:
        try:
            record = encode_gradient(document.values, spec, self.codec)
        except GradientFormatError as error:
            job.future.set_exception(InternalError(f"the encoder's gradient is unusable: {error}"))
        except Exception as error:  # noqa: BLE001 - an error must not end the thread: every ingest would wait for ever
            job.future.set_exception(_translated(error))
        else:
            job.future.set_result(EncodedRecord(record, document.num_tokens, document.truncated))


def _translated(error: Exception) -> Exception:
    if isinstance(error, InternalError):
        return error
    if isinstance(error, ValueError):
        translated: Exception = InvalidArgumentError(f"document.text can't be encoded: {error}", field="document.text")
    else:
        translated = InternalError(f"the encoder failed: {type(error).__name__}: {error}")
    translated.__cause__ = error
    return translated
