"""The nearest documents by cosine, with pgvector. Small namespaces and rare filters are searched exactly."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.contract import CatalogView
from bank_service.catalog.postgres.connect import name_for_log
from bank_service.catalog.postgres.json_conditions import meets
from bank_service.catalog.postgres.partitions import direction, partition
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.prepared import run_text
from bank_service.values.filters import Condition
from bank_service.wire.record import FloatArray

logger = logging.getLogger(__name__)

SCAN_SIZE = 12_000  # up to so many documents that meet a filter are compared one by one
# Nodes of the graph that a search looks at; more find more of the nearest. With a filter, these lie further apart.
EF_SEARCH = 200
FILTERED_EF_SEARCH = 400
MAX_EF_SEARCH = 1_000  # pgvector's own limit
GRAPH = {"m": 16, "ef_construction": 64}
BUILD_MEMORY = "512MB"  # for building a graph; without enough of it, pgvector takes many times as long
# Twice the error of a cosine in half precision, of which the question's whole numbers have a tenth. So no document is
# left out by rounding.
MARGIN = 0.0025

# The number of a namespace's partition, whether its graph is ready, and the state's sequence. It also sets how a graph
# is searched in this transaction. One statement for all saves those of each.
_SPACE = (
    "SELECT number, coalesce((SELECT indisvalid FROM pg_index "
    "WHERE indexrelid = to_regclass('vectors_' || number || '_hnsw')), false), "
    "(SELECT sequence FROM collection), "
    "set_config('hnsw.ef_search', %(ef)s, true), set_config('hnsw.iterative_scan', %(scan)s, true) "
    "FROM spaces WHERE namespace = %(namespace)s"
)
_ITERATE = "SET LOCAL hnsw.iterative_scan = relaxed_order"  # until enough are found
# The numbers of large namespaces without a graph.
_LACKING = (
    "SELECT number FROM spaces JOIN namespace_usage USING (namespace) WHERE num_documents > %(above)s AND NOT EXISTS "
    "(SELECT 1 FROM pg_index WHERE indisvalid AND indexrelid = to_regclass('vectors_' || number || '_hnsw')) ORDER BY 1"
)

# The lock of one graph's builder, on the connection that builds.
_TAKE = "SELECT pg_try_advisory_lock(hashtext('regrad graph ' || current_schema()), {number})"
_HAS_GRAPH = "SELECT EXISTS (SELECT 1 FROM pg_index WHERE indisvalid AND indexrelid = to_regclass('{name}'))"


class PostgresVectors:
    """Implements ``contract.VectorSearch``."""

    def __init__(self, engine: sa.Engine) -> None:
        """``engine``: of readers. Graphs are built on a connection of their own."""
        self._engine = engine
        self._building: Any = None  # the driver's connection while a graph is built
        self._stopped = False
        self._lock = threading.Lock()

    def nearest(
        self,
        view: CatalogView,
        namespace: str,
        vector: FloatArray,
        depth: int,
        conditions: Sequence[Condition] = (),
        as_of: int | None = None,
    ) -> list[int]:
        assert isinstance(view, SqlView)
        is_filtered = bool(conditions) or as_of is not None
        ef_search = min(MAX_EF_SEARCH, max(FILTERED_EF_SEARCH if is_filtered else EF_SEARCH, depth))
        settings = {"ef": str(ef_search), "scan": "relaxed_order" if is_filtered else "off"}
        rows = run_text(view.connection, _SPACE, {"namespace": namespace, **settings})
        if not rows:
            return []
        number, has_graph, sequence, *_ = rows[0]
        view.note_sequence(sequence)
        if has_graph and not is_filtered:
            keys = _by_graph(view.connection, number, vector, depth)
            if len(keys) < depth:  # the nearest nodes are of documents that were deleted since the last vacuum
                run_text(view.connection, _ITERATE)
                keys = _by_graph(view.connection, number, vector, depth)
            if len(keys) == depth:
                return keys
        search = _Search(view.connection, number, vector, depth, conditions, as_of)
        if has_graph and is_filtered:
            few = search.exactly(SCAN_SIZE)
            if few is not None:
                return few
            keys = search.by_graph()
            if len(keys) == depth:
                return keys
        return search.exactly() or []

    def build_graphs(self, above: int) -> int:
        try:
            with self._engine.connect() as connection:
                numbers = [int(number) for (number,) in run_text(connection, _LACKING, {"above": above})]
        except sa.exc.SQLAlchemyError as error:
            logger.warning("graphs can't be built now: %s; trying again", name_for_log(error))
            return 1
        for number in numbers:
            self._build(number)
        return len(numbers)

    def stop(self) -> None:
        """Ends the building of a graph, from another thread. No other one begins."""
        with self._lock:
            self._stopped = True
            if self._building is not None:
                self._building.cancel_safe(timeout=2.0)

    def _build(self, number: int) -> None:
        name, table = f"vectors_{number}_hnsw", f"vectors_{number}"
        options = ", ".join(f"{key} = {value}" for key, value in GRAPH.items())
        try:
            with self._engine.connect() as connection:
                driver: Any = connection.connection.driver_connection
                connection.detach()  # its settings must not reach a reader
                with self._lock:
                    if self._stopped:
                        return
                    self._building = driver
                try:
                    driver.execute("SET statement_timeout = 0")
                    driver.execute("SET lock_timeout = 0")  # it waits for every transaction that is older
                    driver.execute(f"SET maintenance_work_mem = '{BUILD_MEMORY}'")
                    # The server may still build for a node that was killed. To drop its index would end in a deadlock.
                    if not _answer(driver, _TAKE.format(number=number)):
                        logger.info("the graph of partition %d is built by another node", number)
                        return
                    if _answer(driver, _HAS_GRAPH.format(name=name)):
                        return
                    # An index isn't valid where a build ended midway.
                    driver.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
                    driver.execute(
                        f"CREATE INDEX CONCURRENTLY {name} ON {table} "
                        f"USING hnsw (embedding halfvec_cosine_ops) WITH ({options})"
                    )
                finally:
                    with self._lock:
                        self._building = None
        except (sa.exc.SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error) as error:
            if not self._stopped:  # searches are exact meanwhile
                logger.warning(
                    "the graph of partition %d can't be built: %s; trying again", number, name_for_log(error)
                )
            return
        logger.info("the graph of partition %d is built", number)


def _answer(driver: Any, statement: str) -> bool:
    return bool(driver.execute(statement).fetchone()[0])


def _by_graph(connection: sa.Connection, number: int, vector: FloatArray, depth: int) -> list[int]:
    """Up to ``depth`` near documents that the graph finds, without a filter."""
    query = f"SELECT key FROM vectors_{number} ORDER BY embedding <=> %(vector)s::halfvec LIMIT %(depth)s"
    return [int(key) for (key,) in run_text(connection, query, {"vector": direction(vector), "depth": depth})]


class _Search:
    """One search in a namespace's partition, perhaps with a filter."""

    def __init__(
        self,
        connection: sa.Connection,
        number: int,
        vector: FloatArray,
        depth: int,
        conditions: Sequence[Condition],
        as_of: int | None,
    ) -> None:
        self._connection = connection
        self._depth = depth
        self._table = table = partition(number)
        self._where = [meets(table.c.pairs, condition) for condition in conditions]
        if as_of is not None:
            self._where.append(table.c.began <= as_of)
        text = sa.bindparam("vector", direction(vector), _Halfvec())  # as text, it would be parsed anew for each row
        self._distance = table.c.embedding.op("<=>", return_type=sa.Float())(sa.cast(text, _Halfvec()))

    def by_graph(self) -> list[int]:
        """Up to ``depth`` near documents that the graph finds."""
        query = sa.select(self._table.c.key).where(*self._where).order_by(self._distance).limit(self._depth)
        return [int(key) for key in self._connection.execute(query).scalars()]

    def exactly(self, limit: int | None = None) -> list[int] | None:
        """The nearest ``depth`` documents, and all that are as near as the last one but for rounding. None where more
        than ``limit`` documents meet the filter."""
        chosen = sa.select(self._table.c.key, self._distance.label("distance")).where(*self._where)
        some = chosen if limit is None else chosen.limit(limit + 1)
        near = some.cte("near")  # read more than once below, so PostgreSQL computes it once
        number = sa.literal(0) if limit is None else sa.select(sa.func.count()).select_from(near).scalar_subquery()
        last = sa.select(near.c.distance).order_by(near.c.distance).limit(1).offset(self._depth - 1).scalar_subquery()
        bound = sa.func.coalesce(last + MARGIN, sa.literal(float("inf")))
        found = self._connection.execute(sa.select(near.c.key, number).where(near.c.distance <= bound)).all()
        if limit is not None and found and found[0][1] > limit:
            return None
        return [int(key) for key, _ in found]


class _Halfvec(sa.types.UserDefinedType[str]):
    """pgvector's type of half precision."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "halfvec"
