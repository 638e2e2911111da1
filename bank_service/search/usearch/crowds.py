"""Near-equal vectors beside a graph. Many of them would break the graph, because all their links would go among
themselves. A search that reaches one of them would find nothing else.

So the graph has only the first vectors of a neighbourhood. Each later one belongs to the nearest of these, its leader.
A search that finds a leader compares the query with the leader's crowd. Equal vectors are compared once. This is leader
clustering (Hartigan, 1975), used only where many vectors are near-equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import IO

import numpy as np

from bank_service.values.vectors import KeyArray
from bank_service.wire.record import FloatArray

NEAR = 0.05  # the largest cosine distance of near-equal vectors
CROWDED = 32  # near-equal vectors in the graph; the next ones belong to a leader
MAX_DIFFERENT = 4_000  # different vectors of one leader, which take about 1 ms to compare


class _Crowd:
    """The vectors of one leader, (dimension,) in float32 each, in the first rows of a matrix that grows by doubling."""

    def __init__(self, leader: int, dimension: int) -> None:
        self.leader = leader
        self.places: list[_Place] = []  # by row
        self._matrix: FloatArray = np.empty((1, dimension), np.float32)

    @property
    def vectors(self) -> FloatArray:
        return self._matrix[: len(self.places)]

    def place_of(self, vector: FloatArray) -> _Place | None:
        """The place of a vector, a new one if need be. None where the crowd is full."""
        for row in map(int, np.flatnonzero((self.vectors == vector).all(axis=1))):
            return self.places[row]
        return self.add(vector) if len(self.places) < MAX_DIFFERENT else None

    def add(self, vector: FloatArray) -> _Place:
        """Adds a new vector."""
        if len(self.places) == len(self._matrix):
            self._matrix = np.concatenate([self._matrix, np.empty_like(self._matrix)])
        self._matrix[len(self.places)] = vector
        self.places.append(_Place(self))
        return self.places[-1]

    def remove(self, place: _Place) -> None:
        """Removes a vector. The last row moves into its place."""
        row = self.places.index(place)
        self.places[row] = self.places[-1]
        self._matrix[row] = self.vectors[-1]
        self.places.pop()


class _Place:
    """The keys of one vector of a crowd."""

    def __init__(self, crowd: _Crowd) -> None:
        self.crowd = crowd
        self.keys: dict[int, None] = {}  # in order of their arrival


class Crowds:
    """The vectors of one namespace that have a leader. Safe for one thread at a time."""

    def __init__(self) -> None:
        self._crowds: dict[int, _Crowd] = {}  # by leader; none is empty
        self._places: dict[int, _Place] = {}  # by key

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: int) -> bool:
        return key in self._places

    def join(self, leader: int, key: int, vector: FloatArray) -> bool:
        """Adds a new key to the leader's crowd. False where the crowd is full."""
        crowd = self._crowds.setdefault(leader, _Crowd(leader, len(vector)))
        place = crowd.place_of(vector)
        if place is None:
            return False
        place.keys[key] = None
        self._places[key] = place
        return True

    def leave(self, key: int) -> None:
        """Removes a key that is in a crowd."""
        place = self._places.pop(key)
        del place.keys[key]
        if not place.keys:
            place.crowd.remove(place)
        if not place.crowd.places:
            del self._crowds[place.crowd.leader]

    def succeed(self, leader: int) -> tuple[int, FloatArray] | None:
        """Takes a key out of a leader's crowd and makes it the leader of the others. Returns it with its vector. None
        where the key leads nobody."""
        crowd = self._crowds.get(leader)
        if crowd is None:
            return None
        vector = crowd.vectors[0].copy()
        heir = next(iter(crowd.places[0].keys))
        self.leave(heir)
        if crowd.places:
            crowd.leader = heir
            self._crowds[heir] = self._crowds.pop(leader)
        return heir, vector

    def near(self, leaders: Iterable[int], vector: FloatArray, count: int) -> tuple[KeyArray, FloatArray]:
        """Keys and cosines of the best ``count`` vectors in these leaders' crowds, in any order. At most ``count`` keys
        of each vector."""
        crowds = [self._crowds[leader] for leader in leaders if leader in self._crowds]
        if not crowds:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        cosines = np.concatenate([crowd.vectors @ vector for crowd in crowds])
        places = [place for crowd in crowds for place in crowd.places]
        rows = np.argpartition(-cosines, count)[:count] if count < len(cosines) else np.arange(len(cosines))
        keys = [list(islice(places[row].keys, count)) for row in rows]
        return np.concatenate(keys).astype(np.int64), np.repeat(cosines[rows], [len(group) for group in keys])

    def save(self, file: IO[bytes]) -> None:
        places = [place for crowd in self._crowds.values() for place in crowd.places]
        rows = [(place.crowd.leader, key, number) for number, place in enumerate(places) for key in place.keys]
        np.save(file, np.array(rows, np.int64).reshape(-1, 3))
        for crowd in self._crowds.values():
            file.write(crowd.vectors.astype("<f4").tobytes())

    @classmethod
    def load(cls, file: IO[bytes], dimension: int) -> Crowds:
        """Reads a file that ``save`` wrote. ValueError or EOFError."""
        loaded = cls()
        rows = np.load(file, allow_pickle=False)
        vectors = np.frombuffer(file.read(), "<f4").reshape(-1, dimension)
        places: dict[int, _Place] = {}
        for leader, key, number in rows.tolist():
            if number not in places:
                places[number] = loaded._crowds.setdefault(leader, _Crowd(leader, dimension)).add(vectors[number])
            places[number].keys[key] = None
            loaded._places[key] = places[number]
        return loaded
