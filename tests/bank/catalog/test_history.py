"""Past versions: how long they stay, what is left of them, and who takes care of their gradients."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from bank_service.backup.restore import restore
from bank_service.bank import Bank
from bank_service.errors import NotFoundError, OutOfRangeError, VersionConflictError
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.upkeep import history_cleaner
from bank_service.values.documents import Document, Query
from bank_service.values.encoder import EncodedDocument
from bank_service.wire.record import DEFAULT_CODEC, read_header, record_digest
from tests.bank import inside
from tests.bank.search.test_as_of import open_bank

SECRET = "quilegren"


async def put(bank: Bank, id: str, text: str, **pairs: str) -> int:
    """The sequence of the change."""
    return (await bank.put(Document("", id, "", text, pairs))).stored.sequence


async def texts(bank: Bank, as_of: int | None = None) -> dict[str, str]:
    answer = await bank.query(Query("", "any text", top_k=64, include_text=True, include_gradients=True, as_of=as_of))
    for hit in answer.hits:
        assert record_digest(answer.records[hit.gradient_digest]) == hit.gradient_digest
    return {hit.id: hit.text for hit in answer.hits}


def blobs(folder: Path) -> set[str]:
    return {path.parent.name + path.name for path in (folder / "blobs").glob("??/*")}


def bytes_of(folder: Path) -> bytes:
    """The catalog's file, with all that was committed in it."""
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return b"".join(path.read_bytes() for path in folder.glob("catalog.sqlite*"))


def digest_of(folder: Path, version: int) -> str:
    """Of a past version."""
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        ((digest,),) = connection.execute("SELECT gradient_digest FROM versions WHERE ended AND version = ?", [version])
        return str(digest)


@pytest.mark.asyncio
async def test_a_version_goes_when_its_time_is_over_and_its_gradient_with_it(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_cleaner, "CLEAN_SECONDS", 0.05)
    async with open_bank(data_dir, history_seconds=3600) as bank:
        first = await put(bank, "a", f"the {SECRET}")
        await put(bank, "b", "stays")
        last = await put(bank, "a", "other")
        await put(bank, "a", "other", colour="red")  # of the same gradient
        assert await texts(bank, first) == {"a": f"the {SECRET}"}
        assert len(blobs(data_dir)) == 3 and SECRET.encode() in bytes_of(data_dir)
    async with open_bank(data_dir, history_seconds=1) as bank:
        with pytest.raises(OutOfRangeError) as caught:
            while True:  # the test's own limit ends it
                await texts(bank, last)
                await asyncio.sleep(0.05)
        assert caught.value.limit == last + 1
        assert await texts(bank, last + 1) == {"a": "other", "b": "stays"}
        while len(blobs(data_dir)) > 2:
            await asyncio.sleep(0.02)
        await inside.stores(bank).catalog.words.clean()  # the words of texts, which are not the history's
        assert SECRET.encode() not in bytes_of(data_dir)


@pytest.mark.asyncio
async def test_a_bank_that_keeps_no_history_any_more_has_none_after_its_start(data_dir: Path) -> None:
    async with open_bank(data_dir) as bank:
        first = await put(bank, "a", f"the {SECRET}")
        await put(bank, "a", "other")
    async with open_bank(data_dir, history_seconds=0) as bank:
        while (await bank.stats()).totals.num_past_versions:
            await asyncio.sleep(0.01)
        with pytest.raises(OutOfRangeError):
            await texts(bank, first)
        while len(blobs(data_dir)) > 1:
            await asyncio.sleep(0.01)
        await put(bank, "a", "a third")
        await inside.background(bank).drain()
        assert len(blobs(data_dir)) == 1
    assert SECRET.encode() not in bytes_of(data_dir)


@pytest.mark.asyncio
@pytest.mark.parametrize("history_seconds", [0, 3600])
async def test_a_purge_leaves_nothing_of_a_document_and_everything_of_the_others(
    data_dir: Path, history_seconds: int
) -> None:
    async with open_bank(data_dir, history_seconds=history_seconds) as bank:
        kept = await put(bank, "kept", "shared text")
        for text in (f"the {SECRET}", "shared text", f"again the {SECRET}"):
            newest = await put(bank, "a", text)
        with pytest.raises(VersionConflictError):
            await bank.delete("", "a", 2, purge=True)
        result = await bank.delete("", "a", 3, purge=True)
        assert (result.version, result.sequence) == (3, newest + 1)
        assert len(blobs(data_dir)) == 1, "of the text that the other document has, too"
        await inside.stores(bank).catalog.words.clean()
        assert SECRET.encode() not in bytes_of(data_dir)
        oldest = (await bank.stats()).totals.oldest_as_of
        assert oldest == (0 if history_seconds else newest), "a purge takes nobody else's past"
        for sequence in range(max(oldest, kept), result.sequence + 1):
            assert await texts(bank, sequence) == {"kept": "shared text"}
        again = await bank.delete("", "a", purge=True)
        assert (again.version, again.sequence) == (result.version, result.sequence)
        await put(bank, "a", "another life")
        assert await texts(bank, result.sequence) == {"kept": "shared text"}


