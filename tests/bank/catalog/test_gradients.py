"""The suite of every catalog for gradients: their owners, sizes and number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from bank_service.catalog.contract import Catalog
from tests.bank.catalog.test_catalog import document, gradient

if TYPE_CHECKING:
    from tests.bank.catalog.conftest import Opener


@pytest.fixture
def shared(open_store: Opener) -> Catalog:
    """Gradient 0 belongs to three documents and a past version, 1 and 2 to past versions alone."""
    catalog = open_store(history_seconds=60)
    for namespace, id, digit in (("one", "a", "0"), ("one", "b", "0"), ("two", "a", "0"), ("two", "b", "1")):
        catalog.put(document(id, namespace=namespace), gradient(digit), None).result()
    catalog.put(document("b", "later", namespace="two"), gradient("2"), None).result()
    catalog.put(document("b", "last", namespace="two"), gradient("0"), None).result()
    catalog.delete("one", "a", None).result()
    return catalog


def test_a_gradient_counts_once_whoever_has_and_had_it(shared: Catalog) -> None:
    seen: list[Callable[[str], bool] | None] = [None, "one".__eq__, "two".__eq__, "none".__eq__]
    with shared.view() as view:
        totals = [view.totals(may_see) for may_see in seen]
    assert [item.num_gradients for item in totals] == [3, 1, 3, 0]
    assert [item.gradient_bytes for item in totals] == [300, 100, 300, 0]
    assert [item.num_past_versions for item in totals] == [3, 1, 2, 0]
    assert [item.num_documents for item in totals] == [{"default": 0, "one": 1, "two": 2}, {"one": 1}, {"two": 2}, {}]


def test_the_owners_of_a_gradient_are_documents_and_past_versions(shared: Catalog) -> None:
    with shared.view() as view:
        now = [(stored.document.namespace, stored.document.id) for stored in view.owners("0" * 64, 9)]
        assert sorted(now) == [("one", "b"), ("two", "a"), ("two", "b")] and len(view.owners("0" * 64, 2)) == 2
        (past,) = view.past_owners("0" * 64, 9)
        assert (past.document.namespace, past.document.id, past.sequence) == ("one", "a", 1)
        assert view.owners("1" * 64, 9) == [] and len(view.past_owners("1" * 64, 9)) == 1


def test_gradients_are_found_by_digest_and_read_page_by_page(shared: Catalog) -> None:
    digests = [digit * 64 for digit in "0123"]
    with shared.view() as view:
        assert view.gradient_sizes(digests) == dict.fromkeys(digests[:3], 100)
        assert view.gradient_namespaces(digests) == {
            digests[0]: {"one", "two"},
            digests[1]: {"two"},
            digests[2]: {"two"},
        }
        assert list(view.gradients("", 2)) == digests[:2] and view.gradients(digests[1], 2) == {digests[2]: 100}


def test_recoding_is_remembered_until_it_ends(open_store: Opener) -> None:
    catalog = open_store()

    def is_recoding() -> bool:
        with catalog.view() as view:
            return view.is_recoding()

    assert not is_recoding()
    for _ in range(2):  # begun anew, on the way
        catalog.begin_recoding("factors-4-1-8").result()
        assert is_recoding()
    catalog.close()
    catalog = open_store()
    assert is_recoding()
    catalog.end_recoding().result()
    assert not is_recoding()
