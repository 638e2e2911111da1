"""Documents, gradients, queries and their results. Values are checked when they are made.

InvalidArgumentError names the field as it stands in a request's document.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from bank_service.errors import InvalidArgumentError
from bank_service.values.filters import Condition, check_filter
from bank_service.wire import limits

_NAMESPACE = re.compile(rf"[a-zA-Z0-9._-]{{1,{limits.MAX_NAMESPACE_CHARS}}}")
# Control characters show that a text is binary data or was decoded wrongly. White space is text, form feeds too.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")


def check_namespace(name: str, field: str = "namespace") -> str:
    """``name``, or the default namespace for an empty one. InvalidArgumentError."""
    if name and not _NAMESPACE.fullmatch(name):
        raise InvalidArgumentError(
            f"{field} must match [a-zA-Z0-9._-]{{1,{limits.MAX_NAMESPACE_CHARS}}}, got {name[:80]!r}", field=field
        )
    return name or limits.DEFAULT_NAMESPACE


def check_id(id: str, field: str = "id") -> str:
    """``id``, if a document may have it. InvalidArgumentError."""
    check_text(id, field, limits.MAX_ID_BYTES)
    return id


def check_text(text: str, field: str, max_bytes: int) -> None:
    """InvalidArgumentError unless the text is not blank, fits ``max_bytes`` of UTF-8, and has no control characters but
    white space."""
    num_bytes = len(text.encode())
    if num_bytes > max_bytes:
        raise InvalidArgumentError(f"{field} must be at most {max_bytes} bytes of UTF-8, got {num_bytes}", field=field)
    if not text.strip():
        raise InvalidArgumentError(f"{field} must not be empty or blank, got {num_bytes} bytes", field=field)
    _check_printable(text, field)


def _check_printable(text: str, field: str) -> None:
    found = _CONTROL.search(text)
    if found:
        raise InvalidArgumentError(
            f"{field} must not contain control characters except white space, "
            f"got U+{ord(found[0]):04X} at character {found.start()}; remove them, or decode the text another way",
            field=field,
        )


def _canonical_digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Document:
    """A document that a caller stores."""

    namespace: str  # empty: the default
    id: str  # empty: derived from title and text
    title: str
    text: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "namespace", check_namespace(self.namespace, "document.namespace"))
        check_text(self.text, "document.text", limits.MAX_TEXT_BYTES)
        if self.title:
            check_text(self.title, "document.title", limits.MAX_TITLE_BYTES)
        self._check_metadata()
        if self.id:
            check_id(self.id, "document.id")
        else:
            object.__setattr__(self, "id", f"sha256-{self.text_digest[:32]}")

    def _check_metadata(self) -> None:
        name = "document.metadata"
        own = {key: value for key, value in self.metadata.items() if key not in (limits.SOURCE_KEY, limits.FILE_KEY)}
        if len(own) > limits.MAX_METADATA_PAIRS:
            raise InvalidArgumentError(
                f"{name} must have at most {limits.MAX_METADATA_PAIRS} pairs, got {len(own)}", field=name
            )
        num_bytes = sum(len(key.encode()) + len(value.encode()) for key, value in own.items())
        if num_bytes > limits.MAX_METADATA_BYTES:
            raise InvalidArgumentError(
                f"{name} must be at most {limits.MAX_METADATA_BYTES} bytes in all, got {num_bytes}", field=name
            )
        for key in self.metadata.keys() - own.keys():
            num_bytes = len(self.metadata[key].encode())
            if num_bytes > limits.MAX_SOURCE_BYTES:
                raise InvalidArgumentError(
                    f"{name}[{key!r}] must be at most {limits.MAX_SOURCE_BYTES} bytes, got {num_bytes}", field=name
                )
        for key, value in self.metadata.items():
            _check_printable(key + value, name)
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    @property
    def text_digest(self) -> str:
        """A digest of title and text, which the encoder and the embedder read."""
        return _canonical_digest(self.title, self.text)

    @property
    def content_digest(self) -> str:
        """A digest of title, text and metadata."""
        return _canonical_digest(self.title, self.text, dict(self.metadata))


@dataclass(frozen=True, slots=True)
class Gradient:
    """The stored gradient of a document, and facts about its encoding."""

    digest: str  # SHA-256 of the record, 64 hex digits
    num_bytes: int  # of the record
    num_tokens: int  # tokens that the encoder read; 0 for an uploaded gradient
    truncated: bool
    embedding: bytes  # float32 (dimension,), little-endian, L2 norm 1


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document in the catalog."""

    key: int  # one per (namespace, id); it never changes
    document: Document
    gradient: Gradient
    version: int  # from 1; a deleted document that is stored again continues the count
    sequence: int  # of the change that made this version
    updated_us: int  # microseconds since 1970


