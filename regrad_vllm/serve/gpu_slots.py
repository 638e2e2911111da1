"""LoRA slots on a GPU: vLLM's own stacked tensors, written by one Triton launch on a separate CUDA stream.

Copies to the device go through one pinned buffer on that stream. So a copy delays neither the engine's stream nor the
thread that starts it.

A composition waits on the device for the last step that reads the slot's old adapter, and for no other step. If it
waited for the running step, only one request could begin per step. The composing thread waits for the composition,
because it must know that all values are finite before the request runs. The engine's stream waits for the composition's
event before it reads the slot. The engine's loop doesn't wait, unless it composes itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrad_vllm.adapt.document_cache import read_payload
from regrad_vllm.adapt.stored_gradient import ROW_FIELDS, StoredGradient
from regrad_vllm.adapt.triton_compose import LaunchTable, Target, launch
from regrad_vllm.learner import Learner
from regrad_vllm.serve import vllm_seams
from regrad_vllm.serve.foreign_slots import ForeignSlots
from regrad_vllm.serve.slot_shards import shards

_NOTHING: tuple[frozenset[int], torch.cuda.Stream | None] = frozenset(), None


class GpuSlots:
    """The slots of one worker's LoRA manager, in vLLM's own memory."""

    def __init__(self, manager: Any, learner: Learner) -> None:
        """Must be called on the thread and device that run the engine's steps."""
        self._modules = vllm_seams.linear_modules(manager)
        self._dtype = vllm_seams.slot_form(manager)[2]
        self._learner = learner
        self._device = torch.device(manager.device)
        self._phi = torch.tensor(learner.phi, device=self._device)
        self._read_by: dict[int, torch.cuda.Event] = {}  # slot → end of the last step that read it
        self._reading = _NOTHING  # the slots that the newest step reads, and its stream
        self._written_on: dict[int, torch.cuda.Stream] = {}  # slot → the stream on which vLLM writes it
        self._own_stream = _own_stream(self._device)
        self._staging = Staging(self._device)
        self._written: dict[int, torch.cuda.Event] = {}  # slot → end of its last composition
        stacks = [stack for _, module in self._modules for stack in (*module.lora_a_stacked, *module.lora_b_stacked)]
        self._foreign = ForeignSlots(stacks)
        targets = self._targets()
        self._table = LaunchTable(targets, self._device)
        self.num_bytes = sum(target.stack.numel() * target.stack.element_size() for target in targets)
        if self._own_stream is not None:  # the new stream must see the tensors made above
            self._own_stream.wait_stream(torch.cuda.current_stream(self._device))

    def warm_up(self) -> None:
        """Compiles the kernel for all slots and numbers of gradients. It takes seconds, so it precedes all requests."""
        self.compose(0, [], [])
        self._foreign.add(0)

    @property
    def dtype(self) -> str:
        return str(self._dtype)

    def step_begins(self) -> None:
        """Called in the engine's step, on its stream, after all work of the step before was put on the stream."""
        slots, stream = self._reading
        if stream is not None:
            done = stream.record_event()
            for slot in slots:  # a slot of an older step has an earlier event on the same stream
                self._read_by[slot] = done
        self._reading = _NOTHING

    def step_reads(self, slots: Sequence[int]) -> None:
        """Called in the engine's step when its adapters are active. The step reads these slots from now on."""
        if self._own_stream is not None:
            self._reading = frozenset(slots), torch.cuda.current_stream(self._device)

    def before_use(self, slot: int) -> None:
        """Called in the engine's step. All later work on its stream waits for the slot's composition."""
        if (written := self._written.get(slot)) is not None:
            torch.cuda.current_stream(self._device).wait_event(written)

    def is_foreign(self, slot: int) -> None:
        """vLLM is about to write an operator's own adapter into a slot, on the engine's stream."""
        self._foreign.add(slot)
        if self._own_stream is not None:
            self._written_on[slot] = torch.cuda.current_stream(self._device)

    def load(self, arena: str, digest: str) -> tuple[StoredGradient, int]:
        """A checked record of the arena, and its number of bytes on the device. ArenaError, GradientFormatError.

        Its copy to the device may still run. So only our own stream may read it, which does so after the copy.
        """
        payload = read_payload(arena, digest, self._learner.spec)
        with torch.cuda.stream(self._own_stream):
            copies = self._staging.copied(*payload.arrays)
        return StoredGradient(payload.kind, copies), payload.num_bytes

    def compose(self, slot: int, gradients: Sequence[StoredGradient], steps: Sequence[float]) -> bool:
        """Writes φ* − Σ steps[k] δ_k, with the scaling in B, and waits for the device.

        Returns whether all values are finite in the slot's type.
        """
        rows = np.array([gradient.row for gradient in gradients], np.int64).reshape(-1, ROW_FIELDS)
        numbers = np.array([*steps, self._learner.scaling], np.float32)
        with torch.cuda.stream(self._own_stream):
            sources, factors = self._staging.copied(
                rows, numbers
            )  # before the wait below, because the copy needn't wait for the engine's stream
            self._wait_for_readers(slot)
            try:
                self._foreign.clear(slot)
                infinite = launch(
                    self._table, slot, self._dtype, self._phi, sources.view(torch.int64).view(-1, ROW_FIELDS),
                    factors.view(torch.float32),
                )  # fmt: skip
            finally:
                if self._own_stream is not None:
                    self._written[slot] = self._own_stream.record_event()
            return int(infinite) == 0  # this waits for the device

    def _wait_for_readers(self, slot: int) -> None:
        """Makes all later work on our own stream wait until the other streams have finished with the slot."""
        if self._own_stream is None:
            return
        slots, stream = self._reading
        written_on = self._written_on.pop(slot, None)
        if written_on is not None:
            self._own_stream.wait_stream(written_on)
        if slot in slots and stream is not None:  # vLLM removed an adapter between two steps
            self._own_stream.wait_stream(stream)
        elif (done := self._read_by.pop(slot, None)) is not None:
            self._own_stream.wait_event(done)

    def _targets(self) -> list[Target]:
        held = shards(self._modules, self._learner.layout)
        stacks: dict[tuple[str, str], Tensor] = {}
        for names, module in self._modules:
            # A tensor of another adapter may cover several slices, and then there are fewer names.
            stacks |= {(name, "A"): stack for name, stack in zip(names, module.lora_a_stacked, strict=False)}
            stacks |= {(name, "B"): stack for name, stack in zip(names, module.lora_b_stacked, strict=False)}
        targets = [
            Target(
                first=tensor.offset + shard.rows.start * tensor.shape[1] + shard.columns.start,
                stride=tensor.shape[1], stack=stacks[key], rows=len(shard.rows), columns=len(shard.columns),
                scaled=tensor.part == "B", tensor=index,
            )
            for index, tensor in enumerate(self._learner.layout.tensors)
            if (shard := held.get(key := (tensor.module, tensor.part))) is not None
        ]  # fmt: skip
        assert len(targets) == len(held), "a shard would not be composed"
        return targets


