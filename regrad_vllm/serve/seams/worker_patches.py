"""Our replacements for parts of vLLM in the workers. ``worker_seams`` lists the replaced places."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

from regrad_vllm.learner import Learner
from regrad_vllm.serve.recipe import ADAPTER_ID, PATH_PREFIX
from regrad_vllm.serve.seams import worker_seams
from regrad_vllm.serve.seams.seam import PATCH_MARK, check_seams, replace_by

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

WAIT_SECONDS = 1e-4
_CPU_WRAPPER = "regrad_vllm.serve.seams.cpu_wrapper.DocumentsPunicaWrapper"
_CUDA_WRAPPER = "regrad_vllm.serve.seams.cuda_wrapper.CudaPunicaWrapper"


class AdapterRequest(Protocol):
    """vLLM's LoRARequest."""

    @property
    def lora_name(self) -> str: ...

    @property
    def lora_int_id(self) -> int: ...

    @property
    def lora_path(self) -> str: ...


@dataclass(frozen=True, slots=True)
class StepRequests:
    """The requests of one step, in the order of their tokens."""

    ids: Sequence[str]
    num_tokens: NDArray[np.integer[Any]]  # (ids,) of each request in this step
    adapter: Callable[[str], AdapterRequest | None]  # id → the request's adapter
    known: Container[str]  # the ids of all requests that the runner has not forgotten


class RunnerPart(Protocol):
    """The plugin's part of a model runner."""

    def set_step(self, requests: StepRequests | None) -> None:
        """A step begins. None: it has no requests, such as a dummy run or the capture of a graph."""


