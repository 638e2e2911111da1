"""The suite of every catalog for purges: nothing of the document is read again, and the erasure is never forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bank_service.catalog.contract import Catalog
from bank_service.errors import VersionConflictError
from tests.bank.catalog.test_catalog import document, gradient

if TYPE_CHECKING:
    from tests.bank.catalog.conftest import Opener


def pending(catalog: Catalog) -> list[tuple[str, set[str]]]:
    with catalog.view() as view:
        return [(erasure.namespace, set(erasure.digests)) for erasure in view.pending_erasures(0, 100)]


def finish(catalog: Catalog) -> None:
    with catalog.view() as view:
        numbers = [erasure.number for erasure in view.pending_erasures(0, 100)]
    catalog.finish_erasures(numbers).result()


def test_a_purge_takes_the_past_along_and_names_every_gradient(open_store: Opener) -> None:
    catalog = open_store(history_seconds=3600)
    for digit in "012":
        catalog.put(document(text=f"text {digit}"), gradient(digit), None).result()
    result = catalog.delete("n", "a", 3, purge=True).result()
    digests = {digit * 64 for digit in "012"}
    assert (result.version, result.sequence, result.digests) == (3, 4, digests)
    assert pending(catalog) == [("n", digests)]
    with catalog.view() as view:
        assert view.get("n", "a") is None and not view.gradient_sizes(sorted(digests))
        assert view.totals().num_past_versions == 0 and view.usage("n").num_bytes == 0
        assert [view.began("n", ["a"], as_of) for as_of in range(5)] == [{}] * 5
        assert view.horizon("n") == 0, "as if it had never existed: nothing else of the past is lost"


def test_a_deleted_document_can_still_be_purged(open_store: Opener) -> None:
    catalog = open_store(history_seconds=3600)
    catalog.put(document(), gradient(), None).result()
    deleted = catalog.delete("n", "a", None).result()
    with pytest.raises(VersionConflictError):
        catalog.delete("n", "a", 1, purge=True).result()
    purged = catalog.delete("n", "a", 0, purge=True).result()
    assert (purged.version, purged.sequence, purged.digests) == (1, deleted.sequence, {"0" * 64})


def test_a_purge_may_come_again_with_the_version_that_it_expected(open_store: Opener) -> None:
    catalog = open_store()
    catalog.put(document(), gradient(), None).result()
    first = catalog.delete("n", "a", 1, purge=True).result()
    for expected in (1, 0, None):
        again = catalog.delete("n", "a", expected, purge=True).result()
        assert (again.version, again.sequence) == (1, first.sequence)
        assert again.digests == {"0" * 64}, "until it is erased"
        assert pending(catalog) == [("n", {"0" * 64})]
    with pytest.raises(VersionConflictError):
        catalog.delete("n", "a", 2, purge=True).result()
    catalog.close()
    catalog = open_store()
    assert pending(catalog) == [("n", {"0" * 64})], "a restart forgets none"
    finish(catalog)
    assert pending(catalog) == []
    assert catalog.delete("n", "a", 1, purge=True).result().digests == frozenset()
    catalog.put(document(), gradient(), None).result()
    with pytest.raises(VersionConflictError):
        catalog.delete("n", "a", 1, purge=True).result()


def test_erasures_are_read_in_order_and_page_by_page(catalog: Catalog) -> None:
    for namespace in "abc":
        catalog.put(document(namespace=namespace), gradient(), None).result()
        catalog.delete(namespace, "a", None, purge=True).result()
    with catalog.view() as view:
        every = view.pending_erasures(0, 100)
        assert [erasure.namespace for erasure in every] == ["a", "b", "c"]
        assert view.pending_erasures(0, 2) == every[:2] and view.pending_erasures(every[1].number, 2) == every[2:]
    catalog.finish_erasures([every[1].number, 999]).result()
    assert [namespace for namespace, _ in pending(catalog)] == ["a", "c"]
