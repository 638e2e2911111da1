"""A bank moved to PostgreSQL and an object store, and back: the same bank in each place, and the source untouched."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from bank_service.backup.move import BankPlace, move
from bank_service.catalog.entries import NextLearner
from bank_service.catalog.factory import load_catalog, open_catalog, stopped_catalog
from bank_service.catalog.postgres import bulk_load
from bank_service.catalog.sql.transfer import StoppedSqlCatalog
from bank_service.errors import (
    BankInUseError,
    CollectionMismatchError,
    NotFoundError,
)
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from bank_service.wire.generated import bank_pb2 as pb
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient
from tests.bank.postgres_server import shared_server
from tests.bank.records.test_fetch import whole

TABLES = {
    "collection", "history_setting", "horizons", "namespace_usage", "next_gradients", "next_learner",
    "pending_erasures", "recoding", "sentence_vectors", "versions",
}  # fmt: skip
OTHERS = "貓頭鷹坐在樹上。 It sees ünïts."
RED = pb.Filter(
    conditions=[pb.Filter.Condition(key="colour", operator=pb.Filter.Condition.EQUALS, values=["red", 'a "b" \\ é'])]
)


@asynccontextmanager
async def bank(place: BankPlace, **settings: Any) -> AsyncIterator[Client]:
    config = BankConfig(data_dir=place.data_dir, catalog=place.catalog, objects=place.objects, **settings)
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        yield client


async def live(client: Client, namespaces: tuple[str, ...] = ("", "one", "two")) -> list[int]:
    """Writes, changes, deletes and purges documents. Returns sequences at which the past may be asked for."""
    as_of = []
    for namespace in namespaces:
        await client.ingest(
            *(
                {
                    "id": f"d{number}",
                    "namespace": namespace,
                    "title": f"title {number % 7}",
                    "text": f"the owl number {number} of {namespace} sits in tree {number % 5}. {OTHERS}",
                    "metadata": {"colour": ("red", "green", 'a "b" \\ é')[number % 3], "number": str(number)},
                }
                for number in range(40)
            )
        )
        await client.put("d1", "an owl that has flown", namespace=namespace)
        as_of.append((await client.put("d2", "a hedgehog in the grass", namespace=namespace)).sequence - 1)
        await client.delete("d3", namespace)
        await client.put("gone", "purged words", namespace=namespace)
        await client.delete("gone", namespace, purge=True)
        await client.put("d3", "the owl is back", namespace=namespace)
        as_of.append((await client.delete("d4", namespace)).sequence)
    await client.put("last", "the last of its namespace", namespace="empty")
    await client.delete("last", "empty")
    return as_of


async def seen(client: Client, as_of: list[int]) -> list[Any]:
    """What a client sees of a bank: documents, gradients, and the answers to many queries."""
    found: list[Any] = []
    for namespace in ("", "one", "two"):
        listed = (await client.list(namespace=namespace, page_size=100)).documents
        found += listed
        found += [await client.get(entry.id, namespace) for entry in listed[::7]]
        await whole(client, [entry.gradient_digest for entry in listed])
        for query in (
            {"text": "the owl number 7 in tree 2"},
            {"text": "the owl number 7", "retrieval": pb.LEXICAL},
            {"text": "貓頭鷹", "retrieval": pb.LEXICAL},
            {"text": "owl grass", "retrieval": pb.HYBRID, "with_cue": 2},
            {"vector": [0.1 * number for number in range(1, 33)]},
            {"text": "owl", "filter": RED},
            {"text": "owl", "filter": RED, "retrieval": pb.LEXICAL},
            *({"text": "the owl number 2", "as_of": sequence} for sequence in as_of),
        ):
            found.append(await client.query(namespace=namespace, top_k=20, **query))
            assert found[-1].hits or "as_of" in query
    for place, namespace in enumerate(("", "one", "two")):
        named = {"document_ids": ["d1", "d4"], "as_of": as_of[2 * place], "include_text": True}
        found.append(await client.query(namespace=namespace, **named))
    await client.refused(client.query(namespace="never", text="x", top_k=1), NotFoundError)
    found += (await client.query(namespace="empty", text="x", top_k=1)).hits
    stats = await client.stats()
    found.append(
        [stats.sequence, *stats.namespaces, stats.num_gradients, stats.gradient_bytes, stats.num_past_versions]
    )
    return found


def contents(folder: Path) -> dict[str, str]:
    """The digest of each file, but for those that only tell who has the folder."""
    return {
        name: digest
        for name, digest in everything(folder).items()
        if digest and name not in ("lock", "address.json", "catalog.sqlite-wal", "catalog.sqlite-shm")
    }


def everything(folder: Path) -> dict[str, str]:
    """The digest of each file, and an empty text for each folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def places(tmp_path: Path, objects_url: str) -> dict[str, BankPlace]:
    """Where a bank may be, each place a new one."""
    return {
        "folder": BankPlace(tmp_path / "folder"),
        "postgres": BankPlace(tmp_path / "postgres", shared_server().new_schema()),
        "objects": BankPlace(tmp_path / "objects", None, f"{objects_url}-objects"),
        "both": BankPlace(tmp_path / "both", shared_server().new_schema(), f"{objects_url}-both"),
    }