def install_loader(learner_of: Callable[[LoRARequest], Learner]) -> None:
    """A request whose path starts with ``regrad:`` gets an adapter for the learner that ``learner_of`` has for it.

    Our kernels compute the rows of such requests. vLLM only needs an adapter in its books.
    """
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.lora.worker_manager import WorkerLoRAManager

    original = WorkerLoRAManager._load_adapter
    if hasattr(original, PATCH_MARK):
        return

    @wraps(original)
    def load_adapter(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        if lora_request.lora_path.startswith(PATH_PREFIX):
            return make_lora_model(learner_of(lora_request), worker_seams.lora_dtype(self))
        lora = original(self, lora_request)
        # If several workers raise, vLLM (multiproc_executor) reads only the first answer and takes the others for
        # answers to its next call. So only the last worker raises, whose answer is read last.
        if get_tensor_model_parallel_rank() == get_tensor_model_parallel_world_size() - 1:
            if not worker_seams.is_cpu():
                check_room(lora_request.lora_name, self.lora_config.max_loras)
            check_whole(self._adapter_manager, lora_request.lora_name, lora.loras)
        return lora

    replace_by(WorkerLoRAManager, "_load_adapter", load_adapter)


def check_room(name: str, max_loras: int) -> None:
    """ValueError for an operator's adapter where φ* needs the only slot. On GPUs its rows would get no adapter."""
    if max_loras < 2:
        raise ValueError(
            f"adapter {name} must have a slot beside φ*, the engine has {max_loras} in all; start regrad serve with "
            "--max-loras 1 or more"
        )


def check_whole(manager: Any, name: str, modules: Iterable[str]) -> None:
    """ValueError if the engine would ignore a part of an operator's adapter. vLLM ignores it silently."""
    wrapped = worker_seams.modules_of(manager)
    here = {module for module, _ in manager.model.named_modules()}
    missing = sorted(
        module
        for module in modules
        if module not in wrapped and module.rpartition(".")[0] in here  # other modules belong to another pipeline stage
    )
    if missing:
        packed = {part: whole for whole, parts in manager.packed_modules_mapping.items() for part in parts}
        leaves = sorted({packed.get(leaf, leaf) for leaf in (m.rpartition(".")[2] for m in (*wrapped, *missing))})
        raise ValueError(
            f"adapter {name} must have LoRA only on modules that the engine adapts, it has it on {len(missing)} "
            f"others, such as {missing[0]}; start with --lora-target-modules {' '.join(leaves)}"
        )


def install_steps(adopt: Callable[[Any], RunnerPart]) -> None:
    """``adopt(model_runner)`` is called when a runner's LoRA layers are made. Its result learns about each step.

    vLLM tells its LoRA wrapper only about changes of the rows' adapters, and all our requests have one adapter there.
    So both model runners are asked for the batch of every step: the older one in ``set_active_loras``, the newer one in
    ``LoraState.make_lora_inputs``. Both then call ``_set_active_loras``, and so do dummy runs, without a batch.
    """
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    original_load: Any = LoRAModelRunnerMixin.load_lora_model
    original_batch: Any = LoRAModelRunnerMixin.set_active_loras
    original_inputs: Any = LoraState.make_lora_inputs
    original_set: Any = LoRAModelRunnerMixin._set_active_loras
    if hasattr(original_load, PATCH_MARK):
        return

    @wraps(original_load)
    def load_lora_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original_load(self, *args, **kwargs)
        self.regrad_step = None
        self.regrad = adopt(self)
        return model

    @wraps(original_batch)
    def set_active_loras(self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        requests = self.requests
        self.regrad_step = StepRequests(
            input_batch.req_ids, num_scheduled_tokens, lambda id: requests[id].lora_request, requests
        )
        original_batch(self, input_batch, num_scheduled_tokens, *args, **kwargs)

    @wraps(original_inputs)
    def make_lora_inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        adapters = self.lora_requests
        self.regrad_step = StepRequests(req_ids, num_scheduled_tokens, adapters.get, adapters)
        return original_inputs(self, req_ids, idx_mapping, num_scheduled_tokens)

    @wraps(original_set)
    def set_active_loras_of_step(self: Any, *args: Any, **kwargs: Any) -> None:
        original_set(self, *args, **kwargs)
        noted: Any = self if self.regrad_step is not None else getattr(self, "lora_state", None)
        requests = getattr(noted, "regrad_step", None)
        if requests is not None:
            noted.regrad_step = None  # the next call may be a dummy run
        self.regrad.set_step(requests)

    replace_by(LoRAModelRunnerMixin, "load_lora_model", load_lora_model)
    replace_by(LoRAModelRunnerMixin, "set_active_loras", set_active_loras)
    replace_by(LoraState, "make_lora_inputs", make_lora_inputs)
    replace_by(LoRAModelRunnerMixin, "_set_active_loras", set_active_loras_of_step)


def install_kernels() -> None:
    """Makes vLLM use our LoRA kernels on CPUs and CUDA GPUs."""
    from vllm.platforms import current_platform

    ours = _CPU_WRAPPER if current_platform.is_cpu() else _CUDA_WRAPPER if current_platform.is_cuda() else ""
    if ours:
        replace_by(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: ours))


def install_waits() -> None:
    """On CPUs, processes of the engine that wait for each other sleep between looks. vLLM's yield in a loop instead.

    On two cores that loop kept unrelated processes from running for up to 3 s (Linux 6.18), the server's own too.
    SeamError if vLLM waits otherwise.
    """
    if not worker_seams.is_cpu():
        return
    check_seams(worker_seams.CPU_SEAMS)
    from vllm.distributed.device_communicators import shm_broadcast

    replace_by(shm_broadcast, "sched_yield", _wait)


def _wait() -> None:
    time.sleep(WAIT_SECONDS)


def make_lora_model(learner: Learner, dtype: torch.dtype) -> LoRAModel:
    """The adapter of our requests for vLLM's books: zeros on one module.

    Nothing reads its slot, because our layers have φ* themselves. vLLM loads it inside a step, also again after a dummy
    run, so it must be small.
    """
    import torch
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    a, b = learner.layout.tensors[:2]
    zeros = torch.zeros(1, a.shape[1], dtype=dtype), torch.zeros(b.shape[0], 1, dtype=dtype)
    return LoRAModel(ADAPTER_ID, 1, {a.module: LoRALayerWeights(a.module, 1, 1, *zeros, scaling=1.0)})
