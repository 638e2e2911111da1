"""The bodies of requests and answers, as pydantic models. The server's OpenAPI schema has them with their examples.

The models check types and names of fields, and sizes, so that a document fits into a message to the bank. The bank
checks every limit of a document.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from bank_service.wire.limits import (
    MAX_CUE_SENTENCES,
    MAX_ID_BYTES,
    MAX_METADATA_BYTES,
    MAX_METADATA_PAIRS,
    MAX_TEXT_BYTES,
    MAX_TITLE_BYTES,
)
from regrad_vllm.client import Condition, Hit, ListedDocument, Receipt, StoredDocument
from regrad_vllm.client.values import Operator, Outcome, Retrieval
from regrad_vllm.serve.settings import MAX_TOP_K

_DIGEST = "5f2b7e0c9d1a4e6f8b3c5d7e9f0a1b2c3d4e5f60718293a4b5c6d7e8f9a0b1c2"
_TEXT = "The harbour master of Orlen is Ada Quist."
_BODY: dict[str, Any] = {"text": _TEXT, "title": "Orlen", "metadata": {"language": "en"}}
_RECEIPT: dict[str, Any] = {
    "object": "regrad.document", "id": "harbour", "namespace": "default", "version": 1, "sequence": 17,
    "status": "created", "gradient_digest": _DIGEST, "num_tokens": 11, "truncated": False,
}  # fmt: skip
_LISTED: dict[str, Any] = {
    "object": "regrad.document", "id": "harbour", "title": "Orlen", "version": 1, "gradient_digest": _DIGEST,
    "num_text_bytes": 41, "metadata": {"language": "en"},
}  # fmt: skip
_HIT: dict[str, Any] = {
    "id": "harbour", "title": "Orlen", "text": _TEXT, "version": 1, "score": 0.82, "cosine": 0.82, "weight": 1.0,
    "gradient_digest": _DIGEST, "cue": [],
}  # fmt: skip
BATCH_LINE: dict[str, Any] = {"id": "harbour", **_BODY}


def _at_most(num_bytes: int) -> AfterValidator:
    """A check of a text's bytes, of which a character has up to four."""

    def check(text: str) -> str:
        if len(text.encode("utf-8", "surrogatepass")) > num_bytes:
            raise PydanticCustomError("too_long", "must be at most {most} bytes of UTF-8", {"most": num_bytes})
        return text

    return AfterValidator(check)