class Staging:
    """The pinned memory for all copies to the device: one buffer that is reused, and enlarged when necessary."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_pinned = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._free: torch.cuda.Event | None = None  # the end of the last copy from the buffer
        self._lock = threading.Lock()

    def copied(self, *arrays: np.ndarray[Any, Any]) -> list[Tensor]:
        """Each array's bytes on the device, as uint8 at an address divisible by 16, by one copy on the current stream.

        The host waits for the previous copy, not for this one. Called from any thread.
        """
        starts = [0]
        for array in arrays:
            starts.append(starts[-1] + -(-array.nbytes // 16) * 16)
        with self._lock:
            if self._free is not None:
                self._free.synchronize()
            if starts[-1] > self._buffer.numel():
                self._buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=self._is_pinned)
            host = self._buffer.numpy()
            for start, array in zip(starts, arrays, strict=False):
                host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            copy = torch.empty(starts[-1], dtype=torch.uint8, device=self._device)
            copy.copy_(self._buffer[: starts[-1]], non_blocking=True)
            if self._is_pinned:
                self._free = torch.cuda.current_stream(self._device).record_event()
        return [copy[start : start + array.nbytes] for start, array in zip(starts, arrays, strict=False)]


def _own_stream(device: torch.device) -> torch.cuda.Stream | None:
    # High priority: a composition is short, a step is long, and a request waits for the composition.
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
