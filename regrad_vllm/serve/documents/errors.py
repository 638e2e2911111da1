"""Errors of the routes for documents, in OpenAI's form: of the request's fields, and of the bank."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from bank_service.errors import (
    BankError,
    DeadlineExceededError,
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    OutOfRangeError,
    OverloadedError,
    PermissionDeniedError,
    QuotaExceededError,
    VersionConflictError,
)
from bank_service.wire.errors import retry_after_ms
from regrad_vllm.serve.api import http_request
from regrad_vllm.serve.api.bank_errors import of_connection, outage
from regrad_vllm.serve.api.request_errors import RequestError, shown

MAX_BODY_BYTES = 8 * 2**20  # a text of 1 MiB has at most 6 MiB in JSON, where each byte may be escaped
_STATUSES: Mapping[type[BankError], int] = {
    InvalidArgumentError: 400,
    OutOfRangeError: 400,
    PermissionDeniedError: 403,
    NotFoundError: 404,
    VersionConflictError: 409,
    LimitExceededError: 413,
    QuotaExceededError: 429,
    OverloadedError: 429,
    DeadlineExceededError: 504,
}
_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class DocumentRoute(APIRoute):
    """A route that bounds its body, and whose errors have OpenAI's form."""

    streams_body = False
    # The bank's name of a field → ours, where they differ.
    names: Mapping[str, str] = MappingProxyType({})

    def get_route_handler(self) -> _Handler:
        original = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                if not self.streams_body:
                    body = await http_request.read_body(request.receive, MAX_BODY_BYTES)
                    if body is not None:
                        request = Request(request.scope, http_request.Replay(body, request.receive))
                return await original(request)
            except RequestValidationError as error:
                return answer_of(of_fields(error.errors()))
            except RequestError as error:
                return answer_of(error)
            except BankError as error:
                return answer_of(of_bank(error, request.app.state.regrad_documents.bank.address, self.names))
            except HTTPException as error:  # FastAPI raises it for JSON that is too deep
                return answer_of(RequestError(error.status_code, f"the body can't be read as JSON: {error.detail}"))
            except UnicodeEncodeError as error:
                rule = "texts must be valid Unicode, got half of a surrogate pair"
                return answer_of(RequestError(400, f"{rule} at character {error.start} of one; send whole characters"))
            except ValueError as error:  # the client can't use the answer of an older bank
                return answer_of(RequestError(503, str(error)))

        return handle


class QueryRoute(DocumentRoute):
    """A route whose body is a query."""

    names = MappingProxyType({"text": "query", "id": "document_ids"})


class StreamedRoute(DocumentRoute):
    """A route that reads its body itself, piece by piece."""

    streams_body = True


def answer_of(error: RequestError) -> JSONResponse:
    return JSONResponse(error.as_json(), error.status, http_request.retry_header(error))


def of_bank(error: BankError, address: str, names: Mapping[str, str] = DocumentRoute.names) -> RequestError:
    """The error that a client gets for the bank's error. ``address``: the bank's. ``names``: see DocumentRoute."""
    status = _STATUSES.get(type(error))
    if status is None:
        return outage(error, address)
    if not error.by_bank:
        return of_connection(error, address, status)
    message, param = error.message, None
    if isinstance(error, InvalidArgumentError | OutOfRangeError):
        field = error.field.replace("filter.conditions", "filter").removeprefix("document.")
        param = names.get(error.field, field)
        message = message.replace(error.field, param)
    elif isinstance(error, NotFoundError):
        param = "namespace" if error.kind == "namespace" else names.get("id", "id")
    elif isinstance(error, PermissionDeniedError):
        message = (
            f"the server's token for the bank must have the scope {error.scope} for this; start the server with "
            "another token (--regrad-bank-token-file)"
        )
    elif isinstance(error, DeadlineExceededError):
        message = f"the bank at {address} did not answer in time; send the request again"
    return RequestError(status, message, param, retry_after_ms=retry_after_ms(error))


def of_fields(errors: Sequence[Any], model: type[BaseModel] | None = None) -> RequestError:
    """The error for the first field that pydantic refuses. ``model``: of a body that FastAPI didn't parse."""
    found: ErrorDetails = errors[0]
    place = found["loc"] if model else found["loc"][1:]  # FastAPI puts "body", "query" or "path" first
    field = _path(place)
    if found["type"] == "json_invalid":
        return RequestError(400, f"the body must be JSON, got: {found.get('ctx', {}).get('error', 'something else')}")
    if not field:
        return RequestError(400, "the body must be a JSON object, got something else")
    if found["type"] == "missing":
        return RequestError(400, f"{field} must be given, got none", field)
    if found["type"] == "extra_forbidden":
        return RequestError(400, f"{field} must be left out: no field has this name; see /openapi.json", field)
    rule = re.sub(r"^\w+ should ", "must ", found["msg"])  # such as "Input should be a valid string"
    return RequestError(400, f"{field} {rule}, got {shown(found.get('input'))}", field)


def _path(place: Sequence[int | str]) -> str:
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:200]
