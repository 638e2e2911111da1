"""The routes under /v1/regrad for documents. ``RegradEndpoint`` adds them to vLLM's server. Its API key guards them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from starlette.convertors import Convertor, register_url_convertor

from bank_service.wire.limits import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE
from regrad_vllm.client import AsyncBank, Document, Receipt
from regrad_vllm.client import Query as BankQuery
from regrad_vllm.learner import LearnerConfig
from regrad_vllm.serve.api.hang_up import unless_gone
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.documents.bodies import (
    BATCH_LINE,
    BatchLine,
    DeletionAnswer,
    DocumentAnswer,
    DocumentBody,
    DocumentList,
    DocumentReceipt,
    ErrorAnswer,
    HitAnswer,
    HitList,
    ListedAnswer,
    QueryBody,
)
from regrad_vllm.serve.documents.errors import DocumentRoute, QueryRoute, StreamedRoute
from regrad_vllm.serve.documents.ingest_batch import NDJSON, Batch, NdjsonResponse
from regrad_vllm.serve.settings import Settings

MAX_BATCHES = 16  # at a time; each has up to 20 MiB of answers that wait for their client
_LOCAL_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[0-9.]+|[^.:\[\]]+)(:[0-9]+)?")
INGEST_TIMEOUT_S = 600  # a document waits for the encoder behind those of others


class _AnyText(Convertor[str]):
    """The rest of a path. Starlette's own ``path`` ends at a line feed, so that the bank would not get to name it."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any", _AnyText())


@dataclass(frozen=True, slots=True)
class DocumentStore:
    """The parts that the routes use, stored in ``app.state.regrad_documents``."""

    bank: AsyncBank
    settings: Settings
    learner: LearnerConfig
    has_key: bool = False  # whether the server asks for an API key
    is_local: bool = False  # whether this machine alone can reach the server
    batches: set[Batch] = field(default_factory=set)  # those that run
    places: asyncio.Semaphore = field(init=False)  # of single documents that are being stored

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", asyncio.Semaphore(self.settings.bank_concurrency))


async def _store(request: Request) -> DocumentStore:
    store: DocumentStore = request.app.state.regrad_documents
    return store


async def _from_own_page(request: Request) -> None:
    """RequestError if a browser sends the request for a page of another site, and no API key keeps that site out.

    A name with a dot may be any site's that leads to this machine (DNS rebinding).
    """
    store = request.app.state.regrad_documents
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if store.has_key:
        return
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        raise RequestError(403, f"Origin must be this server's address, because it has no API key; {_refused(origin)}")
    if store.is_local and not _LOCAL_HOST.fullmatch(host):
        rule = "Host must be a number or a name without dots, because this server is on loopback without an API key"
        raise RequestError(403, f"{rule}; {_refused(host)}")


async def _writable(request: Request) -> None:
    """RequestError if documents are read-only, or if a page may be another site's, as in ``_from_own_page``."""
    store, origin = request.app.state.regrad_documents, request.headers.get("origin")
    if store.settings.documents != "write":
        raise RequestError(403, "documents are read-only here; start the server with --regrad-documents write")
    if origin and not store.has_key and not _LOCAL_HOST.fullmatch(request.headers.get("host", "")):
        rule = "Origin must be a number or a name without dots, because the server has no API key"
        raise RequestError(403, f"{rule}; {_refused(origin)}")


def _refused(given: str) -> str:
    return f"got {given[:80]}; start the server with --api-key to allow other pages"


async def _namespace(
    request: Request,
    namespace: Annotated[
        str | None,
        Query(pattern=r"^[a-zA-Z0-9._-]{1,64}$", description="Left out: the server's --namespace, else default."),
    ] = None,
) -> str:
    return namespace or str(request.app.state.regrad_documents.settings.namespace)


Store = Annotated[DocumentStore, Depends(_store)]
Namespace = Annotated[str, Depends(_namespace)]
Id = Annotated[str, Path(description="1 to 256 bytes, percent-encoded.", examples=["harbour"])]

