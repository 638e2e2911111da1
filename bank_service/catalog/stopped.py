"""The contract of a catalog that no bank has open, for carrying it to another place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class StoppedCatalog(Protocol):
    """One state of a collection, for reading by one thread. Every read may raise the errors of its store."""

    @property
    def collection_id(self) -> str:
        """The id of the collection."""
        ...

    @property
    def sequence(self) -> int:
        """The sequence of the last change."""
        ...

    def gradients(self) -> Iterator[list[str]]:
        """The digests of all gradients in order, in pages. Those of past versions and the next learner are among
        them."""
        ...
