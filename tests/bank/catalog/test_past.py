"""The suite of every catalog for the past: it knows exactly the state at each sequence from the horizon on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from bank_service.catalog.contract import Catalog, CatalogView
from bank_service.catalog.entries import Score, Usage
from bank_service.values.documents import Document
from bank_service.values.filters import Condition, Operator
from tests.bank.catalog.test_catalog import document, gradient

if TYPE_CHECKING:
    from tests.bank.catalog.conftest import Opener

SPACES, IDS, COLOURS = ("n", "m"), ("a", "b", "c", "d"), ("red", "blue")


@dataclass
class Life:
    """A collection's random life, and the state after each change: (namespace, id) → when its version began."""

    draw: random.Random
    documents: dict[int, Document] = field(default_factory=dict)  # by when the version began
    now: dict[tuple[str, str], int] = field(default_factory=dict)
    states: list[dict[tuple[str, str], int]] = field(default_factory=lambda: [{}])

    def step(self, catalog: Catalog) -> None:
        namespace, id = name = (self.draw.choice(SPACES), self.draw.choice(IDS))
        kind = self.draw.random()
        if kind < 0.7 or name not in self.now:
            made = Document(namespace, id, "", f"text {len(self.states)}", {"colour": self.draw.choice(COLOURS)})
            put = catalog.put(made, gradient(self.draw.choice("0123456789")), None).result()
            assert put.stored.sequence == len(self.states)
            self.documents[put.stored.sequence] = made
            self.now[name] = put.stored.sequence
        else:
            catalog.delete(namespace, id, None, purge=kind > 0.9).result()
            del self.now[name]
            if kind > 0.9:  # as if it had never existed
                for state in self.states:
                    state.pop(name, None)
        self.states.append(dict(self.now))


def past_of(view: CatalogView, namespace: str, as_of: int, conditions: Sequence[Condition]) -> list[tuple[str, int]]:
    found, after = [], as_of
    while (page := view.past_candidates(namespace, as_of, conditions, after, 2)) is not None:
        found += [(candidate.id, candidate.sequence) for candidate in page[0]]
        assert page[1] > after
        after = page[1]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_state_at_every_sequence_is_known_exactly(open_store: Opener, seed: int) -> None:
    catalog = open_store(history_seconds=3600)
    life = Life(random.Random(seed))
    for _ in range(120):
        life.step(catalog)
    red = Condition("colour", Operator.EQUALS, ("red",))
    num_past = 0
    every = {(space, began) for state in life.states for (space, _), began in state.items()}
    with catalog.view() as view:
        for namespace in SPACES:
            held = [life.documents[began] for space, began in every if space == namespace]
            num_bytes = sum(len(item.text) + gradient().num_bytes for item in held)
            assert view.usage(namespace) == Usage(sum(name[0] == namespace for name in life.now), num_bytes)
        for as_of, state in enumerate(life.states):
            for namespace in SPACES:
                expected = {id: began for (space, id), began in state.items() if space == namespace}
                assert view.began(namespace, IDS, as_of) == expected
                hits = view.hits({began: Score(1.0, 1.0) for began in expected.values()}, include_text=True)
                assert [hit.text for hit in hits] == [life.documents[began].text for began in expected.values()]
                for conditions in ([], [red]):
                    keys = view.matching(namespace, conditions, None, as_of)
                    assert keys == sorted(keys) and set(keys) == view.among(keys, conditions, as_of)
                    unchanged = [(item.id, item.sequence) for item in view.candidates(keys)]
                    past = past_of(view, namespace, as_of, conditions)
                    num_past += len(past)
                    matching = {
                        (id, began)
                        for id, began in expected.items()
                        if not conditions or life.documents[began].metadata["colour"] == "red"
                    }
                    assert len(unchanged) + len(past) == len(matching) and {*unchanged, *past} == matching
    assert num_past > 100, "else this test shows nothing"


def test_the_horizon_goes_only_as_far_as_what_was_dropped_of_its_namespace(open_store: Opener) -> None:
    catalog = open_store(history_seconds=3600)

    def horizons() -> list[int]:
        with catalog.view() as view:
            return [view.horizon(name) for name in ("n", "m")]

    for number in range(3):
        for namespace in ("n", "m"):
            catalog.put(document(text=f"text {number}", namespace=namespace), gradient(str(number)), None).result()
    assert horizons() == [0, 0]
    assert catalog.expire_history(0, 10).result() is None and horizons() == [0, 0]
    assert catalog.expire_history(None, 1).result() == ["0" * 64] and horizons() == [3, 0]
    assert catalog.expire_history(None, 10).result() == ["0" * 64, "1" * 64] and horizons() == [5, 6]
    assert catalog.expire_history(None, 10).result() is None


def test_without_history_the_past_ends_at_each_update_and_deletion(catalog: Catalog) -> None:
    horizons = []
    for text in ("one", "two", None, "three"):
        if text is None:
            catalog.delete("n", "a", None).result()
        else:
            catalog.put(document(text=text), gradient(), None).result()
        with catalog.view() as view:
            horizons.append(view.horizon("n"))
            assert view.totals().num_past_versions == 0
    assert horizons == [0, 2, 3, 3], "creations take nothing"


def test_how_long_history_is_kept_is_remembered(open_store: Opener) -> None:
    for given, kept in ((None, 0), (60, 60), (None, 60), (0, 0), (None, 0)):
        catalog = open_store(history_seconds=given)
        assert catalog.history_seconds == kept
        catalog.close()


def test_a_past_version_gets_another_gradient_in_the_place_of_its_own(open_store: Opener) -> None:
    catalog = open_store(history_seconds=3600)
    for digit in "01":
        catalog.put(document(text=f"text {digit}"), gradient(digit), None).result()
    assert catalog.replace_past_gradient(1, "0" * 64, gradient("7")).result() is True
    assert catalog.replace_past_gradient(1, "0" * 64, gradient("8")).result() is False, "it has that no more"
    assert catalog.replace_past_gradient(2, "1" * 64, gradient("8")).result() is False, "it is no past version"
    with catalog.view() as view:
        (hit,) = view.hits({1: Score(1.0, 1.0)}, include_text=False)
        assert hit.gradient_digest == "7" * 64
        assert [stored.sequence for stored in view.past_owners("7" * 64, 9)] == [1]
        assert view.usage("n").num_bytes == 2 * 106
