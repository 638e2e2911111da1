"""The worker's side of the plugin.

``register`` is the ``vllm.general_plugins`` entry point. vLLM runs it in each of its processes. A worker makes its
composer when vLLM has made its LoRA layers.

The server asks the composer for each request's adapter through the door, before it submits the request. So a failed
composition is an error of one request. An exception inside the engine's step would end the engine.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bank_service.wire.tracing import configure_tracing
from regrad_vllm.adapt.document_cache import DocumentCache
from regrad_vllm.learner import Learner
from regrad_vllm.serve import slot_shards, vllm_patches, vllm_seams
from regrad_vllm.serve.composer import Composer
from regrad_vllm.serve.door import Door
from regrad_vllm.serve.launch import PLUGIN_NAME, rank_refusal
from regrad_vllm.serve.process_figures import process_figures
from regrad_vllm.serve.recipe import Recipe, RecipeError
from regrad_vllm.serve.settings import Settings, SettingsError
from regrad_vllm.serve.slots import Slots

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

    from regrad_vllm.serve.cpu_slots import CpuSlots
    from regrad_vllm.serve.gpu_slots import GpuSlots


# Time until Python hands the interpreter's lock to a waiting thread. The composer's threads wait for it several times
# per adapter. Python's default is 5 ms, which is longer than a step on a GPU.
_SWITCH_SECONDS = 2e-4


def register() -> None:
    """Entry point ``regrad`` of ``vllm.general_plugins``. Idempotent. It does nothing if REGRAD_LEARNER is unset.

    SettingsError; SeamError if the installed vLLM differs from the versions that the seams were checked against.
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
    part = WorkerPart(settings)
    vllm_patches.install_loader(part.load)
    vllm_patches.install_slots(settings.waiting_slots_of, part.adopt)
    vllm_patches.install_wide_ids()
    vllm_patches.install_kernels()


class WorkerPart:
    """The plugin's part of a vLLM process that becomes a worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Read before vLLM binds this process to some cores.
        self._cores = frozenset(os.sched_getaffinity(0))

    def adopt(self, manager: Any) -> vllm_patches.SlotBooks:
        """Takes over the manager's slots and opens the composer's door. A reason against it is told to the server."""
        configure_tracing("regrad-worker")
        learner = Learner.load(self._settings.learner)
        slots = Slots(partial(vllm_patches.slot_ids, manager))
        manager.regrad = part = AdoptedManager(learner, slots, refusal(manager, learner))
        if part.refusal:
            return vllm_patches.SlotBooks(
                slots.begin_step,
                slots.step_is_set_up,
                lambda adapter_id, recipe: slots.take(adapter_id)[0],
                lambda adapter_id: slots.put_back(adapter_id, needed=False),
            )
        part.memory = memory = slot_memory(manager, learner)
        memory.warm_up()
        cache = DocumentCache(memory.load, self._settings.worker_bytes)
        part.composer = composer = Composer(learner, cache, slots, memory)
        part.door = Door(composer, self._cores)
        sys.setswitchinterval(_SWITCH_SECONDS)

        def begin_step(adapter_ids: frozenset[int]) -> None:
            memory.step_begins()
            slots.begin_step(adapter_ids)

        def step_is_set_up() -> None:
            memory.step_reads(slots.in_step())
            slots.step_is_set_up()

        def activate(adapter_id: int, recipe: Recipe | None) -> int:
            if recipe is not None:
                slot = composer.activate(recipe)
                memory.before_use(slot)
                return slot
            slot, _ = slots.take(adapter_id)
            memory.before_use(slot)
            memory.is_foreign(slot)
            return slot

        return vllm_patches.SlotBooks(begin_step, step_is_set_up, activate, composer.deactivate)

    def load(self, manager: Any, request: LoRARequest) -> LoRAModel:
        """The entry for a composed adapter in vLLM's manager. RecipeError."""
        recipe = Recipe.parse(request.lora_path)
        if request.lora_name != recipe.name:
            raise RecipeError(f"an adapter's name must be its recipe's digest {recipe.name}, got {request.lora_name}")
        return vllm_patches.make_lora_model(recipe, manager._adapter_manager.regrad.learner.layout.rank)


