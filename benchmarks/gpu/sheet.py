"""The bytes, launches and waits that ReGrad adds to a decoding step on a GPU, counted and not measured.

    python -m benchmarks.gpu.sheet

The step has the shape of Llama-3.2-1B in bfloat16, and a learner of rank 16 on the MLPs of the upper half. Each row has
documents of its own. A ratio to the base model's step is that of the bytes from the GPU's memory. So it holds if both
steps run at the memory's bandwidth. Launches cost time besides, and so does waiting.

- base: each weight once. KV caches are not counted.
- adapters: each row reads an A and B of its own, as before this design and in vLLM.
- documents: φ* once, and the factors of each row's documents.

x and y are not counted, because they lie in the GPU's cache, where the base layer has just used them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from bank_service.wire.codecs.factors import factor_form
from benchmarks.shapes import LLAMA_1B, Shape, made_up_learner
from regrad_vllm.layout import Layout

BYTES_PER_US = 4.8e6  # memory bandwidth of an H200 by its data sheet, 4.8 TB/s
CODEC, CODEC_4 = "factors-4-1-8", "factors-4-1-4"
ROWS = (64, 256)
_TWO_BYTES = 2  # bfloat16
# vLLM's ``prepare_tensors`` copies a flag to the host, reads it there and counts slots, for tokens and for requests.
_WAITS_FOR_ADAPTERS = 2 * 3


@dataclass(frozen=True, slots=True)
class Step:
    """The bytes, launches and waits that a design adds to one decoding step."""

    num_bytes: int
    launches: int
    waits: int  # of the host for the device, in a step whose requests have changed


def base_bytes(shape: Shape) -> int:
    """The weights that a decoding step reads, with the tied embedding as the output layer."""
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    attention = 2 * hidden * head * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    layer = attention + 3 * hidden * inner
    return _TWO_BYTES * (shape["num_hidden_layers"] * layer + shape["vocab_size"] * hidden)


def adapters(layout: Layout, rows: int) -> Step:
    """Each of ``rows`` rows has a dense adapter of its own."""
    return Step(_TWO_BYTES * layout.num_values * rows, _launches(layout), _WAITS_FOR_ADAPTERS)


def documents(layout: Layout, rows: int, per_row: int, codec: str = CODEC) -> Step:
    """Each of ``rows`` rows has ``per_row`` documents that no other has."""
    payload = factor_form(codec, layout.shapes).payload_bytes
    return Step(_TWO_BYTES * layout.num_values + per_row * payload * rows, _launches(layout), 0)


def _launches(layout: Layout) -> int:
    """Two for each merged layer, gate_up and down."""
    return 2 * sum(not module.endswith("up_proj") for module in layout.modules)


def table() -> str:
    """A Markdown table of bytes, and of the ratios to the base model's step that they allow."""
    layout = made_up_learner(LLAMA_1B).layout
    base = base_bytes(LLAMA_1B)
    head = ["rows", "documents of each", "adapters, MB", "documents, MB", "4 bits, MB"]
    lines = [f"| {' | '.join([*head, 'adapters, ratio', 'documents, ratio', '4 bits, ratio'])} |", "|--:" * 8 + "|"]
    for rows in ROWS:
        for per_row in (1, 3, 10):
            steps = adapters(layout, rows), documents(layout, rows, per_row), documents(layout, rows, per_row, CODEC_4)
            sizes = [f"{step.num_bytes / 1e6:,.0f}" for step in steps]
            ratios = [f"{base / (base + step.num_bytes):.3f}" for step in steps]
            lines.append(f"| {' | '.join([str(rows), str(per_row), *sizes, *ratios])} |")
    return "\n".join(lines)


def main() -> None:
    layout = made_up_learner(LLAMA_1B).layout
    old, new = adapters(layout, 1), documents(layout, 1, 1)
    base = base_bytes(LLAMA_1B)
    sys.stdout.write(
        f"{table()}\n\nbase: {base / 1e6:,.0f} MB, {base / BYTES_PER_US:.0f} µs at {BYTES_PER_US / 1e6} TB/s\n"
        f"launches: adapters {old.launches}, documents {new.launches}\n"
        f"waits of the host when requests change: adapters {old.waits}, documents {new.waits}\n"
    )


if __name__ == "__main__":
    main()
