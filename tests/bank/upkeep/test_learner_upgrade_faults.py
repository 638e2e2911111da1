"""An upgrade whose callers give up, whose encoder fails, or whose catalog can't be read."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Coroutine, Generator
from functools import partial
from pathlib import Path
from types import coroutine
from typing import Any

import pytest

from bank_service.bank import Bank
from bank_service.blobs.blob_store import BlobStore
from bank_service.catalog.entries import NextLearner
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.errors import (
    CatalogReadError,
    CollectionMismatchError,
    InvalidArgumentError,
    LearnerMismatchError,
    OverloadedError,
    UnavailableError,
)
from bank_service.records import next_gradients
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.upkeep import learner_upgrade
from bank_service.values.documents import Document, Query
from bank_service.wire.record import DEFAULT_CODEC, decode_gradient
from tests.bank import inside
from tests.bank.upkeep.upgrading import NEW, OLD, Moody, begun, blobs, damage, level, of_new, opened, put, until


@pytest.fixture
def learner(tmp_path: Path) -> Path:
    """The folder of the next learner. Its sister has the first one."""
    (tmp_path / "a learner").mkdir()
    folder = tmp_path / "next"
    folder.mkdir()
    return folder


@coroutine
def cancelled_at(number: int, work: Coroutine[Any, Any, object]) -> Generator[Any, Any, bool]:
    """Cancels the task at an await of ``work``, counted from 0. False if there are fewer awaits."""
    error: BaseException | None = None
    for place in itertools.count():
        try:
            waited = work.send(None) if error is None else work.throw(error)
        except StopIteration:
            return False
        task = asyncio.current_task()
        if place == number and task is not None:
            task.cancel()
        try:
            yield waited
            error = None
        except BaseException as given:  # noqa: BLE001 - the work gets it
            error = given
    raise AssertionError("unreachable")


async def outlived(work: Awaitable[bool]) -> bool:
    """Whether ``work`` came to its end before it was cancelled."""
    try:
        return not await work
    except asyncio.CancelledError:
        return False


def is_under_way(bank: Bank, wanted: bool) -> bool:
    return (bank.upgrade.gradients.learner is not None) == wanted


@pytest.mark.asyncio
async def test_an_action_that_is_cancelled_at_any_await_is_done_as_a_whole(data_dir: Path, learner: Path) -> None:
    async with opened(data_dir) as bank:
        put = itertools.count()
        upgrade, spec = bank.upgrade, OLD
        for action in ("begin", "back", "finish"):
            for number in itertools.count():
                other, folder = (NEW, learner) if spec == OLD else (OLD, learner.parent / "a learner")
                if action == "begin":
                    work: Coroutine[Any, Any, object] = anext(upgrade.begin(str(folder)))
                else:
                    assert (await begun(bank, folder)).is_level
                    work = getattr(upgrade, action)()
                is_over = await asyncio.create_task(outlived(cancelled_at(number, work)))
                await until(partial(is_under_way, bank, action == "begin"))
                if action == "begin":
                    await begun(bank, folder)
                    await upgrade.back()
                spec = other if action == "finish" else spec
                result = await bank.put(Document("", f"d{next(put)}", "", "a text"))
                answer = await bank.query(Query(document_ids=(result.stored.document.id,), include_gradients=True))
                assert answer.learner_fingerprint == spec.fingerprint
                decode_gradient(answer.records[answer.hits[0].gradient_digest], spec)
                if is_over:
                    break


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> type[Moody]:
    """Every mood ends with the test."""
    for name, value in (("broken", set()), ("salt", ""), ("made", []), ("may_load", True)):
        monkeypatch.setattr(Moody, name, value)
    return Moody


@pytest.mark.asyncio
async def test_the_work_goes_on_after_errors_of_the_catalog_and_of_the_encoder(
    data_dir: Path, learner: Path, moody: type[Moody], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_upgrade, "_RETRY_SECONDS", 0.05)
    lacking, failures = SqlView.lacking_next, itertools.count()

    def failing(view: SqlView, after: int, limit: int) -> list[int]:
        if next(failures) == 1:
            raise CatalogReadError("the disk fails")
        return lacking(view, after, limit)

    async with opened(data_dir, moody()) as bank:
        await put(bank, "one", "two", "three")
        moody.broken = {"one"}
        monkeypatch.setattr(SqlView, "lacking_next", failing)
        bank_begun = asyncio.create_task(begun(bank, learner))
        while (await bank.upgrade.progress()).num_done < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(UnavailableError, match="out of memory"):
            await bank.query(of_new("one"))
        moody.broken = set()
        await put(bank, "four")
        assert not (await level(bank)).problem
        assert (await bank_begun).is_level
        assert sorted(moody.made[0].texts) == ["four", "one", "three", "two"], "none was encoded twice"


@pytest.mark.asyncio
async def test_a_learner_that_can_not_be_loaded_for_any_reason_is_told_to_queries(
    data_dir: Path, learner: Path, moody: type[Moody]
) -> None:
    async with opened(data_dir, moody()) as bank:
        await put(bank, "one")
        assert (await begun(bank, learner)).is_level
    moody.may_load = False
    async with opened(data_dir, moody()) as bank:
        await put(bank, "two")
        with pytest.raises(UnavailableError, match="out of memory"):
            await asyncio.wait_for(bank.query(of_new("two")), 10)
        await bank.upgrade.back()
        with pytest.raises(UnavailableError, match="has just ended"):
            await asyncio.wait_for(bank.upgrade.gradients.encode([2]), 10)


@pytest.mark.asyncio
async def test_a_gradient_that_can_not_be_made_again_ends_no_scrub(
    data_dir: Path, learner: Path, moody: type[Moody]
) -> None:
    async with opened(data_dir, moody()) as bank:
        await put(bank, "one", "two", "three")
        assert (await begun(bank, learner)).is_level
        for hit in (await bank.query(of_new("one", "two", "three"))).hits:
            damage(data_dir, hit.gradient_digest)
        moody.broken = {"two"}
        counts = await bank.scrub()
        assert (counts.num_gradients, counts.num_repaired, counts.num_lost) == (6, 2, 1)
        moody.broken, moody.salt = set(), "!"
        assert (await bank.scrub()).num_repaired == 1
        assert len(blobs(data_dir)) == 6, "the damaged gradient was removed, its successor is another"


@pytest.mark.asyncio
async def test_a_start_that_is_refused_leaves_the_upgrade_as_it_was(data_dir: Path, learner: Path) -> None:
    async with opened(data_dir) as bank:
        await put(bank, "one")
        assert (await begun(bank, learner)).is_level
    with pytest.raises(CollectionMismatchError, match="codec"):
        async with opened(data_dir, HashEncoder("next"), codec="factors-2-1-8"):
            pass
    async with opened(data_dir) as bank:
        assert (await bank.upgrade.progress()).next_learner == NEW.fingerprint


@pytest.mark.asyncio
async def test_a_text_that_stays_is_not_encoded_again_and_one_that_never_stays_ends_the_query(
    data_dir: Path, learner: Path, moody: type[Moody]
) -> None:
    async with opened(data_dir, moody()) as bank:
        await put(bank, "one")
        assert (await begun(bank, learner)).is_level
        await put(bank, "one", metadata={"n": "2"})
        assert (await bank.query(of_new("one"))).hits
        (encoder,) = moody.made
        await bank.upgrade.gradients.encode([1, 2])
        assert encoder.texts == ["one"] and len(blobs(data_dir)) == 2
        loop, numbers = asyncio.get_running_loop(), itertools.count()

        def change(_: list[str]) -> None:
            new = bank.put(Document("", "one", "", f"text {next(numbers)}"))
            asyncio.run_coroutine_threadsafe(new, loop).result(20)

        encoder.before = change
        await put(bank, "one", metadata={"n": "3"})
        await asyncio.to_thread(change, [])
        with pytest.raises(UnavailableError, match="changed 5 times"):
            await asyncio.wait_for(bank.query(of_new("one")), 20)
        encoder.before = lambda texts: None


@pytest.mark.asyncio
async def test_a_purge_leaves_no_gradient_that_is_being_made(
    data_dir: Path, learner: Path, moody: type[Moody], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[str] = []
    write = BlobStore.put

    def noting(store: BlobStore, digest: str, record: bytes) -> None:
        stored.append(digest)
        write(store, digest, record)

    async with opened(data_dir, moody()) as bank:
        await put(bank, "one")
        assert (await begun(bank, learner)).is_level
        (encoder,) = moody.made
        encoder.begun.clear()
        encoder.go.clear()
        await put(bank, "two")
        assert await asyncio.to_thread(encoder.begun.wait, 10)
        monkeypatch.setattr(BlobStore, "put", noting)
        await bank.delete("", "two", purge=True)
        encoder.go.set()
        await level(bank)
        await put(bank, "three")
        await level(bank)
        assert len(stored) == 2, "both are of the last document"


@pytest.mark.asyncio
async def test_queries_may_start_only_so_many_encodings_and_an_end_does_not_wait_for_those_in_the_queue(
    data_dir: Path, learner: Path, moody: type[Moody], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_gradients, "MAX_LATE", 8)
    texts = [f"text {n}" for n in range(20)]
    async with opened(data_dir, moody(), encode_batch_size=1) as bank:
        await put(bank, "one")
        assert (await begun(bank, learner)).is_level
        (encoder,) = moody.made
        encoder.go.clear()
        await put(bank, *texts)
        waiting = asyncio.create_task(bank.query(of_new(*texts[-9:])))
        await until(encoder.begun.is_set)
        await asyncio.sleep(0.3)
        same = asyncio.create_task(bank.query(of_new(*texts[-2:])))
        with pytest.raises(OverloadedError, match="8 gradients"):
            await bank.query(of_new(texts[8]))
        assert (await bank.query(of_new("one"))).hits
        back = asyncio.create_task(bank.upgrade.back())
        await until(lambda: bank.upgrade.gradients.learner is None)
        encoder.go.set()
        await back
        for query in (waiting, same):
            with pytest.raises((UnavailableError, LearnerMismatchError)):
                await query
        assert len(encoder.texts) < 6


@pytest.mark.asyncio
async def test_recoding_and_upgrade_exclude_each_other_in_the_catalog(data_dir: Path) -> None:
    async with opened(data_dir) as bank:
        catalog = inside.stores(bank).catalog
        following = NextLearner(NEW.fingerprint, NEW.layout_id, "/next")
        catalog.begin_recoding(DEFAULT_CODEC).result()
        with pytest.raises(UnavailableError, match="being recoded"):
            catalog.begin_next(following).result()
        catalog.end_recoding().result()
        catalog.begin_next(following).result()
        with pytest.raises(UnavailableError, match="/next"):
            catalog.begin_recoding(DEFAULT_CODEC).result()


@pytest.mark.asyncio
async def test_a_bank_reads_learners_below_its_root_and_without_one_for_its_own_machine_alone(
    data_dir: Path, learner: Path
) -> None:
    async with opened(data_dir, host="0.0.0.0") as bank:
        with pytest.raises(InvalidArgumentError, match="--learner-root, which it was started without"):
            await begun(bank, learner)
    async with opened(data_dir, host="0.0.0.0", learner_root=learner) as bank:
        for folder, reason in ((learner.parent / "a learner", "--learner-root"), (learner / "..", "without ..")):
            with pytest.raises(InvalidArgumentError, match=reason):
                await begun(bank, folder)
        assert (await begun(bank, learner)).is_level
