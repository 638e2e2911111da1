"""Clients in processes of their own, which keep so many queries in flight at one node or at several in turn.

python -m benchmarks.scale_out.client_process DOCUMENTS DIMENSION QUERIES FIRST
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import spec_of
from bank_service.wire.generated import bank_pb2 as pb
from benchmarks.bank.child_bank import ROOT
from benchmarks.bank.drawn_corpus import DrawnCorpus
from benchmarks.bank.timing import in_flight, percentile

NUM_PROCESSES = 2
WIDTH = 4  # queries in flight, of each process
TOP_K = 10
WARM_SECONDS = 1.0  # before each pass: both nodes are connected, and their caches are as the load makes them


def main() -> None:
    """Prints a line when it is ready.

    For each line of JSON with ``target`` and ``seconds`` it asks, and prints ``calls_per_s`` and ``p99_ms``.
    """
    documents, dimension, queries, first = map(int, sys.argv[1:])
    questions = DrawnCorpus(documents, dimension, spec_of()).questions(queries)
    requests = [pb.QueryRequest(vector=question.vector.tolist(), top_k=TOP_K) for question in questions]
    requests = requests[first:] + requests[:first]
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asyncio.run(_ask(requests, **json.loads(line)))) + "\n")
        sys.stdout.flush()


async def _ask(requests: Sequence[pb.QueryRequest], target: str, seconds: float) -> dict[str, float]:
    rest = cycle(requests)
    async with Client(target) as client:
        await in_flight(client.stub.Query, rest, WARM_SECONDS, WIDTH)
        times, rate = await in_flight(client.stub.Query, rest, seconds, WIDTH)
    return {"calls_per_s": rate, "p99_ms": percentile(times, 99)}


class Clients:
    """Running client processes."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes
        for process in processes:
            self._read(process)

    def ask(self, target: str, seconds: float) -> list[dict[str, Any]]:
        """The answer of each process. All ask at the same time. RuntimeError if one has ended."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"target": target, "seconds": seconds}) + "\n")
            process.stdin.flush()
        return [self._read(process) for process in self._processes]

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a client must answer, but it has ended; its error is above")
        return dict(json.loads(line))


@contextmanager
def running_clients(documents: int, dimension: int, queries: int) -> Iterator[Clients]:
    """Clients that are ready. They end with the block."""
    module = "benchmarks.scale_out.client_process"
    with ExitStack() as stack:
        processes = []
        for number in range(NUM_PROCESSES):
            words = map(str, (documents, dimension, queries, number * queries // NUM_PROCESSES))
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True,
            )  # fmt: skip
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield Clients(processes)


if __name__ == "__main__":
    main()
