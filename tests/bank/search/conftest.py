from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bank.search.collection import WAYS, Collection, go


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """The vector store, and how it finds a query's documents."""
    return str(request.param)


@pytest.fixture
def collection(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collection]:
    go(way, monkeypatch)
    opened = Collection(tmp_path, way, history_seconds=3600)
    yield opened
    opened.close()
