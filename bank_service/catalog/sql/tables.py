"""The catalog's tables that more than one module reads or writes."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

# SQLite's INTEGER has 64 bits, and only a column of this type can be the row's number.
Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# Text in the order of its UTF-8 bytes, as SQLite has all text.
Name = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

collection = sa.Table(
    "collection",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("uuid", sa.Text, nullable=False),  # the id of this file; derived data on disk names it
    sa.Column("sequence", sa.BigInteger, nullable=False),  # of the last change
    sa.Column("learner_fingerprint", sa.Text, nullable=False),
    sa.Column("layout_id", sa.Text, nullable=False),
    sa.Column("codec", sa.Text, nullable=False),
    sa.Column("embedder", sa.Text, nullable=False),
    sa.Column("embedding_dimension", sa.Integer, nullable=False),
)

# Each document has one present version, whose ``ended`` is null. It has past versions if the bank keeps history. The
# state at sequence s consists of the versions with began <= s < ended. A change begins one version and ends at most
# one. A deletion is a version without content. It is removed when it ends.
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("began", Number, primary_key=True, autoincrement=False),  # sequence of the change that began it
    sa.Column("ended", sa.BigInteger),  # sequence of the change that replaced it; null: it is the present one
    sa.Column("ended_us", sa.BigInteger),  # microseconds since 1970
    sa.Column("key", sa.BigInteger, nullable=False),  # of the document: the sequence of its first change
    sa.Column("namespace", Name, nullable=False),
    sa.Column("id", Name, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("deleted", sa.Boolean, nullable=False),
    sa.Column("purged", sa.Boolean, nullable=False),  # a deletion with all past versions
    sa.Column("updated_us", sa.BigInteger, nullable=False),  # microseconds since 1970
    sa.Column("content_digest", sa.Text),
    sa.Column("gradient_digest", Name),
    sa.Column("gradient_bytes", sa.BigInteger, nullable=False),
    sa.Column("num_tokens", sa.Integer, nullable=False),
    sa.Column("truncated", sa.Boolean, nullable=False),
    sa.Column("num_text_bytes", sa.Integer, nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("metadata", sa.Text, nullable=False),  # JSON object
    sa.Column("embedding", sa.LargeBinary),  # float32 (embedding_dimension,), L2 norm 1
    sa.Column("text", sa.Text, nullable=False),  # last: SQLite reads a row from its start
)
now: sa.ColumnElement[bool] = versions.c.ended.is_(None)
past: sa.ColumnElement[bool] = versions.c.ended.is_not(None)
living: sa.ColumnElement[bool] = sa.and_(now, sa.not_(versions.c.deleted))
sa.Index("versions_now", versions.c.namespace, versions.c.id, unique=True, sqlite_where=now, postgresql_where=now)
sa.Index("versions_by_key", versions.c.key, versions.c.ended)
sa.Index("versions_by_namespace", versions.c.namespace, versions.c.ended, versions.c.began)
# The reads by gradient use only this index, not the table's rows.
sa.Index("versions_by_gradient", versions.c.gradient_digest, versions.c.namespace, versions.c.gradient_bytes)
sa.Index("versions_by_time", versions.c.ended_us, sqlite_where=past, postgresql_where=past)

sentence_vectors = sa.Table(  # of those versions whose sentences have been embedded
    "sentence_vectors",
    metadata,
    sa.Column("began", Number, primary_key=True, autoincrement=False),  # of the version
    sa.Column("places", sa.LargeBinary, nullable=False),  # int32 (sentences, 2): start and end in characters
    sa.Column("vectors", sa.LargeBinary, nullable=False),  # float16 (sentences, embedding_dimension)
)

recoding = sa.Table(  # it has a row until all gradients have the collection's codec
    "recoding", metadata, sa.Column("id", sa.Integer, primary_key=True)
)

next_learner = sa.Table(  # one row while the collection is on its way to another learner
    "next_learner",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("learner_fingerprint", sa.Text, nullable=False),
    sa.Column("layout_id", sa.Text, nullable=False),
    sa.Column("folder", sa.Text, nullable=False),  # where the bank found the learner
)

next_gradients = sa.Table(  # of the next learner, for those versions that have one by now
    "next_gradients",
    metadata,
    sa.Column("began", Number, primary_key=True, autoincrement=False),  # of the version
    sa.Column("gradient_digest", Name, nullable=False, index=True),
    sa.Column("gradient_bytes", sa.BigInteger, nullable=False),
    sa.Column("num_tokens", sa.Integer, nullable=False),
    sa.Column("truncated", sa.Boolean, nullable=False),
)

history_setting = sa.Table(  # one row with the time for which past versions are kept; older catalogs may have none
    "history_setting",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("seconds", sa.BigInteger, nullable=False),
)

horizons = sa.Table(  # the oldest sequence whose state is known, for namespaces that lost a version
    "horizons",
    metadata,
    sa.Column("namespace", Name, primary_key=True),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

namespace_usage = sa.Table(  # a row for each namespace that ever had a document
    "namespace_usage",
    metadata,
    sa.Column("namespace", Name, primary_key=True),
    sa.Column("num_documents", sa.BigInteger, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),  # of texts, gradients and sentences, the past included
    sqlite_with_rowid=False,
)
