"""Queries over the wire against raw usearch in process: the same graph, the same vectors, in turns."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bank_service.search.usearch.graph import expansion_of, new_index
from bank_service.search.usearch.usearch_index import MANIFEST
from bank_service.testing.client import Client
from bank_service.values.embedder import default_embedder
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.limits import DEFAULT_NAMESPACE
from benchmarks.bank.child_bank import BankProcess
from benchmarks.bank.drawn_corpus import SELECTIVITIES, DrawnQuestion, id_of, number_of
from benchmarks.bank.timing import WIDTH, in_flight, one_at_a_time, percentile, quantiles, recall
from regrad_vllm.reporting.intervals import spread

TOP_K = 10
BATCH = 16
REST = 0.002  # seconds before each search of "raw_rested"; a bank's index rests for longer between two queries


class RawIndex:
    """The graph that a stopped bank left in its index snapshot, searched without the bank."""

    def __init__(self, data_dir: Path, dimension: int) -> None:
        folder = data_dir / "index"
        (name, _) = json.loads((folder / MANIFEST).read_text())["files"][DEFAULT_NAMESPACE]
        self.index = new_index(dimension)
        self.index.load((folder / name).read_bytes())
        self.index.expansion_search = expansion_of(len(self.index))
        with closing(sqlite3.connect(f"{(data_dir / 'catalog.sqlite').absolute().as_uri()}?mode=ro", uri=True)) as file:
            rows = file.execute(
                "SELECT key, id FROM versions WHERE ended IS NULL AND namespace = ?", (DEFAULT_NAMESPACE,)
            )
            self._numbers = {int(key): number_of(id) for key, id in rows}

    def search(self, vector: np.ndarray) -> Any:
        return self.index.search(vector, TOP_K, threads=1)

    def numbers(self, matches: Any) -> list[int]:
        return [self._numbers[int(key)] for key in matches.keys]


async def measure_queries(
    process: BankProcess, raw: RawIndex, questions: list[DrawnQuestion], truth: np.ndarray, repeats: int
) -> dict[str, Any]:
    """The figures of queries over the wire and of raw searches. A first repeat warms up and doesn't count."""
    requests = [pb.QueryRequest(vector=question.vector.tolist(), top_k=TOP_K) for question in questions]
    named = [pb.QueryRequest(document_ids=[id_of(question.number)]) for question in questions]
    vectors = [question.vector for question in questions]
    times: dict[str, list[list[float]]] = {}
    rates: dict[str, list[float]] = {}
    async with Client(process.target) as client:
        health = health_pb2_grpc.HealthStub(client.channel)

        async def in_process(vector: np.ndarray) -> Any:
            return raw.search(vector)

        async def nothing(_: object) -> None:
            await health.Check(health_pb2.HealthCheckRequest())

        passes: list[tuple[str, Any, list[Any], float]] = [
            ("raw", in_process, vectors, 0.0),
            ("raw_rested", in_process, vectors, REST),
            ("wire", client.stub.Query, requests, 0.0),
            ("grpc_alone", nothing, vectors, 0.0),
            ("one_by_id", client.stub.Query, named, 0.0),
        ]
        found: dict[str, list[Any]] = {}
        for repeat in range(repeats + 1):
            for name, call, items, rest in passes if repeat % 2 else passes[::-1]:
                each, found[name] = await one_at_a_time(call, items, rest=rest)
                if repeat:
                    times.setdefault(name, []).append(each)
            for name, (each, rate) in {
                "raw_8": await asyncio.to_thread(_raw_by_threads, raw, vectors),
                "wire_8": await in_flight(client.stub.Query, requests),
            }.items():
                if repeat:
                    times.setdefault(name, []).append(each)
                    rates.setdefault(name, []).append(rate)
    over = [percentile(w, 50) - percentile(r, 50) for w, r in zip(times["wire"], times["raw"], strict=True)]
    numbers = {
        "wire": [[number_of(hit.id) for hit in response.hits] for response in found["wire"]],
        "raw": [raw.numbers(matches) for matches in found["raw"]],
    }
    return {
        "p50_ms_over_raw": spread(over),
        **{name: quantiles(each) for name, each in times.items()},
        **{f"{name}_per_s": spread(each) for name, each in rates.items()},
        **{f"recall_at_10_{name}": recall(each, truth) for name, each in numbers.items()},
        "questions": len(questions),
    }


def _raw_by_threads(raw: RawIndex, vectors: list[np.ndarray]) -> tuple[list[float], float]:
    def search(vector: np.ndarray) -> float:
        started = time.perf_counter()
        raw.search(vector)
        return 1e3 * (time.perf_counter() - started)

    started = time.perf_counter()
    with ThreadPoolExecutor(WIDTH) as pool:
        times = list(pool.map(search, vectors))
    return times, len(vectors) / (time.perf_counter() - started)


async def measure_kinds(process: BankProcess, questions: list[DrawnQuestion], repeats: int) -> dict[str, Any]:
    """The figures of each kind of query, one at a time and in turns: filters, words, hybrid, by text, batches."""
    calls: dict[str, tuple[Any, list[Any]]] = {}
    embedder = default_embedder()
    async with Client(process.target) as client:
        for name, one_in in SELECTIVITIES.items():
            calls[f"filter_1_in_{one_in}"] = client.stub.Query, [_filtered(q, name) for q in questions]
        for name, retrieval in (("lexical", "LEXICAL"), ("hybrid", "HYBRID")):
            requests = [pb.QueryRequest(text=q.words, top_k=TOP_K, retrieval=retrieval) for q in questions]
            calls[name] = client.stub.Query, requests
        calls["dense_by_text"] = client.stub.Query, [pb.QueryRequest(text=q.english, top_k=TOP_K) for q in questions]
        calls[f"batch_of_{BATCH}"] = client.stub.BatchQuery, _batches(questions)

        async def embed(text: str) -> None:
            embedder.embed(text)

        calls["embed_alone"] = embed, [question.english for question in questions]
        times: dict[str, list[list[float]]] = {name: [] for name in calls}
        seconds = 60 / len(calls)
        for repeat in range(repeats + 1):
            for name, (call, items) in calls.items():
                each, _ = await one_at_a_time(call, items[:8] if not repeat else items, seconds)
                if repeat:
                    times[name].append(each)
    return {"embedder": embedder.name, **{name: quantiles(each) for name, each in times.items()}}


def _filtered(question: DrawnQuestion, name: str) -> pb.QueryRequest:
    condition = pb.Filter.Condition(key=name, operator="EQUALS", values=[question.metadata[name]])
    return pb.QueryRequest(vector=question.vector.tolist(), top_k=TOP_K, filter=pb.Filter(conditions=[condition]))


def _batches(questions: list[DrawnQuestion]) -> list[pb.BatchQueryRequest]:
    queries = [pb.QueryRequest(vector=question.vector.tolist(), top_k=TOP_K) for question in questions]
    return [
        pb.BatchQueryRequest(queries=queries[start : start + BATCH])
        for start in range(0, max(1, len(queries) - BATCH + 1), BATCH)
    ]
