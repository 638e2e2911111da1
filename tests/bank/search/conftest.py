from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bank.search.collection import WAYS, Collection, go

LONG = pytest.mark.only_test_all  # each change waits for a new graph


@pytest.fixture(params=[pytest.param(way, marks=LONG if way == "postgres graph" else ()) for way in WAYS])
def way(request: pytest.FixtureRequest) -> str:
    """The vector store, and how it finds a query's documents."""
    return str(request.param)


@pytest.fixture
def collection(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collection]:
    go(way, monkeypatch)
    opened = Collection(tmp_path, way, history_seconds=3600)
    yield opened
    opened.close()
