"""`regrad upgrade`, on a bank that runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder, spec_of
from bank_service.values.config import BankConfig
from bank_service.values.encoder import EncodedDocument
from regrad_vllm.cli import main

OLD, NEW = spec_of().fingerprint, spec_of("next").fingerprint


class Held(HashEncoder):
    """Encodes with the next learner when it may go on."""

    go = threading.Event()
    go.set()

    def of_learner(self, folder: Path) -> Held:
        return Held(super().of_learner(folder).learner)

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        assert self.learner != "next" or self.go.wait(20)
        return super().encode(documents)


@pytest.mark.asyncio
async def test_an_upgrade_is_begun_looked_at_taken_back_and_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = tmp_path / "next"
    learner.mkdir()
    config = BankConfig(data_dir=tmp_path / "bank")
    async with BankServer(config, Held(), HashEmbedder()) as server, Client(server.address.target) as client:
        await client.ingest({"id": "a", "text": "one"}, {"id": "b", "text": "two"})

        async def upgrade(*arguments: object) -> int:
            given = [str(argument) for argument in arguments]
            return await asyncio.to_thread(main, ["upgrade", *given, "--bank", server.address.target])

        assert await upgrade("--finish") == 1
        assert capsys.readouterr().err.startswith("regrad upgrade: an upgrade must be under way, there is none")
        assert await upgrade("--learner", learner) == 0
        assert f"2 of 2 versions have a gradient of {NEW}, so servers of both are answered" in capsys.readouterr().out
        assert await upgrade("--back") == 0
        assert await upgrade() == 0
        assert capsys.readouterr().out == f"the bank has the learner {OLD}, and no upgrade is under way\n" * 2
        Held.go.clear()
        begun = asyncio.create_task(upgrade("--learner", learner))
        while await upgrade() or f"gradient of {NEW}" not in capsys.readouterr().out:
            pass
        back = asyncio.create_task(upgrade("--back"))
        assert await begun == 1
        Held.go.set()
        assert await back == 0
        assert "the upgrade was ended from elsewhere" in capsys.readouterr().err
        assert await upgrade("--learner", learner) == 0
        assert await upgrade("--finish") == 0
        assert f"the bank has the learner {NEW}" in capsys.readouterr().out
