from __future__ import annotations

import pytest
import sqlalchemy as sa

from bank_service.catalog.sql.prepared import Prepared, among, listed

metadata = sa.MetaData()
things = sa.Table(
    "things",
    metadata,
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("gone", sa.Boolean, nullable=False),
)
INSERT = Prepared(sa.insert(things).returning(things.c.key), ["name", "gone"])
LIVING = sa.select(things.c.key).where(things.c.name.in_(among("names")), sa.not_(things.c.gone)).order_by("key")


@pytest.fixture
def connection() -> sa.Connection:
    connection = sa.create_engine("sqlite://").connect()
    metadata.create_all(connection)
    for name, gone in (("a", False), ("b", True), ('"c', False), ("a", True), ("☃", False)):
        assert len(INSERT.rows(connection, name=name, gone=gone)) == 1
    return connection


def test_it_gives_what_the_statement_gives(connection: sa.Connection) -> None:
    names = ["a", '"c', "☃", "none"]
    plain = connection.execute(sa.select(things.c.key).where(things.c.name.in_(names), sa.not_(things.c.gone)))
    assert (
        [row[0] for row in Prepared(LIVING).rows(connection, names=listed(names))] == plain.scalars().all() == [1, 3, 5]
    )


def test_constants_of_the_statement_are_kept(connection: sa.Connection) -> None:
    first = Prepared(sa.select(things.c.key).where(things.c.name == "a", things.c.key > sa.bindparam("least")).limit(1))
    assert [tuple(row) for row in first.rows(connection, least=0)] == [(1,)]
    found = first.one(connection, least=1)
    assert found is not None and found["key"] == 4
    assert first.one(connection, least=4) is None


def test_a_parameter_left_out_is_an_error(connection: sa.Connection) -> None:
    with pytest.raises(KeyError, match="names"):
        Prepared(LIVING).rows(connection)
    with pytest.raises(KeyError, match="gone"):
        INSERT.rows(connection, name="x")
