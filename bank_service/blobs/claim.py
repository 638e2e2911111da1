"""A bank's claim to a store of gradients. Only the process that opened the store last removes gradients from it.

OWNER, an object of the store, names the collection and that process. A process that finds another one there removes
nothing more: it may have lost its catalog to the other one. If it still has its catalog, there are two catalogs with
one id, such as a database and its restored dump. Each would remove gradients of the other. So it takes the other's
name out of OWNER, and the other one removes nothing more, either. It goes on looking, in case that one starts again.

The nodes of one catalog have one name together, which the catalog keeps. A node that opens the catalog alone makes a
new one. So a restored dump has another name than the database that it is of. A node that joins others only compares the
name with OWNER. If it put the name there, it would take the store back from a restored dump that it doesn't know.

SEQUENCE, another object, has a sequence that the catalog has reached. So a bank refuses an older state of its catalog.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from bank_service.blobs.objects import Objects, ObjectsTakenError, ObjectsUnavailableError
from bank_service.errors import CollectionMismatchError, UnavailableError

logger = logging.getLogger(__name__)

OWNER = "bank.json"
SEQUENCE = "sequence.json"
CHECK_SECONDS = 1.0  # removals go on for so long after a look at OWNER
KEEP_SECONDS = 30.0  # between two looks at OWNER of a bank that removes nothing


@dataclass(frozen=True, slots=True)
class Owner:
    """The bank that a store belongs to."""

    collection_id: str
    is_restoring: bool = False  # no bank has opened it yet
    process: str = ""  # random; of the process that opened the store last; empty: none may remove gradients

    @classmethod
    def read(cls, objects: Objects) -> Owner | None:
        """None where the store has no owner. OSError."""
        try:
            return cls(**json.loads(objects.read(OWNER)))
        except FileNotFoundError:
            return None

    @property
    def content(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Claim:
    """The claim of one process, or of the nodes of one catalog. Safe to use from many threads."""

    def __init__(
        self,
        objects: Objects,
        place: str,
        collection_id: str,
        sequence: Callable[[], int],
        has_catalog: Callable[[], bool],
        name: Callable[[], str] | None = None,
    ) -> None:
        """``sequence`` returns the catalog's last one. ``has_catalog`` says whether this process may still change its
        catalog. ``name`` returns that of all nodes; None: this process alone has the catalog. ``place`` is for
        messages."""
        self._objects = objects
        self._place = place
        self._owner = Owner(collection_id, process=secrets.token_hex(16))
        self._name = name
        self._sequence = sequence
        self._has_catalog = has_catalog
        self._lock = threading.Lock()
        self._is_lost = False
        self._other: Owner | None = None  # whose name must still be taken out
        self._checked_until = self._kept_until = 0.0

    @property
    def is_lost(self) -> bool:
        """Another process has opened the store, so this one removes no more gradients."""
        return self._is_lost

    def check_catalog(self) -> None:
        """CollectionMismatchError where the catalog is older than the gradients. OSError, CatalogReadError."""
        noted = self._noted()  # before the catalog's own, which grows meanwhile
        sequence = self._sequence()
        if sequence < noted:
            raise CollectionMismatchError(
                f"the catalog must be as new as the gradients in {self._place}, which has reached sequence "
                f"{noted}, got {sequence}: it is an older state, and the bank would remove all newer gradients. "
                "Name the newer catalog, or give this one a copy of the gradients elsewhere. If the newer one is lost, "
                f"remove {SEQUENCE} there"
            )

    def take(self, name: str | None = None) -> None:
        """Opens the store for this process, or for all nodes of this new ``name``. OSError."""
        if name is not None:
            self._owner = replace(self._owner, process=name)
        self._objects.put(OWNER, self._owner.content)

    def check(self) -> None:
        """ObjectsTakenError unless this process may remove gradients now. OSError where the store does not tell."""
        with self._lock:
            if not self._is_lost and time.monotonic() >= self._checked_until:
                self._look()
            if self._is_lost:
                raise ObjectsTakenError(
                    "another process has opened the store of this bank's gradients, so this one removes none there"
                )

    def keep(self) -> None:
        """Call it often. It looks at the store once in KEEP_SECONDS. OSError, CatalogReadError."""
        with self._lock:
            if time.monotonic() < self._kept_until:
                return
            self._kept_until = time.monotonic() + KEEP_SECONDS
            self._keep()

    def close(self) -> None:
        """Notes the catalog's last sequence. OSError, CatalogReadError."""
        with self._lock:
            self._keep()

    def _keep(self) -> None:
        sequence = 0 if self._is_lost else self._sequence()
        self._look()
        if not self._is_lost:
            self._note(sequence)
        elif self._other is not None and self._has_catalog():
            self._objects.put(OWNER, replace(self._other, process="").content)

    def _look(self) -> None:
        for _ in range(2):  # a node that opens the catalog alone changes both the name and OWNER
            if self._name is not None:
                self._owner = replace(self._owner, process=_known(self._name))
            found = Owner.read(self._objects)
            if found == self._owner:
                self._other = None
                self._checked_until = time.monotonic() + CHECK_SECONDS
                return
        self._other = found if found is not None and found.process else None
        if self._is_lost:
            return
        self._is_lost = True
        self._kept_until = 0.0
        logger.error(
            "another process has opened %s, so this bank removes no more gradients there; stop one of the two. If "
            "each has a catalog, such as a restored dump, give one of them a copy of the gradients elsewhere. Then "
            "stop all nodes of the bank that keeps this place, and start it again",
            self._place,
        )

    def _noted(self) -> int:
        try:
            return int(json.loads(self._objects.read(SEQUENCE))["sequence"])
        except FileNotFoundError:
            return 0

    def _note(self, sequence: int) -> None:
        """Another node may have noted a later one. An earlier one than this node's may have come after it."""
        if sequence > self._noted():
            self._objects.put(SEQUENCE, json.dumps({"sequence": sequence}).encode())


def _known(name: Callable[[], str]) -> str:
    """The nodes' name. ObjectsUnavailableError where the catalog doesn't tell."""
    try:
        known = name()
    except UnavailableError as error:
        raise ObjectsUnavailableError(f"the catalog must tell whose gradients these are: {error}") from error
    if not known:
        raise ObjectsUnavailableError("the catalog must tell whose gradients these are, a node is starting; try again")
    return known