_MEANINGS: Mapping[int, str] = {
    400: "A field breaks its rule; param names it.",
    403: "The server's token for the bank doesn't allow it, or documents are read-only.",
    404: "There is no such namespace or document.",
    409: "The document or the learner is another one than expected.",
    413: "The body or the document is too large.",
    429: "A limit of the namespace or the bank is reached; Retry-After says when to come back, if that helps.",
    503: "The bank can't answer now; Retry-After says when to come back.",
    504: "The bank did not answer in time.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": meaning} for status, meaning in _MEANINGS.items()
}
_ERRORS[401] = {"description": "The API key is missing or wrong."}  # vLLM's own answer
_ERRORS["default"] = {"model": ErrorAnswer, "description": "Another error."}
_LINES = {"type": "string", "description": "One JSON object a line."}
_BATCH_BODY = {
    "requestBody": {
        "content": {NDJSON: {"schema": _LINES, "example": BatchLine(**BATCH_LINE).model_dump_json() + "\n"}},
    }
}
_BATCH_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A line for each document: its receipt with the number of its line, or its error.",
        "content": {
            NDJSON: {
                "schema": _LINES,
                "example": '{"line":1,"id":"harbour","version":1,"status":"created"}\n'
                '{"line":2,"id":"quay","error":{"message":"text must be given, got none","type":"BadRequestError",'
                '"param":"text","code":400}}\n',
            }
        },
    }
}


def document_routes() -> APIRouter:
    """The routes with JSON bodies, and the batch."""
    router = APIRouter(
        prefix="/v1/regrad",
        tags=["regrad documents"],
        route_class=DocumentRoute,
        dependencies=[Depends(_from_own_page)],
        responses=_ERRORS,
        generate_unique_id_function=lambda route: route.name,
    )
    writes = [Depends(_writable)]

    @router.put("/documents/{id:any}", dependencies=writes)
    async def put_document(
        id: Id,
        body: DocumentBody,
        store: Store,
        namespace: Namespace,
        request: Request,
        expected_version: Annotated[
            int | None, Query(ge=0, le=2**63 - 1, description="0: there must be none. Else a 409.")
        ] = None,
    ) -> DocumentReceipt:
        """Stores a document, and answers when it is durable. An unchanged one costs nothing."""
        document = Document(id, body.text, body.title or "", body.metadata or {}, expected_version=expected_version)
        receipt = await unless_gone(_stored(store, document, namespace), request.receive, drop=lambda _: None)
        if receipt is None:
            raise RequestError(499, "the client hung up")  # nobody reads it
        return DocumentReceipt.of(receipt, namespace)

    @router.get("/documents/{id:any}")
    async def get_document(id: Id, store: Store, namespace: Namespace) -> DocumentAnswer:
        """A stored document with its text."""
        return DocumentAnswer.of(await store.bank.get(id, namespace=namespace), namespace)

    @router.delete("/documents/{id:any}", dependencies=writes)
    async def delete_document(
        id: Id,
        store: Store,
        namespace: Namespace,
        purge: Annotated[bool, Query(description="Also erases the document's past versions.")] = False,
        expected_version: Annotated[int | None, Query(ge=0, le=2**63 - 1, description="Else a 409.")] = None,
    ) -> DeletionAnswer:
        """Deletes a document. No later request uses it."""
        done = await store.bank.delete(id, namespace=namespace, purge=purge, expected_version=expected_version)
        return DeletionAnswer(id=id, namespace=namespace, version=done.version, sequence=done.sequence)

    @router.get("/documents")
    async def list_documents(
        store: Store,
        namespace: Namespace,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = DEFAULT_PAGE_SIZE,
        after: Annotated[str, Query(description="The last_id of the page before.")] = "",
        prefix: Annotated[str, Query(description="The start of the ids.")] = "",
    ) -> DocumentList:
        """A page of a namespace's documents, in order of id."""
        page_size = min(limit + 1, MAX_PAGE_SIZE)  # one more tells whether there are more
        listing = store.bank.list(namespace=namespace, page_size=page_size, prefix=prefix, after=after)
        found = []
        async for document in listing:
            found.append(ListedAnswer.of(document))
            if len(found) > limit:
                break
        data = found[:limit]
        return DocumentList(data=data, has_more=len(found) > limit, last_id=data[-1].id if data else None)

    async def query_documents(body: QueryBody, store: Store, namespace: Namespace) -> HitList:
        """The documents that a chat request with these fields would use, without asking the model."""
        answer = await store.bank.query(_query_of(body, store, namespace))
        weights = store.learner.weights([hit.cosine for hit in answer.hits])
        data = [
            HitAnswer.of(hit, weight, with_text=body.with_text)
            for hit, weight in zip(answer.hits, weights, strict=True)
        ]
        return HitList(data=data, sequence=answer.sequence)

    router.add_api_route("/query", query_documents, methods=["POST"], route_class_override=QueryRoute)
    router.add_api_route(
        "/documents/batch",
        store_batch,
        methods=["POST"],
        dependencies=writes,
        responses={**_ERRORS, **_BATCH_ANSWER},
        response_class=Response,
        openapi_extra=_BATCH_BODY,
        route_class_override=StreamedRoute,
    )
    return router


