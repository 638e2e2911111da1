"""BankConfig: every setting of a bank, checked once."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from bank_service.wire.codec import CODECS, DEFAULT_CODEC


@dataclass(frozen=True, slots=True, kw_only=True)
class BankConfig:
    """Settings of one bank process. ValueError names the field and its rule."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 0  # 0: the kernel chooses
    metrics_port: int | None = None  # Prometheus; None: off, 0: the kernel chooses
    redis_url: str | None = None  # None: an embedded server
    codec: str = DEFAULT_CODEC  # of gradients that the bank's own encoder computes
    cache_bytes: int = 256 * 2**20  # the embedded server's budget; a server by URL has its own
    cache_timeout_ms: int = 250  # a slower cache is a miss
    cache_ttl_seconds: int = 86_400  # a cached gradient goes so long after it was written
    encode_batch_size: int = 8  # documents
    encode_wait_ms: float = 5.0  # for a batch to fill up
    max_pending_documents: int = 64  # being encoded and stored at once, all streams together
    embed_threads: int = 0  # 0: as many as CPUs, at most 4
    snapshot_every: int = 10_000  # changes between two snapshots of the vector index
    exact_below: int = 2_000  # documents; a namespace with no more is searched exactly, vector by vector
    drain_seconds: float = 10.0  # for calls under way when the bank stops

    @property
    def is_loopback(self) -> bool:
        """Only this machine reaches ``host``. False for a name other than localhost: it may be any address."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", Path(self.data_dir).absolute())
        if self.embed_threads == 0:
            object.__setattr__(self, "embed_threads", min(4, os.cpu_count() or 1))
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(sorted(CODECS))}, got {self.codec!r}")
        if not self.host:
            raise ValueError("host must not be empty; 127.0.0.1 serves this machine, 0.0.0.0 every network")
        if self.redis_url is not None and not self.redis_url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"redis_url must start with redis://, rediss:// or unix://, got {self.redis_url!r}")
        for name, low, high in (
            ("port", 0, 65535),
            ("metrics_port", 0, 65535),
            ("cache_bytes", 2**20, 2**50),
            ("cache_timeout_ms", 1, 60_000),
            ("cache_ttl_seconds", 1, 2**31),
            ("encode_batch_size", 1, 1024),
            ("encode_wait_ms", 0, 1000),
            ("max_pending_documents", 1, 1024),
            ("embed_threads", 1, 256),
            ("snapshot_every", 1, 2**40),
            ("exact_below", 0, 100_000),
            ("drain_seconds", 0, 3600),
        ):
            value = getattr(self, name)
            # Not "value < low": NaN must fail too.
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {value}")
