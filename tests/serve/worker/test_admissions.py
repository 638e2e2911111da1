"""What the API servers announce to a worker: recipes, with their documents held."""

from __future__ import annotations

from dataclasses import replace

import pytest

from regrad_vllm.learner import Learner
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.arena.record_files import ArenaError
from regrad_vllm.serve.recipe import Recipe, RecipeError
from tests.serve.support import Worker, stored_recipe


def test_each_admission_holds_until_its_release(learner: Learner, arena: Arena) -> None:
    recipe = stored_recipe(arena, learner, ["one", "two"])
    worker = Worker(learner)
    assert not worker.admissions.is_resident(recipe)
    for _ in range(2):
        worker.admissions.admit(recipe, str(arena.folder))
    assert worker.admissions.is_resident(recipe) and len(worker.admissions) == 2
    assert worker.admissions.recipe(recipe.name, "regrad:{") is worker.admissions.recipe(recipe.name, recipe.path)
    worker.admissions.release(recipe)
    assert (len(worker.admissions), worker.pool.figures().num_held) == (1, 2)
    worker.admissions.release(recipe)
    assert (len(worker.admissions), worker.pool.figures().num_held) == (0, 0)
    assert worker.admissions.recipe(recipe.name, recipe.path) == recipe, "read from the path"
    with pytest.raises(RecipeError, match="must hold a recipe"):
        worker.admissions.recipe(recipe.name, "regrad:{")


def test_what_can_not_be_served_holds_nothing(learner: Learner, arena: Arena) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    worker = Worker(learner)
    with pytest.raises(RecipeError, match=f"worker's learner {learner.fingerprint}, got f"):
        worker.admissions.admit(replace(recipe, learner="f" * 64), str(arena.folder))
    with pytest.raises(ArenaError, match="must hold gradient"):
        worker.admissions.admit(replace(recipe, digests=(*recipe.digests, "0" * 64), weights=(1, 1)), str(arena.folder))
    assert len(worker.admissions) == worker.pool.figures().num_held == 0


def test_the_newest_arena_is_asked_first(learner: Learner) -> None:
    worker = Worker(learner)
    for folder in ("/one", "/two", "/one"):
        worker.admissions.admit(Recipe(learner.fingerprint, (), (), 1.0), folder)
    assert worker.admissions.arenas == ("/two", "/one")


def test_a_name_that_is_not_its_recipes_is_refused(learner: Learner) -> None:
    recipe = Recipe(learner.fingerprint, (), (), 1.0)
    with pytest.raises(RecipeError, match=f"its recipe's digest {recipe.name}, got mine"):
        Worker(learner).admissions.recipe("mine", recipe.path)
