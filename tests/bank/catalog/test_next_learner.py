"""The suite of every catalog for its next learner: gradients beside those of now, until they take their place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import NextLearner
from bank_service.errors import UnavailableError
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient

if TYPE_CHECKING:
    from tests.bank.catalog.conftest import Opener

NEXT = NextLearner("e" * 64, "f" * 16, "a folder")


def put(catalog: Catalog, began: int, digit: str, fingerprint: str = NEXT.fingerprint) -> set[str]:
    return catalog.put_next(fingerprint, began, gradient(digit)).result()


@pytest.fixture
def moving(open_store: Opener) -> Catalog:
    """On its way to another learner. Version 1 is past, 2 and 3 are documents."""
    catalog = open_store(history_seconds=3600)
    for id, digit in (("a", "0"), ("a", "1"), ("b", "2")):
        catalog.put(document(id, f"text {digit}"), gradient(digit), None).result()
    catalog.begin_next(NEXT).result()
    return catalog


def test_each_version_gets_a_gradient_of_the_next_learner(moving: Catalog) -> None:
    with moving.view() as view:
        assert view.next_learner() == NEXT
        assert view.lacking_next(0, 9) == [1, 2, 3] and view.lacking_next(1, 1) == [2]
        assert view.num_next() == (3, 0)
        assert view.gradients_of(NEXT.fingerprint, [1, 2, 3]) == {} and view.gradients_of("0" * 64, [1]) is None
    assert put(moving, 2, "7") == set() and put(moving, 2, "8") == {"7" * 64}, "it replaces the one before"
    assert put(moving, 9, "9") == {"9" * 64}, "no such version"
    assert put(moving, 2, "9", "another") == {"9" * 64}, "of another learner"
    with moving.view() as view:
        assert view.lacking_next(0, 9) == [1, 3] and view.num_next() == (3, 1)
        assert view.gradients_of(NEXT.fingerprint, [1, 2]) == {2: ("8" * 64, 100)}
        assert view.gradients_of(IDENTITY.learner_fingerprint, [1, 2]) == {1: ("0" * 64, 100), 2: ("1" * 64, 100)}
        assert view.next_owners("8" * 64, 9) == [2]
        assert view.gradient_sizes(["8" * 64, "1" * 64]) == {"8" * 64: 100, "1" * 64: 100}
        assert view.gradient_namespaces(["8" * 64]) == {"8" * 64: {"n"}}
        assert list(view.gradients("2" * 64, 9)) == ["8" * 64]


def test_a_version_of_the_same_text_keeps_it_and_another_text_does_not(moving: Catalog) -> None:
    put(moving, 3, "8")
    same = moving.put(document("b", "text 2", metadata={"colour": "red"}), gradient("2"), None).result().stored.sequence
    other = moving.put(document("b", "another"), gradient("3"), None).result().stored.sequence
    with moving.view() as view:
        assert view.gradients_of(NEXT.fingerprint, [3, same, other]) == dict.fromkeys((3, same), ("8" * 64, 100))
    moving.delete("n", "b", None, purge=True).result()
    with moving.view() as view:
        assert view.next_owners("8" * 64, 9) == [] and view.lacking_next(0, 9) == [1, 2]


def test_it_takes_the_place_of_the_learner_when_every_version_has_one(open_store: Opener, moving: Catalog) -> None:
    assert moving.finish_next().result() is False
    for began, digit in ((1, "7"), (2, "8"), (3, "9")):
        put(moving, began, digit)
    assert moving.finish_next().result() is True
    with moving.view() as view:
        assert view.next_learner() is None and view.sequence() == 3
        assert view.gradients_of(NEXT.fingerprint, [1, 2, 3]) == {
            began: (digit * 64, 100) for began, digit in ((1, "7"), (2, "8"), (3, "9"))
        }
        stored = view.get("n", "a")
        assert stored is not None and stored.gradient.digest == "8" * 64
        assert view.gradient_sizes(["1" * 64]) == {} and view.usage("n").num_bytes == 3 * 106
    moving.close()
    open_store(replace(IDENTITY, learner_fingerprint=NEXT.fingerprint, layout_id=NEXT.layout_id))


def test_a_start_with_the_next_learner_finishes_what_is_whole(open_store: Opener, moving: Catalog) -> None:
    for began in (1, 2, 3):
        put(moving, began, "7")
    moving.close()
    again = open_store(replace(IDENTITY, learner_fingerprint=NEXT.fingerprint, layout_id=NEXT.layout_id))
    with again.view() as view:
        assert view.next_learner() is None and view.gradient_sizes(["7" * 64]) == {"7" * 64: 100}


def test_it_can_be_taken_back_and_excludes_recoding(moving: Catalog) -> None:
    put(moving, 1, "7")
    with pytest.raises(UnavailableError, match="on its way"):
        moving.begin_recoding("factors-4-0-8").result()
    moving.drop_next().result()
    with moving.view() as view:
        assert view.next_learner() is None and view.gradient_sizes(["7" * 64]) == {}
    moving.begin_recoding("factors-4-0-8").result()
    with pytest.raises(UnavailableError, match="being recoded"):
        moving.begin_next(NEXT).result()
