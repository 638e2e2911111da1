"""A worker's composer: adapters into LoRA slots ahead of their requests, off the engine's step.

A request holds a ticket for its adapter from ``admit`` to ``release``. While there is one, the adapter's gradients are
pinned in the worker's cache, so that it can be composed again without reading anything: a request may be preempted
and come back when vLLM has given its slot away. So what the engine's step does for an adapter with a ticket is to find
its slot, and at worst to compose from memory, which was done before without an error. Only an engine that is called
without our server, which gives every request its ticket on the rank where it runs, reads records in the step.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from opentelemetry.context import Context

from bank_service.wire.tracing import extract, span
from regrad_vllm.adapt.document_cache import DocumentCache
from regrad_vllm.adapt.stored_gradient import StoredGradient
from regrad_vllm.learner import Learner
from regrad_vllm.serve.recipe import Recipe, RecipeError
from regrad_vllm.serve.slots import Slots

_MAX_KNOWN_TRACES = 4096


class SlotWriter(Protocol):
    """What writes a worker's LoRA slots."""

    def compose(self, slot: int, gradients: Sequence[StoredGradient], steps: Sequence[float]) -> bool:
        """φ* − Σ steps[k] δ_k into a slot; whether it is finite in the slot's type."""

    @property
    def dtype(self) -> str:
        """The slots' type, for messages."""


@dataclass(slots=True)
class _Ticket:
    recipe: Recipe
    count: int = 0
    pinned: bool = False


@dataclass(slots=True)
class _Figures:
    num_composed: int = 0
    num_recomposed: int = 0  # inside the engine's step
    compose_ms: float = 0.0
    num_activated: int = 0
    activate_ms: float = 0.0  # of the engine's step


