"""Clients that write, read and check their answers until the bank is killed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

from bank_service.testing.client import Client, own_errors, upload_of
from bank_service.wire.errors import BankError, InternalError, NotFoundError, UnavailableError, VersionConflictError
from bank_service.wire.generated import bank_pb2 as pb
from benchmarks.crash.expected import Content, Model, Recorded, Verdict, is_right, record_of
from benchmarks.crash.killable import Process

IDS_PER_WRITER = 6
MAX_HITS = 64  # of one query: all documents of all writers
SNAPSHOT_SECONDS = 0.2  # between the end of one and the next
FAULT_SECONDS = 20  # time for a bank to reach its fault


async def work_until_killed(
    process: Process,
    models: dict[str, Model],
    verdict: Verdict,
    generator: random.Random,
    seconds: float | None,
    target: Path | None,
    kill: Callable[[], None],
) -> bool:
    """Puts load on the bank, lets it write snapshots to ``target``, and calls ``kill`` after ``seconds``.

    target None: it writes none. seconds None: the bank must kill itself. False if it did not.
    """
    async with Client(process.address.target) as client:
        tasks = clients_of(client, models, verdict, generator)
        if target is not None:
            tasks.append(asyncio.create_task(_snapshot(client, target)))
        died = await killed_at(process, seconds, kill)
        await ended(tasks, verdict)
    return died


def clients_of(
    client: Client, models: dict[str, Model], verdict: Verdict, generator: random.Random
) -> list[asyncio.Task[None]]:
    """A writer for each model, and two readers. They work until a call fails."""
    tasks = [
        asyncio.create_task(_write(client, name, model, verdict, random.Random(generator.random())))
        for name, model in models.items()
    ]
    return tasks + [asyncio.create_task(_read(client, verdict)) for _ in range(2)]


async def killed_at(process: Process, seconds: float | None, kill: Callable[[], None]) -> bool:
    """Calls ``kill`` after ``seconds``, or waits until the bank kills itself. False if it did not."""
    died = True
    if seconds is None:
        process.arm()
        died = await asyncio.to_thread(process.wait, FAULT_SECONDS)
    else:
        await asyncio.sleep(seconds)
    await asyncio.to_thread(kill)
    return died


async def ended(tasks: list[asyncio.Task[None]], verdict: Verdict) -> None:
    """Returns when all clients have ended."""
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if not _is_end(result):
            verdict.wrong.append(f"a client's call ended with {type(result).__name__}: {result}")


def _is_end(result: BaseException | None) -> bool:
    """Whether a client gets such an error from a killed bank."""
    cut = isinstance(result, InternalError) and "CANCELLED" in result.message
    return isinstance(result, UnavailableError) or cut


async def _write(client: Client, name: str, model: Model, verdict: Verdict, generator: random.Random) -> None:
    """Writes one document after another. A write without an acknowledgement may or may not have happened."""
    while True:
        id = f"{name}-{generator.randrange(IDS_PER_WRITER)}"
        (now,) = model.states.get(id, [None])
        choice = generator.random()
        if now is not None and choice < 0.25:
            await _delete(client, id, model, verdict)
            continue
        if now is not None and choice < 0.35:
            wanted = Content(now.title, now.text, str(generator.random()))  # the metadata alone
        elif now is not None and choice < 0.4:
            await _conflict(client, id, now, model, verdict)
            continue
        else:
            title = "uploaded" if choice > 0.8 else "encoded"
            wanted = Content(title, f"{id} says {generator.random()}", str(generator.random()))
        await _put(client, id, now, wanted, model, verdict)
        if generator.random() < 0.3:
            await _read_own(client, id, model, verdict)


async def _put(client: Client, id: str, now: Content | None, wanted: Content, model: Model, verdict: Verdict) -> None:
    model.states[id] = [now, wanted]
    document = wanted.document(id)
    if wanted.title == "uploaded":
        record = record_of(wanted.title, wanted.text)
        response = (await client.upload(*upload_of(document, record, chunk_bytes=64)))[0]
    else:
        response = (await client.ingest(document))[0]
    if response.version <= model.versions.get(id, 0) or response.sequence <= model.sequence:
        verdict.wrong.append(f"{id}: version {response.version} and sequence {response.sequence} must have grown")
    _acknowledged(model, id, wanted, response.sequence)
    model.versions[id] = response.version


async def _delete(client: Client, id: str, model: Model, verdict: Verdict) -> None:
    model.states[id].append(None)
    response = await client.delete(id)
    if response.version < model.versions[id] or response.sequence <= model.sequence:
        verdict.wrong.append(f"{id}: deleted version {response.version}, acknowledged was {model.versions[id]}")
    _acknowledged(model, id, None, response.sequence)
    try:
        await client.get(id)
        verdict.wrong.append(f"{id} is there after its deletion was acknowledged")
    except NotFoundError:
        pass


async def _conflict(client: Client, id: str, now: Content, model: Model, verdict: Verdict) -> None:
    """A write that must be refused changes nothing."""
    try:
        await client.put(id, "never to be stored", expected_version=model.versions[id] + 1)
        verdict.wrong.append(f"{id} was written past the version expected")
    except VersionConflictError:
        pass


def _acknowledged(model: Model, id: str, content: Content | None, sequence: int) -> None:
    model.states[id] = [content]
    model.sequence = sequence
    model.num_acknowledged += 1
    model.past.append(Recorded(id, content, sequence))


async def _read_own(client: Client, id: str, model: Model, verdict: Verdict) -> None:
    """The writer finds its own write by a search that could find every document."""
    hits = {hit.id: hit for hit in (await client.query(text=id, top_k=MAX_HITS, include_text=True)).hits}
    (content,) = model.states[id]
    assert content is not None
    hit = hits.get(id)
    if hit is None or (hit.version, hit.title, hit.text) != (model.versions[id], content.title, content.text):
        verdict.wrong.append(f"{id}: a query after version {model.versions[id]} was acknowledged found {hit}")


async def _snapshot(client: Client, target: Path) -> None:
    """Makes snapshots at one target. Each replaces the one before."""
    while True:
        async with own_errors():
            async for _ in client.stub.CreateSnapshot(pb.CreateSnapshotRequest(target=str(target))):
                pass
        await asyncio.sleep(SNAPSHOT_SECONDS)


async def _read(client: Client, verdict: Verdict) -> None:
    """Searches and fetches. All answers must be whole."""
    while True:
        try:
            hits = (await client.query(text="says", top_k=MAX_HITS, include_text=True)).hits
            if hits:
                chosen = {hit.gradient_digest: hit for hit in hits[:: max(1, len(hits) // 4)]}
                for digest, record in await client.fetch(list(chosen)):
                    if not is_right(digest, record, chosen[digest].title, chosen[digest].text):
                        verdict.wrong.append(f"{chosen[digest].id}: a gradient that its text does not give")
        except NotFoundError:
            pass  # no document yet, or one changed between search and fetch
        except BankError as error:
            if _is_end(error):
                raise
            verdict.wrong.append(f"a read failed: {error}")
        await asyncio.sleep(0)
