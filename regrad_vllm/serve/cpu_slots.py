"""LoRA slots on CPUs. All tensors of a slot lie in one row of memory, for the compiled loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regrad_vllm.adapt.document_cache import load_gradient
from regrad_vllm.adapt.loops import lora
from regrad_vllm.adapt.loops.compose_slot import compose_slot
from regrad_vllm.adapt.slot_table import SlotTable
from regrad_vllm.adapt.stored_gradient import StoredGradient
from regrad_vllm.layout import Part
from regrad_vllm.learner import Learner
from regrad_vllm.serve import vllm_seams
from regrad_vllm.serve.foreign_slots import ForeignSlots
from regrad_vllm.serve.slot_shards import shards


class CpuSlots:
    """The slots of one worker's LoRA manager. Modules that the learner doesn't adapt have separate memory."""

    def __init__(self, manager: Any, learner: Learner) -> None:
        """Replaces the stacked tensors of all linear LoRA layers of vLLM's manager by views into our memory.

        A slice of a merged layer that the learner doesn't adapt stays zero.
        """
        modules = vllm_seams.linear_modules(manager)
        num_slots, rank, dtype = vllm_seams.slot_form(manager)
        self._values = {module.base_layer.params_dtype for _, module in modules}  # the types of the kernels' x and y
        self._learner = learner
        self._table = SlotTable.build(learner.layout, shards(modules, learner.layout), rank)
        self._memory = torch.zeros(num_slots, self._table.num_values, dtype=dtype)
        views = {
            (tensor.module, tensor.part): _stacked(self._memory, tensor.part, tensor.offset, rank, tensor.width)
            for tensor in self._table.tensors
        }
        for names, module in modules:
            both: tuple[tuple[Part, Any], ...] = (("A", module.lora_a_stacked), ("B", module.lora_b_stacked))
            for part, stacks in both:
                every = [
                    *names,
                    *[""] * (len(stacks) - len(names)),
                ]  # a tensor of another adapter may cover several slices
                made = [
                    views[name, part] if (name, part) in views else _like(stack, part)
                    for name, stack in zip(every, stacks, strict=True)
                ]
                setattr(module, f"lora_{part.lower()}_stacked", tuple(made))
        stacks = [stack for _, module in modules for stack in (*module.lora_a_stacked, *module.lora_b_stacked)]
        self._foreign = ForeignSlots([self._memory, *stacks])

    def warm_up(self) -> None:
        """Compiles the loops. This takes seconds, so it is done before the first request."""
        self.compose(0, [], [])  # slot 0 is still free
        for values in self._values:
            lora.compile_for(values, self._memory.dtype)
        self._memory[0].zero_()

    @property
    def dtype(self) -> str:
        return str(self._memory.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots together, for the learner's modules alone."""
        return self._memory.numel() * self._memory.element_size()

    def step_begins(self) -> None:
        """Does nothing. On a CPU a composition is done when it returns, and a step when the next one begins."""

    def step_reads(self, slots: Sequence[int]) -> None:
        """Does nothing, for the same reason."""

    def before_use(self, slot: int) -> None:
        """Does nothing, for the same reason."""

    def is_foreign(self, slot: int) -> None:
        """vLLM is about to write an operator's own adapter into a slot."""
        self._foreign.add(slot)

    def load(self, arena: str, digest: str) -> tuple[StoredGradient, int]:
        """A checked record of the arena, and its number of bytes. ArenaError, GradientFormatError."""
        return load_gradient(arena, digest, self._learner.spec)

    def compose(self, slot: int, gradients: Sequence[StoredGradient], steps: Sequence[float]) -> bool:
        """Writes φ* − Σ steps[k] δ_k, with the scaling in B. True if all values are finite in the slot's type."""
        self._foreign.clear(slot)
        return compose_slot(self._memory[slot], self._learner.phi, gradients, steps, self._table, self._learner.scaling)


def _stacked(memory: Tensor, part: Part, offset: int, rank: int, width: int) -> Tensor:
    """A view of shape (slots, 1, rank, in) for A, (slots, 1, out, rank) for B. In memory the rank comes first."""
    block = memory[:, offset : offset + rank * width].view(len(memory), 1, rank, width)
    return block if part == "A" else block.transpose(2, 3)


def _like(stack: Tensor, part: Part) -> Tensor:
    return (
        stack
        if part == "A"
        else torch.zeros_like(stack.transpose(2, 3), memory_format=torch.contiguous_format).transpose(2, 3)
    )
