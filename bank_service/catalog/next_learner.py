"""The part of a catalog's contract for its next learner; see ``contract``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from bank_service.catalog.entries import NextLearner
from bank_service.values.documents import Gradient


class NextLearnerReads(Protocol):
    """The reads of a ``CatalogView``."""

    def next_learner(self) -> NextLearner | None:
        """The learner that the collection is on its way to, if any."""
        ...

    def gradients_of(self, fingerprint: str, began: Sequence[int]) -> dict[int, tuple[str, int]] | None:
        """The sequence at which a version began → digest and bytes of its gradient of a learner.

        Leaves out versions that are gone, and those without a gradient of the next learner yet. None: the learner is
        neither the collection's nor the next one. At most MAX_KEYS versions.
        """
        ...

    def lacking_next(self, after: int, limit: int) -> list[int]:
        """Up to ``limit`` versions, past ones too, that began after a sequence and have no gradient of the next
        learner. In order of sequence."""
        ...

    def num_next(self) -> tuple[int, int]:
        """(versions with content, those of them that have a gradient of the next learner). Past versions count."""
        ...

    def next_owners(self, digest: str, limit: int) -> list[int]:
        """Up to ``limit`` versions, by the sequences at which they began, with this gradient of the next learner."""
        ...


class NextLearnerWrites(Protocol):
    """The writes of a ``Catalog``."""

    def begin_next(self, learner: NextLearner) -> Future[None]:
        """Records that the collection is on its way to another learner. Drops the gradients of an earlier next one.

        UnavailableError while the collection is being recoded.
        """
        ...

    def put_next(self, fingerprint: str, began: int, gradient: Gradient) -> Future[set[str]]:
        """Gives the version that began at ``began`` a gradient of the next learner. Replaces the one that it had.

        Returns the digests to discard: of the replaced one, or the given one where the version is gone or the next
        learner has another fingerprint. The embedding is not used.
        """
        ...

    def drop_next(self) -> Future[None]:
        """Forgets the next learner and all its gradients."""
        ...

    def finish_next(self) -> Future[bool]:
        """Makes the next learner and its gradients the collection's own, and forgets those before.

        Versions and sequences stay. False if a version has no such gradient, or if there is no next learner.
        """
        ...
