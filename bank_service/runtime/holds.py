"""Holds: a thing that somebody holds is not removed."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

from bank_service.errors import UnavailableError

DOUBT_SECONDS = 60.0  # time in which a store may still carry out a removal whose answer did not come


@dataclass(frozen=True, slots=True)
class Removal:
    """The findings of one look for unwanted things."""

    going: Set[str] = frozenset()  # may be removed now
    spared: Set[str] = frozenset()  # unwanted, but kept because somebody holds all things
    busy: Set[str] = frozenset()  # unwanted, but another process writes or removes them
    until: float = math.inf  # no removal may begin later, on the monotonic clock
    doubtful: set[str] = field(default_factory=set)  # the remover adds those whose removal may still happen later

    @property
    def unwanted(self) -> Set[str]:
        return self.going | self.spared


class Holds:
    """Holds on things by key. Safe to use from many threads.

    The internal lock is never kept during disk or database access, because an event loop takes it too.
    """

    batch_size = 256  # the most keys that ``removing`` should get at once

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._removed = threading.Condition(self._lock)
        self._held: Counter[str] = Counter()
        self._held_meanwhile: list[set[str]] = []  # one for each look that is under way
        self._going: Counter[str] = Counter()
        self._num_holding_all = 0
        self._spared: set[str] = set()
        self._doubtful: dict[str, float] = {}  # things whose removal may still happen → until when, monotonic

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """Inside the block, no removal of the thing begins. Removals under way are not waited for; see
        ``wait_removed``."""
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
        """Inside the block, no removal begins. ``take_spared`` gives afterwards the things that were kept for it."""
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
        """Returns when no removal of the thing is under way. Call it with a hold, so that none begins again.

        UnavailableError where a removal may still happen.
        """
        with self._removed:
            self._removed.wait_for(lambda: key not in self._going)
            is_doubtful = self._doubtful.get(key, 0.0) > time.monotonic()
        if is_doubtful:
            raise still_going(key, DOUBT_SECONDS)

    @contextmanager
    def removing(self, keys: list[str], wanted: Callable[[list[str]], Set[str]]) -> Iterator[Removal]:
        """Gives the things that may be removed inside the block. ``wanted`` returns the wanted ones among its keys.

        A user takes a hold, makes the thing, has it listed as wanted, and releases the hold. So a thing may be removed
        if ``wanted`` did not return it, and if nobody held it before or during that call.
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
                # Compare by identity, because another look may have an equal set.
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
                if removal.doubtful:
                    now = time.monotonic()
                    self._doubtful = {other: until for other, until in self._doubtful.items() if until > now}
                    self._doubtful |= dict.fromkeys(removal.doubtful, now + DOUBT_SECONDS)
                self._removed.notify_all()


def still_going(key: str, seconds: float) -> UnavailableError:
    return UnavailableError(
        f"the removal of gradient {key} must be over before it is stored again, the object store didn't answer; try "
        f"again in {seconds:.0f} s"
    )
