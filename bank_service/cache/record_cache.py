"""The contract of a cache of gradient records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class CacheCounts:
    """Counts since the cache was opened."""

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
        """digest → record, verified, for those of ``digests`` that are cached."""

    async def put(self, records: Mapping[str, bytes]) -> None:
        """Offers records. The cache may drop any of them, and drops each one some day."""

    async def remove(self, digests: Sequence[str]) -> None:
        """Removes records now. If that fails, ``retry`` removes those that have not expired by then."""

    async def retry(self) -> None:
        """Removes the records that ``remove`` could not remove."""

    def may_have(self, digests: Iterable[str]) -> bool:
        """Whether a removal of one of ``digests`` has failed and is still to be repeated."""

    async def is_available(self) -> bool:
        """Whether the cache answers now."""

    async def close(self) -> None:
        """Calls ``retry`` a last time, then closes the connections."""
