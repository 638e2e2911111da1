"""The catalog's tables that more than one module reads or writes."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

collection = sa.Table(
    "collection",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("uuid", sa.Text, nullable=False),  # of this file; derived data on disk names it
    sa.Column("sequence", sa.BigInteger, nullable=False),  # of the last change
    sa.Column("learner_fingerprint", sa.Text, nullable=False),
    sa.Column("layout_id", sa.Text, nullable=False),
    sa.Column("codec", sa.Text, nullable=False),
    sa.Column("embedder", sa.Text, nullable=False),
    sa.Column("embedding_dimension", sa.Integer, nullable=False),
)

documents = sa.Table(
    "documents",
    metadata,
    sa.Column("key", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("namespace", sa.Text, nullable=False),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("deleted", sa.Boolean, nullable=False),
    sa.Column("updated_us", sa.BigInteger, nullable=False),
    sa.Column("content_digest", sa.Text),
    sa.Column("gradient_digest", sa.Text),
    sa.Column("gradient_bytes", sa.BigInteger, nullable=False),
    sa.Column("num_tokens", sa.Integer, nullable=False),
    sa.Column("truncated", sa.Boolean, nullable=False),
    sa.Column("num_text_bytes", sa.Integer, nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("metadata", sa.Text, nullable=False),  # JSON object
    sa.Column("embedding", sa.LargeBinary),  # float32 (embedding_dimension,), L2 norm 1
    sa.Column("text", sa.Text, nullable=False),  # last: SQLite reads a row from its start
    sa.UniqueConstraint("namespace", "id"),
    sa.Index("documents_by_sequence", "sequence", unique=True),
    sa.Index("documents_by_namespace", "namespace", "sequence"),
    # All that is asked of a gradient: a row is read for none of it.
    sa.Index("documents_by_gradient", "gradient_digest", "namespace", "gradient_bytes"),
    sqlite_autoincrement=True,
)

recoding = sa.Table(  # a row while the gradients are on their way to the collection's codec
    "recoding", metadata, sa.Column("id", sa.Integer, primary_key=True)
)

# Versions that were superseded or deleted: of the state at sequence s are those with began <= s < ended. A change makes
# at most one version and ends at most one, so ``began`` and ``ended`` are each unique, and ``began`` names a version.
history = sa.Table(
    "history",
    metadata,
    sa.Column("began", sa.Integer, primary_key=True, autoincrement=False),  # sequence of the change that made it
    sa.Column("ended", sa.BigInteger, nullable=False),  # sequence of the change that took its place
    sa.Column("ended_us", sa.BigInteger, nullable=False),  # microseconds since 1970
    sa.Column("key", sa.Integer, nullable=False, index=True),  # of the document's row
    sa.Column("namespace", sa.Text, nullable=False),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("updated_us", sa.BigInteger, nullable=False),
    sa.Column("content_digest", sa.Text, nullable=False),
    sa.Column("gradient_digest", sa.Text, nullable=False),
    sa.Column("gradient_bytes", sa.BigInteger, nullable=False),
    sa.Column("num_tokens", sa.Integer, nullable=False),
    sa.Column("truncated", sa.Boolean, nullable=False),
    sa.Column("num_text_bytes", sa.Integer, nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("metadata", sa.Text, nullable=False),
    sa.Column("embedding", sa.LargeBinary, nullable=False),
    sa.Column("text", sa.Text, nullable=False),  # last: SQLite reads a row from its start
    sa.Index("history_by_namespace", "namespace", "ended", "began"),
    sa.Index("history_by_time", "ended_us"),
    sa.Index("history_by_gradient", "gradient_digest", "namespace", "gradient_bytes"),
)

history_setting = sa.Table(  # a row once somebody, or the creation of the catalog, has said how long history is kept
    "history_setting",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("seconds", sa.BigInteger, nullable=False),
)

horizons = sa.Table(  # of namespaces that lost a version: the oldest sequence whose state is known
    "horizons",
    metadata,
    sa.Column("namespace", sa.Text, primary_key=True),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
