"""The uses of vLLM's private API in the workers. Each seam names the versions that it was checked against.

Only three other places use private API. ``vllm_patches`` replaces parts of the workers. ``vllm_server_seams`` uses
parts of the API server. ``seams`` has our LoRA wrappers.

``check_seams`` compares every seam with the installed vLLM and reports the differences. It must pass before anything is
patched. Patches are idempotent. Without a ReGrad request they don't change vLLM's answers.

Rows without an adapter have the slot index −1. vLLM's own CPU kernels (``lora/ops/torch_ops``) use it as an index into
the stacked tensors. So such a row gets the adapter of the last slot. Our kernels skip it. The Triton kernels of the
CUDA build return early for it (``lora_ops``: ``if lora_id == -1: return``).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PATCH_MARK = "__regrad_patch__"


class SeamError(RuntimeError):
    """The installed vLLM differs from the versions that a seam was checked against."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A place in vLLM's private API that this project relies on."""

    module: str
    path: str  # attribute path within the module
    parameters: tuple[str, ...] | None  # the function's parameters in order; None: only its existence counts
    versions: str  # the versions of vLLM that were checked
    purpose: str
    others_may_follow: bool = False  # only ``parameters`` are used, by name; others may follow


_ALL = "0.26.0, 0.32.0, 0.33.0"

WORKER_SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("self", "lora_request"), _ALL,
        "loads φ* for regrad: requests",
    ),
    Seam(
        "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.load_lora_model",
        ("self", "model", "vllm_config", "device"), _ALL, "has made all LoRA layers",
    ),
    Seam(
        "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.set_active_loras",
        ("self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens", "mapping_type"), _ALL,
        "begins a step of the older model runner with its batch",
    ),
    Seam(
        "vllm.v1.worker.gpu.lora_utils", "LoraState.make_lora_inputs",
        ("self", "req_ids", "idx_mapping", "num_scheduled_tokens"), _ALL,
        "begins a step of the newer model runner with its batch",
    ),
    Seam(
        "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin._set_active_loras",
        ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type"), _ALL,
        "sets the adapters of every step, dummy runs and captures too",
    ),
    Seam(
        "vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.set_lora", ("self", "index", "lora_a", "lora_b"),
        _ALL, "shows that linear layers keep lora_a_stacked and lora_b_stacked",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU.add_lora_linear",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"), _ALL,
        "adds LoRA to a linear layer's output on CPUs",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.add_lora_linear",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"), _ALL,
        "adds LoRA to a linear layer's output on GPUs",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.update_metadata",
        ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"), _ALL,
        "maps the batch's rows to slots on GPUs",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.update_metadata",
        ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"), _ALL,
        "maps the batch's rows to slots",
    ),
    Seam("vllm.lora.lora_model", "LoRAModel", None, _ALL, "holds one adapter"),
    Seam("vllm.lora.lora_weights", "LoRALayerWeights", None, _ALL, "holds A and B of one module"),
)  # fmt: skip


def check_seams(seams: tuple[Seam, ...]) -> None:
    """SeamError names every seam at which the installed vLLM differs."""
    problems: list[str] = []
    for seam in seams:
        try:
            found: Any = importlib.import_module(seam.module)
            for name in seam.path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            problems.append(f"{seam.module}.{seam.path} must exist ({seam.purpose}; read in {seam.versions}): {error}")
            continue
        if seam.parameters is None:
            continue
        parameters = tuple(inspect.signature(inspect.unwrap(found)).parameters)
        if parameters != seam.parameters and not (seam.others_may_follow and set(seam.parameters) <= set(parameters)):
            problems.append(
                f"{seam.module}.{seam.path} must take {seam.parameters} ({seam.purpose}; read in {seam.versions}), "
                f"it takes {parameters}"
            )
    if problems:
        raise SeamError(
            f"vLLM {vllm_version()} is not one that this regrad was read against; install vllm 0.26 to 0.33, or a "
            "newer regrad. " + "; ".join(problems)
        )


def vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def linear_modules(manager: Any) -> list[tuple[list[str], Any]]:
    """The linear layers with LoRA: (names of its modules, layer). A merged layer has a name for each slice."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return [
        (manager.packed_modules.get(name, [name]), module)
        for name, module in manager.modules.items()
        if isinstance(module, BaseLinearLayerWithLoRA)
    ]


def max_rank(manager: Any) -> int:
    """The rank of the manager's LoRA slots."""
    rank: int = manager.lora_config.max_lora_rank
    return rank


def sliced(module: Any, part: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The part of each slice's whole A or B that this worker's layer keeps."""
    if module.tp_size == 1:
        return tensors
    cut = module.slice_lora_a if part == "A" else module.slice_lora_b
    return list(cut(tensors)) if module.n_slices > 1 else [cut(tensors[0])]


def lora_dtype(worker_lora_manager: Any) -> torch.dtype:
    """The engine's LoRA dtype."""
    dtype: torch.dtype = worker_lora_manager.lora_config.lora_dtype
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
    return runner.lora_manager._adapter_manager


def replace_by(owner: Any, name: str, function: Any) -> None:
    """Replaces ``owner.name`` by ``function`` and marks it, so that a second installation notices."""
    setattr(getattr(function, "__func__", function), PATCH_MARK, True)
    setattr(owner, name, function)
