"""The requests that the API servers have announced to a worker: their recipes, with their documents in the pool."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from regrad_vllm.serve.recipe import Recipe, RecipeError
from regrad_vllm.serve.worker.pool import Pool


@dataclass(slots=True)
class _Admitted:
    recipe: Recipe
    count: int = 0


class Admissions:
    """Admitted recipes by their names, and the arenas of all API servers. Thread-safe."""

    def __init__(self, fingerprint: str, pool: Pool) -> None:
        """fingerprint: of the worker's learner."""
        self._fingerprint = fingerprint
        self._pool = pool
        self._lock = threading.Lock()
        self._admitted: dict[str, _Admitted] = {}
        self._arenas: dict[str, None] = {}

    def __len__(self) -> int:
        with self._lock:
            return sum(admitted.count for admitted in self._admitted.values())

    @property
    def arenas(self) -> tuple[str, ...]:
        """The folders of all arenas that requests came with, the newest arena first."""
        return tuple(reversed(self._arenas))

    def is_resident(self, recipe: Recipe) -> bool:
        """Whether ``admit`` would find all documents in the pool."""
        return self._pool.holds_all(recipe.digests)

    def admit(self, recipe: Recipe, arena: str) -> None:
        """Makes a request's documents resident and holds them. ``release`` must follow.

        RecipeError, PoolFull, ArenaError, GradientFormatError. After an error nothing is held.
        """
        if recipe.learner != self._fingerprint:
            raise RecipeError(f"the recipe must be for the worker's learner {self._fingerprint}, got {recipe.learner}")
        self._arenas[arena] = None
        self._pool.hold((arena,), recipe.digests)
        with self._lock:
            self._admitted.setdefault(recipe.name, _Admitted(recipe)).count += 1

    def release(self, recipe: Recipe) -> None:
        """Gives up the documents of one ``admit``."""
        with self._lock:
            admitted = self._admitted[recipe.name]
            admitted.count -= 1
            if not admitted.count:
                del self._admitted[recipe.name]
        self._pool.let_go(recipe.digests)

    def recipe(self, name: str, path: str) -> Recipe:
        """The recipe of a LoRARequest's name and path. RecipeError."""
        admitted = self._admitted.get(name)
        return admitted.recipe if admitted is not None else read_recipe(name, path)


def read_recipe(name: str, path: str) -> Recipe:
    """The recipe in a LoRARequest's path. RecipeError if it isn't the name's."""
    recipe = Recipe.parse(path)
    if name != recipe.name:
        raise RecipeError(f"an adapter's name must be its recipe's digest {recipe.name}, got {name}")
    return recipe
