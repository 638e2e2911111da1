"""The contract of a vector store: it finds the documents whose vectors are nearest to a query's.

**Derived data.** The catalog has every vector. A store follows its changes by their sequence and can be made again
from it at any time, so it promises no durability.

**Namespaces.** Each is searched alone. What one holds never shows in another's answers.

**Threads.** ``nearest`` blocks and may be called from many threads at once. All else belongs to the event loop.

**Errors.** Each method names its own. ``nearest`` may also raise what reads of the view raise.

An implementation must pass the suite in ``tests/bank/search/test_nearest.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from bank_service.catalog.contract import CatalogView
from bank_service.values.filters import Condition
from bank_service.wire.codec import FloatArray


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The answer of a vector store."""

    keys: list[int]  # the nearest are among them; there may be many more, in any order
    sequence: int  # every change up to this one is reflected, a later one perhaps
    is_ahead: bool = False  # changes may be reflected that the view lacks: ask again, with a new view


class Nearest(Protocol):
    """Nearest documents by cosine."""

    @property
    def sequence(self) -> int:
        """Every change of the catalog up to this one is reflected."""
        ...

    async def start(self) -> None:
        """Returns when all of the catalog is reflected. Follows it from then on."""
        ...

    async def stop(self) -> None:
        """Ends all work and keeps what makes the next start fast. Also fine where it does not run."""
        ...

    async def reach(self, sequence: int) -> None:
        """Returns when ``sequence`` is reflected. The change must be in the catalog.

        UnavailableError where that takes too long.
        """
        ...

    async def keep_up(self, sequence: int) -> None:
        """Holds a writer up while the store is far behind ``sequence``. Returns at once where it can't follow now."""
        ...

    def nearest(
        self,
        view: CatalogView,
        namespace: str,
        vector: FloatArray,
        depth: int,
        conditions: Sequence[Condition] = (),
        as_of: int | None = None,
    ) -> Neighbours:
        """The nearest ``depth`` documents of a namespace that meet all conditions, or all where there are fewer.

        ``as_of``: only documents that have not changed since that sequence, which must be reflected. ``view`` must be
        fresh: nothing was read from it. An approximate store may miss some of the nearest; one that compares every
        vector gives all that are as near as the last.
        """
        ...

    async def erase(self, namespaces: Collection[str]) -> None:
        """Leaves nothing, in memory or in files, of vectors that were removed from these namespaces until now.

        OSError, where files can't be written.
        """
        ...