def slot_memory(manager: Any, learner: Learner) -> CpuSlots | GpuSlots:
    # Imported here, because vLLM inspects every loaded module when a worker starts, and it can't inspect numba's.
    if vllm_seams.is_cpu():
        from regrad_vllm.serve.cpu_slots import CpuSlots

        return CpuSlots(manager, learner)
    from regrad_vllm.serve.gpu_slots import GpuSlots

    return GpuSlots(manager, learner)


@dataclass(slots=True)
class AdoptedManager:
    """The plugin's parts for one of vLLM's LoRA managers."""

    learner: Learner
    slots: Slots
    refusal: str  # the reason why ReGrad can't be served here; the fields below are then None
    memory: CpuSlots | GpuSlots | None = None
    composer: Composer | None = None
    door: Door | None = None


def refusal(manager: Any, learner: Learner) -> str:
    """The reason why this manager's layers can't hold the learner's adapters, with the remedy. Empty if they can."""
    _, rank, dtype = vllm_seams.slot_form(manager)
    if refused := rank_refusal(rank, learner) or slot_shards.refusal(manager, learner.layout):
        return refused
    if not vllm_seams.is_cpu():
        from regrad_vllm.adapt import triton_compose

        if not triton_compose.supports(dtype):
            return f"LoRA slots must be float32, bfloat16 or float16, got {dtype}; set --lora-dtype"
        return ""
    from regrad_vllm.adapt.loops.lora import MAX_RANK, supports

    others = vllm_seams.other_layers(manager)
    if others:
        return (
            f"LoRA on CPUs must be on linear layers only, it is on {others[0]} too, where vLLM gives rows without an "
            "adapter somebody's; set --lora-target-modules to the learner's modules (regrad serve does) and other "
            "linear layers that you need"
        )
    if not supports(dtype, dtype, rank):
        return (
            f"LoRA slots on CPUs must be float32, bfloat16 or float16 of rank {MAX_RANK} at most, got {dtype} of rank "
            f"{rank}; set --lora-dtype or --max-lora-rank"
        )
    return ""


class RegradWorkerExtension:
    """``--worker-extension-cls``: the methods that the server calls by ``collective_rpc``. Answers are plain data."""

    model_runner: Any  # vLLM's model runner in this worker

    @property
    def _part(self) -> AdoptedManager:
        part: AdoptedManager = vllm_seams.model_manager(self).regrad
        return part

    def regrad_settled(self) -> None:
        """Its answer comes when the worker has done all earlier calls."""

    def regrad_check(self) -> dict[str, Any]:
        """The worker's answer to the server at its start: {"error", "learner", "modules", "dtype", "door"}."""
        part = self._part
        return {
            "error": part.refusal,
            "learner": part.learner.fingerprint,
            "modules": sorted(vllm_seams.adaptable_modules(self)),
            "dtype": str(vllm_seams.lora_dtype(self.model_runner.lora_manager)),
            "door": part.door.address if part.door is not None else "",
        }

    def regrad_figures(self) -> dict[str, Any]:
        """The counters of this worker, and all sizes that must not grow."""
        part = self._part
        registered, active = vllm_seams.count_adapters(self)
        return {
            **process_figures("worker"),
            **(part.composer.figures() if part.composer is not None else {}),
            "slot_bytes": part.memory.num_bytes if part.memory is not None else 0,
            "num_registered": registered,
            "num_active": active,
        }

    def regrad_base_weights(self) -> str:
        """SHA-256 over all base weights as this worker computes with them, 64 hex digits."""
        import torch

        state = hashlib.sha256(b"regrad.base-weights.v1\0")
        for name, tensor in vllm_seams.base_weights(self):
            state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            state.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()
