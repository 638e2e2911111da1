"""Writers and readers at a bounded rate, each with the token of its namespace."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc

from bank_service.testing.client import Client, own_errors
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.limits import MAX_FETCH_DIGESTS
from bank_service.wire.record import GradientSpec, record_digest
from benchmarks.bank_soak.ledger import PAIRS, Log, SeededContent, Space, Stored, digest_of

NOT_FOUND, ABORTED, DENIED = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.PERMISSION_DENIED,
)
MAX_CANCEL_SECONDS = 0.02  # a cancelled call is cancelled within this time
IDS_PER_DOCUMENT = 1.2  # every fifth write of a present document deletes it, so this many ids reach the target
RAMP_STREAM = 50  # documents of one stream while the bank is filled


async def paced(interval: float, log: Log, step: Callable[[], Awaitable[None]]) -> None:
    """One step each ``interval`` seconds. If the bank is slow, missed steps are left out."""
    due = time.monotonic() + random.random() * interval
    while not log.is_over:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await step()
        due = max(due + interval, time.monotonic())


class SoakWriter:
    """Changes its own ids in one namespace, and knows the expected content of each."""

    def __init__(
        self,
        client: Client,
        space: Space,
        number: int,
        spec: GradientSpec,
        dimension: int,
        log: Log,
        seed: int,
        given_up: float,
    ) -> None:
        """given_up: the share of changes that are cancelled first and then repeated."""
        self._client = client
        self._space = space
        self._spec = spec
        self._dimension = dimension
        self._log = log
        self._random = random.Random(seed)
        self._given_up_share = given_up
        self._ids = [f"{space.name}/{number}/{index}" for index in range(round(space.target * IDS_PER_DOCUMENT))]

    async def fill(self) -> None:
        """Stores the target's documents as fast as possible."""
        ids = self._random.sample(self._ids, self._space.target)
        for start in range(0, len(ids), RAMP_STREAM):
            chosen = {id: self._new_content() for id in ids[start : start + RAMP_STREAM]}
            parts = [part for id, content in chosen.items() for part in self._parts(id, content)]
            for (id, content), response in zip(chosen.items(), await self._client.upload(*parts), strict=True):
                self._acknowledged(id, content, response)

    async def step(self) -> None:
        """One write. Sometimes it is read back."""
        id = self._random.choice(self._ids)
        stored, choice = self._space.documents.get(id), self._random.random()
        if stored is None:
            await self._put("create", id, self._new_content(), "CREATED")
        elif choice < 0.2:
            await self._delete(id)
        elif choice < 0.3:
            await self._put("unchanged", id, stored.content, "UNCHANGED")
        elif choice < 0.4:
            await self._put("update_metadata", id, SeededContent(stored.content.seed, str(choice)), "UPDATED")
        elif choice < 0.45:
            async with self._log.call("version_conflict", ABORTED):
                await self._client.delete(id, self._space.name, expected_version=stored.version + 1)
                self._log.is_wrong(f"{id} was deleted past the version expected")
        elif choice < 0.45 + self._given_up_share:
            await self._given_up(id)
        else:
            await self._put("update", id, self._new_content(), "UPDATED")
        if self._random.random() < 0.2:
            await self._read_back(id)

    async def _put(self, kind: str, id: str, content: SeededContent, outcome: str | None) -> None:
        parts = self._parts(id, content)
        async with self._log.call(kind):
            (response,) = await self._client.upload(*parts)
            if outcome and response.outcome != pb.IngestDocumentsResponse.Outcome.Value(outcome):
                self._log.is_wrong(f"{id}: {kind} must be {outcome}, got outcome {response.outcome}")
            self._acknowledged(id, content, response)

    async def _delete(self, id: str) -> None:
        async with self._log.call("delete"):
            response = await self._client.delete(id, self._space.name)
            if response.version != self._space.documents[id].version:
                self._log.is_wrong(f"{id}: deleted version {response.version}, not {self._space.documents[id].version}")
            del self._space.documents[id]

    async def _given_up(self, id: str) -> None:
        """Cancels a write on its way and writes again at once. The second write must win."""
        parts = self._parts(id, self._new_content())
        await cancelled(self._client.upload(*parts), self._random, self._log, "write_given_up")
        await self._put("write_after_given_up", id, self._new_content(), None)

    async def _read_back(self, id: str) -> None:
        """Reads a document. It must be the acknowledged one, because it has no other writer."""
        stored = self._space.documents.get(id)
        async with self._log.call("get_own", *([] if stored else [NOT_FOUND])):
            found = await self._client.get(id, self._space.name)
            if stored is None:
                self._log.is_wrong(f"{id} is there after its deletion")
            elif (found.version, found.gradient_digest, found.document.text, dict(found.document.metadata)) != (
                stored.version,
                stored.digest,
                stored.content.text,
                stored.content.metadata,
            ):
                self._log.is_wrong(f"{id} must be as acknowledged, version {stored.version}, got {found.version}")

    def _acknowledged(self, id: str, content: SeededContent, response: pb.IngestDocumentsResponse) -> None:
        digest = digest_of(content, self._spec)
        if response.gradient_digest != digest:
            self._log.is_wrong(f"{id}: the gradient stored is not the one sent")
        self._space.documents[id] = Stored(content, response.version, digest)

    def _new_content(self) -> SeededContent:
        return SeededContent(self._random.getrandbits(48))

    def _parts(self, id: str, content: SeededContent) -> list[pb.IngestGradientsRequest]:
        return content.upload(self._space.name, id, self._spec, self._dimension)


