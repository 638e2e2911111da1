"""The part of a catalog's contract for its nodes: the banks that have one catalog and one object store together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

REMOVAL_SECONDS = 30.0  # a removal begins at most so long after its decision
OVER_SECONDS = 90.0  # after its decision, the store has carried it out, even if its answer never came


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer of ``begin_removal``."""

    going: Set[str] = frozenset()  # may be removed now
    busy: Set[str] = frozenset()  # a write or another removal has them
    until: datetime | None = None  # tells this decision from each later one of the same gradients


class Nodes(Protocol):
    """The dealings of one node with the others. Safe to use from many threads.

    A node may be killed at any moment. All that it held is free then, and another node goes on within seconds.

    **Gradients.** A record is kept from before its write until a version names it. ``begin_removal`` never gives a
    gradient that a version names, that any node keeps, or that another node is removing.
    """

    @property
    def leads(self) -> bool:
        """Whether this node does the upkeep now. One node does, as soon as the one before has noticed its own end."""
        ...

    @property
    def is_current(self) -> bool:
        """False: another node has changed the codec, the learner or the history, and this one has missed it. It refuses
        all reads and writes until it is opened anew."""
        ...

    def take_objects(self, take: Callable[[str, bool], None]) -> None:
        """Gives the nodes a random name in the object store unless they have one. Calls ``take`` with a new name and
        whether the catalog never had an object store, and raises its errors.

        No node changes the catalog during ``take``. The name is new where this node opened the catalog alone.
        UnavailableError.
        """
        ...

    def objects_name(self) -> str:
        """The nodes' name in the object store. UnavailableError."""
        ...

    def ended(self) -> list[int]:
        """The numbers of nodes that have ended, and whose gradients may be orphans. UnavailableError."""
        ...

    def remember_ended(self, numbers: Collection[int]) -> None:
        """The orphans of these nodes are found. UnavailableError."""
        ...

    # Gradients that go into the object store

    def held(self, digest: str) -> AbstractContextManager[None]:
        """Holds a gradient inside the block, once ``keep`` is called. It never waits."""
        ...

    def keep(self, digest: str) -> None:
        """From now until the end of ``held`` no node removes the gradient. Waits for a removal under way.

        UnavailableError where that may go on for long. Should the hold be lost, the write that needs it fails.
        """
        ...

    # Gradients that leave it

    def begin_removal(self, digests: Sequence[str]) -> Decision:
        """Gradients that are neither in ``going`` nor in ``busy`` have a version.

        At most MAX_KEYS digests. UnavailableError.

        The last removal must begin within REMOVAL_SECONDS. The store may carry it out until OVER_SECONDS.
        """
        ...

    def end_removal(self, decision: Decision, digests: Collection[str]) -> None:
        """The store has answered for these. The others may still be removed for a while, and nobody stores them. Does
        nothing for those that another node has decided on since, because this decision was over."""
        ...

    def drop(self, digests: Collection[str]) -> None:
        """These may have no version. They wait from now on, unless they wait already. UnavailableError."""
        ...

    def dropped(self, seconds: float) -> dict[str, datetime]:
        """Those that have waited for so long, and since when. UnavailableError."""
        ...

    def forget_dropped(self, waits: Mapping[str, datetime]) -> None:
        """These waits of ``dropped`` are over. A gradient that was dropped again since goes on waiting.
        UnavailableError."""
        ...


class Replica(Protocol):
    """A copy of the catalog that follows it. ``Catalog.view`` with a sequence ``at_least`` may be one of its states.

    Such a state has that change, and all changes that are older than the bank's ``max_staleness_ms``. Where it lacks
    one of them, or can't be read, the view is of the catalog itself. A read that fails later raises ReplicaReadError.
    """

    @property
    def is_up(self) -> bool:
        """Whether it can be read now."""
        ...

    @property
    def staleness_seconds(self) -> float | None:
        """It has every change that is older than this. Some of the newer ones may be there, too. None: it isn't known
        yet."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """The views since the start, by place: "replica", "behind" (it was too old) or "down"."""
        ...


class SharedCatalog(Protocol):
    """A catalog that several banks may have open."""

    @property
    def replica(self) -> Replica | None:
        """None: every view is of the catalog itself."""
        ...

    @property
    def nodes(self) -> Nodes | None:
        """None: one bank alone has the catalog."""
        ...


def leads(catalog: SharedCatalog) -> bool:
    """Whether this bank does the catalog's upkeep now."""
    return catalog.nodes is None or catalog.nodes.leads


def is_current(catalog: SharedCatalog) -> bool:
    """Whether this bank knows the collection's settings."""
    return catalog.nodes is None or catalog.nodes.is_current
