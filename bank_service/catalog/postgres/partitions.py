"""The vectors of the living documents, with their metadata: one partition of ``vectors`` for each namespace.

A partition has its own HNSW graph, so a namespace's answers and times depend on no other. A small one needs no graph.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from bank_service.catalog.postgres.copy_rows import copy_rows
from bank_service.catalog.postgres.postgres_tables import spaces
from bank_service.catalog.sql.prepared import Prepared, run_text
from bank_service.catalog.sql.tables import namespace_usage
from bank_service.catalog.sql.transfer import StoppedSqlCatalog
from bank_service.catalog.sql.versions import Row
from bank_service.wire.record import FloatArray

MAX_HALF = 60_000  # near the largest number of half precision
_NUMBER = Prepared(sa.select(spaces.c.number).where(spaces.c.namespace == sa.bindparam("name")))


def create_parent(connection: sa.Connection, dimension: int) -> None:
    """The table of all partitions, if it is absent. Embeddings have half precision; the versions keep them in
    float32."""
    if not sa.inspect(connection).has_table("vectors"):
        create_bare_parent(connection, dimension)
        add_indexes(connection)


def create_bare_parent(connection: sa.Connection, dimension: int) -> None:
    """The table without its indexes."""
    connection.exec_driver_sql(
        "CREATE TABLE vectors (space integer NOT NULL, key bigint NOT NULL, began bigint NOT NULL, "
        f"pairs jsonb NOT NULL, embedding halfvec({dimension}) NOT NULL) PARTITION BY LIST (space)"
    )


def add_indexes(connection: sa.Connection) -> None:
    """The indexes of all partitions, also of later ones."""
    connection.exec_driver_sql("ALTER TABLE vectors ADD PRIMARY KEY (space, key)")
    connection.exec_driver_sql("CREATE INDEX vectors_by_pair ON vectors USING gin (pairs jsonb_path_ops)")


def fill(connection: sa.Connection, source: StoppedSqlCatalog) -> None:
    """Makes the partitions of all namespaces, with the vectors of another catalog's documents."""
    numbers = {
        name: create(connection, name)
        for name in connection.execute(sa.select(namespace_usage.c.namespace)).scalars().all()
    }
    kinds = {"space": "int4", "key": "int8", "began": "int8", "pairs": "bytea", "embedding": "bytea"}
    for rows in source.living_vectors():
        made = [
            (numbers[namespace], key, began, b"\x01" + pairs.encode(), _binary(embedding))
            for namespace, key, began, pairs, embedding in rows
        ]
        copy_rows(connection, "vectors", kinds, made)


def number_of(connection: sa.Connection, namespace: str) -> int | None:
    """The number of a namespace's partition; None where it never had a document."""
    rows = _NUMBER.rows(connection, name=namespace)
    return int(rows[0][0]) if rows else None


def partition(number: int) -> sa.TableClause:
    """A namespace's partition, for statements."""
    columns = [sa.column("key", sa.BigInteger), sa.column("began", sa.BigInteger), sa.column("pairs", JSONB)]
    return sa.table(f"vectors_{number}", *columns, sa.column("embedding"))


def create(connection: sa.Connection, namespace: str) -> int:
    """Makes the partition of a new namespace, and returns its number. It blocks no reader."""
    added = sa.insert(spaces).values(namespace=namespace, num_words=0).returning(spaces.c.number)
    number = int(connection.execute(added).scalar_one())
    connection.exec_driver_sql(f"CREATE TABLE vectors_{number} (LIKE vectors INCLUDING DEFAULTS INCLUDING INDEXES)")
    connection.exec_driver_sql(f"ALTER TABLE vectors ATTACH PARTITION vectors_{number} FOR VALUES IN ({number})")
    return number


def put_vector(connection: sa.Connection, number: int, new: Row, pairs: Mapping[str, str], before: Row | None) -> None:
    """Stores the vector of a document's version, in the place of the one ``before``."""
    values = {"key": new["key"], "began": new["began"], "pairs": json.dumps(dict(pairs))}
    table = f"vectors_{number}"
    if before is not None and before["embedding"] == new["embedding"]:  # then the graph stays as it is
        run_text(connection, f"UPDATE {table} SET began = %(began)s, pairs = %(pairs)s WHERE key = %(key)s", values)
        return
    if before is not None:
        remove_vector(connection, number, new["key"])
    values["embedding"] = literal(np.frombuffer(new["embedding"], dtype="<f4"))
    run_text(
        connection,
        f"INSERT INTO {table} (space, key, began, pairs, embedding) "
        f"VALUES ({number}, %(key)s, %(began)s, %(pairs)s, %(embedding)s)",
        values,
    )


def remove_vector(connection: sa.Connection, number: int, key: int) -> None:
    run_text(connection, f"DELETE FROM vectors_{number} WHERE key = %(key)s", {"key": key})


def literal(vector: FloatArray) -> str:
    """A vector as pgvector reads it. ``vector``: float32 (dimension,)."""
    return str(vector.tolist())


def direction(vector: FloatArray) -> str:
    """A vector's direction as pgvector reads it, in whole numbers: these are quick to write and to parse.

    A cosine doesn't depend on a vector's length. ``vector``: float32 (dimension,), not all zeros.
    """
    return str(np.rint(vector * (MAX_HALF / np.abs(vector).max())).astype(np.int32).tolist())


def _binary(embedding: bytes) -> bytes:
    """A vector in pgvector's binary format. ``embedding``: float32 (dimension,), little-endian."""
    halves = np.frombuffer(embedding, dtype="<f4").astype(">f2")
    return struct.pack(">hh", len(halves), 0) + halves.tobytes()
