"""Holds: a thing that somebody holds is not removed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Removal:
    """The findings of one look for unwanted things."""

    going: Set[str] = frozenset()  # may be removed now
    spared: Set[str] = frozenset()  # unwanted too, but somebody holds all things

    @property
    def unwanted(self) -> Set[str]:
        return self.going | self.spared


class Holds:
    """Holds on things by key. Safe to use from many threads.

    The lock is never kept during a look at a disk or a database: an event loop takes it, too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._removed = threading.Condition(self._lock)
        self._held: Counter[str] = Counter()
        self._held_meanwhile: list[set[str]] = []  # one for each look that is under way
        self._going: Counter[str] = Counter()
        self._num_holding_all = 0
        self._spared: set[str] = set()

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """Nobody begins to remove the thing inside. This waits for nothing; see ``wait_removed``."""
        with self._lock:
            self._held[key] += 1
            for held in self._held_meanwhile:
                held.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._held[key] -= 1
                self._held += Counter()  # drops the zeros

    @contextmanager
    def hold_all(self) -> Iterator[None]:
        """Nobody begins to remove anything inside. ``take_spared`` says afterwards what has to go."""
        with self._lock:
            self._num_holding_all += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_holding_all -= 1

    @property
    def is_holding_all(self) -> bool:
        return self._num_holding_all > 0

    def take_spared(self) -> set[str]:
        """The things that were unwanted but spared since the last call."""
        with self._lock:
            spared, self._spared = self._spared, set()
            return spared

    def wait_removed(self, key: str) -> None:
        """Returns when nobody is removing the thing. Call it with a hold, so that nobody begins again."""
        with self._removed:
            self._removed.wait_for(lambda: key not in self._going)

    @contextmanager
    def removing(self, keys: list[str], wanted: Callable[[list[str]], Set[str]]) -> Iterator[Removal]:
        """Around the removal of what nobody holds or wants. ``wanted`` says which of the keys it gets are wanted.

        A user takes a hold, makes the thing, has it listed as wanted, and lets go. So a thing is nobody's if it was
        held neither before the look at the wanted things nor during it, and the look did not find it.
        """
        held_meanwhile: set[str] = set()
        unwanted: set[str] = set()
        with self._lock:
            idle = [key for key in keys if key not in self._held]
            self._held_meanwhile.append(held_meanwhile)
        try:
            unwanted = set(idle) - wanted(idle)
        finally:
            with self._lock:
                # By identity: the set of another look may be equal.
                self._held_meanwhile = [held for held in self._held_meanwhile if held is not held_meanwhile]
                unwanted -= held_meanwhile
                removal = Removal(spared=unwanted) if self._num_holding_all else Removal(going=unwanted)
                self._spared |= removal.spared
                self._going.update(removal.going)
        try:
            yield removal
        finally:
            with self._removed:
                self._going -= Counter(removal.going)
                self._removed.notify_all()
