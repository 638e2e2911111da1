"""Stores documents in a bank. Either the bank computes their gradients, or they are uploaded with the documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from bank_service.errors import BankError
from bank_service.wire.record import DEFAULT_CODEC, encode_gradient
from regrad_vllm.client import Bank, Document
from regrad_vllm.data.questions import SourceDocument
from regrad_vllm.learner import Learner


def ingest(documents: Sequence[SourceDocument], address: str, namespace: str) -> None:
    """Stores the documents, with a progress bar. RuntimeError if the bank refuses one or can't be reached."""
    from tqdm import tqdm

    with Bank(address) as bank:
        receipts = bank.ingest(map(_as_stored, documents), namespace=namespace)
        try:
            for _ in tqdm(receipts, total=len(documents), unit="doc", desc="ingest"):
                pass
        except BankError as error:
            raise RuntimeError(f"the bank at {address} must take the documents: {error.message}") from error


def upload(
    documents: Sequence[SourceDocument],
    deltas: Iterable[tuple[int, NDArray[np.float32]]],
    learner: Learner,
    address: str,
    namespace: str,
) -> None:
    """Stores documents with deltas that were computed here, encoded as int8. BankError if one is refused.

    deltas: (index into ``documents``, δ as float32 (num_values,)).
    """
    gradients = (
        (_as_stored(documents[index]), encode_gradient(delta, learner.spec, DEFAULT_CODEC)) for index, delta in deltas
    )
    with Bank(address) as bank:
        for _ in bank.ingest_gradients(gradients, namespace=namespace):
            pass


def _as_stored(document: SourceDocument) -> Document:
    return Document(document.id, document.text, document.title)
