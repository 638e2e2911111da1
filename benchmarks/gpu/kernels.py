"""LoRA's kernels on a GPU in one linear layer: ours and vLLM's own, beside the layer's matrix product.

    python -m benchmarks.gpu.kernels        (needs CUDA)

The layer has the shape of Llama-3.2-1B, rank 16, bfloat16, random weights and 272 slots. vLLM's kernels are made for
256 adapters. "unique" batches have another adapter in each row, as in decoding. "long" batches have many rows per
adapter, as in prompts. Times are µs per call, from 50 replayed calls of a CUDA graph, so that launches cost nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from regrad_vllm.adapt.triton_lora import Tiles, add_lora
from regrad_vllm.reporting.machine import describe

_LAYERS = (("gate_up", 2048, (8192, 8192)), ("down", 8192, (2048,)))
_BATCHES = ((1, 1), (8, 8), (64, 64), (256, 256), (2048, 4), (2048, 64))  # rows, adapters
_SLOTS, _ADAPTERS, _ROWS, _RANK = 272, 256, 4096, 16
_CALLS, _REPLAYS = 10, 5


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA GPU must be there, there is none")
    report: dict[str, Any] = {
        "machine": describe("vllm", "torch", "triton") | {"device": torch.cuda.get_device_name()}, "us": {}
    }  # fmt: skip
    for name, inputs, outputs in _LAYERS:
        for rows, adapters in _BATCHES:
            kind = "unique" if rows == adapters else "long"
            report["us"][f"{name}, {rows} rows, {adapters} adapters, {kind}"] = _measure(
                inputs, outputs, rows, adapters
            )
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(json.dumps({name: row["stock"] / row["ours"] for name, row in report["us"].items()}) + "\n")


def _measure(inputs: int, outputs: tuple[int, ...], rows: int, adapters: int) -> dict[str, float]:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    device = torch.device("cuda")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.01

    a, b = [normal(_SLOTS, 1, _RANK, inputs) for _ in outputs], [normal(_SLOTS, 1, width, _RANK) for width in outputs]
    weight, x = normal(inputs, sum(outputs)), normal(rows, inputs)
    y = torch.zeros(rows, sum(outputs), device=device, dtype=torch.bfloat16)
    slots = np.sort(np.arange(rows) % adapters)
    meta = LoRAKernelMeta.make(_ADAPTERS, _ROWS, device, [])
    meta.prepare_tensors(torch.tensor(slots, device=device))
    low = torch.empty(len(outputs), rows, _RANK, device=device, dtype=torch.float32)
    tiles = Tiles(_ROWS, _ADAPTERS, device)
    tiles.update(slots)

    def stock() -> None:
        lora_shrink(x, a, low, *meta.meta_args(rows, False), 1.0)
        lora_expand(low, b, y, *meta.meta_args(rows, False), offset_start=0, add_inputs=True)

    def ours() -> None:
        add_lora(y, x, a, b, outputs, tiles.table, tiles.order, tiles.is_empty, tiles.max_tiles(rows))

    return {"base": _us(lambda: torch.mm(x, weight)), "stock": _us(stock), "ours": _us(ours)}


def _us(call: Callable[[], object]) -> float:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    for _ in range(3):
        graph.replay()
    begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    for _ in range(_REPLAYS):
        graph.replay()
    done.record()
    torch.cuda.synchronize()
    return round(begun.elapsed_time(done) / (_CALLS * _REPLAYS) * 1000, 1)


if __name__ == "__main__":
    main()