@pytest.mark.asyncio
async def test_what_is_deleted_already_can_still_be_purged(data_dir: Path) -> None:
    async with open_bank(data_dir) as bank:
        first = await put(bank, "a", f"the {SECRET}")
        deleted = await bank.delete("", "a")
        assert await texts(bank, first) == {"a": f"the {SECRET}"} and await texts(bank) == {}
        with pytest.raises(NotFoundError):
            await bank.delete("", "a")
        with pytest.raises(VersionConflictError):
            await bank.delete("", "a", 1, purge=True)
        result = await bank.delete("", "a", 0, purge=True)
        assert (result.version, result.sequence) == (1, deleted.sequence)
        assert await texts(bank, first) == {} and not blobs(data_dir)
        await inside.stores(bank).catalog.words.clean()
        assert SECRET.encode() not in bytes_of(data_dir)


@pytest.mark.asyncio
async def test_a_snapshot_has_the_past_and_its_gradients(data_dir: Path, tmp_path: Path) -> None:
    async with open_bank(data_dir) as bank:
        first = await put(bank, "a", "the first")
        await put(bank, "a", "the second")
        await bank.delete("", "a")
        progress = [progress async for progress in bank.snapshot(str(tmp_path / "snapshot"))]
        assert progress[-1].num_gradients == 2
    list(restore(str(tmp_path / "snapshot"), tmp_path / "restored"))
    async with open_bank(tmp_path / "restored") as bank:
        assert await texts(bank, first) == {"a": "the first"}
        assert await texts(bank, first + 1) == {"a": "the second"} and await texts(bank) == {}


@pytest.mark.asyncio
async def test_a_past_versions_gradient_is_made_again_from_its_text(data_dir: Path, tmp_path: Path) -> None:
    async with open_bank(data_dir) as bank:
        first = await put(bank, "a", "the first")
        await put(bank, "a", "the first", colour="red")
        await put(bank, "a", "the second")
        for damage in (Path.unlink, lambda path: path.write_bytes(b"rot")):
            digest = digest_of(data_dir, 1)
            damage(inside.stores(bank).blobs.path(digest))
            await inside.background(bank).drain()
            await inside.stores(bank).cache.remove([digest])
            assert await texts(bank, first) == {"a": "the first"}
            assert digest_of(data_dir, 1) == digest, "the encoder gives the same"
        inside.stores(bank).blobs.path(digest).unlink()
        counts = await bank.scrub()
        assert (counts.num_gradients, counts.num_repaired, counts.num_lost) == (2, 1, 0)
        inside.stores(bank).blobs.path(digest).unlink()
        assert [item async for item in bank.snapshot(str(tmp_path / "snapshot"))][-1].manifest is not None


class ForgetfulEncoder(HashEncoder):
    """Gives each text another gradient each time."""

    def encode(self, documents: list[tuple[str, str]]) -> list[EncodedDocument]:  # type: ignore[override]
        return super().encode([(f"{len(self.batches)}", text) for _, text in documents])


@pytest.mark.asyncio
async def test_where_the_encoder_gives_another_gradient_the_past_has_that_one(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.bank.search.test_as_of.HashEncoder", ForgetfulEncoder)
    async with open_bank(data_dir) as bank:
        first = await put(bank, "a", "the first")
        await put(bank, "a", "the second")
        digest = digest_of(data_dir, 1)
        inside.stores(bank).blobs.path(digest).write_bytes(b"rot")
        await inside.background(bank).drain()
        await inside.stores(bank).cache.remove([digest])
        assert await texts(bank, first) == {"a": "the first"}
        assert digest_of(data_dir, 1) != digest and digest not in blobs(data_dir)
        assert (await bank.get("", "a")).version == 2, "the document has nothing to do with it"


@pytest.mark.asyncio
async def test_the_past_keeps_its_codec_when_the_collection_gets_another(data_dir: Path) -> None:
    async with open_bank(data_dir) as bank:
        first = await put(bank, "a", "a text")
        progress = [progress async for progress in bank.recode("factors-1-0-8")]
        assert progress[-1].finished and progress[-1].num_recoded == 1
        query = Query("", document_ids=("a",), include_gradients=True, as_of=first)
        for asked, codec, version in ((query, DEFAULT_CODEC, 1), (Query("", document_ids=("a",)), "factors-1-0-8", 2)):
            (hit,) = (await bank.query(asked)).hits
            found = [record async for _, record in bank.fetch([hit.gradient_digest])]
            assert (read_header(found[0]).codec, hit.version) == (codec, version)


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["recoded", "repaired", "repaired with another"])
@pytest.mark.parametrize("history_seconds", [0, 3600])
async def test_without_history_the_past_ends_where_a_document_gets_another_gradient(
    data_dir: Path, way: str, history_seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "repaired with another":
        monkeypatch.setattr("tests.bank.search.test_as_of.HashEncoder", ForgetfulEncoder)
    async with open_bank(data_dir, history_seconds=history_seconds) as bank:
        first = await put(bank, "a", "a text")
        if way == "recoded":
            assert [progress async for progress in bank.recode("factors-1-0-8")][-1].num_recoded == 1
        else:
            (digest,) = blobs(data_dir)
            inside.stores(bank).blobs.path(digest).unlink()
            counts = await bank.scrub()
            assert (counts.num_repaired, counts.num_lost) == (1, 0)
        changed = (await bank.get("", "a")).sequence
        assert (changed == first) is (way == "repaired")
        if history_seconds or way == "repaired":
            assert await texts(bank, first) == {"a": "a text"}
        else:
            with pytest.raises(OutOfRangeError) as caught:
                await texts(bank, first)
            assert caught.value.limit == changed
