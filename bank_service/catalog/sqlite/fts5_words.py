"""The search by words of a SQLite catalog, with FTS5; see ``contract.WordSearch``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future

from bank_service.catalog.contract import CatalogView
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.group_commit import GroupCommit
from bank_service.catalog.sqlite.lexical import clean_step, uncleaned
from bank_service.catalog.sqlite.lexical_search import best_words
from bank_service.values.filters import Condition


class Fts5Words:
    """Searches words, and merges the FTS5 tables from which words were removed. The catalog counts the removals, so a
    crash loses none."""

    def __init__(self, writer: GroupCommit) -> None:
        self._writer = writer
        self._cleaning = asyncio.Lock()  # two cleanings at once would subtract the same removals twice

    def best(
        self, view: CatalogView, namespace: str, text: str, conditions: Sequence[Condition], count: int
    ) -> dict[int, float]:
        assert isinstance(view, SqlView)
        return best_words(view.connection, namespace, text, conditions, count)

    async def clean(self) -> None:
        async with self._cleaning:
            for number, num_removed in (await asyncio.wrap_future(self._uncleaned())).items():
                first = True
                while not await asyncio.wrap_future(self._step(number, num_removed, first=first)):
                    first = False

    def clean_until(self, deadline: float) -> None:
        """Cleans without an event loop, and stops at ``deadline``, a time of ``time.monotonic``."""
        for number, num_removed in self._uncleaned().result().items():
            first = True
            while time.monotonic() < deadline and not self._step(number, num_removed, first=first).result():
                first = False

    def _uncleaned(self) -> Future[dict[int, int]]:
        # The writer reads it, after the last step of a cleaning that was cancelled. Else that would count twice.
        return self._writer.submit(uncleaned)

    def _step(self, number: int, num_removed: int, *, first: bool) -> Future[bool]:
        return self._writer.submit(lambda connection: clean_step(connection, number, num_removed, first=first))
