"""The worker's door: where the API server asks for an adapter without waiting for the engine's turn.

A socket of the machine in the abstract namespace: it has no file, so it ends with its process, however that ends. Only
the same user may enter. Lines of JSON: {"id", "op": "prepare", "path", "traceparent"} is answered by {"id",
"compose_ms", "error", "cache"} when the adapter is in its slot, {"op": "release", "adapter"} isn't answered. Every
prepare is followed by one release; those that a connection owes when it ends are made up for.
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bank_service.wire.codec import GradientFormatError
from regrad_vllm.adapt.arena import ArenaError
from regrad_vllm.adapt.document_cache import DocumentCacheFull
from regrad_vllm.serve.composer import Composer
from regrad_vllm.serve.recipe import Recipe, RecipeError

MAX_LINE_BYTES = 2**20  # of a question: a recipe of 64 documents has 6 KiB
_LOGGER = logging.getLogger("regrad")


class Door:
    """Answers for one worker's composer, on threads of its own."""

    def __init__(self, composer: Composer, cores: frozenset[int] | None = None) -> None:
        """``cores``: on which the threads may run; vLLM binds a worker's main thread to one core, and its children
        would share that with it."""
        self._composer = composer
        self._cores = cores
        self._loop = asyncio.new_event_loop()
        self._executor = ThreadPoolExecutor(1, "regrad-compose", self._unbind)
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
        """One connection."""
        owed: Counter[int] = Counter()
        tasks: set[asyncio.Task[None]] = set()
        try:
            if not _is_same_user(writer.get_extra_info("socket")):
                return
            while line := await reader.readline():
                question = json.loads(line)
                if question["op"] == "release":
                    self._release(owed, int(question["adapter"]))
                    continue
                # Admitted before the next line is read: its release may be that line.
                answer, waiting_for = self._admit(question, owed)
                task = self._loop.create_task(self._answer(answer, waiting_for, writer))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (ValueError, KeyError, TypeError) as error:  # a line that is too long is a ValueError too
            _LOGGER.error("a question to the composer breaks the protocol, the connection ends: %r", error)
        except ConnectionError:
            pass
        finally:
            for adapter_id in list(owed.elements()):
                self._release(owed, adapter_id)
            writer.close()

    def _admit(self, question: dict[str, Any], owed: Counter[int]) -> tuple[dict[str, Any], int | None]:
        """The answer so far, and the adapter that must be prepared before it is given."""
        answer: dict[str, Any] = {"id": question["id"], "compose_ms": 0.0, "error": ""}
        try:
            recipe = Recipe.parse(question["path"])
            is_there = self._composer.admit(recipe, question["traceparent"])
        except RecipeError as error:
            return {**answer, "error": str(error)}, None
        owed[recipe.int_id] += 1
        return answer, None if is_there else recipe.int_id

    async def _answer(self, answer: dict[str, Any], adapter_id: int | None, writer: asyncio.StreamWriter) -> None:
        try:
            if adapter_id is not None:
                prepared = self._loop.run_in_executor(self._executor, self._composer.prepare, adapter_id)
                answer["compose_ms"] = await prepared
        except (RecipeError, ArenaError, GradientFormatError, DocumentCacheFull) as error:
            answer["error"] = str(error)
        answer["cache"] = self._composer.cache_figures()
        if not writer.is_closing():
            writer.write(json.dumps(answer).encode() + b"\n")

    def _release(self, owed: Counter[int], adapter_id: int) -> None:
        if owed[adapter_id] > 0:  # a prepare that was refused at once left nothing to release
            owed[adapter_id] -= 1
            self._composer.release(adapter_id)


def _is_same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.getuid())
