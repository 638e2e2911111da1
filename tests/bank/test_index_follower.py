"""The index behind the catalog, where following it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bank_service.catalog import Catalog
from bank_service.errors import UnavailableError
from bank_service.index_follower import MAX_FAILURES, IndexFollower
from bank_service.usearch_index import UsearchIndex
from tests.bank.test_catalog import IDENTITY, document, gradient


class FailingIndex(UsearchIndex):
    """Fails in a way that nobody foresaw, as often as it is told to."""

    def __init__(self, dimension: int, failures: int) -> None:
        super().__init__(dimension)
        self.failures = failures

    def put(self, namespace: str, keys: Sequence[int], vectors: np.ndarray) -> None:
        if self.failures:
            self.failures -= 1
            raise ZeroDivisionError("unforeseen")
        super().put(namespace, keys, vectors)


@pytest.mark.asyncio
@pytest.mark.parametrize("failures", [1, MAX_FAILURES])
async def test_a_fault_that_nobody_foresaw_is_logged_told_and_tried_again(
    tmp_path: Path, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    catalog = Catalog(tmp_path / "catalog.sqlite", IDENTITY)
    index = FailingIndex(IDENTITY.embedding_dimension, failures)
    follower = IndexFollower(catalog, index, tmp_path / "index", pool, 1000)
    await follower.start()
    sequence = catalog.put(document(), gradient(), None).result().stored.sequence
    follower.wake()
    async with asyncio.timeout(9):  # less than a query waits for an index that only lags
        if failures == MAX_FAILURES:
            with pytest.raises(UnavailableError, match="times in a row, last with ZeroDivisionError: unforeseen"):
                await follower.reach(sequence)
            while follower.sequence < sequence:
                await asyncio.sleep(0.05)
        await follower.reach(sequence)
    assert caplog.text.count("can't follow the catalog") == failures
    await follower.stop()
    catalog.close()
