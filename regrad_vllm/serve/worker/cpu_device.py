"""Documents on CPUs: the records' own files in the arena, mapped. Nothing is copied.

A mapped file stays readable when the arena drops the record. Nobody may truncate it, which would end the worker. Only
the server's user may write into an arena.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bank_service.wire.record import HEADER_BYTES
from regrad_vllm.adapt.arena import ArenaError, record_file
from regrad_vllm.learner import Learner
from regrad_vllm.serve import slot_shards, vllm_seams
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.layer import MAX_RANK, DocumentsLayer, LayerSlice, compile_loops
from regrad_vllm.serve.seams.cpu_wrapper import DocumentsPunicaWrapper
from regrad_vllm.serve.worker.device import Resident, as_factors


class CpuDevice:
    """The CPU of one worker, with φ* in our own layers."""

    def __init__(self, manager: Any, learner: Learner) -> None:
        """manager: vLLM's LoRAModelManager, when it has made its layers."""
        self._spec = learner.spec
        self._forms = Forms(learner.spec.shapes)
        self._wrappers = [
            wrapper
            for wrapper in manager.punica_wrapper_mapping.values()
            if isinstance(wrapper, DocumentsPunicaWrapper)
        ]
        self.refusal = _refusal(manager, learner)
        if self.refusal:
            return
        phi = [view for _, view in learner.layout.views(torch.tensor(learner.phi))]
        modules = vllm_seams.linear_modules(manager)
        layers = {
            module.lora_a_stacked[0].data_ptr(): DocumentsLayer(
                [_layer_slice(part, phi) for part in slices], learner.scaling, self._forms
            )
            for module, slices in slot_shards.slice_shards(modules, learner.layout)
        }
        for wrapper in self._wrappers:
            wrapper.layers = layers
        compile_loops()  # it takes seconds, so no request must wait for it

    def load(self, arena: str, digest: str) -> Resident:
        """A record of an arena: its file, mapped and checked once."""
        path, num_bytes = record_file(arena, digest)
        try:  # torch keeps no file open, as Python's mmap does
            memory = torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8).numpy()
        except RuntimeError as error:
            raise ArenaError(f"gradient {digest} in arena {arena} can't be mapped: {error}") from error
        mapped = memory.data
        record, codec = as_factors(mapped, self._spec)  # the record's own check covers all bytes
        if record is not mapped:
            memory = np.frombuffer(record, np.uint8).copy()
        return Resident(memory.ctypes.data + HEADER_BYTES, self._forms.index(codec), memory.nbytes, memory)

    def forget(self, resident: Resident) -> None:
        """Does nothing. A mapping ends with its last reference."""

    def set_batch(self, batch: BatchDocuments | None) -> None:
        """The documents of the rows of the step that begins."""
        for wrapper in self._wrappers:
            wrapper.batch = batch


def _layer_slice(part: slot_shards.SliceShards, phi: list[torch.Tensor]) -> LayerSlice:
    if part.tensors is None:
        return LayerSlice(part.outputs, None, None, -1, -1, 0, 0)
    a, b = part.tensors
    inputs, outputs = part.inputs_of_a, part.outputs_of_b
    return LayerSlice(
        part.outputs,
        phi[a][:, inputs.start : inputs.stop],
        phi[b][outputs.start : outputs.stop],
        a,
        b,
        inputs.start,
        outputs.start,
    )


def _refusal(manager: Any, learner: Learner) -> str:
    others = vllm_seams.other_layers(manager)
    if others:
        return (
            f"LoRA on CPUs must be on linear layers only, it is on {others[0]} too, where vLLM gives rows without an "
            "adapter somebody's; set --lora-target-modules to the learner's modules (regrad serve does) and other "
            "linear layers that you need"
        )
    if learner.layout.rank > MAX_RANK:
        return f"the learner's rank must be at most {MAX_RANK} on CPUs, got {learner.layout.rank}; train another one"
    return ""