@pytest.mark.asyncio
async def test_a_bank_is_the_same_everywhere_and_each_source_stays_as_it_was(tmp_path: Path, objects_url: str) -> None:
    source = BankPlace(tmp_path / "source")
    async with bank(source) as client:  # without history: its namespace gets a horizon
        for text in ("a text", "another text"):
            await client.put("old", text, namespace="old")
    async with bank(source, history_seconds=3600) as client:
        as_of = await live(client)
    async with bank(source) as client:
        before = await seen(client, as_of)
    for name, place in places(tmp_path, objects_url).items():
        files = everything(source.data_dir)
        *steps, last = move(source, place)
        assert everything(source.data_dir) == files
        assert [step.num_done for step in steps] == sorted(step.num_done for step in steps)
        assert last.num_done == last.num_copied == last.num_gradients > 100
        assert last.num_rows.keys() == TABLES
        assert {table for table, number in last.num_rows.items() if not number} == {
            "next_gradients", "next_learner", "recoding", "pending_erasures",
        }  # fmt: skip
        async with bank(place) as client:
            assert await seen(client, as_of) == before, name
            again = await client.put("d1", "an owl that has flown", namespace="one")
            assert again.outcome == pb.IngestDocumentsResponse.UNCHANGED
        source = place
    async with bank(source) as client:
        changed = await client.put("d1", "another text")
        assert changed.sequence == before[-1][0] + 1 and changed.version == 3
        assert (await client.query(text="another text", top_k=1)).hits[0].id == "d1"


def test_every_table_comes_along(tmp_path: Path) -> None:
    """Those that a bank seldom fills: the next learner and its gradients, and erasures that are not finished."""
    source = tmp_path / "source"
    source.mkdir()
    catalog = open_catalog(source, IDENTITY, history_seconds=9)
    put = catalog.put(document(), gradient(), None).result()
    catalog.begin_next(NextLearner("c" * 64, "d" * 16, "/learner")).result()
    catalog.put_next("c" * 64, put.stored.sequence, gradient("7")).result()
    catalog.put(document("b"), gradient("1"), None).result()
    catalog.delete("n", "b", None, purge=True).result()
    catalog.close()
    for url in (None, shared_server().new_schema()):
        target = tmp_path / ("sqlite" if url is None else "postgres")
        target.mkdir()
        with stopped_catalog(source, None) as stopped:
            assert list(stopped.gradients()) == [["0" * 64, "7" * 64]]
            counts = load_catalog(target, url, stopped, "a new id")
        assert counts == {
            **dict.fromkeys(TABLES, 1),
            "recoding": 0,
            "horizons": 0,
            "sentence_vectors": 0,
            "versions": 2,
        }
        moved = open_catalog(target, IDENTITY, url=url)
        assert moved.collection_id == "a new id" and moved.history_seconds == 9
        with moved.view() as view:
            assert view.get("n", "a") == put.stored
            assert view.next_learner() == NextLearner("c" * 64, "d" * 16, "/learner")
            assert [erasure.digests for erasure in view.pending_erasures(0, 9)] == [("1" * 64,)]
        moved.delete("n", "a", None, purge=True).result()
        with moved.view() as view:
            assert len(view.pending_erasures(0, 9)) == 2
        moved.close()


