"""The implementations that the suite in this folder runs on. A new one is a line here; its own tests get a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.factory import open_catalog
from bank_service.values.namespace_limits import LimitsOf, unlimited
from tests.bank.catalog.test_catalog import IDENTITY
from tests.bank.postgres_server import schema_of


def open_in_postgres(folder: Path, *given: Any, **named: Any) -> Catalog:
    """The catalog of a folder, in PostgreSQL."""
    return open_catalog(folder, *given, **named, url=schema_of(folder))


STORES: dict[str, Callable[..., Catalog]] = {"sqlite": open_catalog, "postgres": open_in_postgres}


class Opener(Protocol):
    """Opens the test's collection, also a second time. It is closed after the test."""

    def __call__(
        self,
        identity: CollectionIdentity = IDENTITY,
        limits_of: LimitsOf = unlimited,
        *,
        history_seconds: int | None = None,
    ) -> Catalog: ...


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One random life in PostgreSQL is enough for `make test`: each step is a commit of its own."""
    for item in items:
        if "test_the_state_at_every_sequence" in item.name and "[postgres-" in item.name and "-0]" not in item.name:
            item.add_marker(pytest.mark.only_test_all)


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
