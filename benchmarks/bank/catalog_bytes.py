"""Measures a document's bytes in PostgreSQL: ``python -m benchmarks.bank.catalog_bytes --catalog URL --data FOLDER``.

The database must be empty. FOLDER has ``*.documents.jsonl`` or ``.jsonl.gz``, see ``regrad_vllm/data/questions.py``.
Texts are real, and so are their words, ids and sentences. Vectors are drawn, because their size doesn't depend on
their values, and gradients lie elsewhere. The sizes are those after VACUUM FULL, so they are the least that the server
needs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import psycopg

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import CollectionIdentity, SentenceVectors
from bank_service.catalog.factory import open_catalog
from bank_service.values.documents import Document, Gradient, PutResult
from bank_service.values.sentences import sentence_places
from bank_service.values.vectors import unit
from bank_service.wire.record import DEFAULT_CODEC

DIMENSION = 384
IN_FLIGHT = 256
NAMESPACE = "default"
PARTS = ("documents", "documents_indexes", "vectors", "graph", "sentences", "words", "rest")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", required=True, help="postgresql:// URL of an empty database")
    parser.add_argument("--data", type=Path, required=True, help="folder with *.documents.jsonl or .jsonl.gz")
    parser.add_argument("--documents", type=int, default=20_000, help="at most")
    args = parser.parse_args(argv)
    identity = CollectionIdentity("a" * 64, "b" * 16, DEFAULT_CODEC, "drawn", DIMENSION)
    with tempfile.TemporaryDirectory(prefix="catalog-bytes-") as folder:
        catalog = open_catalog(Path(folder), identity, url=args.catalog)
        try:
            figures = _fill(catalog, args.data, args.documents)
            assert catalog.vectors is not None
            catalog.vectors.build_graphs(0)
        finally:
            catalog.close()
    with psycopg.connect(args.catalog, autocommit=True) as connection:
        connection.execute("VACUUM FULL")
        sizes = dict(
            connection.execute(
                "SELECT relname, CASE WHEN relkind = 'r' THEN pg_table_size(oid) ELSE pg_relation_size(oid) END "
                "FROM pg_class WHERE relkind IN ('r', 'i') AND relnamespace = current_schema()::regnamespace"
            ).fetchall()
        )
    count = figures["documents"]
    each = {part: round(size / count) for part, size in _by_part(sizes).items()}
    report = {**figures, "bytes_a_document": {**each, "all": sum(each.values())}}
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def _fill(catalog: Catalog, data: Path, limit: int) -> dict[str, int]:
    """Stores the documents. Returns their number, and the means of their text's bytes, words and sentences."""
    generator = np.random.default_rng(0)
    under_way: deque[Future[PutResult]] = deque()
    totals: Counter[str] = Counter()
    for id, title, text in _documents(data, limit):
        places = sentence_places(text)
        vectors = generator.standard_normal((len(places), DIMENSION)).astype("<f2").tobytes()
        vector = unit(generator.standard_normal(DIMENSION, np.float32)).astype("<f4").tobytes()
        gradient = Gradient(hashlib.sha256(id.encode()).hexdigest(), 271_088, 160, False, vector)
        document = Document(NAMESPACE, id, title, text, {})
        cut = SentenceVectors(np.asarray(places, "<i4").tobytes(), vectors) if places else None
        under_way.append(catalog.put(document, gradient, None, cut))
        totals.update(documents=1, text_bytes=len(text.encode()), words=len(text.split()), sentences=len(places))
        if len(under_way) > IN_FLIGHT:
            under_way.popleft().result()
    while under_way:
        under_way.popleft().result()
    if not totals:
        raise SystemExit(f"{data} must have documents, it has none")
    number = totals.pop("documents")
    return {"documents": number, **{name: round(total / number) for name, total in totals.items()}}


def _documents(folder: Path, limit: int) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of each document, at most ``limit``."""
    left = limit
    for path in sorted(folder.glob("*.documents.jsonl*")):
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                if not left:
                    return
                fields = json.loads(line)
                yield fields["id"], fields.get("title", ""), fields["text"]
                left -= 1


def _by_part(sizes: dict[str, int]) -> dict[str, int]:
    """Bytes of each part. ``sizes``: those of tables with their TOAST, and of indexes."""
    parts = dict.fromkeys(PARTS, 0)
    for name, size in sizes.items():
        parts[_part_of(name)] += size
    return parts


def _part_of(name: str) -> str:
    if name.startswith("vectors_") and name.endswith("_hnsw"):
        return "graph"
    starts = {"document_words": "words", "word_counts": "words", "sentence_vectors": "sentences", "vectors": "vectors"}
    for start, part in starts.items():
        if name.startswith(start):
            return part
    if name.startswith("versions"):
        return "documents" if name == "versions" else "documents_indexes"
    return "rest"


if __name__ == "__main__":
    raise SystemExit(main())
