"""The final check: compares the bank's content with the acknowledged writes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bank_service.testing.client import Client
from bank_service.wire.record import record_digest
from benchmarks.bank.child_bank import folder_bytes
from benchmarks.bank_soak.ledger import Space

NUM_SAMPLED = 50  # documents of a namespace whose texts, gradients and vectors are looked at
SETTLE_SECONDS = 15  # time for the bank to remove unused gradients


async def differences(
    clients: Mapping[str, Client], admin: Client, spaces: Sequence[Space], data_dir: Path, dimension: int
) -> list[str]:
    """The differences between the bank and the acknowledged writes. Empty if there are none."""
    found: list[str] = []
    for space in spaces:
        client = clients[space.name]
        found += await _listed(client, space)
        ids = random.Random(0).sample(sorted(space.documents), min(NUM_SAMPLED, len(space.documents)))
        for id in ids:
            found += await _one(client, space, id, dimension)
    stats = await admin.stats()
    count = sum(len(space.documents) for space in spaces)
    if stats.num_documents != count:
        found.append(f"GetStats must count {count} documents, got {stats.num_documents}")
    deadline = time.monotonic() + SETTLE_SECONDS
    while (blobs := folder_bytes(data_dir)["num_blobs"]) != stats.num_gradients:
        if time.monotonic() > deadline:
            found.append(f"the folder must hold {stats.num_gradients} gradients, got {blobs}")
            break
        await asyncio.sleep(0.2)
    return found


async def _listed(client: Client, space: Space) -> list[str]:
    listed: dict[str, tuple[int, str]] = {}
    token = ""
    while True:
        page = await client.list(namespace=space.name, page_size=1000, page_token=token)
        listed |= {entry.id: (entry.version, entry.gradient_digest) for entry in page.documents}
        if not (token := page.next_page_token):
            break
    wanted = {id: (stored.version, stored.digest) for id, stored in space.documents.items()}
    return [
        f"{id} must be at {wanted.get(id)}, got {listed.get(id)}"
        for id in sorted(wanted.keys() | listed.keys())
        if wanted.get(id) != listed.get(id)
    ]


async def _one(client: Client, space: Space, id: str, dimension: int) -> list[str]:
    stored, found = space.documents[id], []
    document = (await client.get(id, space.name)).document
    if (document.text, dict(document.metadata)) != (stored.content.text, stored.content.metadata):
        found.append(f"{id} has another content than acknowledged")
    ((digest, record),) = await client.fetch([stored.digest])
    if digest != stored.digest or record_digest(record) != digest:
        found.append(f"{id} has another gradient than acknowledged")
    hits = (await client.query(namespace=space.name, vector=stored.content.vector(dimension), top_k=1)).hits
    if [hit.id for hit in hits] != [id]:
        found.append(f"{id} is not the nearest to its own vector")
    return found
