from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.testing.tokens import Tokens
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.wire.credentials import VARIABLES, BankCredentials
from bank_service.wire.errors import UnauthenticatedError, UnavailableError
from regrad_vllm.cli import main
from regrad_vllm.client import AsyncBank


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two authorities, and a bank's and a client's certificate by the first."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    folder = tmp_path_factory.mktemp("pem")

    def make(name: str, *options: str) -> None:
        command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2", *options]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other"):
        make(name)
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
    make("bank", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
    make("client", *signed)
    return folder


def config_of(data_dir: Path, pem: Path, **settings: object) -> BankConfig:
    return BankConfig(data_dir=data_dir, tls_cert=pem / "bank.pem", tls_key=pem / "bank.key", **settings)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_a_bank_with_tls_talks_to_those_who_know_its_authority(
    data_dir: Path, pem: Path, embedder: Embedder
) -> None:
    async with BankServer(config_of(data_dir, pem), HashEncoder(), embedder) as server:
        target = server.address.target
        async with Client(target, BankCredentials(ca=pem / "ca.pem")) as client:
            await client.put("a", "over TLS")
        for stranger in (BankCredentials(), BankCredentials(ca=pem / "other.pem")):
            async with Client(target, stranger) as client:
                await client.refused(client.stats(), UnavailableError)


@pytest.mark.asyncio
async def test_with_an_authority_for_clients_each_needs_a_certificate(
    data_dir: Path, pem: Path, embedder: Embedder
) -> None:
    config = config_of(data_dir, pem, tls_client_ca=pem / "ca.pem")
    async with BankServer(config, HashEncoder(), embedder) as server:
        target = server.address.target
        known = BankCredentials(ca=pem / "ca.pem", cert=pem / "client.pem", key=pem / "client.key")
        foreign = BankCredentials(ca=pem / "ca.pem", cert=pem / "other.pem", key=pem / "other.key")
        async with Client(target, known) as client:
            await client.put("a", "both are known")
        for stranger in (BankCredentials(ca=pem / "ca.pem"), foreign):
            async with Client(target, stranger) as client:
                await client.refused(client.stats(), UnavailableError)


@pytest.mark.asyncio
async def test_the_plugins_client_and_the_command_line_bring_token_and_certificate(
    data_dir: Path,
    pem: Path,
    tmp_path: Path,
    embedder: Embedder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens = Tokens(tmp_path)
    token_file = tokens.add("reader", "read", "default").token_file
    assert token_file is not None
    for variable in VARIABLES.values():
        monkeypatch.setenv(variable, "")  # so that what the flags export goes with the test
    config = config_of(data_dir, pem, tls_client_ca=pem / "ca.pem", tokens_file=tokens.path)
    paths = {"token_file": token_file, "ca": pem / "ca.pem", "cert": pem / "client.pem", "key": pem / "client.key"}
    async with BankServer(config, HashEncoder(), embedder) as server:
        target = server.address.target
        client = AsyncBank(target, credentials=BankCredentials(**paths))
        assert (await client.stats()).num_documents == 0
        await client.close()
        nameless = AsyncBank(target, credentials=BankCredentials(**paths | {"token_file": None}))
        with pytest.raises(UnauthenticatedError):
            await nameless.stats()
        await nameless.close()
        flags = [word for name, path in paths.items() for word in (f"--bank-{name.replace('_', '-')}", str(path))]
        assert await asyncio.to_thread(main, ["stats", "--bank", target, *flags]) == 0
        assert '"num_documents": 0' in capsys.readouterr().out
        # The environment has them now, as it has for the children of a command.
        assert await asyncio.to_thread(main, ["query", "--bank", target, "anything"]) == 0
        assert await asyncio.to_thread(main, ["delete", "--bank", target, "a"]) == 1
        told = capsys.readouterr()
        assert "must have scope write" in told.err and tokens.secrets["reader"] not in told.out + told.err


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("with_tokens", "with_tls", "warning"),
    [
        (False, False, "no authentication or TLS,"),
        (True, False, "no TLS,"),
        (False, True, "no authentication,"),
        (True, True, None),
    ],
)
async def test_the_warning_at_the_start_says_what_is_missing(
    data_dir: Path,
    pem: Path,
    tmp_path: Path,
    embedder: Embedder,
    caplog: pytest.LogCaptureFixture,
    with_tokens: bool,
    with_tls: bool,
    warning: str | None,
) -> None:
    protection: dict[str, Path] = {"tokens_file": Tokens(tmp_path).path} if with_tokens else {}
    if with_tls:
        protection |= {"tls_cert": pem / "bank.pem", "tls_key": pem / "bank.key"}
    config = BankConfig(data_dir=data_dir, host="0.0.0.0", **protection)  # type: ignore[arg-type]
    async with BankServer(config, HashEncoder(), embedder):
        pass
    assert ("should listen on loopback" in caplog.text) == (warning is not None)
    assert warning is None or f"it has {warning}" in caplog.text


@pytest.mark.asyncio
async def test_files_of_secrets_that_everybody_reads_stop_the_start(
    data_dir: Path, pem: Path, tmp_path: Path, embedder: Embedder
) -> None:
    key = tmp_path / "open.key"
    shutil.copy(pem / "bank.key", key)
    tokens = Tokens(tmp_path)
    for path, config in (
        (key, BankConfig(data_dir=data_dir, tls_cert=pem / "bank.pem", tls_key=key)),
        (tokens.path, BankConfig(data_dir=data_dir, tokens_file=tokens.path)),
    ):
        path.chmod(0o644)
        with pytest.raises(ValueError, match=f"must not be open to everybody, got {path} with mode 644; run chmod 600"):
            await BankServer(config, HashEncoder(), embedder).start()
        path.chmod(0o600)
        async with BankServer(config, HashEncoder(), embedder):
            pass


@pytest.mark.asyncio
async def test_a_file_that_is_no_pem_is_named(data_dir: Path, pem: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir, tls_cert=pem / "bank.key", tls_key=pem / "bank.key")
    with pytest.raises(ValueError, match=r"tls_cert must be a PEM file with BEGIN CERTIFICATE, got .*bank\.key"):
        await BankServer(config, HashEncoder(), embedder).start()
