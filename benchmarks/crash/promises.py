"""The promises that a bank must keep after a kill and a restart."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from bank_service.backup.restore import restore
from bank_service.backup.snapshot import MANIFEST, WORK_FOLDER
from bank_service.blobs.blob_store import BlobStore
from bank_service.catalog.factory import CATALOG_FILE
from bank_service.errors import SnapshotError
from bank_service.testing.client import Client
from bank_service.wire.errors import BankError, NotFoundError
from benchmarks.crash.clients import MAX_HITS
from benchmarks.crash.expected import Content, Model, Verdict, is_right

PAST_SECONDS = 5  # half of the time that the bank keeps history for, because a check takes time
SWEEP_SECONDS = 20  # the sweep runs beside the first calls


async def check_bank(client: Client, data_dir: Path, models: dict[str, Model], verdict: Verdict) -> None:
    """Checks a bank that has its gradients in its folder."""
    if (data_dir / WORK_FOLDER).exists():
        verdict.wrong.append("a snapshot that was killed left its work folder")
    await check(client, lambda: len(list((data_dir / "blobs").glob("??/*"))), models, verdict)


async def check(client: Client, count_blobs: Callable[[], int], models: dict[str, Model], verdict: Verdict) -> None:
    """Checks that the models allow the bank's state, and updates the models. ``count_blobs``: counts the stored
    gradients."""
    alive: dict[str, Any] = {}
    for model in models.values():
        for id in model.states:
            answer = await _check_one(client, id, model, verdict)
            if answer is not None:
                alive[id] = answer
        await _check_past(client, model, verdict)
    await _check_gradients(client, alive, verdict)
    await _check_search(client, alive, verdict)
    stats = await client.stats()
    newest = max((model.sequence for model in models.values()), default=0)
    if not newest <= stats.sequence == stats.indexed_sequence or stats.num_documents != len(alive):
        verdict.wrong.append(f"{len(alive)} documents, sequence {newest} acknowledged, but stats are {stats}")
    await _check_orphans(client, count_blobs, verdict)


async def _check_one(client: Client, id: str, model: Model, verdict: Verdict) -> Any:
    """Checks one document. Returns the bank's answer for it."""
    states = model.states[id]
    answer, content = None, None
    try:
        answer = await client.get(id)
        content = Content.of(answer.document)
        if answer.version < model.versions.get(id, 0):
            verdict.lost.append(f"{id}: version {answer.version}, acknowledged was {model.versions[id]}")
        model.versions[id] = answer.version
    except NotFoundError:
        pass
    if content not in states:
        half = content is not None and any(state is not None and state.text == content.text for state in states)
        found = f"{id} is {content}, acknowledged or sent were {states}"
        (verdict.wrong if half else verdict.lost).append(found)
    model.states[id] = [content]
    return answer


async def _check_past(client: Client, model: Model, verdict: Verdict) -> None:
    """Checks that as_of still gives earlier acknowledged states, whether they changed since or not."""
    for past in model.past:
        if time.monotonic() - past.acknowledged_s > PAST_SECONDS:
            continue
        ask = {"document_ids": [past.id], "as_of": past.sequence, "include_text": True, "include_gradients": True}
        found = None
        try:
            (hit,) = (await client.query(**ask)).hits
            found = (hit.title, hit.text)
            if not is_right(hit.gradient_digest, hit.gradient, *found):
                verdict.wrong.append(f"{past.id} as of {past.sequence}: a gradient that its text does not give")
        except NotFoundError:
            pass
        except BankError as error:
            verdict.lost.append(f"{past.id} as of {past.sequence}: {error}")
            continue
        if found != (past.content and (past.content.title, past.content.text)):
            verdict.lost.append(f"{past.id} as of {past.sequence} must be {past.content}, got {found}")


async def _check_gradients(client: Client, alive: dict[str, Any], verdict: Verdict) -> None:
    for id, answer in alive.items():
        digest = answer.gradient_digest
        try:
            ((_, record),) = await client.fetch([digest])
        except BankError as error:
            verdict.lost.append(f"{id}: its gradient is not there: {error}")
            continue
        if not is_right(digest, record, answer.document.title, answer.document.text):
            verdict.wrong.append(f"{id}: a gradient that its text does not give")


async def _check_search(client: Client, alive: dict[str, Any], verdict: Verdict) -> None:
    listed = {entry.id: entry.version for entry in (await client.list(page_size=1000)).documents}
    found = {hit.id: hit.version for hit in (await client.query(text="says", top_k=MAX_HITS)).hits}
    wanted = {id: answer.version for id, answer in alive.items()}
    for name, got in (("a list", listed), ("a search", found)):
        if got != wanted:
            verdict.wrong.append(f"{name} must have {wanted}, got {got}")


async def _check_orphans(client: Client, count_blobs: Callable[[], int], verdict: Verdict) -> None:
    """Checks that all blobs without a catalog entry disappear. Missing blobs are found by other checks."""
    num_gradients = (await client.stats()).num_gradients
    deadline = time.monotonic() + SWEEP_SECONDS
    while (count := await asyncio.to_thread(count_blobs)) > num_gradients:
        if time.monotonic() > deadline:
            verdict.wrong.append(f"{count} blobs for {num_gradients} gradients, {SWEEP_SECONDS} s after the start")
            return
        await asyncio.sleep(0.02)


def check_snapshot(target: Path, verdict: Verdict) -> None:
    """Checks that the target has a whole snapshot, even if the last one failed, or that no snapshot is finished yet."""
    if not (target / MANIFEST).exists():
        return
    with tempfile.TemporaryDirectory(prefix="restored-", dir=target.parent) as folder:
        restored = Path(folder, "bank")
        try:
            list(restore(str(target), restored))
        except (SnapshotError, OSError) as error:
            verdict.wrong.append(f"a snapshot that says it is whole can't be restored: {error}")
            return
        blobs = BlobStore.in_folder(restored / "blobs")
        with closing(sqlite3.connect(restored / CATALOG_FILE)) as catalog:
            rows = catalog.execute(
                "SELECT id, title, text, gradient_digest FROM versions WHERE ended IS NULL AND NOT deleted"
            )
            for id, title, text, digest in rows:
                if not is_right(digest, blobs.get(digest), title, text):
                    verdict.wrong.append(f"{id} in a snapshot: a gradient that its text does not give")
