"""Several banks with one catalog: which gradients may be removed, and which wait."""

from __future__ import annotations

import time
from pathlib import Path

import psycopg
import pytest

from bank_service.blobs.blob_store import BlobStore, objects_in
from bank_service.blobs.folder_objects import FolderObjects
from bank_service.blobs.shared_holds import SharedHolds
from bank_service.catalog.postgres import postgres_nodes
from bank_service.errors import UnavailableError
from bank_service.wire.record import record_digest
from tests.bank.catalog.postgres.conftest import DIGEST, Opener, decided, nodes_of, put, until
from tests.bank.catalog.test_catalog import document, gradient


def test_a_gradient_that_a_node_keeps_or_a_version_names_is_never_removed(opener: Opener) -> None:
    first, second = opener(), opener()
    with nodes_of(first).held(DIGEST):
        decision = nodes_of(second).begin_removal([DIGEST])
        assert (decision.going, decision.busy) == ({DIGEST}, set()), "it is not kept yet"
        with pytest.raises(UnavailableError, match="the removal of gradient .* must be over"):
            nodes_of(first).keep(DIGEST)
        nodes_of(second).end_removal(decision, [DIGEST])
        nodes_of(first).keep(DIGEST)
        for catalog, other in ((first, "1" * 64), (second, "2" * 64)):
            assert decided(catalog, [DIGEST, other]) == ({other}, {DIGEST})
        first.put(document(), gradient(), None).result()
    assert decided(second, [DIGEST]) == (set(), set())
    first.delete("n", "a", None).result()
    assert list(nodes_of(first).dropped(0.0)) == [DIGEST] and not nodes_of(first).dropped(3600.0)
    until(lambda: bool(nodes_of(second).begin_removal([DIGEST]).going))
    assert decided(first, [DIGEST]) == (set(), {DIGEST}), "another node has it"


def test_a_removal_without_an_answer_is_over_after_a_while(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_nodes, "OVER_SECONDS", 1.5)
    first, second = opener(), opener()
    assert decided(first, [DIGEST]) == ({DIGEST}, set())
    first.close()
    with nodes_of(second).held(DIGEST), pytest.raises(UnavailableError, match="must be over"):
        nodes_of(second).keep(DIGEST)
    time.sleep(1.5)
    assert put(second, "a").stored.sequence == 1


def test_a_node_that_was_stopped_ends_no_later_removal_of_another(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opener(), opener()
    with monkeypatch.context() as patch:
        patch.setattr(postgres_nodes, "OVER_SECONDS", 0.3)
        early = nodes_of(first).begin_removal([DIGEST])
    time.sleep(0.3)
    late = nodes_of(second).begin_removal([DIGEST])
    assert early.going == late.going == {DIGEST}
    nodes_of(first).end_removal(early, [DIGEST])
    assert decided(first, [DIGEST]) == (set(), {DIGEST}), "the second one still removes it"
    with nodes_of(first).held(DIGEST), pytest.raises(UnavailableError, match="must be over"):
        nodes_of(first).keep(DIGEST)
    nodes_of(second).end_removal(late, [DIGEST])
    until(lambda: decided(second, [DIGEST])[0] == {DIGEST})


def test_a_gradient_that_is_dropped_again_while_it_is_removed_goes_on_waiting(opener: Opener) -> None:
    first, second = opener(), opener()
    nodes_of(first).drop([DIGEST, "1" * 64])
    waits = nodes_of(first).dropped(0.0)
    assert waits.keys() == {DIGEST, "1" * 64}
    put(second, "a")
    second.delete("n", "a", None).result()
    nodes_of(first).forget_dropped(waits)
    again = nodes_of(first).dropped(0.0)
    assert again.keys() == {DIGEST} and again[DIGEST] > waits[DIGEST]
    nodes_of(first).forget_dropped(again)
    assert not nodes_of(second).dropped(0.0)


def test_a_sweep_of_many_gradients_has_few_of_them_at_a_time(
    opener: Opener, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A purge by another node waits for those."""
    blobs = BlobStore(objects_in(tmp_path / "blobs"), None, SharedHolds(nodes_of(opener())))
    nums_going: list[int] = []
    remove = FolderObjects.remove

    def counted(objects: FolderObjects, name: str) -> None:
        with psycopg.connect(url) as connection:
            nums_going.extend(number for (number,) in connection.execute("SELECT count(*) FROM removals"))
        remove(objects, name)

    monkeypatch.setattr(FolderObjects, "remove", counted)
    digests = []
    for number in range(40):
        digests.append(record_digest(b"%d" % number))
        with blobs.hold(digests[-1]):
            blobs.put(digests[-1], b"%d" % number)
    swept = blobs.sweep(lambda _: set(), digests)
    assert swept.num_removed == len(nums_going) == 40 and not swept.failed
    assert max(nums_going) == SharedHolds.batch_size < 20, nums_going
