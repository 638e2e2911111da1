"""The worker's door: a socket on which the API server asks for an adapter, outside vLLM's own messages.

The socket is in the machine's abstract namespace. It has no file, so it always ends with its process. Only processes of
the same user may connect. The lines are JSON:
- {"id", "op": "prepare", "path", "traceparent"} is answered by {"id", "compose_ms", "error", "damaged", "cache"} when
  the adapter is in its slot.
- {"id", "op": "release"} isn't answered. It ends the hold of the prepare with that id.

Every prepare needs one release. When a connection ends, the door does its missing releases.

A request whose adapter is in a slot already doesn't wait behind requests that wait for a slot. A request whose adapter
is being composed, or waits for its turn, waits for that alone. Otherwise it would keep the slot while it waits behind a
request for another slot, and both would wait forever. The gradients of a waiting request are read when its turn comes.
So gradients are held for at most one adapter more than there are slots.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bank_service.wire.record import GradientFormatError
from regrad_vllm.adapt.arena import ArenaError
from regrad_vllm.adapt.document_cache import DocumentCacheFull
from regrad_vllm.serve.composer import Composer
from regrad_vllm.serve.recipe import Recipe, RecipeError

MAX_LINE_BYTES = 2**20  # the longest line; a recipe of 64 documents has 6 KiB
_LOGGER = logging.getLogger("regrad")


class Door:
    """Serves one worker's composer on its own threads."""

    def __init__(self, composer: Composer, cores: frozenset[int] | None = None) -> None:
        """cores: the CPU cores for the threads. vLLM binds a worker's main thread to one core, and new threads inherit
        that.
        """
        self._composer = composer
        self._cores = cores
        self._loop = asyncio.new_event_loop()
        self._under_way: dict[int, asyncio.Future[float]] = {}  # adapter → its turn at composing
        self._finding = ThreadPoolExecutor(1, "regrad-find", self._unbind)
        self._composing = ThreadPoolExecutor(1, "regrad-compose", self._unbind)
        self.address = f"regrad-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + self.address)
        self._socket.listen(64)
        threading.Thread(target=self._run, name="regrad-door", daemon=True).start()

    def _run(self) -> None:
        self._unbind()
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_unix_server(self._serve, sock=self._socket, limit=MAX_LINE_BYTES))
        self._loop.run_forever()

    def _unbind(self) -> None:
        if self._cores is not None:
            os.sched_setaffinity(0, self._cores)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection until it ends."""
        owed: dict[int, int] = {}  # id of a prepare without a release → adapter that it holds
        tasks: set[asyncio.Task[None]] = set()
        try:
            if not _is_same_user(writer.get_extra_info("socket")):
                return
            while line := await reader.readline():
                question = json.loads(line)
                if question["op"] == "release":
                    self._release(owed, int(question["id"]))
                    continue
                # It is admitted before the next line is read, because that line may be its release.
                answer, waiting_for = self._admit(question, owed)
                task = self._loop.create_task(self._answer(answer, waiting_for, writer))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (ValueError, KeyError, TypeError) as error:  # a too long line is a ValueError
            _LOGGER.error("a question to the composer breaks the protocol, the connection ends: %r", error)
        except ConnectionError:
            pass
        finally:
            for number in list(owed):
                self._release(owed, number)
            writer.close()

    def _admit(self, question: dict[str, Any], owed: dict[int, int]) -> tuple[dict[str, Any], int | None]:
        """The answer so far, and the adapter to prepare before it is sent; None if there is none to prepare."""
        number = int(question["id"])
        if number in owed:
            raise ValueError(f"a question's id must be a new one, got {number} again")
        answer: dict[str, Any] = {"id": number, "compose_ms": 0.0, "error": "", "damaged": False}
        try:
            recipe = Recipe.parse(question["path"])
            is_there = self._composer.admit(recipe, question["traceparent"])
        except RecipeError as error:
            return {**answer, "error": str(error)}, None
        owed[number] = recipe.int_id
        return answer, None if is_there else recipe.int_id

    async def _answer(self, answer: dict[str, Any], adapter_id: int | None, writer: asyncio.StreamWriter) -> None:
        try:
            if adapter_id is not None:
                answer["compose_ms"] = await self._prepare(adapter_id)
        except (ArenaError, GradientFormatError) as error:
            answer |= {"error": str(error), "damaged": True}
        except (RecipeError, DocumentCacheFull) as error:
            answer["error"] = str(error)
        except Exception as error:  # noqa: BLE001  # the client needs an answer in any case
            _LOGGER.exception("composing adapter %s failed", adapter_id)
            answer["error"] = f"internal error, see the server's log: {type(error).__name__}: {error}"
        answer["cache"] = self._composer.cache_figures()
        if not writer.is_closing():
            writer.write(json.dumps(answer).encode() + b"\n")

    async def _prepare(self, adapter_id: int) -> float:
        """Composes the adapter. Returns the ms without the wait for a slot."""
        while True:
            under_way = self._under_way.get(adapter_id)
            if under_way is not None:
                await asyncio.wait([under_way])
            elif not self._composer.is_there(adapter_id):
                break
            else:
                to_compose, ms = await self._loop.run_in_executor(self._finding, self._composer.load, adapter_id)
                if not to_compose:
                    return ms
        turn = self._under_way[adapter_id] = self._loop.run_in_executor(
            self._composing, self._composer.prepare, adapter_id
        )
        turn.add_done_callback(lambda _: self._under_way.pop(adapter_id))
        return await turn

    def _release(self, owed: dict[int, int], number: int) -> None:
        adapter_id = owed.pop(number, None)
        if adapter_id is not None:  # None: the prepare was refused or never arrived
            self._composer.release(adapter_id)


def _is_same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.getuid())
