"""BankConfig: every setting of a bank, checked once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from bank_service.values.catalog_url import ReplicaSettings, check_catalog_url
from bank_service.values.namespace_limits import NamespaceLimits
from bank_service.values.objects_url import check_objects_url
from bank_service.values.redis_url import check_redis_url
from bank_service.wire.ports import is_loopback
from bank_service.wire.record import check_choice


@dataclass(frozen=True, slots=True, kw_only=True)
class BankConfig:
    """Settings of one bank process. ValueError names the field and its rule."""

    data_dir: Path  # the bank's folder
    host: str = "127.0.0.1"  # address to listen on
    port: int = 0  # port to listen on; 0: the kernel chooses
    metrics_port: int | None = None  # port for Prometheus; None: off, 0: the kernel chooses
    catalog: str | None = field(default=None, repr=False)  # postgresql:// URL of the catalog; None: SQLite in data_dir
    catalog_read: str | None = field(default=None, repr=False)  # URL of a replica of it, which queries read
    max_staleness_ms: int = 1000  # a query reads no older state there, but for what its caller has written
    objects: str | None = None  # object store for a new bank's gradients, such as s3://BUCKET/PREFIX; None: the folder
    objects_grace_seconds: int = 3600  # time for which it keeps a gradient that no document has any more
    redis_url: str | None = field(default=None, repr=False)  # URL of your own Redis servers; None: an embedded server
    redis_url_file: Path | None = None  # file that holds only that URL, so that nobody sees its password
    codec: str | None = None  # factors-P-Q-BITS of a new bank; None: factors-4-1-8; an existing bank keeps its codec
    cache_bytes: int = 256 * 2**20  # memory limit of the embedded server; your own server has its own limit
    cache_timeout_ms: int = 250  # a slower answer of the cache counts as a miss
    cache_ttl_seconds: int = 86_400  # time after which a cached gradient expires
    encode_batch_size: int = 8  # documents encoded together
    encode_wait_ms: float = 5.0  # longest wait for a batch to fill up
    max_pending_documents: int = 64  # documents encoded and stored at once, over all streams
    embed_sentences: bool = True  # embed sentences where the bank encodes a document; off: when a cue needs them
    embed_threads: int = 0  # threads that compute embeddings; 0: one per CPU, at most 4
    snapshot_every: int = 10_000  # changes between saves of the vector index; a tenth of its vectors if that is more
    scrub_mib_per_second: float = 0.0  # rate of reading stored gradients, to find and repair damage; 0: off
    snapshot_root: str | None = None  # CreateSnapshot writes below it: folder or URL; None: anywhere, on loopback only
    learner_root: Path | None = None  # UpgradeLearner reads learners below it; None: anywhere, on loopback only
    exact_below: int = 2_000  # a namespace of at most so many documents is searched exactly
    history_seconds: int | None = None  # time to keep past versions, for as_of; 0: none; None: the last setting
    drain_seconds: float = 10.0  # time for calls under way to finish when the bank stops
    tokens_file: Path | None = None  # tokens and their scopes, see `regrad token`; None: everybody may do everything
    tls_cert: Path | None = None  # PEM of the certificate and its chain; None: no TLS
    tls_key: Path | None = None  # PEM of its key
    tls_client_ca: Path | None = None  # PEM of the authority of clients' certificates; None: clients need none
    max_namespace_documents: int = 0  # documents of each namespace; 0: no limit
    max_namespace_bytes: int = 0  # bytes of each namespace's texts, gradients and sentence vectors; 0: no limit
    max_namespace_requests: int = 0  # requests of each namespace in flight, a stream is one; 0: no limit
    max_calls: int = 1024  # calls in progress, of all kinds together; more are refused
    max_ingests: int = 64  # ingest streams in progress; more are refused
    max_queries: int = 256  # queries in progress or waiting; more are refused
    ingest_idle_seconds: float = 300.0  # time after which an idle or unread ingest stream ends
    unread_seconds: float = 300.0  # time after which an unread fetch, snapshot, recode or upgrade ends

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches ``host``."""
        return is_loopback(self.host)

    @property
    def has_own_redis(self) -> bool:
        """Whether the cache is a Redis server of the operator."""
        return self.redis_url is not None or self.redis_url_file is not None

    @property
    def replica(self) -> ReplicaSettings | None:
        """The catalog's replica."""
        return None if self.catalog_read is None else ReplicaSettings(self.catalog_read, self.max_staleness_ms)

    @property
    def missing_protection(self) -> tuple[str, ...]:
        """The protection against callers from other machines that this bank lacks."""
        has_callers = self.tokens_file is not None or self.tls_client_ca is not None
        return (*(() if has_callers else ("authentication",)), *(("TLS",) if self.tls_cert is None else ()))

    @property
    def namespace_limits(self) -> NamespaceLimits:
        """The limits of a namespace without limits in the tokens file."""
        return NamespaceLimits(self.max_namespace_documents, self.max_namespace_bytes, self.max_namespace_requests)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", Path(self.data_dir).absolute())
        if self.learner_root is not None:
            object.__setattr__(self, "learner_root", Path(self.learner_root).absolute())
        if self.embed_threads == 0:
            object.__setattr__(self, "embed_threads", min(4, os.cpu_count() or 1))
        if self.codec is not None:
            check_choice(self.codec)
        # URLs write IPv6 addresses in brackets.
        host = self.host[1:-1] if self.host[:1] + self.host[-1:] == "[]" else self.host
        object.__setattr__(self, "host", host)
        if not self.host:
            raise ValueError("host must not be empty; 127.0.0.1 serves this machine, 0.0.0.0 every network")
        self._check_urls()
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together, got one of them")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca must come with tls_cert and tls_key, got it alone")
        for name, low, high in (
            ("port", 0, 65535),
            ("metrics_port", 0, 65535),
            ("max_staleness_ms", 100, 3_600_000),
            ("objects_grace_seconds", 0, 2**31),
            ("cache_bytes", 2**20, 2**50),
            ("cache_timeout_ms", 1, 60_000),
            ("cache_ttl_seconds", 1, 2**31),
            ("encode_batch_size", 1, 1024),
            ("encode_wait_ms", 0, 1000),
            ("max_pending_documents", 1, 1024),
            ("embed_threads", 1, 256),
            ("snapshot_every", 1, 2**40),
            ("scrub_mib_per_second", 0, 2**20),
            ("exact_below", 0, 100_000),
            ("history_seconds", 0, 2**31),
            ("drain_seconds", 0, 3600),
            ("max_namespace_documents", 0, 2**62),
            ("max_namespace_bytes", 0, 2**62),
            ("max_namespace_requests", 0, 2**31),
            ("max_calls", 1, 2**20),
            ("max_ingests", 1, 2**20),
            ("max_queries", 1, 2**20),
            ("ingest_idle_seconds", 0.1, 86_400),
            ("unread_seconds", 0.1, 86_400),
        ):
            value = getattr(self, name)
            # NaN must fail too, so this does not test "value < low".
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {value}")
        if self.port and self.port == self.metrics_port:
            raise ValueError(f"metrics_port must be another than port, got {self.port} for both")

    def _check_urls(self) -> None:
        if self.objects is not None:
            check_objects_url(self.objects, "objects")
        if self.catalog is not None:
            check_catalog_url(self.catalog, "catalog")
        if self.catalog_read is not None:
            check_catalog_url(self.catalog_read, "catalog_read")
            if self.catalog is None:
                raise ValueError("catalog_read must come with catalog, the URL of the replica's primary; got it alone")
        if self.redis_url is not None:
            check_redis_url(self.redis_url, "redis_url")
            if self.redis_url_file is not None:
                raise ValueError("redis_url_file must be left out where redis_url is given, got both")