@pytest.mark.asyncio
async def test_a_place_that_is_not_new_is_refused_and_stays_as_it_was(tmp_path: Path, objects_url: str) -> None:
    source, other = BankPlace(tmp_path / "source"), BankPlace(tmp_path / "other")
    taken = BankPlace(tmp_path / "taken", shared_server().new_schema(), objects_url)
    stranger = BankPlace(tmp_path / "stranger", None, f"{objects_url}-stranger")
    for place in (source, other, taken, stranger):
        async with bank(place) as client:
            await client.put("a", "an owl")
    new = tmp_path / "new"
    for target, message in (
        (source, "into another folder"),
        (other, "must be absent or empty, it has"),
        (BankPlace(new, None, objects_url), "must be empty, it belongs to a bank"),
        (BankPlace(tmp_path / "newer", taken.catalog), "must be without a catalog, it has the collection"),
    ):
        files = contents(tmp_path / "other"), contents(source.data_dir)
        with pytest.raises(CollectionMismatchError, match=message):
            list(move(source, target))
        assert files == (contents(tmp_path / "other"), contents(source.data_dir))
    assert not contents(tmp_path / "newer"), "no gradient is copied to a place that can't be used"
    with pytest.raises(CollectionMismatchError, match="it has part of"):
        list(move(other, BankPlace(new)))
    for nowhere in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CollectionMismatchError, match="must be the folder of a bank"):
            list(move(BankPlace(nowhere), BankPlace(tmp_path / "newest")))
    with pytest.raises(CollectionMismatchError, match="has its catalog in PostgreSQL; name it with --from-catalog"):
        list(move(BankPlace(taken.data_dir), BankPlace(tmp_path / "newest")))
    with pytest.raises(CollectionMismatchError, match="--from-objects must be"):
        list(move(BankPlace(taken.data_dir, taken.catalog, "s3://other/x"), BankPlace(tmp_path / "newest")))
    empty = tmp_path / "empty"
    empty.mkdir()
    for lost, message in (
        (BankPlace(empty, taken.catalog), "which has none; name .* --from-objects"),
        (BankPlace(empty, taken.catalog, f"{objects_url}-wrong"), "-wrong, which has none"),
        (BankPlace(empty, taken.catalog, stranger.objects), "of another bank; name .* --from-objects"),
    ):
        with pytest.raises(CollectionMismatchError, match=message):
            list(move(lost, BankPlace(tmp_path / "newest")))
    assert not contents(tmp_path / "newest")
    async with bank(taken) as client:
        assert (await client.get("a")).document.text == "an owl"
        with pytest.raises(BankInUseError):
            list(move(taken, BankPlace(tmp_path / "newest")))
        with pytest.raises(BankInUseError):
            list(move(source, taken))


@pytest.mark.asyncio
async def test_a_server_without_the_locks_for_all_namespaces_is_refused_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = BankPlace(tmp_path / "source"), BankPlace(tmp_path / "target", shared_server().new_schema())
    async with bank(source) as client:
        for number in range(30):
            await client.put("a", "an owl", namespace=f"n{number}")
    with monkeypatch.context() as patch:
        patch.setattr(bulk_load, "LOCKS_PER_NAMESPACE", 1_000)
        with pytest.raises(RuntimeError, match="max_locks_per_transaction must be at least .* 30 namespaces, got"):
            list(move(source, target))
    assert not contents(target.data_dir)
    nums_locks: list[int] = []
    compare = bulk_load.compare

    def counted(source: StoppedSqlCatalog, connection: sa.Connection, collection_id: str) -> dict[str, int]:
        count = "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()"
        nums_locks.append(connection.exec_driver_sql(count).scalar_one())
        return compare(source, connection, collection_id)

    monkeypatch.setattr(bulk_load, "compare", counted)
    list(move(source, target))
    (num_locks,) = nums_locks
    assert 30 * 10 < num_locks <= 30 * bulk_load.LOCKS_PER_NAMESPACE + bulk_load.OTHER_LOCKS
