"""The suite of every catalog: documents, versions and changes. None gets lost or mixed up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bank_service.catalog.contract import MAX_KEYS, Catalog
from bank_service.catalog.entries import CollectionIdentity, Score
from bank_service.errors import CollectionMismatchError, NotFoundError, UnavailableError, VersionConflictError
from bank_service.values.documents import Document, Gradient, Outcome
from bank_service.values.filters import Condition, Operator
from bank_service.wire.limits import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from tests.bank.catalog.conftest import Opener

IDENTITY = CollectionIdentity("a" * 64, "b" * 16, "factors-4-1-8", "an embedder", 4)


def gradient(digit: str = "0") -> Gradient:
    return Gradient(digit * 64, 100, 3, False, np.full(4, 0.5, "<f4").tobytes())


def document(
    id: str = "a", text: str = "text", namespace: str = "n", metadata: Mapping[str, str] = MappingProxyType({})
) -> Document:
    return Document(namespace, id, "", text, metadata)


def test_a_catalog_opened_anew_has_its_documents_and_its_identity(open_store: Opener) -> None:
    first = open_store()
    put = first.put(document(), gradient(), None).result()
    first.close()
    second = open_store()
    with second.view() as view:
        assert view.get("n", "a") == put.stored
    assert second.collection_id == first.collection_id


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"learner_fingerprint": "c" * 64}, ("a" * 64, "c" * 64)),
        ({"layout_id": "d" * 16}, ("b" * 16, "d" * 16)),
        ({"codec": "factors-4-0-8"}, ("factors-4-1-8", "factors-4-0-8")),
        ({"embedder": "another"}, ("an embedder", "another")),
        ({"embedding_dimension": 5}, ("4", "5")),
    ],
)
def test_another_collection_is_refused_with_both_names(
    open_store: Opener, change: dict[str, object], names: tuple[str, str]
) -> None:
    open_store().close()
    with pytest.raises(CollectionMismatchError) as caught:
        open_store(replace(IDENTITY, **change))  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in names)


def test_a_put_creates_updates_or_changes_nothing(catalog: Catalog) -> None:
    created = catalog.put(document(), gradient(), None).result()
    assert (created.outcome, created.stored.version, created.stored.sequence) == (Outcome.CREATED, 1, 1)
    same = catalog.put(document(), gradient(), None).result()
    assert (same.outcome, same.stored) == (Outcome.UNCHANGED, created.stored)
    updated = catalog.put(document(text="other"), gradient("1"), None).result()
    assert (updated.outcome, updated.stored.version, updated.dropped) == (Outcome.UPDATED, 2, {"0" * 64})
    assert updated.stored.key == created.stored.key
    kept = catalog.put(Document("n", "a", "", "other", {"colour": "red"}), gradient("1"), None).result()
    assert (kept.outcome, kept.stored.version, kept.dropped) == (Outcome.UPDATED, 3, set())


def test_a_document_that_comes_back_has_its_key_and_counts_on(catalog: Catalog) -> None:
    first = catalog.put(document(), gradient(), None).result()
    deleted = catalog.delete("n", "a", None).result()
    assert (deleted.version, deleted.sequence, deleted.digests) == (1, 2, frozenset({"0" * 64}))
    other = catalog.put(document("b"), gradient(), None).result()
    back = catalog.put(document(), gradient(), None).result()
    assert (back.outcome, back.stored.version, back.stored.key) == (Outcome.CREATED, 2, first.stored.key)
    assert other.stored.key != first.stored.key


@pytest.mark.parametrize("expected", [0, 2, 7])
def test_a_write_that_expects_another_version_changes_nothing(catalog: Catalog, expected: int) -> None:
    put = catalog.put(document(), gradient(), 0).result()
    writes: list[Callable[[], object]] = [
        lambda: catalog.put(document(text="other"), gradient("1"), expected).result(),
        lambda: catalog.delete("n", "a", expected).result(),
        lambda: catalog.delete("n", "a", expected, purge=True).result(),
    ]
    for write in writes:
        with pytest.raises(VersionConflictError) as caught:
            write()
        assert (caught.value.expected_version, caught.value.actual_version) == (expected, 1)
    with catalog.view() as view:
        assert view.get("n", "a") == put.stored and view.sequence() == 1
    assert catalog.put(document(text="other"), gradient("1"), 1).result().stored.version == 2
    assert catalog.delete("n", "a", 2).result().version == 2
    assert catalog.put(document(), gradient(), 0).result().stored.version == 3, "a deleted document is absent"


def test_what_is_not_there_cannot_be_deleted(catalog: Catalog) -> None:
    catalog.put(document(), gradient(), None).result()
    catalog.delete("n", "a", None).result()
    for namespace, id, purge in (("n", "a", False), ("n", "b", False), ("m", "a", False), ("n", "b", True)):
        with pytest.raises(NotFoundError):
            catalog.delete(namespace, id, None, purge=purge).result()


def test_a_view_does_not_move_with_later_writes(catalog: Catalog) -> None:
    catalog.put(document(), gradient(), None).result()
    with catalog.view() as view:
        assert view.sequence() == 1
        catalog.put(document(text="other"), gradient("1"), None).result()
        stored = view.get("n", "a")
        assert stored is not None and (stored.version, stored.document.text, view.sequence()) == (1, "text", 1)
    with catalog.view() as view:
        assert view.sequence() == 2


def test_writes_of_many_threads_each_have_a_sequence_of_their_own_without_gaps(catalog: Catalog) -> None:
    with ThreadPoolExecutor(20) as pool:
        good = [pool.submit(catalog.put, document(str(n)), gradient(), None) for n in range(40)]
        bad = [pool.submit(catalog.put, document(f"x{n}"), gradient(), 7) for n in range(40)]
    for future in bad:
        with pytest.raises(VersionConflictError):
            future.result().result()
    assert sorted(future.result().result().stored.sequence for future in good) == list(range(1, 41))
    with catalog.view() as view:
        assert len(view.page("n", "", 100)) == 40


def test_only_a_namespace_that_had_a_document_is_known(catalog: Catalog) -> None:
    catalog.put(document(), gradient(), None).result()
    catalog.delete("n", "a", None).result()
    with catalog.view() as view:
        view.check_namespace("n")
        view.check_namespace(DEFAULT_NAMESPACE)
        with pytest.raises(NotFoundError):
            view.check_namespace("m")
        assert [view.sequence_of(names) for names in (["n"], ["m"], ["m", "n"], [])] == [2, 0, 2, 0]


def test_documents_are_listed_by_the_bytes_of_their_ids(catalog: Catalog) -> None:
    ids = ["b", "a", "é", "Z", "aa", "\U0001f989", "\uffee"]
    for id in ids:
        catalog.put(document(id), gradient(), None).result()
    catalog.put(document("elsewhere", namespace="m"), gradient(), None).result()
    catalog.put(document("gone"), gradient(), None).result()
    catalog.delete("n", "gone", None).result()
    expected = sorted(ids, key=str.encode)
    with catalog.view() as view:
        assert [entry.id for entry in view.page("n", "", 100)] == expected
        assert [entry.id for entry in view.page("n", expected[1], 2)] == expected[2:4]
        assert [entry.id for entry in view.page("n", "", 100, prefix="a")] == ["a", "aa"]
        assert [entry.id for entry in view.page("n", "a", 100, prefix="a")] == ["aa"]
        assert [entry.id for entry in view.page("n", "", 100, prefix="\U0001f989")] == ["\U0001f989"]
        assert not view.page("n", "b", 100, prefix="a") and not view.page("n", "", 100, prefix="ab")
        assert [stored.document.id for stored in view.after_key(0, 100)] == [*ids, "elsewhere"]
        last = view.after_key(0, 2)[-1].key
        assert [stored.document.id for stored in view.after_key(last, 2)] == ids[2:4]


def test_changes_show_each_document_once_in_order(catalog: Catalog) -> None:
    for id, namespace in ("an", "bn", "cn", "am"):
        catalog.put(document(id, namespace=namespace), gradient(), None).result()
    catalog.put(document("a", "other"), gradient("1"), None).result()
    catalog.delete("n", "b", None).result()
    with catalog.view() as view:
        changes = view.changes(0, 10)
        assert [(change.sequence, change.namespace) for change in changes] == [(3, "n"), (4, "m"), (5, "n"), (6, "n")]
        assert [change.embedding is None for change in changes] == [False, False, False, True]
        assert view.changes(3, 1) == changes[1:2]
        assert view.changes(6, 10) == []
        own = [change for change in changes if change.namespace == "n"]
        assert view.changes_of("n", 0) == own and view.changes_of("n", 0, 2) == own[:2]
        assert view.changes_of("n", 3, alive=True) == own[1:2] and view.changes_of("none", 0) == []


def test_candidates_and_hits_are_what_a_query_needs_of_living_documents(catalog: Catalog) -> None:
    stored = [catalog.put(document(id, f"text {id}"), gradient(id), None).result().stored for id in "abc"]
    catalog.delete("n", "b", None).result()
    keys = [item.key for item in stored]
    with catalog.view() as view:
        found = {item.id: item for item in view.candidates([*keys, 999])}
        assert found.keys() == {"a", "c"}
        for item in (stored[0], stored[2]):
            candidate = found[item.document.id]
            assert (candidate.key, candidate.sequence, candidate.version) == (item.key, item.sequence, item.version)
            assert (candidate.embedding, candidate.gradient_digest) == (item.gradient.embedding, item.gradient.digest)
        scores = {stored[2].sequence: Score(0.5, 0.25), stored[0].sequence: Score(0.4, 0.3)}
        with_text, without = view.hits(scores, include_text=True), view.hits(scores, include_text=False)
        assert [(hit.id, hit.text, hit.score, hit.cosine) for hit in with_text] == [
            ("c", "text c", 0.5, 0.25),
            ("a", "text a", 0.4, 0.3),
        ]
        assert without == [found[id].hit(score) for id, score in zip("ca", scores.values(), strict=True)]
        assert view.began("n", ["c", "b", "a", "never"]) == {"a": 1, "c": 3} and view.began("m", ["a"]) == {}


def test_a_closed_catalog_takes_no_writes(open_store: Opener) -> None:
    catalog = open_store()
    catalog.close()
    with pytest.raises(UnavailableError):
        catalog.put(document(), gradient(), None)


@pytest.mark.parametrize("num_red", [MAX_KEYS, MAX_KEYS + 1], ids=["few", "many"])
def test_a_listing_keeps_to_documents_that_meet_all_conditions(catalog: Catalog, num_red: int) -> None:
    ids = sorted(f"d{n}" for n in range(num_red))
    red, big = {"colour": "red"}, {"colour": "red", "size": "big"}
    for id in reversed(ids):
        catalog.put(document(id, metadata=big if id == ids[1] else red), gradient(), None)
    catalog.put(document("blue", metadata={"colour": "blue"}), gradient(), None)
    catalog.put(document("gone", metadata=red), gradient(), None)
    catalog.put(document("elsewhere", namespace="m", metadata=red), gradient(), None)
    catalog.delete("n", "gone", None).result()
    is_red = Condition("colour", Operator.EQUALS, ("red",))
    with catalog.view() as view:
        assert [entry.id for entry in view.page("n", "", 1000, [is_red])] == ids
        assert [entry.id for entry in view.page("n", ids[2], 3, [is_red])] == ids[3:6]
        (entry,) = view.page("n", "", 10, [is_red, Condition("size", Operator.PRESENT)])
        assert (entry.id, entry.metadata) == (ids[1], big)
        assert [entry.id for entry in view.page("n", "", 10, [Condition("colour", Operator.NOT_EQUALS, ("red",))])] == [
            "blue"
        ]
