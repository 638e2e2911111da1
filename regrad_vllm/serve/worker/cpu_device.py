"""Documents on CPUs: the records' own files in the arena, mapped. Nothing is copied.

A mapped file stays readable when the arena drops the record. Nobody may truncate it, which would end the worker. Only
the server's user may write into an arena.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bank_service.wire.record import HEADER_BYTES
from regrad_vllm.learner import Learner
from regrad_vllm.serve.arena.record_files import ArenaError, check_record, record_file
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.layer import DocumentsLayer, compile_loops
from regrad_vllm.serve.seams import slot_shards, worker_seams
from regrad_vllm.serve.seams.cpu_wrapper import DocumentsPunicaWrapper
from regrad_vllm.serve.worker.device import NoMemory, Resident, as_factors

_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")


class CpuDevice:
    """The CPU of one worker, with φ* in our own layers."""

    def __init__(self, manager: Any, learner: Learner) -> None:
        """manager: vLLM's LoRAModelManager, when it has made its layers."""
        # Each document is a mapping. The other half is for the rest of the process.
        self.max_documents = _max_mappings() // 2
        self._spec = learner.spec
        self._forms = Forms(learner.spec.shapes)
        wrappers = worker_seams.lora_wrappers(manager)
        self._wrappers = [wrapper for wrapper in wrappers if isinstance(wrapper, DocumentsPunicaWrapper)]
        self.refusal = _refusal(manager)
        if self.refusal:
            return
        found = slot_shards.layer_slices(worker_seams.linear_modules(manager), learner)
        layers = {address: DocumentsLayer(slices, learner.scaling, self._forms) for address, slices in found.items()}
        for wrapper in self._wrappers:
            wrapper.layers = layers
        compile_loops()  # it takes seconds, so no request must wait for it

    def load(self, arena: str, digest: str) -> Resident:
        """A record of an arena: its file, mapped and checked once. NoMemory, ArenaError, GradientFormatError."""
        path, num_bytes = record_file(arena, digest)
        try:  # torch keeps no file open, as Python's mmap does
            memory = torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8).numpy()
        except RuntimeError as error:
            if f"({errno.ENOMEM})" in str(error):
                raise NoMemory(
                    "a worker must have memory for another mapping, it has not; raise vm.max_map_count or lower "
                    f"--regrad-worker-bytes: {error}"
                ) from error
            record_file(arena, digest)  # ArenaMissing if it has just been removed
            raise ArenaError(f"gradient {digest} in arena {arena} can't be mapped: {error}") from error
        mapped = memory.data
        check_record(mapped, arena, digest)
        record, codec = as_factors(mapped, self._spec)
        if record is not mapped:
            memory = np.frombuffer(record, np.uint8).copy()
        return Resident(memory.ctypes.data + HEADER_BYTES, self._forms.index(codec), memory.nbytes, memory)

    def forget(self, resident: Resident) -> None:
        """Does nothing. A mapping ends with its last reference."""

    def set_batch(self, batch: BatchDocuments | None) -> None:
        """The documents of the rows of the step that begins."""
        for wrapper in self._wrappers:
            wrapper.batch = batch


def _max_mappings() -> int:
    """The most mappings that a process may have. Linux's default where /proc doesn't say it."""
    try:
        return int(_MAX_MAP_COUNT.read_text("ascii"))
    except OSError:
        return 65530


def _refusal(manager: Any) -> str:
    others = worker_seams.other_layers(manager)
    if others:
        return (
            f"LoRA on CPUs must be on linear layers only, it is on {others[0]} too, where vLLM gives rows without an "
            "adapter somebody's; set --lora-target-modules to the learner's modules (regrad serve does) and other "
            "linear layers that you need"
        )
    return ""
