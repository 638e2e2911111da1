"""The plugin's part of a worker.

``register`` is the ``vllm.general_plugins`` entry point. vLLM runs it in each of its processes. A worker gets its part
when vLLM has made its LoRA layers.

The server asks for each request's documents through the door, before it submits the request. So a missing or damaged
document is an error of one request. An exception inside the engine's step would end the engine.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bank_service.wire.tracing import configure_tracing
from regrad_vllm.learner import Learner
from regrad_vllm.serve import slot_shards, vllm_patches, vllm_seams
from regrad_vllm.serve.launch import PLUGIN_NAME, rank_refusal
from regrad_vllm.serve.recipe import ADAPTER_ID, RecipeError
from regrad_vllm.serve.settings import Settings, SettingsError
from regrad_vllm.serve.worker.admissions import Admissions, read_recipe
from regrad_vllm.serve.worker.device import Device
from regrad_vllm.serve.worker.door import Door
from regrad_vllm.serve.worker.pool import Pool
from regrad_vllm.serve.worker.steps import StepRequests, Steps

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest


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
    vllm_patches.install_steps(part.adopt)
    vllm_patches.install_kernels()


class WorkerPart:
    """The plugin's part of a vLLM process that becomes a worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._learner: Learner | None = None
        # Read before vLLM binds this process to some cores.
        self._cores = frozenset(os.sched_getaffinity(0))

    def adopt(self, runner: Any) -> Adopted:
        """Makes the pool, the steps and the door of a model runner. A reason against it is told to the server."""
        configure_tracing("regrad-worker")
        learner = self._learner = Learner.load(self._settings.learner)
        manager = runner.lora_manager._adapter_manager
        refusal = _refusal(manager, learner)
        if refusal:
            return Adopted(learner, refusal)
        device = _device(manager, learner)
        return Adopted(learner, device.refusal, device, self._settings.worker_bytes, self._cores)

    def load(self, manager: Any, request: LoRARequest) -> LoRAModel:
        """φ* as one of vLLM's adapters. RecipeError.

        Our kernels compute the rows of our requests. vLLM only needs an adapter in its books.
        """
        read_recipe(request.lora_name, request.lora_path)
        if request.lora_int_id != ADAPTER_ID:
            raise RecipeError(
                f"a regrad: adapter must have the id {ADAPTER_ID}, got {request.lora_int_id}; ask with the field "
                "regrad, and don't load such an adapter by name"
            )
        assert self._learner is not None  # vLLM loads no adapter before its layers are made
        return vllm_patches.make_lora_model(self._learner, vllm_seams.lora_dtype(manager))


class Adopted:
    """The plugin's parts for one of vLLM's model runners."""

    def __init__(
        self,
        learner: Learner,
        refusal: str,
        device: Device | None = None,
        worker_bytes: int = 0,
        cores: frozenset[int] | None = None,
    ) -> None:
        """refusal: the reason why ReGrad can't be served here. Then there is neither pool nor door."""
        self.learner = learner
        self.refusal = refusal
        self.door_address = ""
        if refusal or device is None:
            return
        self._pool = Pool(device, worker_bytes)
        self._admissions = Admissions(learner.fingerprint, self._pool)
        self._steps = Steps(self._admissions, self._pool, device)
        self._door = Door(self._admissions, self._pool, cores)
        self.door_address = self._door.address

    def set_step(self, requests: StepRequests | None) -> None:
        """A step of the engine begins."""
        if self.refusal:
            return
        if requests is None:
            self._steps.clear()
        else:
            self._steps.set(requests)

    def figures(self) -> dict[str, float]:
        """Counts and sums since the start, and the present holds."""
        return {
            **self._steps.figures(),
            "num_admitted": len(self._admissions),
            **{f"pool_{name}": value for name, value in asdict(self._pool.figures()).items()},
        }


def _device(manager: Any, learner: Learner) -> Device:
    # Imported here, because vLLM inspects every loaded module when a worker starts, and it can't inspect numba's.
    if vllm_seams.is_cpu():
        from regrad_vllm.serve.worker.cpu_device import CpuDevice

        return CpuDevice(manager, learner)
    from regrad_vllm.serve.worker.cuda_device import CudaDevice

    return CudaDevice(manager, learner)


def _refusal(manager: Any, learner: Learner) -> str:
    """The reason why this manager's layers can't serve the learner, with the remedy. Empty if they can."""
    return rank_refusal(vllm_seams.max_rank(manager), learner) or slot_shards.refusal(manager, learner.layout)
