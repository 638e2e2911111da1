"""The implementations that the suite in this folder runs on. A new one is a line here; its own tests get a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.factory import open_catalog
from bank_service.values.namespace_limits import LimitsOf, unlimited
from tests.bank.catalog.test_catalog import IDENTITY

STORES: dict[str, Callable[..., Catalog]] = {"sqlite": open_catalog}


class Opener(Protocol):
    """Opens the test's collection, also a second time. It is closed after the test."""

    def __call__(
        self,
        identity: CollectionIdentity = IDENTITY,
        limits_of: LimitsOf = unlimited,
        *,
        history_seconds: int | None = None,
    ) -> Catalog: ...


@pytest.fixture(params=STORES)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    opened: list[Catalog] = []

    def opening(
        identity: CollectionIdentity = IDENTITY,
        limits_of: LimitsOf = unlimited,
        *,
        history_seconds: int | None = None,
    ) -> Catalog:
        opened.append(STORES[request.param](tmp_path, identity, limits_of, history_seconds=history_seconds))
        return opened[-1]

    yield opening
    for catalog in opened:
        catalog.close()


@pytest.fixture
def catalog(open_store: Opener) -> Catalog:
    return open_store()
