"""φ* and documents in one linear layer on a GPU: our kernels beside the layer's matrix product and beside their bytes.

    python -m benchmarks.gpu.kernels        (times need CUDA; without it, it only runs once in Triton's interpreter)

The layers have the shape of Llama-3.2-1B, bfloat16, rank 16, random weights. In decoding each row has documents of its
own. A prompt's rows share them. Times are µs per call, from 50 replayed calls of a CUDA graph, so that launches cost
nothing. The calls take turns with 16 copies of the documents, so that those come from the GPU's memory. "bytes" is the
time that φ* and all documents need at the memory's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from bank_service.wire.codecs.factors import factor_form
from bank_service.wire.record import HEADER_BYTES, encode_gradient
from benchmarks.gpu.sheet import BYTES_PER_US, CODEC
from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig
from regrad_vllm.reporting.machine import describe
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.device_layers import DeviceLayer, tile_rows
from regrad_vllm.serve.kernels.device_tables import DeviceTables
from regrad_vllm.serve.kernels.layer_slice import LayerSlice

_LAYERS = {
    "1b": {"gate_up": (2048, (8192, 8192)), "down": (8192, (2048,))},
    "tiny": {"gate_up": (256, (384, 384)), "down": (384, (256,))},
}
_DECODE = tuple((rows, k) for rows in (1, 8, 64, 256) for k in (1, 3, 10))
_PROMPTS = ((2048, 4, 3),)  # rows, requests, documents
_SCALING = 2.0
_CALLS, _REPLAYS, _COPIES = 10, 5, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(_LAYERS), default="1b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--codec", default=CODEC)
    parser.add_argument(
        "--decode", type=int, nargs="+", default=[], help="rows and k of single decode batches, in turn"
    )
    args = parser.parse_args()
    report = {
        "machine": describe("vllm", "torch", "triton"), "us": measured(args.shape, args.rank, args.codec, args.decode),
    }  # fmt: skip
    last = {name: [row["ours"], row["bytes"], row["base"]] for name, row in report["us"].items()}
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(last) + "\n")


def measured(shape: str = "1b", rank: int = 16, codec: str = CODEC, decode: Sequence[int] = ()) -> dict[str, Any]:
    """µs by layer and batch: "base" (the matrix product), "ours" and "bytes"."""
    pairs = tuple(zip(decode[::2], decode[1::2], strict=True)) or _DECODE
    prompts = () if decode else _PROMPTS
    found: dict[str, Any] = {}
    for name, (inputs, outputs) in _LAYERS[shape].items():
        batches = [(f"{rows} rows, k={k}", rows, rows, k) for rows, k in pairs]
        batches += [(f"{rows} rows of {requests} prompts, k={k}", rows, requests, k) for rows, requests, k in prompts]
        for title, rows, requests, k in batches:
            found[f"{name}, {title}"] = _measure(inputs, outputs, rank, codec, rows, requests, k)
    return found


def _measure(
    inputs: int, outputs: tuple[int, ...], rank: int, codec: str, rows: int, requests: int, k: int
) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    copies = _COPIES if device.type == "cuda" else 1
    learner = _learner(inputs, outputs, rank)
    forms = Forms(learner.layout.shapes)
    payload = torch.from_numpy(np.frombuffer(_record(inputs, outputs, rank, codec), np.uint8)[HEADER_BYTES:].copy())
    stride = -(-payload.numel() // 256) * 256
    pool = torch.zeros(copies * requests * k, stride, dtype=torch.uint8, device=device)
    pool[:, : payload.numel()] = payload.to(device)
    tables = []
    for copy in range(copies):
        of_row = np.repeat(np.arange(requests), rows // requests)
        documents = (of_row[:, None] * k + np.arange(k) + copy * requests * k).reshape(-1)
        batch = BatchDocuments(
            rows, np.arange(rows), np.arange(rows + 1) * k, pool.data_ptr() + stride * documents,
            np.full(len(documents), -1.0, np.float32), np.full(len(documents), forms.index(codec), np.int32),
        )  # fmt: skip
        tables.append(DeviceTables(forms, rows, requests, requests * k, tile_rows(rank), device))
        tables[-1].write(batch)
    parts = [torch.from_numpy(view) for _, view in learner.layout.views(_normal(learner.layout.num_values, 0.01))]
    slices = [
        LayerSlice(width, parts[2 * i], parts[2 * i + 1], 2 * i, 2 * i + 1, whole=(inputs, width))
        for i, width in enumerate(outputs)
    ]
    layers = [DeviceLayer(slices, _SCALING, own, torch.bfloat16) for own in tables]
    x, y = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for width in (inputs, sum(outputs)))
    weight = torch.randn(inputs, sum(outputs), device=device, dtype=torch.bfloat16)
    phi_bytes = 2 * learner.layout.num_values
    num_bytes = phi_bytes + requests * k * factor_form(codec, learner.layout.shapes).payload_bytes
    turns = [lambda layer=layer: layer.add(y, x) for layer in layers]
    return {
        "base": _us([lambda: torch.mm(x, weight)]), "ours": _us(turns), "bytes": round(num_bytes / BYTES_PER_US, 1),
    }  # fmt: skip


def _learner(inputs: int, outputs: tuple[int, ...], rank: int) -> Learner:
    layout = Layout.build(rank, [(f"m.{i}", inputs, width) for i, width in enumerate(outputs)])
    config = LearnerConfig(base_digest="0" * 64, lora_alpha=_SCALING * rank, step_size_kind="tie")
    ones = np.ones(len(layout.tensors), np.float32)
    return Learner(config, layout, np.zeros(layout.num_values, np.float32), ones)


@lru_cache(maxsize=2)
def _record(inputs: int, outputs: tuple[int, ...], rank: int, codec: str) -> bytes:
    learner = _learner(inputs, outputs, rank)
    return encode_gradient(_normal(learner.layout.num_values, 1e-3), learner.spec, codec)


def _normal(number: int, scale: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(number).standard_normal(number, np.float32) * np.float32(scale)


def _us(calls: Sequence[Callable[[], object]]) -> float:
    """µs of a call, in turns; without CUDA it calls once and gives 0."""
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(max(_CALLS, len(calls))):
            calls[number % len(calls)]()
    for _ in range(3):
        graph.replay()
    begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    for _ in range(_REPLAYS):
        graph.replay()
    done.record()
    torch.cuda.synchronize()
    return round(begun.elapsed_time(done) / (max(_CALLS, len(calls)) * _REPLAYS) * 1000, 1)


if __name__ == "__main__":
    main()