_Value = Annotated[str, _at_most(MAX_METADATA_BYTES)]
Metadata = Annotated[
    dict[_Value, _Value],
    Field(
        max_length=MAX_METADATA_PAIRS,
        description="Metadata that filters go by: at most 32 pairs of text, 4 KiB in all.",
    ),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _shown(**example: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class DocumentBody(_Request):
    """A document to store under the id in the path."""

    model_config = _shown(**_BODY)

    text: Annotated[str, _at_most(MAX_TEXT_BYTES)] = Field(
        min_length=1, max_length=MAX_TEXT_BYTES, description="1 byte to 1 MiB of UTF-8, not blank."
    )
    title: Annotated[str, _at_most(MAX_TITLE_BYTES)] | None = Field(None, description="At most 1 KiB.")
    metadata: Metadata | None = None


class BatchLine(DocumentBody):
    """A line of a batch: a document with its id."""

    model_config = _shown(**BATCH_LINE)

    id: Annotated[str, _at_most(MAX_ID_BYTES)] = Field(min_length=1, description="1 to 256 bytes.")


class FilterCondition(_Request):
    """A rule for one attribute."""

    key: str
    operator: Operator
    values: list[str] | None = Field(None, description="1 to 64 texts for equals and not_equals, else none.")

    def as_condition(self) -> Condition:
        return Condition(self.key, self.operator, tuple(self.values or ()))


class QueryBody(_Request):
    """A search. The fields mean what they mean in the ``regrad`` object of a chat request."""

    model_config = _shown(query="Who is the harbour master?", top_k=1)

    query: str | None = Field(None, description="The text to search for. Either it or document_ids must be given.")
    document_ids: list[str] | None = Field(None, description="Documents by their ids, in place of a search.")
    top_k: int | None = Field(None, ge=1, le=MAX_TOP_K, description="Left out: the server's --regrad-top-k.")
    min_score: float | None = Field(None, ge=-1, le=1, allow_inf_nan=False, description="The least cosine of a hit.")
    retrieval: Retrieval | None = Field(None, description="Left out: the server's --regrad-retrieval.")
    filter: list[FilterCondition] | None = Field(None, description="Rules for metadata, which must all hold.")
    as_of: int | None = Field(None, ge=0, le=2**64 - 1, description="Answer as after that change of the bank.")
    with_text: bool = Field(True, description="Whether hits have their title and text.")
    with_cue: int = Field(0, ge=0, le=MAX_CUE_SENTENCES, description="Sentences nearest to the query, of all hits.")


class DocumentReceipt(BaseModel):
    """The bank's answer to one document. The document is stored and durable."""

    model_config = _shown(**_RECEIPT)

    object: Literal["regrad.document"] = "regrad.document"
    id: str
    namespace: str
    version: int = Field(description="1 for the first content of an id.")
    sequence: int = Field(description="The bank's change that made this version.")
    status: Outcome
    gradient_digest: str
    num_tokens: int = Field(description="The tokens that the gradient was made of.")
    truncated: bool = Field(description="Whether the text was longer than the learner reads.")

    @classmethod
    def of(cls, receipt: Receipt, namespace: str) -> DocumentReceipt:
        return cls(
            id=receipt.id,
            namespace=namespace,
            version=receipt.version,
            sequence=receipt.sequence,
            status=receipt.outcome,
            gradient_digest=receipt.gradient_digest,
            num_tokens=receipt.num_tokens,
            truncated=receipt.truncated,
        )


class DocumentAnswer(BaseModel):
    """A stored document."""

    model_config = _shown(
        **{name: value for name, value in _RECEIPT.items() if name != "status"},
        **_BODY,
        updated_at="2026-11-30T09:00:00Z",
    )

    object: Literal["regrad.document"] = "regrad.document"
    id: str
    namespace: str
    title: str
    text: str
    metadata: dict[str, str]
    version: int
    sequence: int
    gradient_digest: str
    updated_at: datetime
    num_tokens: int
    truncated: bool

    @classmethod
    def of(cls, stored: StoredDocument, namespace: str) -> DocumentAnswer:
        document = stored.document
        return cls(
            id=document.id,
            namespace=namespace,
            title=document.title,
            text=document.text,
            metadata=dict(document.metadata),
            version=stored.version,
            sequence=stored.sequence,
            gradient_digest=stored.gradient_digest,
            updated_at=stored.updated_at,
            num_tokens=stored.num_tokens,
            truncated=stored.truncated,
        )


class ListedAnswer(BaseModel):
    """A document in a listing, without its text."""

    model_config = _shown(**_LISTED)

    object: Literal["regrad.document"] = "regrad.document"
    id: str
    title: str
    version: int
    gradient_digest: str
    num_text_bytes: int
    metadata: dict[str, str]

    @classmethod
    def of(cls, listed: ListedDocument) -> ListedAnswer:
        return cls(
            id=listed.id,
            title=listed.title,
            version=listed.version,
            gradient_digest=listed.gradient_digest,
            num_text_bytes=listed.num_text_bytes,
            metadata=dict(listed.metadata),
        )


class DocumentList(BaseModel):
    """A page of documents, in order of their ids' UTF-8 bytes."""

    model_config = _shown(object="list", data=[_LISTED], has_more=False, last_id="harbour")

    object: Literal["list"] = "list"
    data: list[ListedAnswer]
    has_more: bool
    last_id: str | None = Field(description="The value of after for the next page. null on an empty page.")


class DeletionAnswer(BaseModel):
    """The bank's answer to a deletion."""

    model_config = _shown(
        object="regrad.document.deleted", id="harbour", namespace="default", deleted=True, version=1, sequence=18
    )

    object: Literal["regrad.document.deleted"] = "regrad.document.deleted"
    id: str
    namespace: str
    deleted: Literal[True] = True
    version: int = Field(description="The version that was deleted.")
    sequence: int = Field(description="The bank's change that deleted it.")


class CueAnswer(BaseModel):
    """A sentence of a hit that is near to the query."""

    start: int
    end: int
    text: str
    score: float


class HitAnswer(BaseModel):
    """A document that a search found."""

    model_config = _shown(**_HIT)

    id: str
    title: str | None = Field(description="null without with_text.")
    text: str | None = Field(description="null without with_text.")
    version: int
    score: float = Field(description="The order of the hits goes by it.")
    cosine: float
    weight: float = Field(description="The gradient's weight in an adapter of these hits.")
    gradient_digest: str
    cue: list[CueAnswer] = Field(description="Nearest first.")

    @classmethod
    def of(cls, hit: Hit, weight: float, *, with_text: bool) -> HitAnswer:
        return cls(
            id=hit.id,
            title=hit.title if with_text else None,
            text=hit.text if with_text else None,
            version=hit.version,
            score=hit.score,
            cosine=hit.cosine,
            weight=weight,
            gradient_digest=hit.gradient_digest,
            cue=[CueAnswer(start=found.start, end=found.end, text=found.text, score=found.score) for found in hit.cue],
        )


class HitList(BaseModel):
    """The documents that a search found, best first."""

    model_config = _shown(object="list", data=[_HIT], sequence=17)

    object: Literal["list"] = "list"
    data: list[HitAnswer]
    sequence: int = Field(description="The bank's last change that the answer reflects.")


class ErrorDetail(BaseModel):
    """The fault, and the field that has it."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """An error in OpenAI's form."""

    model_config = _shown(
        error={"message": "no document 'harbour' in namespace default", "type": "NotFoundError", "param": "id",
               "code": 404}
    )  # fmt: skip

    error: ErrorDetail
