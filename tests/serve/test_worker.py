"""The worker's side of the plugin, without an engine: what it takes for a recipe, when it is on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from regrad_vllm.learner import Learner
from regrad_vllm.serve.recipe import Recipe, RecipeError
from regrad_vllm.serve.settings import Settings, SettingsError
from regrad_vllm.serve.worker import extension as worker
from regrad_vllm.serve.worker.extension import register


@pytest.mark.parametrize(
    "path", ["regrad:", "regrad:{", "regrad:[]", 'regrad:{"v":2}', 'regrad:{"v":1}', "/some/folder",
             'regrad:{"v":1,"arena":"","learner":"","digests":["a"],"weights":[],"gamma":1}',
             'regrad:{"v":1,"arena":"","learner":"","digests":[],"weights":[],"gamma":Infinity}'],
)  # fmt: skip
def test_a_path_that_is_no_recipe_is_refused(path: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.parse(path)


def test_register_does_nothing_without_a_learner_and_refuses_a_half_enabled_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("REGRAD_LEARNER", raising=False)
    register()
    monkeypatch.setenv("REGRAD_LEARNER", "/nowhere")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with pytest.raises(SettingsError, match="VLLM_PLUGINS must name regrad"):
        register()


class Memory:
    """Stands for a worker's slots and tells what it was told."""

    num_bytes, dtype = 0, "float32"

    def __init__(self) -> None:
        self.told: list[object] = []
        self.in_step: frozenset[int] = frozenset()  # what the books say when a step begins
        self.part: worker.AdoptedManager | None = None

    def warm_up(self) -> None:
        pass

    def step_begins(self) -> None:
        assert self.part is not None
        self.told.append(("begins, the books still have", set(self.part.slots._in_step)))

    def step_reads(self, slots: list[int]) -> None:
        self.told.append(("reads", slots))

    def before_use(self, slot: int) -> None:
        self.told.append(("before use", slot))

    def is_foreign(self, slot: int) -> None:
        self.told.append(("is foreign", slot))

    def compose(self, slot: int, gradients: object, steps: object) -> bool:
        self.told.append(("compose", slot))
        return True

    def load(self, arena: str, digest: str) -> Any:
        raise AssertionError("a recipe without documents")


@pytest.fixture
def switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switch_interval")
def test_a_step_tells_its_memory_which_slots_it_reads_and_when_the_next_one_begins(
    learner: Learner, learner_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a composition on a GPU waits for: on CPUs all of this does nothing, and no other test would miss it."""
    memory = Memory()
    monkeypatch.setattr(worker, "slot_memory", lambda manager, learner: memory)
    monkeypatch.setattr(worker, "refusal", lambda manager, learner: "")
    manager = SimpleNamespace(regrad_slot_ids=[None, None, None])
    books = worker.WorkerPart(Settings(learner=learner_folder)).adopt(manager)
    memory.part = manager.regrad
    mine, recipe = 7, Recipe("/dev/shm/none", learner.fingerprint, (), (), 1.0)
    books.begin_step(frozenset([mine]))
    slot = books.activate(mine, None)
    books.step_is_set_up()
    assert memory.told == [
        ("begins, the books still have", set()), ("before use", slot), ("is foreign", slot), ("reads", [slot]),
    ]  # fmt: skip
    memory.told.clear()
    books.begin_step(frozenset([mine, recipe.int_id]))
    other = books.activate(recipe.int_id, recipe)
    books.step_is_set_up()
    assert memory.told == [
        ("begins, the books still have", {mine}), ("compose", other), ("before use", other),
        ("reads", sorted([slot, other])),
    ]  # fmt: skip
    memory.told.clear()
    books.begin_step(frozenset([recipe.int_id]))
    books.step_is_set_up()
    assert memory.told == [("begins, the books still have", {mine, recipe.int_id}), ("reads", [other])]
