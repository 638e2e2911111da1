"""The worker's door: a socket on which the API server makes documents resident, outside vLLM's own messages.

The socket is in the machine's abstract namespace. It has no file, so it always ends with its process. Only processes of
the same user may connect. The lines are JSON:
- {"id", "op": "hold", "path", "arena", "traceparent"}: make the documents of the recipe in ``path`` resident. The
  answer is {"id", "error", "damaged", "pool"}. It comes when they are in the pool.
- {"id", "op": "release"} isn't answered. It ends the hold with that id.

Every hold needs one release. When a connection ends, the door does its missing releases. A request whose documents are
resident doesn't wait behind one whose documents are loaded.
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
from dataclasses import asdict
from typing import Any

from bank_service.wire.record import GradientFormatError
from bank_service.wire.tracing import extract, span
from regrad_vllm.serve.arena.record_files import ArenaCorrupt, ArenaError, ArenaMissing
from regrad_vllm.serve.recipe import Recipe, RecipeError
from regrad_vllm.serve.worker.admissions import Admissions
from regrad_vllm.serve.worker.pool import Pool, PoolFull
from regrad_vllm.serve.worker.steps import Steps

MAX_LINE_BYTES = 2**20  # the longest line; a recipe of 64 documents has 6 KiB
_LOGGER = logging.getLogger("regrad")


class Door:
    """Serves one worker's admissions on its own threads."""

    def __init__(self, admissions: Admissions, pool: Pool, steps: Steps, cores: frozenset[int] | None = None) -> None:
        """cores: the CPU cores for the threads. vLLM binds a worker's main thread to one core, and new threads inherit
        that.
        """
        self._admissions = admissions
        self._pool = pool
        self._steps = steps
        self._cores = cores
        self._loop = asyncio.new_event_loop()
        self._loading = ThreadPoolExecutor(1, "regrad-load", self._unbind)
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
        owed: dict[int, asyncio.Task[Recipe | None]] = {}  # holds without a release, by id
        try:
            if not _is_same_user(writer.get_extra_info("socket")):
                return
            while line := await reader.readline():
                question = json.loads(line)
                number = int(question["id"])
                if question["op"] == "release":
                    self._release(owed, number)
                elif question["op"] != "hold":
                    raise ValueError(f"op must be hold or release, got {question['op']!r}")
                elif number in owed:
                    raise ValueError(f"a question's id must be a new one, got {number} again")
                else:
                    owed[number] = self._loop.create_task(self._hold(number, question, writer))
        except (ValueError, KeyError, TypeError) as error:  # a too long line is a ValueError
            _LOGGER.error("a question at the door breaks the protocol, the connection ends: %r", error)
        except ConnectionError:
            pass
        finally:
            for number in list(owed):
                self._release(owed, number)
            writer.close()

    async def _hold(self, number: int, question: dict[str, Any], writer: asyncio.StreamWriter) -> Recipe | None:
        """Answers a question for a hold. The recipe whose documents are held, or None after an error."""
        held: Recipe | None = None
        answer: dict[str, Any] = {"id": number, "error": "", "damaged": False}
        try:
            recipe, arena = Recipe.parse(question["path"]), str(question["arena"])
            if self._admissions.is_resident(recipe):
                self._admissions.admit(recipe, arena)
            else:
                await self._loop.run_in_executor(
                    self._loading, self._admit_traced, recipe, arena, str(question.get("traceparent", ""))
                )
            held = recipe
        except (ArenaCorrupt, ArenaMissing) as error:
            answer |= {"error": str(error), "damaged": True}
        except (RecipeError, PoolFull, ArenaError, GradientFormatError) as error:
            answer["error"] = str(error)
        except Exception as error:  # noqa: BLE001  # the client needs an answer in any case
            _LOGGER.exception("question %s at the door failed", number)
            answer["error"] = f"internal error, see the server's log: {type(error).__name__}: {error}"
        counts = {"num_late": self._steps.num_late, "num_lost": self._steps.num_lost}
        answer["pool"] = {**asdict(self._pool.figures()), **counts}
        if not writer.is_closing():
            writer.write(json.dumps(answer).encode() + b"\n")
        return held

    def _admit_traced(self, recipe: Recipe, arena: str, traceparent: str) -> None:
        count = {"regrad.num_documents": len(recipe.digests)}
        with span("regrad.load", extract([("traceparent", traceparent)]), **count):
            self._admissions.admit(recipe, arena)

    def _release(self, owed: dict[int, asyncio.Task[Recipe | None]], number: int) -> None:
        """Ends a hold, as soon as its documents are loaded."""
        holding = owed.pop(number, None)
        if holding is not None:  # None: the question never arrived
            holding.add_done_callback(self._released)

    def _released(self, holding: asyncio.Task[Recipe | None]) -> None:
        recipe = holding.result()
        if recipe is not None:
            self._admissions.release(recipe)


def _is_same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.getuid())
