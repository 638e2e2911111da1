"""All that is not public vLLM API, each seam with the versions it was read against.

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
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from regrad_vllm.naming import ADAPTER_PREFIX
from regrad_vllm.serve.recipe import PATH_PREFIX, Recipe

if TYPE_CHECKING:
    import torch
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

_MARK = "__regrad_patch__"


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
SERVER_SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.entrypoints.serve.engine.serving", "BaseServing._maybe_get_adapters",
        ("self", "request", "supports_default_mm_loras"), "0.32.0",
        "maps an API request to its LoRARequest",
    ),
    Seam(
        "vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name", ("self", "lora_request"), "0.32.0",
        "names the model in an answer",
    ),
    Seam(
        "vllm.v1.metrics.stats", "LoRARequestStates.update_scheduler_stats", ("self", "scheduler_stats"), "0.32.0",
        "labels vllm:lora_requests_info with adapter names, one time series for each combination",
    ),
    Seam(
        "vllm.v1.engine.output_processor", "RequestState.__init__",
        None, "0.32.0", "knows by lora_name which adapters unfinished requests use",
    ),
    Seam("vllm.v1.engine.output_processor", "OutputProcessor", None, "0.32.0", "holds request_states"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServedCall:
    """What the serving layer must use for the API request that is being handled."""

    lora_request: LoRARequest
    model_name: str  # for the answer's "model"


_SERVED_CALL: ContextVar[ServedCall | None] = ContextVar("regrad_served_call", default=None)


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


# Worker side.


def install_loader(load: Callable[[Any, LoRARequest], LoRAModel]) -> None:
    """``load(worker_lora_manager, lora_request)`` serves the requests whose path starts with ``regrad:``."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    original = WorkerLoRAManager._load_adapter
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def load_adapter(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        if lora_request.lora_path.startswith(PATH_PREFIX):
            return load(self, lora_request)
        return original(self, lora_request)

    _replace(WorkerLoRAManager, "_load_adapter", load_adapter)


def install_spare_slot() -> None:
    """On CPUs every LoRA layer gets one slot more than the manager hands out; see the module's docstring."""
    from vllm.lora import model_manager
    from vllm.platforms import current_platform

    original = getattr(model_manager, "from_layer")  # noqa: B009  # imported there, not exported
    if not current_platform.is_cpu() or hasattr(original, _MARK):
        return

    @wraps(original)
    def from_layer(layer: Any, max_loras: int, *args: Any, **kwargs: Any) -> Any:
        return original(layer, max_loras + 1, *args, **kwargs)

    _replace(model_manager, "from_layer", from_layer)


def install_activation_observer(observe: Callable[[int, Callable[[], bool]], bool]) -> None:
    """``observe(lora_int_id, activate)`` stands around each activation and returns what ``activate`` does."""
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

    original = LRUCacheLoRAModelManager.activate_adapter
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def activate_adapter(self: LRUCacheLoRAModelManager, lora_id: int) -> bool:
        if lora_id in self._active_adapters:
            return original(self, lora_id)
        return observe(lora_id, lambda: original(self, lora_id))

    _replace(LRUCacheLoRAModelManager, "activate_adapter", activate_adapter)


def make_lora_model(
    lora_int_id: int, rank: int, modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> LoRAModel:
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


def spare_slot_is_zero(worker: Any) -> bool:
    """Whether slot −1 of every wrapped module is one that the manager can't hand out, and zero."""
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


# API server side.


def install_served_call() -> None:
    """The serving layer uses the LoRARequest of ``served_call`` for the API request handled inside it.

    A context variable reaches exactly the handler's task and its children, and no other request.
    """
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    original = BaseServing._maybe_get_adapters
    original_name = OpenAIServingModels.model_name
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def maybe_get_adapters(
        self: BaseServing, request: Any, supports_default_mm_loras: bool = False
    ) -> LoRARequest | None:
        call = _SERVED_CALL.get()
        if call is not None:
            return call.lora_request
        return original(self, request, supports_default_mm_loras)

    @wraps(original_name)
    def model_name(self: OpenAIServingModels, lora_request: LoRARequest | None = None) -> str:
        call = _SERVED_CALL.get()
        if call is not None and lora_request is not None and lora_request.lora_name == call.lora_request.lora_name:
            return call.model_name
        return original_name(self, lora_request)

    _replace(BaseServing, "_maybe_get_adapters", maybe_get_adapters)
    _replace(OpenAIServingModels, "model_name", model_name)


def make_served_call(recipe: Recipe, model_name: str) -> ServedCall:
    """The LoRARequest of a recipe: named by its content, its path is the recipe itself."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest(lora_name=recipe.name, lora_int_id=recipe.int_id, lora_path=recipe.path)
    return ServedCall(request, model_name)


@contextmanager
def served_call(call: ServedCall | None) -> Iterator[None]:
    """While inside, the serving layer uses ``call`` (None: vLLM's own choice)."""
    token = _SERVED_CALL.set(call)
    try:
        yield
    finally:
        _SERVED_CALL.reset(token)


def engine_uses(engine_client: Any, lora_name: str) -> bool:
    """Whether the server still waits for outputs of a request with this adapter (``AsyncLLM``'s own list)."""
    states = engine_client.output_processor.request_states
    return any(state.lora_name == lora_name for state in states.values())


def install_bounded_lora_metrics() -> None:
    """All ReGrad adapters count under one name in vllm:lora_requests_info.

    vLLM labels that gauge with the names of the running adapters and keeps every label set it has seen; with a
    name for each request that would grow without end.
    """
    from vllm.v1.metrics.stats import LoRARequestStates

    original = LoRARequestStates.update_scheduler_stats
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def update_scheduler_stats(self: LoRARequestStates, scheduler_stats: Any) -> None:
        original(self, scheduler_stats)
        if scheduler_stats is None:
            return
        for counts in (scheduler_stats.waiting_lora_adapters, scheduler_stats.running_lora_adapters):
            ours = [name for name in counts if name.startswith(ADAPTER_PREFIX)]
            if ours:
                counts[ADAPTER_PREFIX.rstrip("-")] = sum(counts.pop(name) for name in ours)

    _replace(LoRARequestStates, "update_scheduler_stats", update_scheduler_stats)


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    setattr(function, _MARK, True)
    setattr(owner, name, function)
