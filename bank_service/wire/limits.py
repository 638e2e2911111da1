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
# Metadata that `regrad ingest` adds. They take no room from MAX_METADATA_PAIRS and MAX_METADATA_BYTES.
SOURCE_KEY = "regrad.source"  # the file or folder that the document came from
FILE_KEY = "regrad.file"  # the file that the document's id is made of; absent if the document brought its id
MAX_SOURCE_BYTES = 4 * 2**10  # of the value of either key; the longest path on Linux
MAX_TOP_K = 64
MAX_QUERY_IDS = 64
MAX_CUE_SENTENCES = 4
DEFAULT_CUE_SENTENCES = 2  # that mode cue and the evaluations ask for by default
MAX_BATCH_QUERIES = 64
MAX_CONDITIONS = 16
MAX_CONDITION_VALUES = 64
MAX_FETCH_DIGESTS = 64
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
DEFAULT_NAMESPACE = "default"
RETRY_AFTER_MS = 1000  # the wait before a client repeats a call that the bank refused as one too many
MAX_RECONNECT_MS = 1_000  # the longest wait between a client's tries to reach an absent bank
KEEPALIVE_MS = 20_000  # the silence on a connection after which either end pings the other
PING_TIMEOUT_MS = 30_000  # a connection whose ping has no answer for so long is closed


def channel_options() -> list[tuple[str, int]]:
    """Options of a client's channel. gRPC's default would refuse answers above 4 MiB."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A client finds a restarted bank within two seconds. By default, gRPC waits up to minutes between its tries.
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
        *_keepalive(),
    ]


def server_options() -> list[tuple[str, int]]:
    """Options of a bank's server."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.so_reuseport", 0),  # without it, two servers could listen on one port
        *_keepalive(),
        ("grpc.http2.max_ping_strikes", 0),  # by default, it hangs up on a client that pings every few seconds
    ]


def _keepalive() -> list[tuple[str, int]]:
    """Both ends notice a connection that a network has dropped without a word. A client then opens another one."""
    return [
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),  # by default a minute, whatever the option above says
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # no limit
    ]
