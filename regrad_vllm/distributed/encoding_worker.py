"""A worker of `regrad encode`: encodes the documents that the bank doesn't have yet, and uploads their gradients.

A batch may come to a worker twice, because Ray repeats what a lost worker had. The bank keeps one document for an id.
So the second time finds what the first has stored, and encodes the rest only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bank_service.errors import BankError, DataLossError, InvalidArgumentError, NotFoundError, UnavailableError
from bank_service.wire.record import encode_gradient
from regrad_vllm.client import Bank, BankCredentials, StoredDocument
from regrad_vllm.client.corpus import CorpusDocument
from regrad_vllm.encode.gradient_encoder import GradientEncoder

_NUM_LOOKUPS = 8  # documents that are looked up at once
_WAITS_S = (1, 4, 15, 40)  # before a batch is tried again while the bank is unavailable, such as during a restart


@dataclass(frozen=True, slots=True)
class EncodingJob:
    """The settings of every worker. The paths are the same on all machines."""

    model: Path
    learner: Path
    bank: str
    credentials: BankCredentials
    namespace: str
    codec: str  # of the records; the bank's, so that it stores them as they are


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome for one document."""

    place: str
    outcome: str  # created, updated, unchanged or refused
    was_encoded: bool = False  # else the bank had its gradient, or there is none
    truncated: bool = False
    sequence: int = 0  # of the change that made its version
    refusal: str = ""  # the reason; empty unless it was refused


@dataclass(frozen=True, slots=True)
class _Gradient:
    record: bytes
    truncated: bool
    was_encoded: bool


def line_of(document: CorpusDocument) -> str:
    """The document as a line of JSON, in which it travels to a worker."""
    return json.dumps(asdict(document), ensure_ascii=False)


class EncodingWorker:
    """An actor. It loads the base model and the learner once."""

    def __init__(self, job: EncodingJob) -> None:
        """LearnerError, OSError."""
        self._job = job
        self._encoder = GradientEncoder.load(job.model, job.learner)
        self._bank = Bank(job.bank, credentials=job.credentials, spec=self._encoder.spec)
        self._lookups = ThreadPoolExecutor(_NUM_LOOKUPS)

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Stores a batch of lines, in the column "document". A column of answers for each field of ``Result``.

        RuntimeError if the bank fails; it names no document, because any of the batch may be stored.
        """
        documents = [CorpusDocument(**json.loads(line)) for line in batch["document"]]
        try:
            results = self._patiently(documents)
        except BankError as error:  # Ray can't carry every error of a bank to the driver
            raise RuntimeError(error.message) from None
        return {field.name: [getattr(result, field.name) for result in results] for field in fields(Result)}

    def _patiently(self, documents: Sequence[CorpusDocument]) -> list[Result]:
        for wait in _WAITS_S:
            try:
                return self._store(documents)
            except UnavailableError:
                time.sleep(wait)
        return self._store(documents)

    def _store(self, documents: Sequence[CorpusDocument]) -> list[Result]:
        """The results in order. BankError other than a refusal."""
        results: dict[int, Result] = {}
        gradients: dict[int, _Gradient] = {}
        new: list[int] = []
        for index, (document, stored) in enumerate(
            zip(documents, self._lookups.map(self._stored, documents), strict=True)
        ):
            if stored is None or (stored.document.title, stored.document.text) != (document.title, document.text):
                new.append(index)
            elif dict(stored.document.metadata) == dict(document.metadata):
                results[index] = Result(document.place, "unchanged", False, stored.truncated, stored.sequence)
            elif (record := self._record(stored.gradient_digest)) is not None:
                gradients[index] = _Gradient(record, stored.truncated, was_encoded=False)
            else:
                new.append(index)
        for index, encoded in zip(new, self._encode([documents[index] for index in new]), strict=True):
            if isinstance(encoded, str):
                results[index] = Result(documents[index].place, "refused", refusal=encoded)
            else:
                gradients[index] = encoded
        pairs = [(documents[index], gradient) for index, gradient in gradients.items()]
        results.update(zip(gradients, self._upload(pairs), strict=True))
        return [results[index] for index in range(len(documents))]

    def _stored(self, document: CorpusDocument) -> StoredDocument | None:
        try:
            return self._bank.get(document.id, namespace=self._job.namespace)
        except NotFoundError:
            return None

    def _record(self, digest: str) -> bytes | None:
        """The record that the bank has, or None if it is lost."""
        try:
            return next(record for _, record in self._bank.fetch([digest]))
        except (DataLossError, NotFoundError):
            return None

    def _encode(self, documents: Sequence[CorpusDocument]) -> Iterator[_Gradient | str]:
        """The gradient of each document, or the reason why it has none."""
        try:
            encoded = self._encoder.encode([(document.title, document.text) for document in documents])
        except ValueError as error:
            if len(documents) == 1:
                yield f"can't be encoded: {error}"
                return
            for document in documents:  # the others of the batch can be encoded
                yield from self._encode([document])
            return
        for entry in encoded:
            record = encode_gradient(entry.values, self._encoder.spec, self._job.codec)
            yield _Gradient(record, entry.truncated, was_encoded=True)

    def _upload(self, pairs: Sequence[tuple[CorpusDocument, _Gradient]]) -> Iterable[Result]:
        """Uploads in order, past the documents that the bank refuses."""
        done = 0
        while done < len(pairs):
            given = ((document, gradient.record) for document, gradient in pairs[done:])
            try:
                for receipt in self._bank.ingest_gradients(given, namespace=self._job.namespace):
                    document, gradient = pairs[done]
                    done += 1
                    yield Result(
                        document.place, receipt.outcome, gradient.was_encoded, gradient.truncated, receipt.sequence
                    )
            except InvalidArgumentError as error:
                place = pairs[done][0].place
                done += 1
                yield Result(place, "refused", refusal=error.message)
