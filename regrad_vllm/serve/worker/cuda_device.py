"""Documents on a CUDA GPU: one tensor of bytes each, copied on a stream of its own.

A copy delays neither the engine's stream nor the thread that starts it. A step waits on the device for the copies that
were started before it was set. The memory of a forgotten document is used again only after the steps that were given to
the device before.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bank_service.wire.limits import MAX_TOP_K
from bank_service.wire.record import HEADER_BYTES
from regrad_vllm.learner import Learner
from regrad_vllm.serve.arena.record_files import read_record
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.device_layers import TYPES, DeviceLayer, tile_rows
from regrad_vllm.serve.kernels.device_tables import DeviceTables
from regrad_vllm.serve.seams import cuda_wrapper, slot_shards, worker_seams
from regrad_vllm.serve.worker.device import NoMemory, Resident, as_factors


class CudaDevice:
    """The GPU of one worker, with φ* in our own layers."""

    max_documents = sys.maxsize  # only bytes count

    def __init__(self, manager: Any, learner: Learner) -> None:
        """manager: vLLM's LoRAModelManager, when it has made its layers. Called on the thread that runs the steps."""
        self._spec = learner.spec
        self._forms = Forms(learner.spec.shapes)
        self.refusal = _refusal(manager)
        if self.refusal:
            return
        self._device = torch.device(worker_seams.lora_device(manager))
        self._staging = Staging(self._device)
        self._step_stream: torch.cuda.Stream | None = None
        max_rows, max_requests = worker_seams.step_limits(manager)
        self._tables = DeviceTables(
            self._forms, max_rows, max_requests, max_requests * MAX_TOP_K, tile_rows(learner.layout.rank), self._device
        )
        cuda_wrapper.LAYERS.clear()
        found = slot_shards.layer_slices(worker_seams.linear_modules(manager), learner)
        dtype = worker_seams.lora_dtype(manager)
        cuda_wrapper.LAYERS.update(
            {address: DeviceLayer(slices, learner.scaling, self._tables, dtype) for address, slices in found.items()}
        )

    def load(self, arena: str, digest: str) -> Resident:
        """A checked record of an arena, on its way to the device. NoMemory, ArenaError, GradientFormatError."""
        record, codec = as_factors(read_record(arena, digest), self._spec)
        form = self._forms.index(codec)
        memory = self._staging.copied(np.frombuffer(record, np.uint8)[HEADER_BYTES:])
        return Resident(memory.data_ptr(), form, memory.numel(), memory)

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

        The host waits for the copy before, because both use the buffer. NoMemory.
        """
        with self._lock, torch.cuda.stream(self._stream):
            if self._done is not None:
                self._done.synchronize()
            try:
                if len(content) > self._buffer.numel():
                    self._buffer = torch.empty(len(content), dtype=torch.uint8, pin_memory=self._stream is not None)
                copy = torch.empty(len(content), dtype=torch.uint8, device=self._device)
            except RuntimeError as error:
                if not _lacks_memory(error):
                    raise
                raise NoMemory(
                    f"GPU and host must have {len(content)} bytes free for a document; lower --regrad-worker-bytes or "
                    f"--gpu-memory-utilization: {error}"
                ) from error
            self._buffer.numpy()[: len(content)] = content
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


def _lacks_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory. That of the host, pinned or not, has no error of its own."""
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _refusal(manager: Any) -> str:
    dtype = worker_seams.lora_dtype(manager)
    if dtype not in TYPES:
        return f"LoRA must be float32, bfloat16 or float16, got {dtype}; set --lora-dtype"
    return ""
