"""`regrad snapshot` and `regrad restore`, on a bank that runs and on one that doesn't."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bank_service.runtime.data_dir import DataDir
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from regrad_vllm.cli import main
from regrad_vllm.cli.backup import absolute_place


def regrad(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.asyncio
async def test_a_running_banks_snapshot_is_restored_by_one_command_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BankConfig(data_dir=tmp_path / "bank")
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        await client.ingest({"id": "a", "text": "one"}, {"id": "b", "text": "two"})
        server_address = server.address
        assert await asyncio.to_thread(regrad, "snapshot", tmp_path / "s", "--data-dir", config.data_dir) == 0
        assert "snapshot at change 2, 2 gradients, 2 of them copied" in capsys.readouterr().out
        await client.put("c", "three")
        assert await asyncio.to_thread(regrad, "snapshot", tmp_path / "s", "--bank", server.address.target) == 0
        assert "snapshot at change 3, 3 gradients, 1 of them copied" in capsys.readouterr().out
        assert await asyncio.to_thread(regrad, "snapshot", tmp_path, "--bank", server.address.target) == 1
        assert "must be empty or a snapshot of this bank" in capsys.readouterr().err
    DataDir(config.data_dir).announce(server_address)  # as a bank that was killed leaves it
    assert regrad("snapshot", tmp_path / "s", "--data-dir", config.data_dir) == 0
    assert "3 gradients, 0 of them copied" in capsys.readouterr().out
    assert regrad("restore", tmp_path / "s", "--data-dir", tmp_path / "elsewhere") == 0
    assert "restored at change 3, 3 gradients" in capsys.readouterr().out
    config = BankConfig(data_dir=tmp_path / "elsewhere")
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        assert (await client.get("c")).document.text == "three"


@pytest.mark.asyncio
async def test_a_stopped_bank_is_moved_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BankConfig(data_dir=tmp_path / "bank")
    command = ("move", "--from", config.data_dir, "--to", tmp_path / "else where")
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        await client.ingest({"id": "a", "text": "one"}, {"id": "b", "text": "two"})
        assert await asyncio.to_thread(regrad, *command) == 1
        assert "must belong to one bank, got one running already" in capsys.readouterr().err
    assert regrad(*command) == 0
    out = capsys.readouterr().out
    assert "the bank at change 2, 2 gradients, 2 of them copied, 7 rows of 10 tables compared" in out
    assert out.splitlines()[-1] == f"regrad bank --data-dir '{tmp_path}/else where'"
    assert regrad(*command) == 1
    assert f"the bank was moved to {tmp_path}/else where already" in capsys.readouterr().err
    assert regrad(*command, "--to-catalog", "mysql://x/y") == 1
    assert "--to-catalog must start with postgresql://" in capsys.readouterr().err
    config = BankConfig(data_dir=tmp_path / "else where")
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        assert (await client.get("b")).document.text == "two"


@pytest.mark.asyncio
async def test_a_relative_place_is_meant_from_where_the_command_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    config = BankConfig(data_dir=tmp_path / "bank")
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        await client.put("a", "one")
        assert await asyncio.to_thread(regrad, "snapshot", "../s", "--bank", server.address.target) == 0
        assert (tmp_path / "s" / "manifest.json").exists()
    assert regrad("restore", "../below/../s", "--data-dir", tmp_path / "elsewhere") == 0
    assert absolute_place("file:///x/../y") == "file:///x/../y" and absolute_place("s3://b/s") == "s3://b/s"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["restore", "{tmp}", "--data-dir", "{tmp}/new"], "has no manifest.json"),
        (["restore", "{tmp}", "--data-dir", "{tmp}"], "must be absent or an empty folder"),
        (["snapshot", "{tmp}/s", "--data-dir", "{tmp}/nowhere"], "or a running bank with --bank"),
        (["scrub", "--data-dir", "{tmp}/nowhere"], "must be the folder of a bank"),
        (["scrub", "--data-dir", "{tmp}", "--objects", "ftp://x"], "objects must be"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_says_why(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "something").write_text("mine")
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"regrad {arguments[0]}: ") and message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["something"]
