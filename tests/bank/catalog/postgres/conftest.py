"""A server for the tests that stop it, a line to it that breaks when a test wants, and nodes."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Set
from itertools import count
from pathlib import Path
from urllib.parse import quote

import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.factory import open_catalog
from bank_service.catalog.nodes import Nodes
from bank_service.catalog.postgres import membership, postgres_nodes
from bank_service.values.documents import PutResult
from benchmarks.servers.postgres_server import PostgresServer
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient

DIGEST = "0" * 64  # of ``gradient()``
Opener = Callable[..., Catalog]


class Line:
    """Passes bytes between a bank and its server, on a socket of its own.

    ``cut_at_commit``: at the next COMMIT of the bank, the line breaks. "before": the server doesn't get it. "after": it
    does, but its answer is lost.
    """

    def __init__(self, folder: Path, server: Path) -> None:
        self.folder = folder
        self._server = server
        self.cut_at_commit: str | None = None
        self.is_broken = False  # from the cut on, nobody gets through
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, direct: str) -> str:
        """The server's URL, by this line."""
        there, here = (quote(str(folder), safe="") for folder in (self._server, self.folder))
        assert there in direct
        return direct.replace(there, here)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                bank, _ = self._listener.accept()
                if self.is_broken and self.cut_at_commit is None:
                    bank.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._server / ".s.PGSQL.5432"))
                threading.Thread(target=self._pass, args=(bank, server, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, bank, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, from_bank: bool) -> None:
        with contextlib.suppress(OSError):  # either end is gone
            while data := source.recv(65536):
                cut = self.cut_at_commit if from_bank and b"COMMIT\0" in data else None
                if cut is not None:
                    self.cut_at_commit = None
                    source.shutdown(socket.SHUT_RDWR)
                if cut != "before":
                    target.sendall(data)
                if cut is not None:
                    break
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
        source.close()


@pytest.fixture
def line(own_server: PostgresServer) -> Iterator[Line]:
    with tempfile.TemporaryDirectory(prefix="rg-line-") as folder:  # short: a socket's path has at most 107 bytes
        made = Line(Path(folder), own_server.folder)
        yield made
        made.close()


@pytest.fixture
def url(own_server: PostgresServer) -> str:
    return own_server.new_schema()


@pytest.fixture
def catalog(tmp_path: Path, url: str) -> Iterator[Catalog]:
    opened = open_catalog(tmp_path, IDENTITY, url=url)
    yield opened
    opened.close()


@pytest.fixture
def opener(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Opens one node after another. They wait for nothing long."""
    monkeypatch.setattr(membership, "TAKE_SECONDS", 0.3)
    monkeypatch.setattr(postgres_nodes, "WAIT_SECONDS", 0.3)
    opened: list[Catalog] = []
    numbers = count(1)

    def opening(**settings: object) -> Catalog:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        given = {"identity": IDENTITY, "url": url, "is_shared": True, **settings}
        opened.append(open_catalog(folder, **given))  # type: ignore[arg-type]
        return opened[-1]

    yield opening
    for catalog in opened:
        catalog.close()


def nodes_of(catalog: Catalog) -> Nodes:
    assert catalog.nodes is not None
    return catalog.nodes


def put(catalog: Catalog, id: str, digit: str = "0", namespace: str = "n") -> PutResult:
    """Stores a document, as a bank does that has written its gradient."""
    given = gradient(digit)
    with nodes_of(catalog).held(given.digest):
        nodes_of(catalog).keep(given.digest)
        return catalog.put(document(id, namespace=namespace), given, None).result()


def decided(catalog: Catalog, digests: list[str]) -> tuple[Set[str], Set[str]]:
    """Which gradients a node may remove now, and which are busy."""
    decision = nodes_of(catalog).begin_removal(digests)
    return decision.going, decision.busy


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
