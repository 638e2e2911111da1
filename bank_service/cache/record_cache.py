"""The contract of a cache of gradient records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class CacheCounts:
    """Counts of a cache since its start."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0  # records that didn't match their digest; also misses
    errors: int = 0  # calls that failed or timed out; their records are also misses


class RecordCache(Protocol):
    """Records by digest, used in one event loop. No method raises for a fault of the cache.

    A cache may lose any record at any time. It never gives a record that does not match its digest.
    """

    counts: CacheCounts

    async def get(self, digests: Sequence[str]) -> dict[str, bytes]:
        """Those of ``digests`` that are cached, each verified."""

    async def put(self, records: Mapping[str, bytes]) -> None:
        """Offers records. The cache may drop any. It keeps none for ever."""

    async def remove(self, digests: Sequence[str]) -> None:
        """Removes records now. Where that fails, ``retry`` removes them, unless they have expired by then."""

    async def retry(self) -> None:
        """Removes what could not be removed before."""

    def may_have(self, digests: Iterable[str]) -> bool:
        """One of ``digests`` could not be removed yet."""

    async def is_available(self) -> bool:
        """The cache answers now."""

    async def close(self) -> None:
        """Ends the use of the cache, after a last ``retry``."""
