"""The parts of vLLM's private API that the workers read or replace, and functions that read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from regrad_vllm.serve.seams.seam import Seam, SeamError

if TYPE_CHECKING:
    import torch

WORKER_SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("self", "lora_request"),
        "loads an adapter for regrad: requests",
    ),
    Seam(
        "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.load_lora_model",
        ("self", "model", "vllm_config", "device"), "has made all LoRA layers",
    ),
    Seam(
        "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.set_active_loras",
        ("self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens", "mapping_type"),
        "begins a step of the older model runner with its batch",
    ),
    Seam(
        "vllm.v1.worker.gpu.lora_utils", "LoraState.make_lora_inputs",
        ("self", "req_ids", "idx_mapping", "num_scheduled_tokens"),
        "begins a step of the newer model runner with its batch",
    ),
    Seam(
        "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin._set_active_loras",
        ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type"),
        "sets the adapters of every step, dummy runs and captures too",
    ),
    Seam(
        "vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.set_lora", ("self", "index", "lora_a", "lora_b"),
        "shows that linear layers keep lora_a_stacked and lora_b_stacked",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU.add_lora_linear",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"),
        "adds LoRA to a linear layer's output on CPUs",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.add_lora_linear",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"),
        "adds LoRA to a linear layer's output on GPUs",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.update_metadata",
        ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"),
        "maps the batch's rows to slots on GPUs",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.update_metadata",
        ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"),
        "maps the batch's rows to slots",
    ),
    Seam("vllm.lora.lora_model", "LoRAModel", None, "holds one adapter"),
    Seam("vllm.lora.lora_weights", "LoRALayerWeights", None, "holds A and B of one module"),
)  # fmt: skip
CPU_SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.distributed.device_communicators.shm_broadcast", "sched_yield", (),
        "is called in a loop while a process of the engine waits for another",
    ),
)  # fmt: skip


def linear_modules(manager: Any) -> list[tuple[list[str], Any]]:
    """The linear layers with LoRA: (names of its modules, layer). A merged layer has a name for each slice."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return [
        (manager.packed_modules.get(name, [name]), module)
        for name, module in manager.modules.items()
        if isinstance(module, BaseLinearLayerWithLoRA)
    ]


def lora_wrappers(manager: Any) -> list[Any]:
    """The wrappers that the layers with LoRA call."""
    return list(manager.punica_wrapper_mapping.values())


def lora_device(manager: Any) -> torch.device | str:
    """The device of the LoRA slots."""
    device: torch.device | str = manager.device
    return device


def step_limits(manager: Any) -> tuple[int, int]:
    """The most tokens and the most requests of a step."""
    return int(manager.max_num_batched_tokens), int(manager.max_num_seqs)


def sliced(module: Any, part: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The part of each slice's whole A or B that this worker's layer keeps."""
    if module.tp_size == 1:
        return tensors
    cut = module.slice_lora_a if part == "A" else module.slice_lora_b
    return list(cut(tensors)) if module.n_slices > 1 else [cut(tensors[0])]


def lora_dtype(manager: Any) -> torch.dtype:
    """The engine's LoRA dtype."""
    dtype: torch.dtype = manager.lora_config.lora_dtype
    return dtype


def adaptable_modules(worker: Any) -> frozenset[str]:
    """The module names that an adapter may use: gate_proj and up_proj, not vLLM's merged gate_up_proj."""
    return modules_of(model_manager(worker))


def modules_of(manager: Any) -> frozenset[str]:
    names: set[str] = set()
    for module in manager.modules:
        names.update(manager.packed_modules.get(module, [module]))
    return frozenset(names)


def is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def other_layers(manager: Any) -> list[str]:
    """Names of the layers with LoRA that are not linear ones, such as embeddings."""
    linear = {id(module) for _, module in linear_modules(manager)}
    return [name for name, module in manager.modules.items() if id(module) not in linear]


def count_adapters(worker: Any) -> tuple[int, int]:
    """(registered, active) adapters of a worker."""
    manager = model_manager(worker)
    return len(manager._registered_adapters), len(manager._active_adapters)


def base_weights(worker: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every base weight tensor, as the worker computes with it, with its name, in a fixed order.

    On CPUs vLLM packs a linear layer's weight into a handle of its math library and empties the parameter. Such a
    weight is read as the layer's output for the identity matrix. This is exact: 1·w + 0·….
    """
    import torch

    model = worker.model_runner.get_model()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.numel():
            yield name, parameter.detach()
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        size = getattr(layer, "input_size_per_partition", None) or layer.input_size
        for start in range(0, size, 256):
            rows = torch.eye(min(256, size - start), size, dtype=parameter.dtype).roll(start, 1)
            with torch.no_grad():
                yield f"{name}[{start}:]", layer.cpu_linear(rows, None, None)


def model_manager(worker: Any) -> Any:
    """The LoRA manager of a worker. SeamError if the engine has none."""
    runner = worker.model_runner
    if not hasattr(runner, "lora_manager"):
        raise SeamError("the engine must run with LoRA; set --enable-lora")
    return runners_manager(runner)


def runners_manager(runner: Any) -> Any:
    """The LoRA manager (LoRAModelManager) of a model runner whose LoRA layers are made."""
    return runner.lora_manager._adapter_manager
