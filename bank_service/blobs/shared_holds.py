"""Holds on gradients that several banks have in one object store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace

from bank_service.catalog.nodes import REMOVAL_SECONDS, Decision, Nodes
from bank_service.runtime.holds import Holds, Removal


class SharedHolds(Holds):
    """Holds of this process, and of the other nodes of its catalog. ``hold`` is seen by others after ``wait_removed``,
    and needs no database before."""

    batch_size = 16  # another node that wants one of them waits for the removal of all

    def __init__(self, nodes: Nodes) -> None:
        super().__init__()
        self._nodes = nodes

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        with super().hold(key), self._nodes.held(key):
            yield

    def wait_removed(self, key: str) -> None:
        super().wait_removed(key)
        self._nodes.keep(key)

    @contextmanager
    def removing(self, keys: list[str], wanted: Callable[[list[str]], Set[str]]) -> Iterator[Removal]:
        """UnavailableError where the catalog can't be written."""
        with super().removing(keys, wanted) as own:
            until = time.monotonic() + REMOVAL_SECONDS
            decision = self._nodes.begin_removal(sorted(own.going)) if own.going else Decision()
            try:
                yield replace(own, going=decision.going, busy=decision.busy, until=until)
            finally:
                if answered := decision.going - own.doubtful:
                    self._nodes.end_removal(decision, answered)