class Outcome(Enum):
    """The outcome of an ingest."""

    CREATED = 1
    UPDATED = 2
    UNCHANGED = 3


@dataclass(frozen=True, slots=True)
class PutResult:
    """An acknowledged ingest."""

    stored: StoredDocument
    outcome: Outcome
    dropped: frozenset[str] = frozenset()  # digests of gradients that perhaps no version has any more
    relative_error: float | None = None  # ‖stored − given‖ / ‖given‖ of an uploaded gradient


class Retrieval(Enum):
    """The method by which a text finds documents."""

    DENSE = 1  # by the cosine of the embeddings
    LEXICAL = 2  # by BM25
    HYBRID = 3  # by both


@dataclass(frozen=True, slots=True)
class Query:
    """A query, for exactly one of text, vector, document_ids."""

    namespace: str = ""
    text: str = ""
    vector: tuple[float, ...] = ()
    document_ids: tuple[str, ...] = ()
    top_k: int = 0  # 1..64 with text or vector; not used with document_ids
    min_score: float = -1.0
    learner_fingerprint: str = ""
    include_gradients: bool = False
    include_text: bool = False
    retrieval: Retrieval = Retrieval.DENSE
    conditions: tuple[Condition, ...] = ()  # a document's metadata must meet all of them
    as_of: int | None = None  # answers from the bank's state at this past sequence; None: the present state
    with_cue: int = 0  # sentences of all hits together that are nearest to a question, 0..4
    cue_text: str = ""  # the question; empty: ``text``
    at_least: int | None = None  # a replica's state will do if it has this change; None: none will

    @property
    def question(self) -> str:
        """The text that the cue must be near to. Empty if the query has none."""
        return self.cue_text or self.text

    def __post_init__(self) -> None:
        object.__setattr__(self, "namespace", check_namespace(self.namespace))
        given = [name for name in ("text", "vector", "document_ids") if getattr(self, name)]
        if len(given) != 1:
            raise InvalidArgumentError(
                f"exactly one of text, vector, document_ids must be given, got {' and '.join(given) or 'none'}",
                field=given[1] if given else "text",
            )
        lowest = 0 if self.document_ids else 1
        if not lowest <= self.top_k <= limits.MAX_TOP_K:
            raise InvalidArgumentError(
                f"top_k must be in {lowest}..{limits.MAX_TOP_K}, got {self.top_k}", field="top_k"
            )
        if not -1.0 <= self.min_score <= 1.0:  # false for NaN
            raise InvalidArgumentError(f"min_score must be a cosine in -1..1, got {self.min_score}", field="min_score")
        if self.text:
            _check_query_text(self.text, "text")
        self._check_retrieval()
        self._check_cue()
        check_filter(self.conditions)
        if self.conditions and self.document_ids:
            raise InvalidArgumentError(
                "filter must be absent with document_ids: they choose themselves", field="filter"
            )
        if len(self.document_ids) > limits.MAX_QUERY_IDS:
            raise InvalidArgumentError(
                f"document_ids must be at most {limits.MAX_QUERY_IDS}, got {len(self.document_ids)}",
                field="document_ids",
            )
        if len(set(self.document_ids)) < len(self.document_ids):
            raise InvalidArgumentError("document_ids must be distinct, got one twice", field="document_ids")
        for index, id in enumerate(self.document_ids):
            check_id(id, f"document_ids[{index}]")

    def _check_retrieval(self) -> None:
        if self.retrieval is Retrieval.DENSE:
            return
        for is_refused, rule in (
            (not self.text, "without text, got {}; it goes by the text's words"),
            (self.as_of is not None, "with as_of, got {}; the statistics of words that BM25 had then are not kept"),
        ):
            if is_refused:
                raise InvalidArgumentError(
                    f"retrieval must be dense {rule.format(self.retrieval.name.lower())}", field="retrieval"
                )

    def _check_cue(self) -> None:
        if not 0 <= self.with_cue <= limits.MAX_CUE_SENTENCES:
            raise InvalidArgumentError(
                f"with_cue must be in 0..{limits.MAX_CUE_SENTENCES}, got {self.with_cue}", field="with_cue"
            )
        if self.cue_text:
            _check_query_text(self.cue_text, "cue_text")
        if bool(self.cue_text) > bool(self.with_cue):
            raise InvalidArgumentError("cue_text must come with with_cue, got it alone", field="cue_text")
        if self.with_cue and not self.question:
            raise InvalidArgumentError(
                "cue_text must be given for with_cue where the query has no text, got none", field="cue_text"
            )


