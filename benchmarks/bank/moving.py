"""Measures `regrad move`: ``python -m benchmarks.bank.moving --catalog URL``.

The database must be empty. A bank of the documents of ``drawn_corpus.py`` with small gradients is made in a folder. It
is moved to PostgreSQL, with its gradients in another folder, and from there into a third folder. The rates count
documents, from the start to the end of a move. "catalog" is the part without the gradients.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bank_service.backup.move import BankPlace, move
from bank_service.blobs.blob_store import BlobStore
from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.factory import open_catalog
from bank_service.testing.hash_encoder import spec_of
from bank_service.values.documents import Document, Gradient
from bank_service.wire.record import DEFAULT_CODEC, encode_gradient, record_digest
from benchmarks.bank.drawn_corpus import BLOCK, DrawnCorpus, id_of
from regrad_vllm.reporting.machine import describe

DIMENSION = 384
NUM_THREADS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", required=True, help="postgresql:// URL of an empty database")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moving-", dir=args.folder) as name:
        folder = Path(name)
        source, there, back = (
            BankPlace(folder / "source"), BankPlace(folder / "there", args.catalog), BankPlace(folder / "back"),
        )  # fmt: skip
        _make(source.data_dir, DrawnCorpus(args.documents, DIMENSION, spec_of()))
        figures = {
            "documents": args.documents,
            **_timed("to_postgres", source, there),
            **_timed("to_folder", there, back),
        }
    report = {"machine": describe("psycopg", "SQLAlchemy"), **figures}
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(figures) + "\n")
    return 0


def _make(folder: Path, corpus: DrawnCorpus) -> None:
    """A stopped bank with the corpus."""
    folder.mkdir()
    blobs = BlobStore.in_folder(folder / "blobs")
    spec, generator = corpus.spec, np.random.default_rng(0)
    catalog = open_catalog(
        folder, CollectionIdentity(spec.fingerprint, spec.layout_id, DEFAULT_CODEC, "drawn", DIMENSION)
    )
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for block in range(corpus.num_blocks):
            puts, stored = [], []
            for place, (text, pairs, vector) in enumerate(corpus.rows(block)):
                record = encode_gradient(generator.standard_normal(spec.num_values, np.float32), spec, DEFAULT_CODEC)
                digest = record_digest(record)
                stored.append(pool.submit(blobs.put, digest, record))
                gradient = Gradient(digest, len(record), 1, False, vector.astype("<f4").tobytes())
                document = Document("default", id_of(block * BLOCK + place), "", text, pairs)
                puts.append(catalog.put(document, gradient, None))
            for done in (*stored, *puts):
                done.result()
    catalog.close()


def _timed(name: str, source: BankPlace, target: BankPlace) -> dict[str, float]:
    began = copied = time.perf_counter()
    num_documents = 0
    for step in move(source, target):
        if step.num_rows:
            num_documents = step.num_rows["versions"]
        else:
            copied = time.perf_counter()
    ended = time.perf_counter()
    return {
        f"{name}_documents_per_s": round(num_documents / (ended - began), 1),
        f"{name}_catalog_documents_per_s": round(num_documents / (ended - copied), 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())
