"""A bank and a server as the README starts them, and its examples run with them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regrad_vllm.local.pair import wait_for_bank, wait_for_server
from regrad_vllm.local.processes import Services, free_port
from tests.house.pages import ROOT, examples

BANK, SERVER = "127.0.0.1:50061", "localhost:8000"


@dataclass(frozen=True, slots=True)
class House:
    """A running bank and server."""

    bank: str  # host:port
    server: str  # host:port

    def run(self, name: str, folder: Path, python: Path = Path(sys.executable)) -> str:
        """Runs an example with the README's addresses replaced by ours; its output."""
        example = examples()[name]
        code = example.code.replace(BANK, self.bank).replace(SERVER, self.server)
        if example.language == "sh":
            # The command line's default bank is the README's; every command that talks to one takes --bank.
            code = re.sub(
                r"^(regrad (?:ingest|query|snapshot|export) .*)$", rf"\1 --bank {self.bank}", code, flags=re.MULTILINE
            )
            command = ["bash", "-euc", code.replace("regrad_vllm/", f"{ROOT}/regrad_vllm/")]
        elif example.language == "js":
            (folder / "example.mjs").write_text(code, "utf-8")
            command = ["node", "example.mjs"]
        else:
            command = [str(python), "-c", code]
        return _output(command, folder)

    def ingest(self, file: Path) -> str:
        """Puts the documents of a file into the bank; what `regrad ingest` says."""
        return _output([sys.executable, "-m", "regrad_vllm.cli", "ingest", str(file), "--bank", self.bank], file.parent)


@contextmanager
def opened(folder: Path) -> Iterator[House]:
    """The bank and the server of the README, started by its own commands on ports of their own."""
    with Services(folder) as services:
        flags = ["--port", "0", "--data-dir", str(folder / "data")]
        bank = wait_for_bank(services.start("bank", _command("bank") + flags))
        port = free_port()
        assert _command("server")[-2:] == ["--port", "8000"]
        flags = ["--port", str(port), "--bank", bank, "--enforce-eager", "--max-model-len", "1024"]
        flags += ["--dtype", "float32"]  # so that answers can be held against those of another implementation
        server = services.start("server", _command("server")[:-2] + flags)
        wait_for_server(server, f"http://127.0.0.1:{port}")
        yield House(bank, f"127.0.0.1:{port}")


def _output(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _command(name: str) -> list[str]:
    """The words after `regrad` in a one-command example."""
    words = shlex.split(examples()[name].code)
    assert words[0] == "regrad"
    return words[1:]
