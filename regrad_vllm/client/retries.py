"""Which calls gRPC repeats by itself: those that a repeat can't make wrong, while the bank can't answer.

A deletion is not among them: where the first try was done, a repeat would find nothing to delete. Streams of documents
are not, because gRPC can't know how far the bank came.
"""

from __future__ import annotations

import json

SERVICE = "regrad.bank.v1.BankService"
REPEATABLE = ("Query", "BatchQuery", "GetDocument", "ListDocuments", "GetStats", "FetchGradients")
DEFAULT_ATTEMPTS = 4  # after 0.2, 0.4 and 0.8 s: a bank that isn't there is reported within two seconds
_FIRST_BACKOFF_MS = 200


def retry_options(attempts: int) -> list[tuple[str, str | int]]:
    """Options of a channel that tries a repeatable call up to ``attempts`` times, of which gRPC allows 5."""
    if not 1 <= attempts <= 5:
        raise ValueError(f"attempts must be in 1..5, as gRPC has it, got {attempts}")
    if attempts == 1:
        return []
    policy = {
        "maxAttempts": attempts,
        "initialBackoff": f"{_FIRST_BACKOFF_MS / 1000}s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": SERVICE, "method": method} for method in REPEATABLE]
    return [
        ("grpc.service_config", json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]})),
        # The channel must look for the bank again as early as the call is tried again.
        ("grpc.initial_reconnect_backoff_ms", _FIRST_BACKOFF_MS),
    ]
