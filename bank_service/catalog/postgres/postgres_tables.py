"""The tables that only a catalog in PostgreSQL has, for its searches."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from bank_service.catalog.sql.made_words import words_version_in
from bank_service.catalog.sql.tables import Name

own_metadata = sa.MetaData()

spaces = sa.Table(  # a row for each namespace that ever had a document
    "spaces",
    own_metadata,
    sa.Column("number", sa.Integer, primary_key=True),  # of its partition of ``vectors``
    sa.Column("namespace", Name, nullable=False, unique=True),
    sa.Column("num_words", sa.BigInteger, nullable=False),  # of all its living documents together
)

document_words = sa.Table(  # of the living documents
    "document_words",
    own_metadata,
    sa.Column("key", sa.BigInteger, primary_key=True, autoincrement=False),  # of the document
    sa.Column("id", Name, nullable=False),  # of the document, to order equal scores
    sa.Column("num_words", sa.Integer, nullable=False),  # repetitions count
    sa.Column("words", ARRAY(sa.BigInteger), nullable=False),  # its different words in order, made by ``hash_of``
    sa.Column("counts", ARRAY(sa.Integer), nullable=False),  # how often each of them occurs
    sa.Index("document_words_by_word", "words", postgresql_using="gin"),
)

word_counts = sa.Table(
    "word_counts",
    own_metadata,
    sa.Column("word", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("num_documents", sa.BigInteger, nullable=False),  # that have the word
    postgresql_with={"fillfactor": 50},  # its rows change with every document: leave room beside them
)

nodes = sa.Table(  # a row for each bank that has had the catalog in the last days
    "nodes",
    own_metadata,
    sa.Column("node", sa.BigInteger, primary_key=True, autoincrement=False),  # random, of one process
    sa.Column("token", sa.Text, nullable=False),  # random; of the last transaction of its writer
    sa.Column("is_over", sa.Boolean, nullable=False),  # another node has seen that it ended
    sa.Column("seen", sa.DateTime(timezone=True), nullable=False),  # when it began or wrote
)

epoch = sa.Table(  # one row
    "epoch",
    own_metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    # The nodes' random name in their object store. Empty: the catalog never had a store; -: they have no name yet.
    sa.Column("objects", sa.Text, nullable=False),
)

removals = sa.Table(  # of gradients from the object store: under way, or without an answer of the store
    "removals",
    own_metadata,
    sa.Column("digest", Name, primary_key=True),
    sa.Column("until", sa.DateTime(timezone=True), nullable=False),  # the store has carried it out by then
)

dropped_gradients = sa.Table(  # of the object store: they wait for the end of their grace period
    "dropped_gradients",
    own_metadata,
    sa.Column("digest", Name, primary_key=True),
    sa.Column("since", sa.DateTime(timezone=True), nullable=False, index=True),
)

words_version = words_version_in(own_metadata)
