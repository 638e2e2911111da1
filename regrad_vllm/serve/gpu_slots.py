"""LoRA slots on a GPU: vLLM's own stacked tensors, written by one Triton launch on a stream of its own.

The composing thread waits until the slot is written; the engine's step then finds it there and has nothing to wait for,
on the host or on the device. The other way round, a composition waits on the device for what the engine's stream was
given before it, since that may still read the slot for the adapter that was there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrad_vllm.adapt.document_cache import read_payload
from regrad_vllm.adapt.stored_gradient import StoredGradient
from regrad_vllm.adapt.triton_compose import LaunchTable, Target, launch
from regrad_vllm.learner import Learner
from regrad_vllm.serve import vllm_seams
from regrad_vllm.serve.foreign_slots import ForeignSlots
from regrad_vllm.serve.slot_shards import shards


class GpuSlots:
    """The slots of one worker's LoRA manager, where vLLM made them."""

    def __init__(self, manager: Any, learner: Learner) -> None:
        """Made on the thread and device that run the engine's steps."""
        self._modules = vllm_seams.linear_modules(manager)
        self._dtype = vllm_seams.slot_form(manager)[2]
        self._learner = learner
        self._device = torch.device(manager.device)
        self._phi = torch.tensor(learner.phi, device=self._device)
        stacks = [stack for _, module in self._modules for stack in (*module.lora_a_stacked, *module.lora_b_stacked)]
        self._foreign = ForeignSlots(stacks)
        targets = self._targets()
        self._table = LaunchTable(targets, self._device)
        self.num_bytes = sum(target.stack.numel() * target.stack.element_size() for target in targets)
        self._engine_stream: torch.cuda.Stream | None = None  # known from the engine's first step with an adapter on
        self._own_stream = _own_stream(self._device)

    def warm_up(self) -> None:
        """Compiles the kernel, which takes seconds, before a request waits for it."""
        self.compose(0, [], [])
        self._foreign.add(0)

    @property
    def dtype(self) -> str:
        return str(self._dtype)

    def in_step(self) -> None:
        """Called in the engine's step, on its stream."""
        if self._own_stream is not None:
            self._engine_stream = torch.cuda.current_stream(self._device)

    def is_foreign(self, slot: int) -> None:
        """Another adapter is about to be written to a slot."""
        self._foreign.add(slot)

    def load(self, arena: str, digest: str) -> tuple[StoredGradient, int]:
        """A record of the arena, checked, with its bytes on the device. ArenaError, GradientFormatError."""
        kind, values, scales, num_bytes = read_payload(arena, digest, self._learner.spec)
        with torch.cuda.stream(self._own_stream):
            gradient = StoredGradient(kind, self._copied(values), None if scales is None else self._copied(scales))
            self._settle()
        return gradient, num_bytes

    def compose(self, slot: int, gradients: Sequence[StoredGradient], steps: Sequence[float]) -> bool:
        """φ* − Σ steps[k] δ_k with the scaling in B; whether it is finite in the slot's type. Waits for the device."""
        rows = np.array([gradient.row for gradient in gradients], np.int64).reshape(-1, 3)
        with torch.cuda.stream(self._own_stream):
            if self._own_stream is not None and self._engine_stream is not None:
                self._own_stream.wait_stream(self._engine_stream)
            self._foreign.clear(slot)
            infinite = launch(self._table, slot, self._dtype, self._phi, rows, steps, self._learner.scaling)
            return int(infinite) == 0  # waits

    def _targets(self) -> list[Target]:
        held = shards(self._modules, self._learner.layout)
        stacks: dict[tuple[str, str], Tensor] = {}
        for names, module in self._modules:
            stacks |= {(name, "A"): stack for name, stack in zip(names, module.lora_a_stacked, strict=True)}
            stacks |= {(name, "B"): stack for name, stack in zip(names, module.lora_b_stacked, strict=True)}
        return [
            Target(
                first=tensor.offset + shard.rows.start * tensor.shape[1] + shard.columns.start,
                stride=tensor.shape[1], stack=stacks[key], rows=len(shard.rows), columns=len(shard.columns),
                scaled=tensor.part == "B",
            )
            for tensor in self._learner.layout.tensors
            if (shard := held.get(key := (tensor.module, tensor.part))) is not None
        ]  # fmt: skip

    def _copied(self, values: np.ndarray[Any, Any]) -> Tensor:
        host = torch.tensor(values)
        return host if self._own_stream is None else host.pin_memory().to(self._device, non_blocking=True)

    def _settle(self) -> None:
        if self._own_stream is not None:
            self._own_stream.synchronize()


def _own_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
