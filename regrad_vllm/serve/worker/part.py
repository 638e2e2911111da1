"""The plugin's part of a worker.

``register`` is the ``vllm.general_plugins`` entry point. vLLM runs it in each of its processes. A worker gets its part
when vLLM has made its LoRA layers.

The server asks for each request's documents through the door, before it submits the request. So a missing or damaged
document is an error of one request. An exception inside the engine's step would end the engine.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from typing import Any

from bank_service.wire.tracing import configure_tracing
from regrad_vllm.learner import Learner
from regrad_vllm.serve.engine_flags import PLUGIN_NAME
from regrad_vllm.serve.recipe import ADAPTER_ID, RecipeError
from regrad_vllm.serve.seams import slot_shards, worker_patches, worker_seams
from regrad_vllm.serve.seams.seam import check_seams
from regrad_vllm.serve.seams.worker_patches import AdapterRequest, StepRequests
from regrad_vllm.serve.settings import Settings, SettingsError
from regrad_vllm.serve.worker.admissions import Admissions, read_recipe
from regrad_vllm.serve.worker.device import Device
from regrad_vllm.serve.worker.door import Door
from regrad_vllm.serve.worker.pool import Pool
from regrad_vllm.serve.worker.steps import Steps


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
    keep_warnings()
    check_seams(worker_seams.WORKER_SEAMS)
    part = WorkerPart(settings)
    worker_patches.install_loader(part.learner_of)
    worker_patches.install_steps(part.adopt)
    worker_patches.install_kernels()
    worker_patches.install_waits()


def keep_warnings() -> None:
    """Logs the plugin's warnings, unless its logger has a level already.

    A package that vLLM's server imports raises the root logger's level to ERROR. Workers may inherit it.
    """
    logger = logging.getLogger("regrad")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


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
        manager = worker_seams.runners_manager(runner)
        refusal = slot_shards.refusal(manager, learner.layout)
        if refusal:
            return Adopted(learner, refusal)
        device = _device(manager, learner)
        return Adopted(learner, device.refusal, device, self._settings.worker_bytes, self._cores)

    def learner_of(self, request: AdapterRequest) -> Learner:
        """The learner for a request whose path starts with ``regrad:``. RecipeError if it isn't one of ours."""
        read_recipe(request.lora_name, request.lora_path)
        if request.lora_int_id != ADAPTER_ID:
            raise RecipeError(
                f"a regrad: adapter must have the id {ADAPTER_ID}, got {request.lora_int_id}; ask with the field "
                "regrad, and don't load such an adapter by name"
            )
        assert self._learner is not None  # vLLM loads no adapter before its layers are made
        return self._learner


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
        self._door = Door(self._admissions, self._pool, self._steps, cores)
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
    if worker_seams.is_cpu():
        from regrad_vllm.serve.worker.cpu_device import CpuDevice

        return CpuDevice(manager, learner)
    from regrad_vllm.serve.worker.cuda_device import CudaDevice

    return CudaDevice(manager, learner)
