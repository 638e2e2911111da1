"""Documents on a CUDA GPU: one tensor of bytes each, copied on a stream of its own.

A copy delays neither the engine's stream nor the thread that starts it. A step waits on the device for the copies that
were started before it was set. The memory of a forgotten document is used again only after the steps that were given to
the device before.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bank_service.wire.limits import MAX_TOP_K
from bank_service.wire.record import HEADER_BYTES
from regrad_vllm.adapt.arena import ArenaError, read_record
from regrad_vllm.learner import Learner
from regrad_vllm.serve import slot_shards, vllm_seams
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.device_layers import MAX_RANK, TYPES, DeviceLayer, Slice, tile_rows
from regrad_vllm.serve.kernels.device_tables import DeviceTables
from regrad_vllm.serve.seams import cuda_wrapper
from regrad_vllm.serve.worker.device import Resident, as_factors


class CudaDevice:
    """The GPU of one worker, with φ* in our own layers."""

    def __init__(self, manager: Any, learner: Learner) -> None:
        """manager: vLLM's LoRAModelManager, when it has made its layers. Called on the thread that runs the steps."""
        self._spec = learner.spec
        self._forms = Forms(learner.spec.shapes)
        self.refusal = _refusal(manager, learner)
        if self.refusal:
            return
        self._device = torch.device(manager.device)
        self._staging = Staging(self._device)
        self._step_stream: torch.cuda.Stream | None = None
        self._tables = DeviceTables(
            self._forms, manager.max_num_batched_tokens, manager.max_num_seqs, manager.max_num_seqs * MAX_TOP_K,
            tile_rows(learner.layout.rank), self._device,
        )  # fmt: skip
        cuda_wrapper.LAYERS.clear()
        cuda_wrapper.LAYERS.update(_layers(manager, learner, self._tables))

    def load(self, arena: str, digest: str) -> Resident:
        """A checked record of an arena, on its way to the device. ArenaError, GradientFormatError."""
        record, codec = as_factors(read_record(arena, digest), self._spec)
        try:
            memory = self._staging.copied(np.frombuffer(record, np.uint8)[HEADER_BYTES:])
        except torch.OutOfMemoryError as error:  # it would end the engine
            raise ArenaError(
                f"the GPU must have {len(record)} bytes free for a document; lower --regrad-worker-bytes or "
                f"--gpu-memory-utilization: {error}"
            ) from error
        return Resident(memory.data_ptr(), self._forms.index(codec), memory.numel(), memory)

    def forget(self, resident: Resident) -> None:
        """Keeps the bytes until the steps that the device has been given are over."""
        if self._step_stream is not None:
            assert isinstance(resident.memory, Tensor)
            resident.memory.record_stream(self._step_stream)

    def set_batch(self, batch: BatchDocuments | None) -> None:
        """The documents of the rows of the step that begins, on the current stream."""
        if self._device.type == "cuda":
            self._step_stream = torch.cuda.current_stream(self._device)
            self._staging.wait_for_copies(self._step_stream)
        self._tables.write(batch)


class Staging:
    """Copies bytes to the device through one pinned buffer, which is enlarged when necessary. Thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # High priority: a copy is short, a step is long, and a request waits for the copy.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._done: torch.cuda.Event | None = None  # the end of the last copy
        self._is_waited_for = True  # the steps' stream waits for it
        self._lock = threading.Lock()

    def copied(self, content: NDArray[np.uint8]) -> Tensor:
        """``content`` in a tensor of its own on the device, at a multiple of 16 bytes. Its copy may still run.

        The host waits for the copy before, because both use the buffer.
        """
        with self._lock, torch.cuda.stream(self._stream):
            if self._done is not None:
                self._done.synchronize()
            if len(content) > self._buffer.numel():
                self._buffer = torch.empty(len(content), dtype=torch.uint8, pin_memory=self._stream is not None)
            self._buffer.numpy()[: len(content)] = content
            copy = torch.empty(len(content), dtype=torch.uint8, device=self._device)
            copy.copy_(self._buffer[: len(content)], non_blocking=True)
            if self._stream is not None:
                self._done, self._is_waited_for = self._stream.record_event(), False
        return copy

    def wait_for_copies(self, stream: torch.cuda.Stream) -> None:
        """All later work on ``stream`` waits for the copies so far."""
        with self._lock:
            if self._done is not None and not self._is_waited_for:
                stream.wait_event(self._done)
                self._is_waited_for = True


def _layers(manager: Any, learner: Learner, tables: DeviceTables) -> dict[int, DeviceLayer]:
    """The layers that the learner adapts, by the address of vLLM's first stacked A."""
    device, dtype = tables.rows.device, vllm_seams.lora_dtype(manager)
    phi = [torch.from_numpy(view.copy()) for _, view in learner.layout.views(learner.phi)]

    def piece(part: slot_shards.SliceShards) -> Slice:
        if part.tensors is None:
            return Slice(part.outputs)
        a, b = part.tensors
        inputs, outputs = part.inputs_of_a, part.outputs_of_b
        return Slice(
            part.outputs,
            phi[a][:, inputs.start : inputs.stop].to(device, dtype),
            (phi[b][outputs.start : outputs.stop] * learner.scaling).to(device, dtype),
            part.tensors,
            inputs.start,
            outputs.start,
            (phi[a].shape[1], phi[b].shape[0]),
        )

    modules = vllm_seams.linear_modules(manager)
    return {
        module.lora_a_stacked[0].data_ptr(): DeviceLayer(
            [piece(part) for part in slices], learner.layout.rank, learner.scaling, tables
        )
        for module, slices in slot_shards.slice_shards(modules, learner.layout)
    }


def _refusal(manager: Any, learner: Learner) -> str:
    dtype = vllm_seams.lora_dtype(manager)
    if dtype not in TYPES:
        return f"LoRA must be float32, bfloat16 or float16, got {dtype}; set --lora-dtype"
    if learner.layout.rank > MAX_RANK:
        return f"the learner's rank must be at most {MAX_RANK} on GPUs, got {learner.layout.rank}; train another one"
    return ""
