"""Measures a catalog in PostgreSQL beside its SQL alone: ``python -m benchmarks.bank.catalog_times --catalog URL``.

The database must be empty. Its documents are those of ``benchmarks.bank`` (see ``drawn_corpus.py``), but the catalog is
used in this process, without a bank and its gradients.

- Build: documents/s of ``Catalog.put`` with many in flight, and the seconds that the graph takes.
- Queries: the 10 nearest, as a bank finds them, with filters and without. The main figure is their p50 minus the p50 of
  the one SQL statement that they stand on, one after the other and in turns.
- Words: BM25 by eight words of a document.
- Recall@10 is against float32 brute force.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.factory import open_catalog
from bank_service.catalog.postgres.partitions import direction
from bank_service.catalog.postgres.vector_search import EF_SEARCH
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.search.catalog_nearest import CatalogNearest
from bank_service.search.present import Present
from bank_service.testing.hash_encoder import spec_of
from bank_service.values.documents import Document, Gradient, PutResult, Query, Retrieval
from bank_service.values.filters import Condition, Operator
from bank_service.wire.record import DEFAULT_CODEC
from benchmarks.bank.drawn_corpus import BLOCK, SELECTIVITIES, DrawnCorpus, DrawnQuestion, id_of, number_of
from benchmarks.bank.timing import percentile, quantiles, recall
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe

DIMENSION = 384
TOP_K = 10
DEPTH = 2 * TOP_K + 16  # that a query asks the catalog for
IN_FLIGHT = 256
NAMESPACE = "default"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", required=True, help="postgresql:// URL of an empty database")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    corpus = DrawnCorpus(args.documents, DIMENSION, spec_of())
    questions = corpus.questions(args.queries)
    identity = CollectionIdentity("a" * 64, "b" * 16, DEFAULT_CODEC, "drawn", DIMENSION)
    with tempfile.TemporaryDirectory(prefix="catalog-times-") as folder:
        catalog = open_catalog(Path(folder), identity, url=args.catalog)
        try:
            report = {
                "documents": args.documents,
                "machine": describe("psycopg", "SQLAlchemy"),
                "build": build_catalog(catalog, corpus),
                **_measured(catalog, args.catalog, corpus, questions, args.repeats),
            }
        finally:
            catalog.close()
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    figures = {"query_p50_ms_over_sql": report["p50_ms_over_sql"]["median"], "recall_at_10": report["recall_at_10"]}
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


def build_catalog(catalog: Catalog, corpus: DrawnCorpus) -> dict[str, float]:
    """Stores all documents, without gradients, and builds the graph."""
    assert catalog.vectors is not None
    started = time.perf_counter()
    under_way: deque[Future[PutResult]] = deque()
    for block in range(corpus.num_blocks):
        for place, (text, pairs, vector) in enumerate(corpus.rows(block)):
            number = block * BLOCK + place
            gradient = Gradient(f"{number:064x}", 1, 1, False, vector.astype("<f4").tobytes())
            under_way.append(catalog.put(Document(NAMESPACE, id_of(number), "", text, pairs), gradient, None))
            if len(under_way) > IN_FLIGHT:
                under_way.popleft().result()
    while under_way:
        under_way.popleft().result()
    built = time.perf_counter()
    catalog.vectors.build_graphs(0)
    return {
        "documents_per_s": round(corpus.num_documents / (built - started), 1),
        "graph_s": round(time.perf_counter() - built, 1),
    }


def _measured(
    catalog: Catalog, url: str, corpus: DrawnCorpus, questions: Sequence[DrawnQuestion], repeats: int
) -> dict[str, Any]:
    assert catalog.vectors is not None
    pool = ThreadPoolExecutor(1)
    nearest = CatalogNearest(catalog, catalog.vectors, AcknowledgedSequence(), pool, exact_below=0)
    present = Present(nearest, catalog.words)

    def find(query: Query, question: DrawnQuestion) -> list[int]:
        with catalog.view() as view:
            found = present.find(view, query, question.vector)
            return [number_of(found.candidates[key].id) for key in found.scores]

    def filtered(name: str) -> Callable[[DrawnQuestion], list[int]]:
        def ask(question: DrawnQuestion) -> list[int]:
            condition = Condition(name, Operator.EQUALS, (question.metadata[name],))
            return find(Query(NAMESPACE, "x", top_k=TOP_K, conditions=(condition,)), question)

        return ask

    def by_words(question: DrawnQuestion) -> list[int]:
        return find(Query(NAMESPACE, question.words, top_k=TOP_K, retrieval=Retrieval.LEXICAL), question)

    with sql_of(url) as sql_alone:
        calls: dict[str, Callable[[DrawnQuestion], list[int]]] = {
            "sql_alone": sql_alone,
            "query": lambda question: find(Query(NAMESPACE, "x", top_k=TOP_K), question),
            **{f"filter_1_in_{one_in}": filtered(name) for name, one_in in SELECTIVITIES.items()},
            "words": by_words,
        }
        times, found = in_turns(calls, questions, repeats)
    over = [percentile(q, 50) - percentile(s, 50) for q, s in zip(times["query"], times["sql_alone"], strict=True)]
    return {
        "p50_ms_over_sql": spread(over),
        "recall_at_10": recall(found["query"], corpus.nearest(list(questions), TOP_K)),
        **{name: quantiles(each) for name, each in times.items()},
    }


@contextmanager
def sql_of(url: str) -> Iterator[Callable[[DrawnQuestion], list[int]]]:
    """The one statement that a query in a namespace with a graph stands on. It vacuums the database before."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
        ((table,),) = connection.execute("SELECT 'vectors_' || number FROM spaces").fetchall()
        connection.execute(f"SET hnsw.ef_search = {EF_SEARCH}")
        statement = f"SELECT key FROM {table} ORDER BY embedding <=> %s::halfvec LIMIT {DEPTH}"

        def ask(question: DrawnQuestion) -> list[int]:
            return [key for (key,) in connection.execute(statement, [direction(question.vector)])]

        yield ask


def in_turns(
    calls: dict[str, Callable[[DrawnQuestion], list[int]]], questions: Sequence[DrawnQuestion], repeats: int
) -> tuple[dict[str, list[list[float]]], dict[str, list[list[int]]]]:
    """Milliseconds of each call by pass, after one pass that doesn't count, and the last answers."""
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    found: dict[str, list[list[int]]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            each, answers = [], []
            for question in questions:
                started = time.perf_counter()
                answers.append(call(question))
                each.append(1e3 * (time.perf_counter() - started))
            found[name] = answers
            if repeat:
                times[name].append(each)
    return times, found


if __name__ == "__main__":
    raise SystemExit(main())
