"""The bank's Prometheus metrics. Each bank has its own registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class BankMetrics:
    """The counters and histograms of one bank."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "regrad_bank_calls", "Calls answered, by method and status code", ["method", "code"], registry=self.registry
        )
        self._call_seconds = Histogram(
            "regrad_bank_call_seconds", "Duration of calls, whole streams included", ["method"], registry=self.registry
        )
        self._encode_seconds = Histogram(
            "regrad_bank_encode_seconds", "Duration of one batch in the encoder", registry=self.registry
        )
        self._encode_documents = Histogram(
            "regrad_bank_encode_batch_documents",
            "Documents in one batch of the encoder",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.encode_waiting = Gauge(
            "regrad_bank_encode_waiting", "Documents that wait for the encoder", registry=self.registry
        )
        self._swept = Counter("regrad_bank_swept_gradients", "Gradients removed as orphans", registry=self.registry)
        self._data_loss = Counter("regrad_bank_data_loss", "Gradients found missing or corrupt", registry=self.registry)
        self._repaired = Counter(
            "regrad_bank_repaired_gradients", "Damaged gradients made again from their text", registry=self.registry
        )
        self.sequence = Gauge("regrad_bank_sequence", "Last acknowledged change", registry=self.registry)
        self.indexed_sequence = Gauge(
            "regrad_bank_indexed_sequence", "Change that the vector index reflects", registry=self.registry
        )
        self.erasures = Gauge(
            "regrad_bank_pending_erasures", "Purges of which not all is erased yet", registry=self.registry
        )
        self.erasure_seconds = Gauge(
            "regrad_bank_oldest_erasure_seconds", "How long the oldest of them is known", registry=self.registry
        )
        self.free_disk_bytes = Gauge(
            "regrad_bank_free_disk_bytes",
            "Free bytes of the file system with the bank's folder",
            registry=self.registry,
        )
        self.removals_stopped = Gauge(
            "regrad_bank_removals_stopped",
            "1 while this bank removes no gradients, because another one has opened their place",
            registry=self.registry,
        )
        self.replica_staleness = Gauge(
            "regrad_bank_replica_staleness_seconds",
            "The catalog's replica has every change that is older; NaN until that is known, 0 without a replica",
            registry=self.registry,
        )
        self.replica_reads = Gauge(
            "regrad_bank_replica_reads",
            "States read for queries since the start: in the replica, or at the primary because it was behind or down",
            ["outcome"],
            registry=self.registry,
        )
        self.cache = Gauge(
            "regrad_bank_cache_records",
            "Records asked of the cache since the start",
            ["outcome"],
            registry=self.registry,
        )

    def called(self, method: str, code: str, seconds: float) -> None:
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)

    def encoded(self, num_documents: int, seconds: float) -> None:
        self._encode_seconds.observe(seconds)
        self._encode_documents.observe(num_documents)

    def swept(self, num_gradients: int) -> None:
        self._swept.inc(num_gradients)

    def lost(self) -> None:
        self._data_loss.inc()

    def repaired(self) -> None:
        self._repaired.inc()
