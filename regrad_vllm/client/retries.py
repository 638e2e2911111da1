"""The calls that gRPC repeats by itself while the bank is unavailable. These are the calls that are safe to repeat.

A deletion isn't repeated: if the first try succeeded, a second one would find no document. A stream of documents isn't
repeated either, because gRPC doesn't know how many documents the bank has stored.
"""

from __future__ import annotations

import json

from bank_service.wire.channel import SERVICE

REPEATABLE = ("Query", "BatchQuery", "GetDocument", "ListDocuments", "GetStats", "FetchGradients")
DEFAULT_ATTEMPTS = 4  # repeats after 0.2, 0.4 and 0.8 s, so that a missing bank is reported within two seconds
_FIRST_BACKOFF_MS = 200


def retry_options(attempts: int) -> list[tuple[str, str | int]]:
    """The options of a channel that tries a repeatable call up to ``attempts`` times. gRPC allows at most 5."""
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
        # The channel must reconnect at least as early as the call is repeated.
        ("grpc.initial_reconnect_backoff_ms", _FIRST_BACKOFF_MS),
    ]
