"""Our replacements for parts of vLLM in the workers. ``vllm_seams`` lists the replaced places and their versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from regrad_vllm.serve import vllm_seams
from regrad_vllm.serve.recipe import PATH_PREFIX, Recipe
from regrad_vllm.serve.vllm_seams import PATCH_MARK, replace_by

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

_RECIPE = "regrad_recipe"  # the attribute of a LoRAModel that holds its recipe
_CPU_WRAPPER = "regrad_vllm.serve.cpu_punica.RowsPunicaWrapper"
_CUDA_WRAPPER = "regrad_vllm.serve.gpu_punica.TilesPunicaWrapper"


@dataclass(frozen=True, slots=True)
class SlotBooks:
    """The functions that give out slots, in place of vLLM's manager. All are called inside the engine's step."""

    begin_step: Callable[[frozenset[int]], None]  # called first, with the ids of the batch's adapters
    step_is_set_up: Callable[[], None]  # called when all adapters of the batch are active
    activate: Callable[[int, Recipe | None], int]  # (adapter id, recipe or None for an operator's adapter) → slot
    deactivate: Callable[[int], None]  # takes the id of an adapter that has a slot


def install_loader(load: Callable[[Any, LoRARequest], LoRAModel]) -> None:
    """``load(worker_lora_manager, lora_request)`` serves the requests whose path starts with ``regrad:``."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.lora.worker_manager import WorkerLoRAManager

    original = WorkerLoRAManager._load_adapter
    if hasattr(original, PATCH_MARK):
        return

    @wraps(original)
    def load_adapter(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        if lora_request.lora_path.startswith(PATH_PREFIX):
            return load(self, lora_request)
        lora = original(self, lora_request)
        # If several workers raise, vLLM (multiproc_executor) reads only the first answer and takes the others for
        # answers to its next call. So only the last worker raises, whose answer is read last.
        if get_tensor_model_parallel_rank() == get_tensor_model_parallel_world_size() - 1:
            check_whole(self._adapter_manager, lora_request.lora_name, lora.loras)
        return lora

    replace_by(WorkerLoRAManager, "_load_adapter", load_adapter)


def check_whole(manager: Any, name: str, modules: Iterable[str]) -> None:
    """ValueError if the engine would ignore a part of an operator's adapter. vLLM ignores it silently."""
    wrapped = vllm_seams.modules_of(manager)
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


def install_slots(num_waiting: Callable[[int], int], adopt: Callable[[Any], SlotBooks]) -> None:
    """Gives vLLM's manager ``num_waiting(max_loras)`` more slots, and lets ``SlotBooks`` give them out.

    ``adopt(manager)`` is called when a manager's layers are made.
    """
    from vllm.lora import model_manager

    if hasattr(getattr(model_manager, "from_layer"), PATCH_MARK):  # noqa: B009  # imported there, not exported
        return
    _install_more_slots(num_waiting, adopt)
    _install_books()


def slot_ids(manager: Any) -> list[int | None]:
    """The manager's list: slot → id of the adapter in it. ``remove_all_adapters`` makes a new list."""
    ids: list[int | None] = manager.regrad_slot_ids
    return ids


def _install_more_slots(num_waiting: Callable[[int], int], adopt: Callable[[Any], SlotBooks]) -> None:
    from vllm.lora import model_manager
    from vllm.lora.model_manager import LoRAModelManager

    original_layer = getattr(model_manager, "from_layer")  # noqa: B009
    original_create: Any = LoRAModelManager._create_lora_modules
    original_remove: Any = LoRAModelManager.remove_all_adapters

    def empty(manager: Any) -> None:
        manager.lora_index_to_id = [None] * (manager.lora_slots + num_waiting(manager.lora_slots))
        manager.regrad_slot_ids = manager.lora_index_to_id

    @wraps(original_layer)
    def from_layer(layer: Any, max_loras: int, *args: Any, **kwargs: Any) -> Any:
        return original_layer(layer, max_loras + num_waiting(max_loras), *args, **kwargs)

    @wraps(original_create)
    def create_lora_modules(self: Any) -> None:
        original_create(self)
        empty(self)
        self.regrad_books = adopt(self)

    @wraps(original_remove)
    def remove_all_adapters(self: Any) -> None:
        original_remove(self)
        empty(self)

    replace_by(model_manager, "from_layer", from_layer)
    replace_by(LoRAModelManager, "_create_lora_modules", create_lora_modules)
    replace_by(LoRAModelManager, "remove_all_adapters", remove_all_adapters)


def _install_books() -> None:
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    original_set: Any = WorkerLoRAManager.set_active_adapters
    original_merge: Any = LoRAModelManager._create_merged_loras_inplace
    original_activate = LoRAModelManager.activate_adapter
    original_deactivate: Any = LoRAModelManager._deactivate_adapter

    @wraps(original_set)
    def set_active_adapters(self: Any, requests: set[Any], mapping: Any) -> None:
        batch = frozenset(request.adapter_id for request in requests if request)
        self._adapter_manager.regrad_books.begin_step(batch)
        try:
            original_set(self, requests, mapping)
        finally:
            self._adapter_manager.regrad_books.step_is_set_up()

    @wraps(original_merge)
    def create_merged_loras_inplace(self: Any, lora_model: Any) -> None:
        if not hasattr(lora_model, _RECIPE):
            original_merge(self, lora_model)

    @wraps(original_activate)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        if lora_id in self.lora_index_to_id:
            return False
        recipe = getattr(self._registered_adapters[lora_id], _RECIPE, None)
        slot = self.regrad_books.activate(lora_id, recipe)
        if recipe is not None:
            self._active_adapters[lora_id] = None
            return True
        # vLLM writes into the first free slot of the list. So it gets a list in which only this slot is free. The real
        # list stays unchanged, because the composer may read it at the same time.
        self.lora_index_to_id = [None if index == slot else -1 for index in range(len(slot_ids(self)))]
        try:
            return bool(original_activate(self, lora_id))
        finally:
            self.lora_index_to_id = slot_ids(self)

    @wraps(original_deactivate)
    def deactivate_adapter(self: Any, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self.regrad_books.deactivate(lora_id)

    replace_by(WorkerLoRAManager, "set_active_adapters", set_active_adapters)
    replace_by(LoRAModelManager, "_create_merged_loras_inplace", create_merged_loras_inplace)
    replace_by(LoRAModelManager, "activate_adapter", activate_adapter)
    replace_by(LoRAModelManager, "_deactivate_adapter", deactivate_adapter)


def install_wide_ids() -> None:
    """Makes vLLM's newer model runner for GPUs keep adapters' ids as int64, as the older one does, not as int32.

    Our ids are digests of 63 bits. With 31 bits two adapters would sometimes share an id.
    """
    from vllm.v1.worker.gpu.lora_utils import LoraState

    original: Any = LoraState.__init__
    if hasattr(original, PATCH_MARK):
        return

    @wraps(original)
    def init(self: LoraState, max_num_reqs: int) -> None:
        original(self, max_num_reqs)
        self.lora_ids = self.lora_ids.astype("int64")

    replace_by(LoraState, "__init__", init)


def install_kernels() -> None:
    """Makes vLLM use our LoRA kernels on CPUs and CUDA GPUs."""
    from vllm.platforms import current_platform

    ours = _CPU_WRAPPER if current_platform.is_cpu() else _CUDA_WRAPPER if current_platform.is_cuda() else ""
    if ours:
        replace_by(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: ours))


def make_lora_model(recipe: Recipe, rank: int) -> LoRAModel:
    """The entry for a recipe's adapter in vLLM's manager. It has no tensors, because they are in its slot."""
    from vllm.lora.lora_model import LoRAModel

    model = LoRAModel(recipe.int_id, rank, {})
    setattr(model, _RECIPE, recipe)
    return model