async def store_batch(request: Request, store: Store, namespace: Namespace) -> Response:
    """Stores many documents, and answers each when it is durable. A bad line doesn't stop the others.

    The body is NDJSON of any length, a document with its id a line, of at most 8 MiB each. A client that doesn't read
    is paused when 65,536 answers wait for it. If the bank fails as a whole, the last line is an error without an id.
    """
    if len(store.batches) >= MAX_BATCHES:
        raise RequestError(
            429,
            f"at most {MAX_BATCHES} batches may run at a time; send it again when one has ended",
            retry_after_ms=1000,
        )
    answers = _noted(Batch(store.bank, namespace, request.stream()), store)
    return NdjsonResponse(await anext(answers, b""), answers)


async def _noted(batch: Batch, store: DocumentStore) -> AsyncGenerator[bytes, None]:
    """The batch's answers. It is among ``store.batches`` meanwhile."""
    store.batches.add(batch)
    try:
        async with aclosing(batch.answers()) as answers:
            async for answer in answers:
                yield answer
    finally:
        store.batches.remove(batch)


async def _stored(store: DocumentStore, document: Document, namespace: str) -> Receipt:
    """The bank's receipt for a document. RequestError, BankError."""
    try:
        async with asyncio.timeout(INGEST_TIMEOUT_S), store.places:
            (receipt,) = [stored async for stored in store.bank.ingest([document], namespace=namespace)]
    except TimeoutError:
        rule = f"the bank must store a document within {INGEST_TIMEOUT_S} s, it did not"
        raise RequestError(504, f"{rule}; send it again") from None
    return receipt


def _query_of(body: QueryBody, store: DocumentStore, namespace: str) -> BankQuery:
    """The bank's query. RequestError."""
    if bool(body.query) == bool(body.document_ids):
        raise RequestError(400, "query or document_ids must be given, and not both", "query")
    settings = store.settings
    for name in ("top_k", "min_score", "retrieval", "filter"):
        if body.document_ids and getattr(body, name) is not None:
            raise RequestError(400, f"{name} must be left out where document_ids names the documents", name)
    most = settings.max_documents
    for name, number in (("top_k", body.top_k or 0), ("document_ids", len(body.document_ids or ()))):
        if number > most:
            raise RequestError(
                400, f"{name} must be at most {most}, the server's --regrad-max-documents, got {number}", name
            )
    return BankQuery(
        text=body.query or "",
        namespace=namespace,
        document_ids=tuple(body.document_ids or ()),
        top_k=body.top_k or settings.top_k_for(store.learner.top_k),
        min_score=settings.min_score if body.min_score is None and not body.document_ids else body.min_score,
        with_text=body.with_text,
        retrieval=body.retrieval or settings.retrieval,
        conditions=tuple(rule.as_condition() for rule in body.filter or ()),
        as_of=body.as_of,
        with_cue=body.with_cue,
    )
