"""The API server's side of a worker's door."""

from __future__ import annotations

import asyncio
import json
import socket
from itertools import count
from typing import Any

from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.worker.door import MAX_LINE_BYTES

FLUSH_SECONDS = 1.0  # time to send the remaining lines when a connection ends


class DoorClosed(RuntimeError):
    """There is no connection to the worker. It has probably ended."""


class DoorClient:
    """One connection to one worker's door, for any number of concurrent questions. Used in one event loop."""

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
        """A number for ``hold`` and the ``release`` that must follow it."""
        return next(self._numbers)

    async def hold(self, number: int, recipe: Recipe, arena: str, traceparent: str) -> dict[str, Any]:
        """The worker's answer when the documents are resident: {"error", "damaged", "pool"}. DoorClosed.

        arena: the folder that has the records. damaged: a record there is damaged or missing.
        """
        writer = await self._connected()
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        question = {"id": number, "op": "hold", "path": recipe.path, "arena": arena, "traceparent": traceparent}
        try:
            writer.write(json.dumps(question).encode() + b"\n")
            return await answer
        finally:
            self._waiting.pop(number, None)

    def release(self, number: int) -> None:
        """Releases a ``hold``, which may have failed, been cancelled, or not been sent.

        After the end of a connection it does nothing, because the worker has released all its holds.
        """
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps({"id": number, "op": "release"}).encode() + b"\n")

    async def close(self) -> None:
        """Ends the connection for good. The worker then does the missing releases."""
        self._closed = True
        async with self._opening:
            if self._writer is not None:
                self._writer.close()
            await self._read_to_its_end()

    async def _connected(self) -> asyncio.StreamWriter:
        async with self._opening:
            if self._closed:
                raise DoorClosed("the server must not be shutting down, it is; ask another one")
            if self._writer is None or self._writer.is_closing():
                await self._read_to_its_end()  # a pending answer must not be mixed up with one of the next connection
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    connection.connect(
                        "\0" + self._address
                    )  # connected here, because uvloop doesn't know abstract addresses
                    reader, self._writer = await asyncio.open_unix_connection(sock=connection, limit=MAX_LINE_BYTES)
                except OSError as error:
                    connection.close()
                    raise DoorClosed(
                        f"the worker's door must answer, it does not: {error}; restart the server"
                    ) from error
                self._reading = asyncio.get_running_loop().create_task(self._read(reader, self._writer))
            return self._writer

    async def _read_to_its_end(self) -> None:
        """Waits for the reading task after the writer was closed. Python may collect a task that is never awaited."""
        if self._reading is not None and self._writer is not None:
            _, waiting = await asyncio.wait([self._reading], timeout=FLUSH_SECONDS)
            if waiting:  # the worker has stopped reading, so the rest can't be sent
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
                    waiting.set_exception(DoorClosed("the worker's door went away; restart the server"))
