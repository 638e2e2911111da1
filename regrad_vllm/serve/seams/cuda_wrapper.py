"""LoRA in vLLM's linear layers on CUDA GPUs: φ* and documents by our kernels, operators' own adapters by vLLM's.

All ReGrad requests are one adapter to vLLM. Its kernels are told that their rows have no adapter, and skip them. While
no row has an operator's adapter, they are told nothing at all: that costs loops over tokens and waits for the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from regrad_vllm.serve.kernels.device_layers import DeviceLayer
from regrad_vllm.serve.recipe import ADAPTER_ID

# The learner's layers of this worker, by the address of a layer's first stacked A. Captured operations find them here.
LAYERS: dict[int, DeviceLayer] = {}


class CudaPunicaWrapper(PunicaWrapperGPU):  # type: ignore[misc]  # final to vLLM
    """The wrapper that vLLM makes in each worker (``CudaPlatform.get_punica_wrapper``)."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._embeddings_indices.zero_()  # an embedding with LoRA reads them in every step, and we don't write them all
        # On the host, and read inside the operation, because torch.compile would keep a plain value for ever.
        self._has_adapters = torch.ones(1, dtype=torch.bool)
        self._has_operators = True  # vLLM's kernels were told of an operator's adapter, or nothing yet
        # With one slot there is room for φ* alone, see ``worker_patches.check_room``.
        self._serves_operators = self.max_loras > 1

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Called when the rows' adapters or their slots have changed."""
        ids = set(mapping.index_mapping)
        self._has_adapters[0] = any(id > 0 for id in ids)
        self.is_prefill = mapping.is_prefill
        has_operators = bool(ids - {0, ADAPTER_ID})
        if has_operators or self._has_operators:
            theirs = replace(
                mapping,
                index_mapping=_without_ours(mapping.index_mapping),
                prompt_mapping=_without_ours(mapping.prompt_mapping),
            )
            super().update_metadata(theirs, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self._has_operators = has_operators

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Adds to each row of y what its adapter makes of x. Rows without an adapter stay as they are.

        With ``add_inputs=False`` vLLM hands over zeros, and adds them to the output later.
        """
        # Theirs is captured before ours, because a captured step may have rows of both.
        if self._serves_operators:
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
        # One opaque operation, because torch.compile would not see the kernels' writes.
        _add_documents(y, x, lora_a_stacked[0], self._has_adapters)


def _without_ours(ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if id == ADAPTER_ID else id for id in ids)


@torch.library.custom_op("regrad::add_documents", mutates_args=("y",))
def _add_documents(y: Tensor, x: Tensor, stack: Tensor, has_adapters: Tensor) -> None:
    layer = LAYERS.get(stack.data_ptr())
    if layer is not None and has_adapters.item():
        layer.add(y, x)


_add_documents.register_fake(lambda *args: None)
