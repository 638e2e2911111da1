"""An upgrade in a bank of this process, with an encoder that fails when it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

from bank_service.bank import Bank
from bank_service.runtime.metrics import BankMetrics
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder, spec_of
from bank_service.upkeep.learner_upgrade import UpgradeProgress
from bank_service.values.config import BankConfig
from bank_service.values.documents import Document, Query
from bank_service.values.encoder import EncodedDocument, Encoder

OLD, NEW = spec_of(), spec_of("next")


@asynccontextmanager
async def opened(data_dir: Path, encoder: Encoder | None = None, **settings: Any) -> AsyncIterator[Bank]:
    """A bank without a cache."""
    config = BankConfig(data_dir=data_dir, **settings)
    data_dir.mkdir(exist_ok=True)
    absent = f"unix://{data_dir}/absent.sock"
    bank = await Bank.open(config, encoder or HashEncoder(), HashEmbedder(), absent, BankMetrics())
    try:
        yield bank
    finally:
        await asyncio.wait_for(bank.close(), 20)


async def begun(bank: Bank, folder: Path) -> UpgradeProgress:
    """The last report of BEGIN."""
    return [progress async for progress in bank.upgrade.begin(str(folder))][-1]


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


class Moody(HashEncoder):
    """Breaks, waits or draws anew where it is told to."""

    broken: ClassVar[set[str]] = set()  # texts, of every learner
    salt: ClassVar[str] = ""  # another one gives other gradients
    made: ClassVar[list[Moody]] = []  # by of_learner
    may_load: ClassVar[bool] = True

    def __init__(self, learner: str = "a learner") -> None:
        super().__init__(learner)
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.before: Callable[[list[str]], object] = lambda texts: None

    def of_learner(self, folder: Path) -> Moody:
        if not self.may_load:
            raise RuntimeError("out of memory")
        encoder = Moody(super().of_learner(folder).learner)
        self.made.append(encoder)
        return encoder

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        self.begun.set()
        self.before([text for _, text in documents])
        assert self.go.wait(20)
        if self.broken & {text for _, text in documents}:
            raise RuntimeError("out of memory")
        return super().encode([(title, text + self.salt) for title, text in documents])

    @property
    def texts(self) -> list[str]:
        return [text for batch in self.batches for text in batch]


async def put(bank: Bank, *texts: str, **fields: Any) -> None:
    """A document of each text."""
    for text in texts:
        await bank.put(Document("", id_of(text), "", text, **fields))


def id_of(text: str) -> str:
    return text.replace(" ", "")


def of_new(*texts: str, **fields: Any) -> Query:
    ids = tuple(id_of(text) for text in texts)
    return Query(document_ids=ids, learner_fingerprint=NEW.fingerprint, **fields)


def blobs(data_dir: Path) -> set[Path]:
    return {path for path in data_dir.glob("blobs/??/*") if path.is_file()}


def damage(data_dir: Path, digest: str) -> None:
    path = data_dir / "blobs" / digest[:2] / digest[2:]
    path.write_bytes(path.read_bytes()[:-1])


async def level(bank: Bank) -> UpgradeProgress:
    for _ in range(500):
        progress = await bank.upgrade.progress()
        if progress.is_level:
            return progress
        await asyncio.sleep(0.01)
    raise AssertionError(f"it never became level: {progress}")
