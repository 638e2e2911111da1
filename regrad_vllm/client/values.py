"""The values that a bank's client takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from bank_service.wire.limits import DEFAULT_NAMESPACE
from regrad_vllm.naming import Operator, Retrieval

Outcome = Literal["created", "updated", "unchanged"]
OUTCOMES: tuple[Outcome, ...] = ("created", "updated", "unchanged")


@dataclass(frozen=True, slots=True)
class Document:
    """A document to store. The bank has the limits of id, title, text and metadata."""

    id: str  # empty: the bank derives it from title and text
    text: str
    title: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The bank's answer to one document."""

    id: str
    version: int  # 1 for the first content of an id
    gradient_digest: str  # SHA-256 of the gradient's record, 64 hex digits
    outcome: Outcome
    num_tokens: int  # tokens that the encoder read
    truncated: bool  # the text was longer than the learner reads
    sequence: int  # of the change that made this version


@dataclass(frozen=True, slots=True)
class Deletion:
    """The bank's answer to a deletion."""

    version: int  # the version that was deleted
    sequence: int  # of the deletion


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as the bank holds it."""

    document: Document
    version: int
    gradient_digest: str
    updated_at: datetime  # UTC
    num_tokens: int
    truncated: bool
    sequence: int  # of the change that made this version


@dataclass(frozen=True, slots=True)
class ListedDocument:
    """A document in a listing, without its text."""

    id: str
    title: str
    version: int
    gradient_digest: str
    num_text_bytes: int


@dataclass(frozen=True, slots=True)
class Condition:
    """A rule for one key of a document's metadata."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()  # one of them, or none of them; empty for present and absent


@dataclass(frozen=True, slots=True)
class Query:
    """A query. Exactly one of ``text`` and ``document_ids`` is set."""

    text: str = ""
    namespace: str = field(default=DEFAULT_NAMESPACE, kw_only=True)
    document_ids: tuple[str, ...] = field(default=(), kw_only=True)
    top_k: int = field(default=3, kw_only=True)
    min_score: float | None = field(default=None, kw_only=True)  # a cosine, in every retrieval
    with_text: bool = field(default=False, kw_only=True)
    retrieval: Retrieval = field(default="dense", kw_only=True)
    conditions: tuple[Condition, ...] = field(default=(), kw_only=True)  # all must hold; none with document_ids
    as_of: int | None = field(default=None, kw_only=True)  # answer as after that change; None: as of now

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.document_ids):
            raise ValueError("a query must have either text or document_ids")


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that the bank found, without its gradient."""

    id: str
    version: int
    score: float  # the bank's order: a cosine, BM25 or fused ranks; 1 for a document named by id
    cosine: float  # of the embeddings, in every retrieval; weights are made of it; 1 for a document named by id
    gradient_digest: str  # 64 hex digits
    gradient_bytes: int
    title: str  # empty unless the query asked for texts
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The documents that the bank found, and the state of the bank then."""

    hits: tuple[Hit, ...]  # best first; documents named by id in the order named
    sequence: int  # of the last change that the answer reflects; as_of where that was given


@dataclass(frozen=True, slots=True)
class Stats:
    """A bank's own figures, as far as the caller's token may see them."""

    namespaces: Mapping[str, int]  # name → number of documents
    num_documents: int
    num_gradients: int  # with those of past versions
    gradient_bytes: int
    sequence: int
    indexed_sequence: int
    learner_fingerprint: str
    layout_id: str
    codec: str
    embedder: str
    embedding_dimension: int
    cache_hits: int
    cache_misses: int
    cache_available: bool
    version: str  # of the bank's program
    num_past_versions: int  # that as_of can find
    oldest_as_of: int  # from it on, as_of is answered in all of these namespaces


@dataclass(frozen=True, slots=True)
class SnapshotProgress:
    """How far a snapshot is. The last one has ``is_whole``."""

    num_gradients: int  # in the snapshot
    num_done: int
    num_copied: int  # of those, not at the target before
    copied_bytes: int
    is_whole: bool
    sequence: int  # of the last change in the snapshot, where it is whole
    catalog_digest: str  # where it is whole


@dataclass(frozen=True, slots=True)
class RecodeProgress:
    """How far a change of codec is. The last one has ``finished``."""

    num_documents: int  # of the collection, when it began
    num_done: int
    num_recoded: int  # of those, had another codec
    num_failed: int  # of those, keep their old record
    finished: bool
