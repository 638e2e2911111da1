"""The slow obvious vector store: it compares with every vector of the view. The oracle of the tests."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from bank_service.catalog.contract import Catalog, CatalogView
from bank_service.search.nearest import Neighbours
from bank_service.search.ranking import candidates_of, cosines_of
from bank_service.values.filters import Condition
from bank_service.wire.record import FloatArray


class ExactNearest:
    """Implements ``search.nearest.Nearest`` and keeps nothing."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    @property
    def sequence(self) -> int:
        with self._catalog.view() as view:
            return view.sequence()

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def reach(self, sequence: int) -> None:
        assert sequence <= self.sequence

    async def keep_up(self, sequence: int) -> None:
        pass

    async def erase(self, namespaces: Collection[str]) -> None:
        pass

    def nearest(
        self,
        view: CatalogView,
        namespace: str,
        vector: FloatArray,
        depth: int,
        conditions: Sequence[Condition] = (),
        as_of: int | None = None,
    ) -> Neighbours:
        candidates = candidates_of(view, view.matching(namespace, conditions, None, as_of))
        cosines = cosines_of(candidates, vector)
        ranked = sorted(cosines, key=lambda key: -cosines[key])
        least = cosines[ranked[depth - 1]] if depth < len(ranked) else -1.0
        return Neighbours([key for key in ranked if cosines[key] >= least], view.sequence())