class Composer:
    """Composes adapters of one learner. ``prepare`` runs on one thread at a time, the rest on any."""

    def __init__(
        self, learner: Learner, cache: DocumentCache[StoredGradient], slots: Slots, writer: SlotWriter
    ) -> None:
        self._learner = learner
        self._cache = cache
        self._slots = slots
        self._writer = writer
        self._tickets: dict[int, _Ticket] = {}
        self._lock = threading.Lock()  # over the tickets
        self._traces: OrderedDict[int, str] = OrderedDict()  # traceparent by adapter, until activated
        self._figures = _Figures()

    def admit(self, recipe: Recipe, traceparent: str) -> bool:
        """Gives a ticket; whether the adapter is in a slot already. RecipeError, and then there is no ticket."""
        if recipe.learner != self._learner.fingerprint:
            raise RecipeError(
                f"the recipe must be for the worker's learner {self._learner.fingerprint}, got {recipe.learner}"
            )
        if traceparent:
            self._traces[recipe.int_id] = traceparent
            while len(self._traces) > _MAX_KNOWN_TRACES:
                self._traces.popitem(last=False)
        with self._lock:
            ticket = self._tickets.setdefault(recipe.int_id, _Ticket(recipe))
            ticket.count += 1
            return self._slots.keep(recipe.int_id) and ticket.pinned

    def is_there(self, adapter_id: int) -> bool:
        """Whether the adapter is in a slot, as a whole."""
        return self._slots.is_there(adapter_id)

    def prepare(self, adapter_id: int) -> float:
        """Composes an admitted adapter into a slot, when one is free; the ms without that wait.

        RecipeError, ArenaError, GradientFormatError, DocumentCacheFull. Returns at once where the tickets are gone.
        """
        to_compose, load_ms = self.load(adapter_id)
        return load_ms + self._compose_ahead(adapter_id) if to_compose else load_ms

    def load(self, adapter_id: int) -> tuple[bool, float]:
        """Pins an admitted adapter's gradients in the cache; whether it must still be composed, and the ms.

        Waits for no slot. ArenaError, GradientFormatError, DocumentCacheFull.
        """
        ticket = self._tickets.get(adapter_id)
        if ticket is None:  # released in the meantime
            return False, 0.0
        start = time.perf_counter()
        pinned = self._pin(adapter_id, ticket)
        return pinned and not self._slots.is_there(adapter_id), (time.perf_counter() - start) * 1000

    def release(self, adapter_id: int) -> None:
        """Takes a ticket back. With the last one the adapter's slot may be given away."""
        with self._lock:
            ticket = self._tickets[adapter_id]
            ticket.count -= 1
            if ticket.count:
                return
            del self._tickets[adapter_id]
            if ticket.pinned:
                self._cache.unpin(ticket.recipe.digests)
            self._traces.pop(adapter_id, None)
            self._slots.leave(adapter_id)

    def activate(self, recipe: Recipe) -> int:
        """The adapter's slot, from now on vLLM's; composed here where it isn't yet. Called in the engine's step."""
        start = time.perf_counter()
        adapter_id = recipe.int_id
        with span("regrad.activate", self._trace(adapter_id)):
            slot, composed = self._slots.take(adapter_id)
            if not composed:
                self._figures.num_recomposed += 1
                try:
                    self._compose_in_step(slot, recipe)
                except BaseException:
                    self._slots.lose(adapter_id)
                    raise
        self._traces.pop(adapter_id, None)
        self._figures.num_activated += 1
        self._figures.activate_ms += (time.perf_counter() - start) * 1000
        return slot

    def deactivate(self, adapter_id: int) -> None:
        """vLLM gives an adapter's slot away, though a request may wait for it or have been preempted."""
        with self._lock:  # against a release meanwhile
            self._slots.put_back(adapter_id, needed=adapter_id in self._tickets)

    def cache_figures(self) -> dict[str, int]:
        """The cache's counts and bytes, by name."""
        return asdict(self._cache.figures())

    def figures(self) -> dict[str, float]:
        """Counts and sums since the start, and what is held now."""
        return {
            "num_composed": self._figures.num_composed,
            "num_recomposed": self._figures.num_recomposed,
            "compose_ms": round(self._figures.compose_ms, 3),
            "num_activated": self._figures.num_activated,
            "activate_ms": round(self._figures.activate_ms, 3),
            "num_waiting": self._slots.num_waiting,
            "num_tickets": len(self._tickets),
            **{f"cache_{name}": value for name, value in self.cache_figures().items()},
        }

    def _pin(self, adapter_id: int, ticket: _Ticket) -> bool:
        """Pins a ticket's gradients; False where the ticket is gone."""
        if ticket.pinned:
            return True
        self._cache.pin(ticket.recipe.arena, ticket.recipe.digests)
        with self._lock:
            wanted = self._tickets.get(adapter_id) is ticket
            if wanted and not ticket.pinned:
                ticket.pinned = True
                return True
        self._cache.unpin(ticket.recipe.digests)  # released, or pinned by another, in the meantime
        return wanted

    def _compose_ahead(self, adapter_id: int) -> float:
        ticket = self._tickets.get(adapter_id)
        if ticket is None or self._slots.is_there(adapter_id):
            return 0.0
        slot = self._slots.reserve(adapter_id, lambda: adapter_id in self._tickets)
        if slot is None:
            return 0.0
        start = time.perf_counter()
        try:
            with span("regrad.compose", self._trace(adapter_id), num_documents=len(ticket.recipe.digests)):
                self._compose(slot, ticket.recipe)
        except BaseException:
            self._slots.give_up(adapter_id)
            raise
        self._slots.ready(adapter_id)
        if adapter_id not in self._tickets:  # released in the meantime
            self._slots.give_up(adapter_id)
        return (time.perf_counter() - start) * 1000

    def _compose_in_step(self, slot: int, recipe: Recipe) -> None:
        with self._lock:
            ticket = self._tickets.get(recipe.int_id)
            pinned = ticket is not None and ticket.pinned
            if pinned:
                ticket.count += 1  # type: ignore[union-attr]  # it can't go while we read
        if not pinned:  # nobody prepared it: vLLM was called without our server
            self._cache.pin(recipe.arena, recipe.digests)
        try:
            self._compose(slot, recipe)
        finally:
            if pinned:
                self.release(recipe.int_id)
            else:
                self._cache.unpin(recipe.digests)

    def _compose(self, slot: int, recipe: Recipe) -> None:
        start = time.perf_counter()
        steps = [recipe.gamma * weight for weight in recipe.weights]
        finite = self._writer.compose(slot, self._cache.get(recipe.digests), steps)
        self._figures.num_composed += 1
        self._figures.compose_ms += (time.perf_counter() - start) * 1000
        if not finite:
            raise RecipeError(
                f"the adapter's values must be finite in {self._writer.dtype}, got Inf or NaN from gamma "
                f"{recipe.gamma:g} and gradients {', '.join(recipe.digests)}; ask with a smaller regrad.gamma, or "
                "ingest the documents anew"
            )

    def _trace(self, adapter_id: int) -> Context:
        return extract([("traceparent", self._traces.get(adapter_id, ""))])
