"""An error that would stop the start is raised before a model is loaded."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bank_service.errors import BankInUseError
from bank_service.runtime.data_dir import BankAddress, DataDir, read_address
from bank_service.service.preflight import check_startable
from bank_service.values.config import BankConfig
from regrad_vllm.cli import main


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_that_is_taken_comes_before_a_model_that_is_not_there(
    flag: str, taken: int, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = ["--port", "0"] if flag == "--metrics-port" else []
    command = ["bank", "--data-dir", str(data_dir), "--model", "/nowhere", *others, flag, str(taken)]
    assert main(command) == 1
    assert capsys.readouterr().err == (
        f"regrad bank: the bank can't listen on 127.0.0.1:{taken} (Address already in use); choose another {flag} or "
        "--host, or end the program that has it\n"
    )


def test_a_folder_that_another_bank_has_comes_before_a_model_that_is_not_there(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = DataDir(data_dir)
    owner.take()
    address = BankAddress("127.0.0.1", 1, None)
    owner.announce(address)
    try:
        assert main(["bank", "--data-dir", str(data_dir), "--port", "0", "--model", "/nowhere"]) == 1
        assert "must belong to one bank, got one running already" in capsys.readouterr().err
        assert read_address(data_dir) == address, "the other bank's"
    finally:
        owner.release()
    check_startable(BankConfig(data_dir=data_dir))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens-file", "/nowhere.toml"], "tokens_file must be a readable file"),
        (["--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"], "tls_key must be a readable file"),
    ],
)
def test_files_that_are_not_there_come_before_a_model_that_is_not_there(
    flags: list[str], message: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bank", "--data-dir", str(data_dir), "--port", "0", "--model", "/nowhere", *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("no.such.host.invalid", "host must be a name or an address of this machine, got 'no.such.host.invalid'"),
        ("127..0.0.1", "host must be a name or an address of this machine, got '127..0.0.1'"),
        (
            "192.0.2.1",
            "can't listen on 192.0.2.1:50061 (Cannot assign requested address); choose another --port or --host",
        ),
    ],
)
def test_a_host_that_is_not_of_this_machine_is_named(host: str, message: str, data_dir: Path) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message) + "$"):
        check_startable(BankConfig(data_dir=data_dir, host=host, port=50061))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_nothing_is_taken_and_nothing_is_left(host: str, data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    for _ in range(2):
        check_startable(BankConfig(data_dir=data_dir, host=host, port=port))
    assert not data_dir.exists(), "a restore wants it absent or empty"


def test_a_folder_that_is_kept_is_closed_to_banks_but_not_to_readers(tmp_path: Path) -> None:
    folder = DataDir(tmp_path)
    with folder.kept(), DataDir(tmp_path).kept():
        assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("lock", 0)]
        with pytest.raises(BankInUseError):
            folder.take()
    folder.take()
    try:
        with pytest.raises(BankInUseError), DataDir(tmp_path).kept():
            pass
    finally:
        folder.release()
