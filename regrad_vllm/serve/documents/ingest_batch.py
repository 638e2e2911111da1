"""Many documents in one request: NDJSON in, NDJSON out, while the bank encodes.

A task reads the body's lines, a second one sends documents to the bank. Both put their answers into one bounded queue.
A client that reads no answers thus stops the reading of its body.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from bank_service.errors import BankError, InvalidArgumentError, LimitExceededError, VersionConflictError
from regrad_vllm.client import AsyncBank, Document
from regrad_vllm.serve.api.answer import Send
from regrad_vllm.serve.api.http_request import Receive, Scope
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.documents.bodies import BatchLine, DocumentReceipt
from regrad_vllm.serve.documents.errors import MAX_BODY_BYTES, of_bank, of_fields

MAX_LINE_BYTES = MAX_BODY_BYTES
_ANSWERS_WAITING = 2**16  # about 20 MiB; many clients send their whole body before they read
_OWN_FAULTS = (InvalidArgumentError, LimitExceededError, VersionConflictError)  # of a document, not of the bank
NDJSON = "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class SentLine:
    """A document and the number of its line, from 1."""

    number: int
    document: Document


class Batch:
    """One batch. ``answers`` gives a line for each document, in the order in which the bank acknowledges them."""

    def __init__(self, bank: AsyncBank, namespace: str, body: AsyncIterable[bytes]) -> None:
        self._bank = bank
        self._namespace = namespace
        self._body = body
        self._lines: asyncio.Queue[SentLine | None] = asyncio.Queue(1)  # None: the body's end
        self._answers: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(_ANSWERS_WAITING)
        self._again: deque[SentLine] = deque()  # sent on a failed stream, to be sent again
        self._sent: deque[SentLine] = deque()
        self._all_read = False

    async def answers(self) -> AsyncGenerator[bytes, None]:
        """Pieces of NDJSON. BankError if the bank fails as a whole before it acknowledges any document.

        Later such a failure is the last line. It has the number of the first line that isn't acknowledged.
        """
        tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._send())]
        begun = False
        try:
            while (answer := await self._answers.get()) is not None:
                if isinstance(answer, BankError) and begun:
                    yield self._failure(answer)
                    return
                if isinstance(answer, Exception):
                    raise answer
                begun = True
                yield answer
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        """Parses the body's lines. A line that is no document is answered here."""
        try:
            async for number, raw in lines_of(self._body, MAX_LINE_BYTES):
                try:
                    await self._lines.put(SentLine(number, parse_line(raw)))
                except RequestError as error:
                    await self._answers.put(_error_line(number, _id_in(raw), error))
            await self._lines.put(None)
        except ClientDisconnect:
            await self._answers.put(None)
        except Exception as error:  # noqa: BLE001 - the request's handler waits for an end, and raises it
            await self._answers.put(error)

    async def _send(self) -> None:
        """Stores the documents. One that the bank refuses is answered, and the others are sent on another stream."""
        try:
            while True:
                try:
                    async for receipt in self._bank.ingest(self._documents(), namespace=self._namespace):
                        line = self._sent.popleft()
                        told = DocumentReceipt.of(receipt, self._namespace).model_dump()
                        await self._answers.put(_json_line({"line": line.number, **told}))
                    break
                except _OWN_FAULTS as error:
                    whole = isinstance(error, LimitExceededError) and error.index is None  # gRPC's own refusal
                    if whole or not self._sent:
                        raise
                    line = self._sent.popleft()
                    told_error = of_bank(error, self._bank.address)
                    await self._answers.put(_error_line(line.number, line.document.id, told_error))
                    self._again.extendleft(reversed(self._sent))
                    self._sent.clear()
            await self._answers.put(None)
        except Exception as error:  # noqa: BLE001 - as in _read
            await self._answers.put(error)

    async def _documents(self) -> AsyncIterator[Document]:
        """The documents for one stream."""
        while self._again or not self._all_read:
            line = self._again.popleft() if self._again else await self._lines.get()
            if line is None:
                self._all_read = True
                return
            self._sent.append(line)
            yield line.document

    def _failure(self, error: BankError) -> bytes:
        told = of_bank(error, self._bank.address)
        unanswered = self._sent or self._again
        number = unanswered[0].number if unanswered else None
        message = f"{told.message}. The lines without an answer may not be stored; send them again"
        return _error_line(number, None, RequestError(told.status, message, told.param))


def parse_line(raw: bytes | None) -> Document:
    """The document of a line. RequestError. None: a line that is too long."""
    if raw is None:
        raise RequestError(413, f"a line must be at most {MAX_LINE_BYTES} bytes, got more; split the document")
    try:
        line = BatchLine.model_validate_json(raw)
    except ValidationError as error:
        raise of_fields(error.errors(include_url=False), BatchLine) from error
    return Document(line.id, line.text, line.title or "", line.metadata or {})


async def lines_of(pieces: AsyncIterable[bytes], max_bytes: int) -> AsyncIterator[tuple[int, bytes | None]]:
    """(number, line) of each line that isn't blank. A line of more than ``max_bytes`` is None, and isn't kept."""
    number, held = 1, bytearray()
    too_long = False
    async for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for part in ended:
            held += part
            if too_long or len(held) > max_bytes:
                yield number, None
            elif held.strip():
                yield number, bytes(held)
            number, held, too_long = number + 1, bytearray(), False
        held += rest
        if len(held) > max_bytes:
            held, too_long = bytearray(), True
    if too_long or held.strip():
        yield number, None if too_long else bytes(held)


class NdjsonResponse(Response):
    """A streamed answer. Starlette's own listens for a hang-up, and so takes pieces of a body that is still sent."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type=NDJSON)
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async with aclosing(self._rest):
            async for piece in self._rest:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _error_line(number: int | None, id: str | None, error: RequestError) -> bytes:
    return _json_line({"line": number, "id": id, **error.as_json()})


def _json_line(told: dict[str, Any]) -> bytes:
    return json.dumps(told, separators=(",", ":")).encode() + b"\n"


def _id_in(raw: bytes | None) -> str | None:
    """The id of a line that is no document, if it has one."""
    with suppress(ValueError, RecursionError):
        found = json.loads(raw or b"")
        if isinstance(found, dict) and isinstance(found.get("id"), str):
            return str(found["id"])[:256]
    return None