def _check_query_text(text: str, field: str) -> None:
    num_bytes = len(text.encode())
    if num_bytes > limits.MAX_TEXT_BYTES or not text.strip():
        raise InvalidArgumentError(
            f"{field} must be 1..{limits.MAX_TEXT_BYTES} bytes of UTF-8 and not blank, got {num_bytes}", field=field
        )


def check_digests(digests: Sequence[str]) -> None:
    """InvalidArgumentError unless each digest is a gradient's name and their number fits a fetch."""
    if not 1 <= len(digests) <= limits.MAX_FETCH_DIGESTS:
        raise InvalidArgumentError(
            f"digests must be 1..{limits.MAX_FETCH_DIGESTS}, got {len(digests)}", field="digests"
        )
    for index, digest in enumerate(digests):
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise InvalidArgumentError(
                f"digests[{index}] must be 64 lower-case hex digits, got {digest[:80]!r}", field=f"digests[{index}]"
            )


def check_vector(vector: Sequence[float], dimension: int, field: str) -> None:
    """InvalidArgumentError unless the vector has the embedder's dimension, is finite and is not zero."""
    if len(vector) != dimension:
        raise InvalidArgumentError(
            f"{field} must have the embedder's {dimension} dimensions, got {len(vector)}", field=field
        )
    norm = math.hypot(*vector)
    if not (math.isfinite(norm) and norm > 1e-12):
        raise InvalidArgumentError(f"{field} must be finite and not zero, got a norm of {norm}", field=field)


@dataclass(frozen=True, slots=True)
class CueSentence:
    """A sentence of a hit that is near to the question."""

    start: int  # its place in the document's text, in characters
    end: int
    text: str
    score: float  # cosine of the question and the sentence, with the title before it


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer of a query."""

    id: str
    version: int
    score: float  # by the query's retrieval method; 1 for a document named by id
    cosine: float  # of the embeddings; 1 for a document named by id
    gradient_digest: str
    gradient_bytes: int
    sequence: int  # of the change that made the version
    title: str = ""  # title and text are set only if the query asks for them; the title also if there is a cue
    text: str = ""
    cue: tuple[CueSentence, ...] = ()  # nearest first


@dataclass(frozen=True, slots=True)
class QueryResult:
    """Hits, best first, and the catalog's sequence that they reflect."""

    hits: tuple[Hit, ...]
    records: Mapping[str, bytes]  # digest → gradient record, if the query asks for it and it fits the message
    sequence: int
    num_with_record: int | None = None  # so many of the first hits have their records here; None: all
    learner_fingerprint: str = ""  # of the hits' gradients
