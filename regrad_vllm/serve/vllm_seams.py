"""All that is not public vLLM API in the workers, each seam with the versions it was read against.

What is not public in the API server lies in ``vllm_server_seams``; nothing else reaches behind vLLM's API.
``check_seams`` compares every seam with the vLLM that is installed and says what changed; nothing is patched
before it has passed. Patches are idempotent, and with no ReGrad request they leave vLLM as it was, with two
exceptions that only ever help: the spare LoRA slot on CPUs, and bounded labels in one metric.

The spare slot: rows without an adapter carry the slot index −1, and vLLM's CPU kernels
(``lora/ops/torch_ops``) index the stacked tensors with it, so that such a row gets whatever adapter lies in the
LAST slot. All slots of the manager are an LRU cache that stays filled with adapters of finished requests, so a
spare slot is only spare where the manager can't hand it out. Hence every stacked tensor gets one slot more than
the manager knows (index ``max_loras``), which nobody ever writes and which stays zero: −1 means it.
The Triton kernels of the CUDA build return early for index −1 (``lora_ops``: ``if lora_id == -1: return``;
``lora_kernel_metadata`` counts −1 as an adapter of its own), so nothing is spared there.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from regrad_vllm.serve.recipe import PATH_PREFIX

if TYPE_CHECKING:
    import torch
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

PATCH_MARK = "__regrad_patch__"


class SeamError(RuntimeError):
    """The installed vLLM differs from the ones that a seam was read against."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A place in vLLM that is not public and that we rely on."""

    module: str
    path: str  # attribute path within the module
    parameters: tuple[str, ...] | None  # of the function there, in order; None: only its existence counts
    versions: str  # read in
    purpose: str


WORKER_SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("self", "lora_request"), "0.26.0, 0.32.0",
        "turns a regrad: request into tensors",
    ),
    Seam(
        "vllm.lora.model_manager", "from_layer",
        ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config"), "0.32.0",
        "gives each LoRA layer the spare slot on CPUs",
    ),
    Seam(
        "vllm.lora.model_manager", "LRUCacheLoRAModelManager.activate_adapter", ("self", "lora_id"), "0.32.0",
        "measures the copy into a slot",
    ),
    Seam(
        "vllm.lora.lora_weights", "LoRALayerWeights.__init__",
        ("self", "module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"), "0.32.0",
        "holds one module's tensors",
    ),
    Seam("vllm.lora.lora_model", "LoRAModel", None, "0.32.0", "holds one adapter"),
    Seam("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.add_lora", ("self", "lora_request"), "0.32.0",
         "shows that the model runner keeps its lora_manager"),
)  # fmt: skip


def check_seams(seams: tuple[Seam, ...]) -> None:
    """Raises SeamError, naming every seam where the installed vLLM is not as it was read."""
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
        if parameters != seam.parameters:
            problems.append(
                f"{seam.module}.{seam.path} must take {seam.parameters} ({seam.purpose}; read in {seam.versions}), "
                f"it takes {parameters}"
            )
    if problems:
        raise SeamError(
            f"vLLM {vllm_version()} is not one that this regrad was read against; install vllm 0.32.0 or a newer "
            "regrad. " + "; ".join(problems)
        )


def vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def install_loader(load: Callable[[Any, LoRARequest], LoRAModel]) -> None:
    """``load(worker_lora_manager, lora_request)`` serves the requests whose path starts with ``regrad:``."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    original = WorkerLoRAManager._load_adapter
    if hasattr(original, PATCH_MARK):
        return

    @wraps(original)
    def load_adapter(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        if lora_request.lora_path.startswith(PATH_PREFIX):
            return load(self, lora_request)
        return original(self, lora_request)

    replace_by(WorkerLoRAManager, "_load_adapter", load_adapter)


def install_spare_slot() -> None:
    """On CPUs every LoRA layer gets one slot more than the manager hands out; see the module's docstring."""
    from vllm.lora import model_manager
    from vllm.platforms import current_platform

    original = getattr(model_manager, "from_layer")  # noqa: B009  # imported there, not exported
    if not current_platform.is_cpu() or hasattr(original, PATCH_MARK):
        return

    @wraps(original)
    def from_layer(layer: Any, max_loras: int, *args: Any, **kwargs: Any) -> Any:
        return original(layer, max_loras + 1, *args, **kwargs)

    replace_by(model_manager, "from_layer", from_layer)


