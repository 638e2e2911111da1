"""The contract of a vector store: it finds the documents whose vectors are nearest to a query's.

**Derived data.** The catalog has every vector. A store follows the catalog's changes by their sequence. It can be built
again from the catalog at any time, so it need not be durable.

**Namespaces.** Each is searched alone. An answer never has documents of another namespace, nor depends on them.

**Threads.** ``nearest`` blocks and may be called from many threads at once. Call all other methods in the event loop.

**Errors.** Each method names its errors. ``nearest`` may also raise CatalogReadError, because it reads the view.

An implementation must pass the suite in ``tests/bank/search/test_nearest.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from bank_service.catalog.contract import CatalogView
from bank_service.values.filters import Condition
from bank_service.wire.record import FloatArray


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The answer of a vector store."""

    keys: list[int]  # the nearest documents and perhaps many more, in any order
    sequence: int  # every change up to this one is reflected; later ones may be
    is_ahead: bool = False  # the store may reflect changes that the view lacks: ask again with a new view


class Nearest(Protocol):
    """Nearest documents by cosine."""

    @property
    def sequence(self) -> int:
        """The store reflects every change of the catalog up to this one."""
        ...

    async def start(self) -> None:
        """Returns when the store reflects the whole catalog. It follows the catalog from then on."""
        ...

    async def stop(self) -> None:
        """Ends all work, and saves data for a fast next start. Does nothing if the store does not run."""
        ...

    async def reach(self, sequence: int) -> None:
        """Returns when the store reflects ``sequence``. The change must be in the catalog.

        UnavailableError if that takes too long.
        """
        ...

    async def keep_up(self, sequence: int) -> None:
        """Makes a writer wait while the store is far behind ``sequence``. Returns at once if it can't follow now."""
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
        """Finds the nearest ``depth`` documents of a namespace that meet all conditions, or all if there are fewer.

        ``vector``: float32 (dimension,). ``as_of``: only documents that have not changed since that sequence, which the
        store must reflect. ``view`` must be fresh: nothing was read from it. An approximate store may miss some of the
        nearest. An exact store returns all documents as near as the last one.
        """
        ...

    async def erase(self, namespaces: Collection[str]) -> None:
        """Erases from all files the vectors that were removed from these namespaces until now.

        OSError if files can't be written.
        """
        ...
