"""Brings documents into a bank: by `regrad ingest`, as users do, or with gradients made here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bank_service.wire.codec import DEFAULT_CODEC, encode_gradient
from bank_service.wire.generated import bank_pb2, bank_pb2_grpc
from bank_service.wire.limits import MAX_CHUNK_BYTES
from regrad_vllm.data.questions import SourceDocument
from regrad_vllm.learner import Learner


def ingest(documents: Sequence[SourceDocument], bank: str, namespace: str, folder: Path) -> None:
    """Writes ``folder``/documents.jsonl and ingests it. RuntimeError if the bank refuses it."""
    corpus = folder / "documents.jsonl"
    lines = (json.dumps({"id": d.id, "title": d.title, "text": d.text}, ensure_ascii=False) for d in documents)
    corpus.write_text("\n".join(lines) + "\n", "utf-8")
    command = ["-m", "regrad_vllm.cli", "ingest", str(corpus), "--bank", bank, "--namespace", namespace]
    if subprocess.run([sys.executable, *command]).returncode:
        raise RuntimeError(f"the bank at {bank} must take the documents; what it refused stands above")


def upload(
    documents: Sequence[SourceDocument],
    deltas: Iterable[tuple[int, NDArray[np.float32]]],
    learner: Learner,
    bank: str,
    namespace: str,
) -> None:
    """Stores documents with deltas that were computed here, int8, one stream. grpc.RpcError where one is refused."""
    from bank_service.wire.channel import open_channel

    with open_channel(bank) as channel:
        stub = bank_pb2_grpc.BankServiceStub(channel)
        for _ in stub.IngestGradients(_messages(documents, deltas, learner, namespace)):
            pass


def _messages(
    documents: Sequence[SourceDocument],
    deltas: Iterable[tuple[int, NDArray[np.float32]]],
    learner: Learner,
    namespace: str,
) -> Iterator[bank_pb2.IngestGradientsRequest]:
    for index, delta in deltas:
        entry = documents[index]
        record = encode_gradient(delta, learner.spec, DEFAULT_CODEC)
        document = bank_pb2.Document(namespace=namespace, id=entry.id, title=entry.title, text=entry.text)
        header = bank_pb2.IngestGradientsRequest.Header(document=document, record_bytes=len(record))
        yield bank_pb2.IngestGradientsRequest(header=header)
        for start in range(0, len(record), MAX_CHUNK_BYTES):
            yield bank_pb2.IngestGradientsRequest(chunk=record[start : start + MAX_CHUNK_BYTES])
