"""Our LoRA kernels (``adapt.triton_lora``) for vLLM's linear layers on CUDA GPUs. The rest of vLLM's wrapper stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from regrad_vllm.adapt.triton_lora import MAX_RANK, Tiles, add_lora


class TilesPunicaWrapper(PunicaWrapperGPU):  # type: ignore[misc]  # final to vLLM
    """The wrapper that vLLM makes in each worker (``CudaPlatform.get_punica_wrapper``)."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._tiles = Tiles(max_num_batched_tokens, self.max_loras, torch.device(device))

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self._tiles.update(slots_of(mapping.index_mapping, lora_index_to_id))

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
        """y[row] += B[slot] (A[slot] x[row]) · scale, for each row with an adapter; scale is always 1 in vLLM."""
        # vLLM's own kernels do two cases: dual streams (``kwargs``), and the high rank of an operator's own adapters.
        if kwargs or lora_a_stacked[0].shape[2] > MAX_RANK:
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
            return
        tiles = self._tiles
        # One opaque operation, because torch.compile would not see the kernels' writes.
        _add_lora(
            y, x, lora_a_stacked, lora_b_stacked, output_slices, tiles.table, tiles.order, tiles.is_empty,
            tiles.max_tiles(x.shape[0]),
        )  # fmt: skip


def slots_of(adapter_ids: Sequence[int], slot_ids: Sequence[int | None]) -> NDArray[np.int64]:
    """The slot of each row, int64 (rows,); −1 for a row without an adapter.

    adapter_ids: the adapter of each row, 0 for none. slot_ids: the adapter of each slot.
    """
    ids, rows = np.unique(np.asarray(adapter_ids, np.int64), return_inverse=True)
    places = {id: slot for slot, id in enumerate(slot_ids) if id is not None}
    return np.array([places[id] if id > 0 else -1 for id in ids.tolist()], np.int64)[rows]


@torch.library.custom_op("regrad::add_lora", mutates_args=("y",))
def _add_lora(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], output_slices: Sequence[int], table: Tensor,
    order: Tensor, is_empty: Tensor, max_tiles: int,
) -> None:  # fmt: skip
    add_lora(y, x, a, b, output_slices, table, order, is_empty, max_tiles)


_add_lora.register_fake(lambda *args: None)
