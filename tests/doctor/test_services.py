"""A bank and ports as a doctor finds them: real processes, real sockets. tests/serve has a real server."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bank_service.blobs import claim
from bank_service.service.server import BankServer
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.testing.tokens import Tokens
from bank_service.values.config import BankConfig
from regrad_vllm.cli import main
from regrad_vllm.default_model import shipped_learner
from regrad_vllm.doctor import services
from regrad_vllm.doctor.finding import Finding
from regrad_vllm.doctor.services import check_bank, check_server
from regrad_vllm.learner import Learner
from regrad_vllm.local.processes import free_port
from tests.client.conftest import bank_process

SHIPPED = Learner.load(shipped_learner())


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a bank of another learner."""
    with bank_process(tmp_path_factory.mktemp("bank")) as (_, address):
        yield address


def test_a_bank_of_another_learner_is_wrong_and_its_disk_is_told(bank: str) -> None:
    reached, learner, disk = check_bank(bank, SHIPPED)
    assert reached.state == "ok" and reached.found.startswith(f"{bank}, version ")
    assert learner.state == "wrong" and f"this one is {SHIPPED.fingerprint[:12]}" in learner.found
    assert "--learner" in learner.remedy
    assert disk.name == "bank's disk" and disk.found.endswith("free")


def test_a_bank_at_the_default_port_is_found_and_asked(bank: str) -> None:
    assert next(check_bank(None, None, int(bank.rpartition(":")[2]))).found.startswith(f"{bank}, version ")


@pytest.mark.asyncio
async def test_a_bank_that_refuses_the_token_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(tmp_path)
    tokens.add("reader", "read", "default")
    config = BankConfig(data_dir=tmp_path / "data", tokens_file=tokens.path)
    async with BankServer(config, HashEncoder()) as bank:

        def check() -> list[Finding]:
            return [*check_bank(bank.address.target, None)]

        (refused,) = await asyncio.to_thread(check)
        assert refused.state == "wrong" and refused.remedy == "name the token's file with --bank-token-file"
        monkeypatch.setenv("REGRAD_BANK_TOKEN_FILE", str(tmp_path / "reader.token"))
        reached, disk = await asyncio.to_thread(check)
        assert reached.state == "ok" and disk.found.startswith("not told to this token")


@pytest.mark.asyncio
async def test_a_bank_whose_gradients_another_one_has_opened_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "KEEP_SECONDS", 0.2)
    async with BankServer(BankConfig(data_dir=tmp_path), HashEncoder()) as bank:

        def states() -> dict[str, str]:
            return {finding.name: finding.state for finding in check_bank(bank.address.target, None)}

        assert "bank's gradients" not in await asyncio.to_thread(states)
        owner = tmp_path / "blobs" / claim.OWNER
        owner.write_text(json.dumps(json.loads(owner.read_text()) | {"process": "another"}))
        while (await asyncio.to_thread(states)).get("bank's gradients") != "wrong":  # the test's own limit ends it
            await asyncio.sleep(0.1)


def test_a_dead_address_is_wrong() -> None:
    (bank,) = check_bank("127.0.0.1:1", SHIPPED)
    assert bank.state == "wrong" and bank.found.startswith("127.0.0.1:1 doesn't answer: ")
    assert bank.remedy == "start one with `regrad bank`, or mend --bank"
    (server,) = check_server("http://127.0.0.1:1", SHIPPED)
    assert server.state == "wrong" and server.found.startswith("http://127.0.0.1:1/v1/regrad/status must answer, got")


def test_free_ports_are_ok() -> None:
    port = free_port()
    assert [*check_bank(None, SHIPPED, port)] == [
        Finding("bank", "ok", f"none runs; port {port} is free for `regrad bank`")
    ]
    assert [*check_server(None, SHIPPED, port)] == [
        Finding("server", "ok", f"none runs; port {port} is free for `regrad serve`")
    ]


class Other(BaseHTTPRequestHandler):
    """A web server that knows nothing of ReGrad."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


def test_a_port_that_another_program_has_is_wrong_and_the_program_is_named() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        for finding in (
            next(check_bank(None, SHIPPED, running.server_port)),
            next(check_server(None, SHIPPED, running.server_port)),
        ):
            assert finding.state == "wrong" and f"(pid {os.getpid()}) has port {running.server_port}" in finding.found
        running.shutdown()


@pytest.mark.parametrize("is_named", [True, False])
def test_only_a_server_that_was_named_gets_the_key(is_named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    given: list[str | None] = []

    class Asking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given.append(self.headers["authorization"])
            self.send_error(401)

        def log_message(self, *args: object) -> None:
            """Nothing is logged."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Asking) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}"
        (finding,) = check_server(url if is_named else None, SHIPPED, running.server_port)
        running.shutdown()
    assert given == ["Bearer sk-secret" if is_named else None]
    assert "OPENAI_API_KEY" in finding.remedy and ("--server" in finding.remedy) is not is_named


def test_a_program_that_does_not_answer_in_time_may_be_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "TIMEOUT_MS", 300)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for finding in (next(check_bank(None, SHIPPED, port)), next(check_server(None, SHIPPED, port))):
            assert finding.state == "wrong" and f"(pid {os.getpid()}) has port {port}, and doesn't" in finding.found
            assert "less busy" in finding.remedy and "TLS" in finding.remedy


def test_the_command_prints_a_line_for_each_check_and_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom regrad_vllm.cli import main\n"
        "assert main(['doctor', '--json', '--bank', '127.0.0.1:1', '--server', 'http://127.0.0.1:1']) == 1\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    found = {line["name"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert len(found) >= 15 and {"Python", "vLLM", "learner", "base model"} <= {*found}
    for name in ("bank", "server"):
        assert found[name]["state"] == "wrong" and found[name]["remedy"]


def test_the_table_has_fault_and_remedy_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--learner", str(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("learner ")]
    assert line.startswith("learner          wrong ") and line.endswith(" → name a learner's folder with --learner")