def install_activation_observer(observe: Callable[[int, Callable[[], bool]], bool]) -> None:
    """``observe(lora_int_id, activate)`` stands around each activation and returns what ``activate`` does."""
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

    original = LRUCacheLoRAModelManager.activate_adapter
    if hasattr(original, PATCH_MARK):
        return

    @wraps(original)
    def activate_adapter(self: LRUCacheLoRAModelManager, lora_id: int) -> bool:
        if lora_id in self._active_adapters:
            return original(self, lora_id)
        return observe(lora_id, lambda: original(self, lora_id))

    replace_by(LRUCacheLoRAModelManager, "activate_adapter", activate_adapter)


def make_lora_model(lora_int_id: int, rank: int, modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> LoRAModel:
    """An adapter for vLLM: module → (A (rank, in), B (out, rank)) with the scaling already folded into B.

    scaling=1 makes vLLM's own in-place fold a no-op, so that it can happen neither twice nor on shared tensors.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    loras = {
        module: LoRALayerWeights(module, rank, rank, lora_a, lora_b, scaling=1.0)
        for module, (lora_a, lora_b) in modules.items()
    }
    return LoRAModel(lora_int_id, rank, loras)


def lora_dtype(worker_lora_manager: Any) -> torch.dtype:
    """The engine's LoRA dtype."""
    dtype: torch.dtype = worker_lora_manager.lora_config.lora_dtype
    return dtype


def is_registered(worker: Any, lora_int_id: int) -> bool:
    """Whether vLLM still keeps this adapter, so that it needn't be composed again."""
    return bool(lora_int_id in _model_manager(worker)._registered_adapters)


def adaptable_modules(worker: Any) -> frozenset[str]:
    """Names by which an adapter can address the wrapped modules: gate_proj and up_proj, not gate_up_proj."""
    manager = _model_manager(worker)
    names: set[str] = set()
    for module in manager.modules:
        names.update(manager.packed_modules.get(module, [module]))
    return frozenset(names)


def spare_slot_is_zero(worker: Any) -> bool | None:
    """Whether slot −1 of every wrapped module is one that the manager can't hand out, and zero; None: not needed."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    manager = _model_manager(worker)
    for module in manager.modules.values():
        for stacked in (*module.lora_a_stacked, *module.lora_b_stacked):
            if stacked.shape[0] != manager.lora_slots + 1 or bool(stacked[-1].any()):
                return False
    return bool(len(manager.lora_index_to_id) == manager.lora_slots)


def count_adapters(worker: Any) -> tuple[int, int]:
    """(registered, active) adapters of a worker."""
    manager = _model_manager(worker)
    return len(manager._registered_adapters), len(manager._active_adapters)


def base_weights(worker: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every base weight tensor as the worker computes with it, by name, in a fixed order.

    On CPUs vLLM packs a linear layer's weight into a handle of its math library and empties the parameter:
    such a weight is read back through the layer itself, as its answer to the identity (exact: 1·w + 0·…).
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


def _model_manager(worker: Any) -> Any:
    runner = worker.model_runner
    if not hasattr(runner, "lora_manager"):
        raise SeamError("the engine must run with LoRA; set --enable-lora")
    return runner.lora_manager._adapter_manager


def replace_by(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Puts ``function`` in the place of ``owner.name`` and marks it, so that a second installation sees it."""
    setattr(function, PATCH_MARK, True)
    setattr(owner, name, function)
