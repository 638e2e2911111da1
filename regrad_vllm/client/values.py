"""The arguments and results of a bank's client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from bank_service.errors import InvalidArgumentError
from bank_service.wire.limits import DEFAULT_NAMESPACE

Outcome = Literal["created", "updated", "unchanged"]
OUTCOMES: tuple[Outcome, ...] = ("created", "updated", "unchanged")
Retrieval = Literal["dense", "lexical", "hybrid"]  # the kinds of search, explained in the bank's contract
RETRIEVALS: tuple[Retrieval, ...] = ("dense", "lexical", "hybrid")
Operator = Literal["equals", "not_equals", "present", "absent"]  # the operators of a condition on metadata
OPERATORS: tuple[Operator, ...] = ("equals", "not_equals", "present", "absent")
UpgradeAction = Literal["status", "begin", "finish", "back"]
OPERATORS_WITH_VALUES: tuple[Operator, ...] = ("equals", "not_equals")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidArgumentError(f"{field} must be one of {', '.join(choices)}, got {value!r}", field=field)


@dataclass(frozen=True, slots=True)
class Document:
    """A document to store. The bank sets limits for id, title, text and metadata."""

    id: str  # empty: the bank derives it from title and text
    text: str
    title: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    # The version that the bank must have of it now, 0 for none. Otherwise VersionConflictError. None: any.
    expected_version: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The bank's answer to one document."""

    id: str
    version: int  # 1 for the first content of an id
    gradient_digest: str  # SHA-256 of the gradient's record, 64 hex digits
    outcome: Outcome
    num_tokens: int  # tokens that the encoder read
    truncated: bool  # the text was too long for the learner and was cut
    sequence: int  # the number of the change that made this version
    relative_error: float | None = None  # ‖stored − given‖ / ‖given‖ of an uploaded gradient


@dataclass(frozen=True, slots=True)
class Deletion:
    """The bank's answer to a deletion."""

    version: int  # the version that was deleted
    sequence: int  # the number of the change that deleted it


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document in the bank."""

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
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Condition:
    """A rule for one key of a document's metadata."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()  # equals: the value is one of them; not_equals: it is not; otherwise empty

    def __post_init__(self) -> None:
        """InvalidArgumentError for an unknown operator."""
        _check_choice("operator", self.operator, OPERATORS)


@dataclass(frozen=True, slots=True)
class Query:
    """A query. Exactly one of ``text`` and ``document_ids`` is set."""

    text: str = ""
    namespace: str = field(default=DEFAULT_NAMESPACE, kw_only=True)
    document_ids: tuple[str, ...] = field(default=(), kw_only=True)
    top_k: int = field(default=3, kw_only=True)
    min_score: float | None = field(default=None, kw_only=True)  # least cosine, for every kind of retrieval
    with_text: bool = field(default=False, kw_only=True)
    retrieval: Retrieval = field(default="dense", kw_only=True)
    conditions: tuple[Condition, ...] = field(default=(), kw_only=True)  # all must hold; not allowed with document_ids
    as_of: int | None = field(
        default=None, kw_only=True
    )  # the answer of the past after that change; None: the present one
    with_cue: int = field(default=0, kw_only=True)  # sentences of all hits together, nearest to a question, 0..4
    cue_text: str = field(default="", kw_only=True)  # the question; empty: ``text``
    newest: bool = field(default=False, kw_only=True)  # the bank reads no replica, which may lack others' last changes

    def __post_init__(self) -> None:
        """InvalidArgumentError for an unknown retrieval, ValueError without or with both of text and ids."""
        _check_choice("retrieval", self.retrieval, RETRIEVALS)
        if bool(self.text) == bool(self.document_ids):
            raise ValueError("a query must have either text or document_ids")


@dataclass(frozen=True, slots=True)
class CueSentence:
    """A sentence of a hit that is near to the question."""

    start: int  # its place in the document's text, in characters
    end: int
    text: str
    score: float  # cosine of the question and the sentence, with the title before it


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that the bank found, without its gradient."""

    id: str
    version: int
    score: float  # the bank sorts by it: a cosine, BM25 or fused ranks; 1 for a document named by id
    cosine: float  # of the embeddings, for every retrieval; it makes the weights; 1 for a document named by id
    gradient_digest: str  # 64 hex digits
    gradient_bytes: int
    title: str  # empty unless the query asked for texts, or there is a cue
    text: str
    cue: tuple[CueSentence, ...] = ()  # nearest first; empty unless the query asked for one


@dataclass(frozen=True, slots=True)
class Answer:
    """The documents that the bank found, and the state of the bank at that time."""

    hits: tuple[Hit, ...]  # best first; documents named by id in the order named
    sequence: int  # the last change that the answer reflects; it is as_of if that was given

    @property
    def cue(self) -> tuple[tuple[Hit, CueSentence], ...]:
        """The sentences of all hits, nearest to the question first, as learners are trained with them."""
        found = [(hit, sentence) for hit in self.hits for sentence in hit.cue]
        return tuple(sorted(found, key=lambda pair: -pair[1].score))


class BankTooOldError(ValueError):
    """The bank's version doesn't know a part of the query. ``answer`` is its answer without that part."""

    def __init__(self, message: str, answer: Answer) -> None:
        super().__init__(message)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A replica of a bank's catalog. The counts are of states that queries read since the bank's start."""

    is_up: bool  # it can be read
    staleness_ms: int | None  # it has every change that is older than this; None: not known yet
    num_reads: int
    num_behind: int  # read at the primary, because the replica's state was too old
    num_down: int  # read at the primary, because the replica could not be read


@dataclass(frozen=True, slots=True)
class Stats:
    """A bank's statistics, as far as the caller's token may see them."""

    namespaces: Mapping[str, int]  # name → number of documents
    num_documents: int
    num_gradients: int  # past versions included
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
    num_past_versions: int  # past versions that as_of can find
    oldest_as_of: int  # the least as_of that all of these namespaces can answer
    free_disk_bytes: int  # of the bank's folder; 0 if the token may not see it, or the bank is older
    removals_stopped: bool  # another bank has opened the place of the gradients, so this one removes none
    replica: ReplicaStats | None  # None: the bank reads no replica, or the token may not see it


@dataclass(frozen=True, slots=True)
class SnapshotProgress:
    """The progress of a snapshot. The last one has ``is_whole``."""

    num_gradients: int  # gradients in the snapshot
    num_done: int
    num_copied: int  # gradients that the target didn't have before
    copied_bytes: int
    is_whole: bool
    sequence: int  # the last change in the snapshot, when it is whole
    catalog_digest: str  # set when it is whole


@dataclass(frozen=True, slots=True)
class UpgradeProgress:
    """The state of a bank's upgrade to another learner."""

    learner_fingerprint: str  # of the bank's learner
    next_fingerprint: str  # of the next one; empty if no upgrade is under way
    num_versions: int  # versions of documents, past ones included
    num_done: int  # versions that have a gradient of the next learner
    is_level: bool  # all have one
    problem: str  # the reason why the work can't go on, or why a version has no gradient


@dataclass(frozen=True, slots=True)
class RecodeProgress:
    """The progress of a change of codec. The last one has ``finished``."""

    num_documents: int  # documents in the bank at the start
    num_done: int
    num_recoded: int  # documents whose gradient was recoded
    num_failed: int  # documents that keep their old gradient
    finished: bool
