"""The cost of cues: ingest with and without vectors of sentences, and queries by text with and without a cue.

Two banks take turns. A document has 6 sentences of 8 to 20 common words. Its gradient is drawn from a hash of its text,
so that no encoder is measured. The embedder is the real one.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bank_service.testing.client import Client
from bank_service.wire.generated import bank_pb2 as pb
from benchmarks.bank.child_bank import running_bank
from benchmarks.bank.drawn_corpus import ENGLISH
from benchmarks.bank.timing import one_at_a_time, quantiles
from regrad_vllm.reporting.intervals import spread

NUM_SENTENCES, FEWEST_WORDS, MOST_WORDS = 6, 8, 20
TOP_K = 3
NUM_WARM = 8  # documents, and queries, that warm up


def measure_cues(folder: Path, num_documents: int, num_queries: int, repeats: int) -> dict[str, Any]:
    """The figures. Each repeat ingests its share of the documents; then each repeat asks all queries."""
    with running_bank(folder / "with") as first, running_bank(folder / "without", "--no-sentences") as second:
        return asyncio.run(_measure(first.target, second.target, num_documents, num_queries, repeats))


async def _measure(target: str, without: str, num_documents: int, num_queries: int, repeats: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    documents = [pb.Document(id=str(number), text=_text(generator)) for number in range(NUM_WARM + num_documents)]
    questions = [_words(generator, 8) for _ in range(num_queries)]
    rates: dict[str, list[float]] = {"with": [], "without": []}
    times: dict[int, list[list[float]]] = {0: [], 2: []}  # by ``with_cue``
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(address)) for address in (target, without)]
        for client in clients:
            await client.ingest(*documents[:NUM_WARM])
        for repeat in range(repeats):
            part = documents[NUM_WARM + repeat :: repeats]
            for name, client in list(zip(rates, clients, strict=True))[:: 1 if repeat % 2 else -1]:
                started = time.perf_counter()
                await client.ingest(*part)
                rates[name].append(len(part) / (time.perf_counter() - started))
        for repeat in range(repeats + 1):
            for with_cue in list(times)[:: 1 if repeat % 2 else -1]:
                asked = [pb.QueryRequest(text=text, top_k=TOP_K, with_cue=with_cue) for text in questions]
                each, _ = await one_at_a_time(clients[0].stub.Query, asked if repeat else asked[:NUM_WARM])
                if repeat:
                    times[with_cue].append(each)
    return {
        "documents": num_documents,
        **{f"documents_per_s_{name}_sentences": spread(each) for name, each in rates.items()},
        **{f"query_with_cue_{number}": quantiles(each) for number, each in times.items()},
    }


def _text(generator: np.random.Generator) -> str:
    lengths = generator.integers(FEWEST_WORDS, MOST_WORDS + 1, NUM_SENTENCES)
    return " ".join(f"{_words(generator, int(length))}." for length in lengths)


def _words(generator: np.random.Generator, count: int) -> str:
    return " ".join(generator.choice(ENGLISH.split(), count))
