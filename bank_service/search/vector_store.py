"""Chooses the vector store. Other rooms reach the stores only from here."""

from __future__ import annotations

from concurrent.futures import Executor

from bank_service.catalog.contract import Catalog
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.search.catalog_nearest import CatalogNearest
from bank_service.search.nearest import Nearest
from bank_service.search.usearch.usearch_nearest import UsearchNearest
from bank_service.values.config import BankConfig


def vector_store(
    catalog: Catalog, config: BankConfig, dimension: int, acknowledged: AcknowledgedSequence, pool: Executor
) -> Nearest:
    """The catalog's own vectors, or else a store in the bank's process."""
    if catalog.vectors is not None:
        return CatalogNearest(catalog, catalog.vectors, acknowledged, pool, exact_below=config.exact_below)
    return UsearchNearest(
        catalog,
        dimension,
        config.data_dir / "index",
        acknowledged,
        pool,
        exact_below=config.exact_below,
        snapshot_every=config.snapshot_every,
    )
