"""A Python client of the gradient bank: ``Bank`` for blocking programs, ``AsyncBank`` for asynchronous ones.

    with Bank("127.0.0.1:50061") as bank:
        for receipt in bank.ingest([Document("harbour", "The harbour master of Orlen is Ada Quist.")]):
            print(receipt.id, receipt.version)
        print(bank.query("Who is the harbour master?").hits)

A failed call raises a subclass of ``bank_service.errors.BankError``. An argument, or an answer of another version, that
the client can't use raises ValueError. gRPC is imported when ``Bank`` or ``AsyncBank`` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bank_service.wire.credentials import BankCredentials
from regrad_vllm.client.values import (
    Answer,
    BankTooOldError,
    Condition,
    CueSentence,
    Deletion,
    Document,
    Hit,
    ListedDocument,
    Query,
    Receipt,
    RecodeProgress,
    ReplicaStats,
    SnapshotProgress,
    Stats,
    StoredDocument,
    UpgradeAction,
    UpgradeProgress,
)

if TYPE_CHECKING:
    from regrad_vllm.client.async_bank import AsyncBank
    from regrad_vllm.client.bank import Bank

__all__ = [
    "Answer", "AsyncBank", "Bank", "BankCredentials", "BankTooOldError", "Condition", "CueSentence", "Deletion",
    "Document", "Hit", "ListedDocument", "Query", "Receipt", "RecodeProgress", "ReplicaStats", "SnapshotProgress",
    "Stats", "StoredDocument", "UpgradeAction", "UpgradeProgress",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports ``Bank`` and ``AsyncBank`` at their first use, because they import gRPC."""
    if name == "Bank":
        from regrad_vllm.client.bank import Bank

        return Bank
    if name == "AsyncBank":
        from regrad_vllm.client.async_bank import AsyncBank

        return AsyncBank
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
