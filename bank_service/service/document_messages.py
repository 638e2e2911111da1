"""Documents on the wire: turns requests into documents, and stored documents into responses."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from bank_service.catalog.entries import ListEntry
from bank_service.errors import InvalidArgumentError
from bank_service.values.documents import Document, Outcome, PutResult, StoredDocument
from bank_service.wire import limits
from bank_service.wire.generated import bank_pb2 as pb

_OUTCOMES = {
    Outcome.CREATED: pb.IngestDocumentsResponse.CREATED,
    Outcome.UPDATED: pb.IngestDocumentsResponse.UPDATED,
    Outcome.UNCHANGED: pb.IngestDocumentsResponse.UNCHANGED,
}


def document_of(message: pb.Document) -> Document:
    """The document of a message. InvalidArgumentError names the field."""
    return Document(message.namespace, message.id, message.title, message.text, dict(message.metadata))


def expected_version_of(
    message: pb.IngestDocumentsRequest | pb.IngestGradientsRequest.Header | pb.DeleteDocumentRequest,
) -> int | None:
    return message.expected_version if message.HasField("expected_version") else None


def ingested_response(result: PutResult) -> pb.IngestDocumentsResponse:
    stored = result.stored
    return pb.IngestDocumentsResponse(
        namespace=stored.document.namespace,
        id=stored.document.id,
        version=stored.version,
        gradient_digest=stored.gradient.digest,
        outcome=_OUTCOMES[result.outcome],
        num_tokens=stored.gradient.num_tokens,
        truncated=stored.gradient.truncated,
        sequence=stored.sequence,
        relative_error=result.relative_error,
    )


def document_response(stored: StoredDocument) -> pb.GetDocumentResponse:
    document = stored.document
    response = pb.GetDocumentResponse(
        document=pb.Document(
            namespace=document.namespace,
            id=document.id,
            title=document.title,
            text=document.text,
            metadata=dict(document.metadata),
        ),
        version=stored.version,
        gradient_digest=stored.gradient.digest,
        num_tokens=stored.gradient.num_tokens,
        truncated=stored.gradient.truncated,
        sequence=stored.sequence,
    )
    response.updated_at.FromMicroseconds(stored.updated_us)
    return response


def page_of(request: pb.ListDocumentsRequest) -> tuple[str, int]:
    """(the id after which the page begins, the number of documents in it). InvalidArgumentError."""
    if request.page_size > limits.MAX_PAGE_SIZE:
        raise InvalidArgumentError(
            f"page_size must be at most {limits.MAX_PAGE_SIZE}, got {request.page_size}", field="page_size"
        )
    after_id = _id_of_token(request.page_token) if request.page_token else request.after_id
    return after_id, request.page_size or limits.DEFAULT_PAGE_SIZE


def list_response(entries: Sequence[ListEntry], size: int) -> pb.ListDocumentsResponse:
    """A page of at most ``size`` entries. If there are more, it has the token of the next page."""
    page = entries[:size]
    return pb.ListDocumentsResponse(
        documents=[
            pb.ListDocumentsResponse.Entry(
                id=entry.id,
                title=entry.title,
                version=entry.version,
                gradient_digest=entry.gradient_digest,
                num_text_bytes=entry.num_text_bytes,
                metadata=dict(entry.metadata),
            )
            for entry in page
        ],
        next_page_token=_token_of_id(page[-1].id) if len(entries) > size else "",
    )


def _token_of_id(id: str) -> str:
    return base64.urlsafe_b64encode(id.encode()).decode()


def _id_of_token(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"page_token must be one that ListDocuments returned, got {token[:80]!r}", field="page_token"
        ) from error
