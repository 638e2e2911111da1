"""The values that a catalog takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bank_service.values.documents import Hit


@dataclass(frozen=True, slots=True)
class CollectionIdentity:
    """The properties that all gradients and embeddings of a bank share."""

    learner_fingerprint: str
    layout_id: str
    codec: str
    embedder: str
    embedding_dimension: int


@dataclass(frozen=True, slots=True)
class StoredCollection:
    """The part of a collection that a catalog tells without being opened."""

    collection_id: str
    codec: str
    sequence: int
    has_gradients: bool  # or has had an object store for them


@dataclass(frozen=True, slots=True)
class NextLearner:
    """The learner that a collection is on its way to."""

    fingerprint: str
    layout_id: str
    folder: str  # where the bank found the learner


@dataclass(frozen=True, slots=True)
class Change:
    """The latest change of one document."""

    sequence: int
    key: int
    namespace: str
    embedding: bytes | None  # None: deleted


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of a document for a query."""

    value: float  # orders the hits
    cosine: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document or a past version, with the fields that ranking and a hit need."""

    key: int
    id: str
    sequence: int
    embedding: bytes
    version: int
    gradient_digest: str
    gradient_bytes: int

    def hit(self, score: Score) -> Hit:
        """The hit, without title and text."""
        return Hit(
            self.id, self.version, score.value, score.cosine, self.gradient_digest, self.gradient_bytes, self.sequence
        )


@dataclass(frozen=True, slots=True)
class SentenceVectors:
    """The places and embeddings of a text's sentences. The title is before each embedded sentence."""

    places: bytes  # int32 (sentences, 2): start and end in characters, little-endian
    vectors: bytes  # float16 (sentences, dimension), little-endian

    @property
    def num_bytes(self) -> int:
        return len(self.places) + len(self.vectors)


@dataclass(frozen=True, slots=True)
class VersionText:
    """The text of a version, and the vectors of its sentences."""

    title: str
    text: str
    sentences: SentenceVectors | None  # None: not embedded yet


@dataclass(frozen=True, slots=True)
class ListEntry:
    """A document in a list."""

    id: str
    title: str
    version: int
    gradient_digest: str
    num_text_bytes: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Usage:
    """The counts of a namespace."""

    num_documents: int = 0
    num_bytes: int = 0  # texts, gradients and vectors of sentences, past versions included


@dataclass(frozen=True, slots=True)
class Totals:
    """The counts of a catalog."""

    num_documents: dict[str, int]  # by namespace; 0 for a namespace that lost its last document
    num_gradients: int  # of documents and their past versions
    gradient_bytes: int
    num_past_versions: int
    oldest_as_of: int  # from this sequence on, the past of every namespace is known


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """A deletion that is durable."""

    version: int  # of the deleted document
    sequence: int
    digests: frozenset[str]  # gradients that perhaps no document names any more


@dataclass(frozen=True, slots=True)
class Erasure:
    """A purge with traces that are not erased yet."""

    number: int
    namespace: str
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CatalogCopy:
    """The counts of a catalog's copy in a snapshot."""

    collection_id: str
    learner_fingerprint: str
    sequence: int  # of the last change in it
    gradients: dict[str, int]  # digest → bytes, in order of digest, of documents and past versions