class SoakReader:
    """Searches, lists and fetches in one namespace. All answers must be whole and belong to the namespace."""

    def __init__(self, client: Client, space: Space, foreign: str, dimension: int, log: Log, seed: int) -> None:
        self._client = client
        self._space = space
        self._foreign = foreign  # a namespace that the token does not cover
        self._dimension = dimension
        self._log = log
        self._random = random.Random(seed)
        self._digests: list[str] = []  # of the last hits
        self._kinds = {self._query: 70, self._batch: 7, self._fetch: 25, self._list: 5, self._get: 8}
        self._kinds |= {self._refused: 3, self._given_up: 5}

    async def step(self) -> None:
        (kind,) = self._random.choices(list(self._kinds), list(self._kinds.values()))
        await kind()

    async def _query(self) -> None:
        kind = self._random.choice(["dense", "dense", "dense", "filtered", "filtered_rare", "lexical", "hybrid"])
        async with self._log.call(kind):
            hits = (await self._client.query(**self._fields(kind))).hits
            self._seen(kind, hits)

    async def _batch(self) -> None:
        async with self._log.call("batch_of_8"):
            for response in await self._client.query_batch(*[self._fields("dense") for _ in range(8)]):
                self._seen("batch_of_8", response.hits)

    async def _fetch(self) -> None:
        if not self._digests:
            return
        async with self._log.call("fetch", NOT_FOUND):  # it may have been changed since the query
            for digest, record in await self._client.fetch(self._digests[:3]):
                if record_digest(record) != digest:
                    self._log.is_wrong(f"a record does not match its digest {digest}")

    async def _list(self) -> None:
        async with self._log.call("list"):
            page = await self._client.list(namespace=self._space.name, page_size=200)
            self._seen("list", page.documents)

    async def _get(self) -> None:
        id = self._random.choice(list(self._space.documents))
        async with self._log.call("get", NOT_FOUND):
            await self._client.get(id, self._space.name)

    async def _refused(self) -> None:
        async with self._log.call("foreign_namespace", DENIED):
            await self._client.query(namespace=self._foreign, vector=self._vector(), top_k=1)
            self._log.is_wrong(f"the token of {self._space.name} may read {self._foreign}")

    async def _given_up(self) -> None:
        if self._digests and self._random.random() < 0.5:
            call = self._client.fetch(self._digests)
        else:
            call = self._client.query(**self._fields(self._random.choice(["dense", "filtered", "lexical"])))
        await cancelled(call, self._random, self._log, "read_given_up")

    def _fields(self, kind: str) -> dict[str, object]:
        fields: dict[str, object] = {"namespace": self._space.name, "top_k": 10}
        content = SeededContent(self._random.getrandbits(48))
        if kind in ("lexical", "hybrid"):
            return {**fields, "text": " ".join(content.text.split()[:8]), "retrieval": kind.upper()}
        if kind.startswith("filtered"):
            name = "topic" if kind == "filtered_rare" else "shelf"
            condition = {"key": name, "operator": "EQUALS", "values": [str(self._random.randrange(PAIRS[name]))]}
            fields["filter"] = pb.Filter(conditions=[pb.Filter.Condition(**condition)])
        return {**fields, "vector": self._vector()}

    def _vector(self) -> list[float]:
        return SeededContent(self._random.getrandbits(48)).vector(self._dimension)

    def _seen(self, kind: str, hits: object) -> None:
        entries = list(hits)  # type: ignore[call-overload]
        if not all(entry.id.startswith(f"{self._space.name}/") for entry in entries):
            self._log.is_wrong(f"{kind}: a document of another namespace than {self._space.name}")
        if kind in ("dense", "list") and not entries:
            self._log.is_wrong(f"{kind}: nothing was found in {self._space.name}")
        self._digests = [entry.gradient_digest for entry in entries[:MAX_FETCH_DIGESTS]] or self._digests


async def snapshots(client: Client, target: Path, every: float, log: Log) -> None:
    """Makes snapshots at one target. Each replaces the one before."""
    while True:
        await asyncio.sleep(every)
        if log.is_over:
            return
        async with log.call("snapshot"), own_errors():
            async for _ in client.stub.CreateSnapshot(pb.CreateSnapshotRequest(target=str(target))):
                pass


async def cancelled(call: Awaitable[object], generator: random.Random, log: Log, kind: str) -> None:
    """Makes a call and cancels it after a moment. It may have ended by then."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(generator.random() * MAX_CANCEL_SECONDS)
    task.cancel()
    try:
        async with log.call(kind, NOT_FOUND):
            await task
    except asyncio.CancelledError:
        log.expected[f"{kind} CANCELLED"] += 1
