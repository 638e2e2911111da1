"""The limits of the contract, in one place for the bank and its clients."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 32 * 2**20  # of one answer of the bank
MAX_REQUEST_BYTES = 4 * 2**20  # of one message to the bank, which is parsed before its token is checked
MAX_CHUNK_BYTES = 2**20  # of one chunk of a gradient record
MAX_NAMESPACE_CHARS = 64
MAX_ID_BYTES = 256
MAX_TITLE_BYTES = 2**10
MAX_TEXT_BYTES = 2**20
MAX_METADATA_PAIRS = 32
MAX_METADATA_BYTES = 4 * 2**10
MAX_TOP_K = 64
MAX_QUERY_IDS = 64
MAX_BATCH_QUERIES = 64
MAX_CONDITIONS = 16
MAX_CONDITION_VALUES = 64
MAX_FETCH_DIGESTS = 64
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
DEFAULT_NAMESPACE = "default"
RETRY_AFTER_MS = 1000  # the wait before a client repeats a call that the bank refused as one too many
MAX_RECONNECT_MS = 1_000  # the longest wait between a client's tries to reach an absent bank


def channel_options() -> list[tuple[str, int]]:
    """Options of a client's channel. gRPC's default would refuse answers above 4 MiB."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A client finds a restarted bank within two seconds. By default, gRPC waits up to minutes between its tries.
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
    ]
