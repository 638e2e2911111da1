"""The API server's side of a worker's door."""

from __future__ import annotations

import asyncio
import json
import socket
from itertools import count
from typing import Any

from regrad_vllm.serve.door import MAX_LINE_BYTES
from regrad_vllm.serve.recipe import Recipe

FLUSH_SECONDS = 1.0  # for what is still to be sent when a connection ends


class DoorClosed(RuntimeError):
    """The worker can't be asked; it has probably ended."""


class DoorClient:
    """One connection to one worker's composer, for any number of questions at a time. Used in one event loop."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def open(self) -> None:
        """Connects. DoorClosed."""
        await self._connected()

    def new_question(self) -> int:
        """A number for ``prepare`` and the ``release`` that must follow it."""
        return next(self._numbers)

    async def prepare(self, number: int, recipe: Recipe, traceparent: str) -> dict[str, Any]:
        """The worker's answer when the adapter is in its slot: {"compose_ms", "error", "damaged", "cache"}. DoorClosed.

        damaged: the error is of the records in the arena.
        """
        writer = await self._connected()
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        question = {"id": number, "op": "prepare", "path": recipe.path, "traceparent": traceparent}
        try:
            writer.write(json.dumps(question).encode() + b"\n")
            return await answer
        finally:
            self._waiting.pop(number, None)

    def release(self, number: int) -> None:
        """The request of a ``prepare`` is over, whatever came of it, cancelled or not even sent.

        The debts of a closed connection are released already.
        """
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps({"id": number, "op": "release"}).encode() + b"\n")

    async def close(self) -> None:
        """Ends the connection, for good. The worker releases what it still owes."""
        self._closed = True
        async with self._opening:
            if self._writer is not None:
                self._writer.close()
            await self._read_to_its_end()

    @property
    def is_open(self) -> bool:
        """It was connected once and nobody has closed it since."""
        return self._writer is not None and not self._closed

    async def _connected(self) -> asyncio.StreamWriter:
        async with self._opening:
            if self._closed:
                raise DoorClosed("the server must not be shutting down, it is; ask another one")
            if self._writer is None or self._writer.is_closing():
                await self._read_to_its_end()  # what it owed answers must not take the next connection's for its own
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    connection.connect("\0" + self._address)  # by hand: uvloop knows no abstract addresses
                    reader, self._writer = await asyncio.open_unix_connection(sock=connection, limit=MAX_LINE_BYTES)
                except OSError as error:
                    connection.close()
                    raise DoorClosed(
                        f"the worker's composer must answer, it does not: {error}; restart the server"
                    ) from error
                self._reading = asyncio.get_running_loop().create_task(self._read(reader, self._writer))
            return self._writer

    async def _read_to_its_end(self) -> None:
        """After the writer was closed. A task that nobody waits for may be collected while it is pending."""
        if self._reading is not None and self._writer is not None:
            _, waiting = await asyncio.wait([self._reading], timeout=FLUSH_SECONDS)
            if waiting:  # the worker reads no more; what is left to say to it would hold the server up for ever
                self._writer.transport.abort()
                await asyncio.wait([self._reading])

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                answer: dict[str, Any] = json.loads(line)
                waiting = self._waiting.get(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except ConnectionError:
            pass
        finally:
            writer.close()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(DoorClosed("the worker's composer went away; restart the server"))
