"""The server's requests to vLLM's workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import propagate

from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.door_client import DoorClient, DoorClosed
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.seams import server_seams
from regrad_vllm.serve.settings import SettingsError


class ResidentError(RuntimeError):
    """A worker can't make documents resident. The message gives the reason."""

    def __init__(self, message: str, *, damaged: bool = False) -> None:
        """damaged: a record in the arena is damaged or missing."""
        super().__init__(message)
        self.damaged = damaged


@dataclass(frozen=True, slots=True)
class Placement:
    """The rank where a request runs and its documents are. ``Engine.release`` ends its holds there."""

    recipe: Recipe
    rank: int  # index among the data parallel ranks of this server
    data_parallel_rank: int | None  # the rank as an argument for vLLM; None if there is only one
    asked: list[tuple[DoorClient, int]] = field(default_factory=list)  # (worker, id of the hold)


class Engine:
    """vLLM's engine client, with connections to the doors of all workers."""

    def __init__(self, client: Any, doors: Sequence[Sequence[DoorClient]]) -> None:
        """doors: for each data parallel rank, the connections to its workers."""
        self._client = client
        self._doors = doors
        self._num_placed = [0] * len(doors)
        self._last_rank = -1
        self.pools: dict[str, dict[str, int]] = {}  # "rank/number" of a worker → the latest figures of its pool

    @classmethod
    async def connect(cls, client: Any, learner: Learner) -> tuple[Engine, str]:
        """Checks that the workers fit the learner. Returns the engine and its LoRA dtype. SettingsError."""
        ranks = await server_seams.ask_workers(client, "regrad_check")
        answers = [answer for rank in ranks for answer in rank]
        for answer in answers:
            if answer["error"]:
                raise SettingsError(answer["error"])
            if answer["learner"] != learner.fingerprint:
                raise SettingsError(
                    f"server and workers must have one learner, got {learner.fingerprint} and {answer['learner']}; "
                    "don't change the learner's folder while the server starts"
                )
        adaptable = frozenset().union(
            *(answer["modules"] for answer in ranks[0])
        )  # each pipeline stage has some of the modules
        missing = [module for module in learner.layout.modules if module not in adaptable]
        if missing:
            raise SettingsError(
                f"the engine must have LoRA on all modules of the learner, it lacks {len(missing)}, such as "
                f"{missing[0]}; set --lora-target-modules to the learner's modules (regrad serve does)"
            )
        engine = cls(client, [[DoorClient(answer["door"]) for answer in rank] for rank in ranks])
        try:
            await asyncio.gather(*(door.open() for rank in engine._doors for door in rank))
        except DoorClosed as error:
            await engine.close()
            raise SettingsError(
                "every worker must run on the API server's machine, in its network namespace; one can't be reached: "
                f"{error}; start an API server on each machine (--data-parallel-hybrid-lb)"
            ) from error
        return engine, str(answers[0]["dtype"])

    async def close(self) -> None:
        """Ends the connections to the workers."""
        await asyncio.gather(*(door.close() for rank in self._doors for door in rank))

    @property
    def num_ranks(self) -> int:
        """The number of data parallel ranks that this server sends requests to."""
        return len(self._doors)

    def place(self, recipe: Recipe, wanted_rank: int | None = None) -> Placement:
        """Chooses the rank for a request: the wanted one, or the one with the fewest requests from this server.

        A ``release`` must follow in any case.
        """
        if wanted_rank is None or not 0 <= wanted_rank < self.num_ranks:  # vLLM itself refuses a wrong rank
            # Equally busy ranks take turns, as in vLLM.
            turns = [(start + self._last_rank + 1) % self.num_ranks for start in range(self.num_ranks)]
            wanted_rank = self._last_rank = min(turns, key=self._num_placed.__getitem__)
        self._num_placed[wanted_rank] += 1
        return Placement(recipe, wanted_rank, wanted_rank if self.num_ranks > 1 else None)

    async def prepare(self, placement: Placement, arena: str) -> None:
        """Makes the documents resident on every worker of the rank. ResidentError.

        arena: the folder that has the records.
        """
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        asking = [self._ask(door, placement, arena, carrier.get("traceparent", "")) for door in
                  self._doors[placement.rank]]  # fmt: skip
        # All of them end before the caller releases, because a release must not overtake its question.
        answers: list[dict[str, Any]] = []
        for found in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(found, DoorClosed):
                raise ResidentError(str(found)) from found
            if isinstance(found, BaseException):
                raise found
            answers.append(found)
        for number, answer in enumerate(answers):
            self.pools[f"{placement.rank}/{number}"] = answer["pool"]
            if answer["error"]:
                raise ResidentError(answer["error"], damaged=answer["damaged"])

    async def _ask(self, door: DoorClient, placement: Placement, arena: str, traceparent: str) -> dict[str, Any]:
        number = door.new_question()
        placement.asked.append((door, number))  # noted before it is sent, because the sending may be cancelled
        return await door.hold(number, placement.recipe, arena, traceparent)

    async def settled(self) -> None:
        """Waits until the workers have done everything that they were asked before, aborts included."""
        await server_seams.ask_workers(self._client, "regrad_settled")

    def release(self, placement: Placement) -> None:
        """Releases the holds of a placement, when its request is over."""
        self._num_placed[placement.rank] -= 1
        for door, number in placement.asked:
            door.release(number)

    def unfinished(self, request_id: str, recipe: Recipe) -> frozenset[str]:
        """The engine's ids for the parts of one API request that still run. ``still_runs`` takes them."""
        return server_seams.unfinished(self._client, request_id, recipe.name)

    def still_runs(self, engine_ids: frozenset[str]) -> bool:
        """Whether one of these parts still runs."""
        return server_seams.still_runs(self._client, engine_ids)

    async def figures(self) -> list[dict[str, Any]]:
        """The counters of each worker."""
        ranks = await server_seams.ask_workers(self._client, "regrad_figures")
        return [
            {"rank": rank, "worker": f"{rank}/{number}", **figures}
            for rank, workers in enumerate(ranks)
            for number, figures in enumerate(workers)
        ]

    async def base_weights(self) -> list[str]:
        """SHA-256 of each worker's base weights."""
        ranks = await server_seams.ask_workers(self._client, "regrad_base_weights")
        return [digest for rank in ranks for digest in rank]
