"""A worker's composer: it composes adapters into LoRA slots before their requests run, outside the engine's step.

A request holds its adapter from ``admit`` to ``release``. During that time the worker's cache holds the adapter's
gradients, so that it can be composed again from memory. A preempted request needs this if vLLM has given its slot away.
So the engine's step finds the slot of a held adapter, or at worst composes the adapter from memory.

Our server holds each request's adapter on the rank where it runs. So the step reads records only if the engine is
called without our server.
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
    """Writes a worker's LoRA slots."""

    def compose(self, slot: int, gradients: Sequence[StoredGradient], steps: Sequence[float]) -> bool:
        """Writes φ* − Σ steps[k] δ_k into a slot. Returns whether all values are finite in the slot's type."""

    @property
    def dtype(self) -> str:
        """The name of the slots' type, for messages."""


@dataclass(slots=True)
class _AdapterHold:
    recipe: Recipe
    count: int = 0
    has_gradients: bool = False  # the cache holds its gradients


@dataclass(slots=True)
class _Figures:
    num_composed: int = 0
    num_recomposed: int = 0  # adapters composed inside the engine's step
    compose_ms: float = 0.0
    num_activated: int = 0
    activate_ms: float = 0.0  # time of the engine's step spent on activation


class Composer:
    """Composes adapters of one learner. ``prepare`` runs on one thread at a time, other methods on any thread."""

    def __init__(
        self, learner: Learner, cache: DocumentCache[StoredGradient], slots: Slots, writer: SlotWriter
    ) -> None:
        self._learner = learner
        self._cache = cache
        self._slots = slots
        self._writer = writer
        self._holds: dict[int, _AdapterHold] = {}
        self._lock = threading.Lock()  # guards the holds
        self._traces: OrderedDict[int, str] = OrderedDict()  # adapter → traceparent, until it is activated
        self._figures = _Figures()

    def admit(self, recipe: Recipe, traceparent: str) -> bool:
        """Takes a hold. Returns whether the adapter is in a slot already. After a RecipeError there is no hold."""
        if recipe.learner != self._learner.fingerprint:
            raise RecipeError(
                f"the recipe must be for the worker's learner {self._learner.fingerprint}, got {recipe.learner}"
            )
        if traceparent:
            self._traces[recipe.int_id] = traceparent
            while len(self._traces) > _MAX_KNOWN_TRACES:
                self._traces.popitem(last=False)
        with self._lock:
            hold = self._holds.setdefault(recipe.int_id, _AdapterHold(recipe))
            hold.count += 1
            return self._slots.keep(recipe.int_id) and hold.has_gradients

    def is_there(self, adapter_id: int) -> bool:
        """Whether the adapter is in a slot and complete."""
        return self._slots.is_there(adapter_id)

    def prepare(self, adapter_id: int) -> float:
        """Composes an admitted adapter into a slot, as soon as one is free. Returns the ms without the wait for a slot.

        Returns at once if no request holds the adapter. RecipeError, ArenaError, GradientFormatError,
        DocumentCacheFull.
        """
        to_compose, load_ms = self.load(adapter_id)
        return load_ms + self._compose_ahead(adapter_id) if to_compose else load_ms

    def load(self, adapter_id: int) -> tuple[bool, float]:
        """Holds an admitted adapter's gradients in the cache. Returns whether it must still be composed, and the ms.

        It doesn't wait for a slot. ArenaError, GradientFormatError, DocumentCacheFull.
        """
        hold = self._holds.get(adapter_id)
        if hold is None:  # released in the meantime
            return False, 0.0
        start = time.perf_counter()
        held = self._hold_gradients(adapter_id, hold)
        return held and not self._slots.is_there(adapter_id), (time.perf_counter() - start) * 1000

    def release(self, adapter_id: int) -> None:
        """Gives up a hold. After the last one the adapter's slot may be given away."""
        with self._lock:
            hold = self._holds[adapter_id]
            hold.count -= 1
            if hold.count:
                return
            del self._holds[adapter_id]
            if hold.has_gradients:
                self._cache.let_go(hold.recipe.digests)
            self._traces.pop(adapter_id, None)
            self._slots.leave(adapter_id)

    def activate(self, recipe: Recipe) -> int:
        """Gives the adapter's slot to vLLM, and composes the adapter if necessary. Called in the engine's step."""
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
        """vLLM gives an adapter's slot away. A request may still need the adapter, waiting or preempted."""
        with self._lock:  # a release must not come in between
            self._slots.put_back(adapter_id, needed=adapter_id in self._holds)

    def cache_figures(self) -> dict[str, int]:
        """The cache's counts and bytes, by name."""
        return asdict(self._cache.figures())

    def figures(self) -> dict[str, float]:
        """Counts and sums since the start, and the present holds. The status endpoint shows them by these names."""
        return {
            "num_composed": self._figures.num_composed,
            "num_recomposed": self._figures.num_recomposed,
            "compose_ms": round(self._figures.compose_ms, 3),
            "num_activated": self._figures.num_activated,
            "activate_ms": round(self._figures.activate_ms, 3),
            "num_waiting": self._slots.num_waiting,
            "num_tickets": len(self._holds),
            **{f"cache_{name}": value for name, value in self.cache_figures().items()},
        }

    def _hold_gradients(self, adapter_id: int, hold: _AdapterHold) -> bool:
        """Holds an adapter's gradients in the cache. False if the adapter's hold was released."""
        if hold.has_gradients:
            return True
        self._cache.hold(hold.recipe.arena, hold.recipe.digests)
        with self._lock:
            wanted = self._holds.get(adapter_id) is hold
            if wanted and not hold.has_gradients:
                hold.has_gradients = True
                return True
        self._cache.let_go(hold.recipe.digests)  # released, or done by another thread, in the meantime
        return wanted

    def _compose_ahead(self, adapter_id: int) -> float:
        hold = self._holds.get(adapter_id)
        if hold is None or self._slots.is_there(adapter_id):
            return 0.0
        slot = self._slots.hold(adapter_id, lambda: adapter_id in self._holds)
        if slot is None:
            return 0.0
        start = time.perf_counter()
        try:
            with span("regrad.compose", self._trace(adapter_id), num_documents=len(hold.recipe.digests)):
                self._compose(slot, hold.recipe)
        except BaseException:
            self._slots.let_go(adapter_id)
            raise
        self._slots.ready(adapter_id)
        if adapter_id not in self._holds:  # released in the meantime
            self._slots.let_go(adapter_id)
        return (time.perf_counter() - start) * 1000

    def _compose_in_step(self, slot: int, recipe: Recipe) -> None:
        with self._lock:
            hold = self._holds.get(recipe.int_id)
            held = hold is not None and hold.has_gradients
            if held:
                hold.count += 1  # type: ignore[union-attr]  # it can't be released during the reading
        if not held:  # it wasn't prepared, because vLLM was called without our server
            self._cache.hold(recipe.arena, recipe.digests)
        try:
            self._compose(slot, recipe)
        finally:
            if held:
                self.release(recipe.int_id)
            else:
                self._cache.let_go(recipe.digests)

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
