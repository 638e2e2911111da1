"""Durable ingest of precomputed gradients over the wire, against writing the same bytes to files with fsync.

    make bench-ingest          (python -m benchmarks.bank_ingest [--repeats N] [--documents N] [--values N])

Both count a gradient when it would survive a crash. The bank gets it by gRPC, verifies it, and stores it with its
document's text and a given embedding. It then commits the catalog and acknowledges. A file is written under a temporary
name, fsynced and renamed, and its folder is fsynced. There are as many threads as the bank has streams. Both take turns
on the same disk. A repeat's ratio is bank MB/s over file MB/s. Embeddings and gradients are random.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bank_service.blobs.folder_objects import fsync_folder
from bank_service.runtime.data_dir import read_address
from bank_service.service.server import serve
from bank_service.testing.client import Client, upload_of
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder, spec_of
from bank_service.values.config import BankConfig
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.limits import MAX_CHUNK_BYTES
from bank_service.wire.record import DEFAULT_CODEC, GradientSpec, encode_gradient
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe

NUM_STREAMS = 8
START_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--documents", type=int, default=200, help="of one repeat")
    parser.add_argument("--values", type=int, default=500_000, help="of a gradient; a byte each, and scales")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the system's temporary folder)")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        encoder = HashEncoder()
        encoder.spec = spec_with(args.values)
        asyncio.run(serve(BankConfig(data_dir=args.serve), encoder, embedder=HashEmbedder()))
        return
    report = measure_ingest(args)
    figures = {
        "ingest_ratio_fsync": report["ratio"]["median"],
        "documents_per_s": report["documents_per_s_bank"]["median"],
        "mb_per_s": report["mb_per_s_bank"]["median"],
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(figures) + "\n")


def measure_ingest(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all repeats. args: the command's arguments repeats, documents, values and folder."""
    spec = spec_with(args.values)
    with (
        tempfile.TemporaryDirectory(prefix="ingest-", dir=args.folder) as folder,
        _bank(Path(folder, "bank"), args.values) as target,
    ):
        seconds = asyncio.run(_measure(target, Path(folder, "files"), spec, args))
    record_bytes = len(_records(spec, 1, 0)[0])
    num_bytes = args.documents * record_bytes
    ratios = [files / bank for bank, files in zip(seconds["bank"], seconds["files"], strict=True)]
    report: dict[str, Any] = {
        "machine": describe("grpcio", "SQLAlchemy", "numpy"),
        "documents": args.documents,
        "record_bytes": record_bytes,
        "streams": NUM_STREAMS,
        "ratio": spread(ratios),
    }
    for name, each in seconds.items():
        report[f"documents_per_s_{name}"] = spread([args.documents / value for value in each])
        report[f"mb_per_s_{name}"] = spread([num_bytes / value / 1e6 for value in each])
    return report


def spec_with(num_values: int) -> GradientSpec:
    """The spec of a learner with one tensor of ``num_values`` values."""
    return GradientSpec(spec_of().fingerprint, spec_of().layout_id, ((1, num_values),))


@contextlib.contextmanager
def _bank(data_dir: Path, num_values: int) -> Iterator[str]:
    """Starts a bank in a child process and yields its address."""
    command = [sys.executable, "-m", "benchmarks.bank_ingest", "--serve", str(data_dir), "--values", str(num_values)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + START_SECONDS
        while (address := read_address(data_dir)) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the bank must start; its error is above")
            time.sleep(0.05)
        yield address.target
    finally:
        process.terminate()
        process.wait(20)


async def _measure(target: str, folder: Path, spec: GradientSpec, args: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of each repeat. A first round warms up and doesn't count."""
    seconds: dict[str, list[float]] = {"bank": [], "files": []}
    async with Client(target) as client:
        for repeat in range(args.repeats + 1):
            records = _records(spec, args.documents, repeat)  # new each time: equal records are stored once
            for name in ("bank", "files") if repeat % 2 else ("files", "bank"):
                if name == "bank":
                    elapsed = await _through_the_bank(client, records, repeat)
                else:
                    elapsed = await asyncio.to_thread(_to_files, folder / str(repeat), records)
                if repeat:
                    seconds[name].append(elapsed)
    return seconds


def _records(spec: GradientSpec, number: int, seed: int) -> list[bytes]:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(spec.num_values).astype(np.float32)
    return [encode_gradient(np.roll(values, shift), spec, DEFAULT_CODEC) for shift in range(number)]


async def _through_the_bank(client: Client, records: list[bytes], repeat: int) -> float:
    """Seconds until every record is acknowledged, by NUM_STREAMS streams at once."""
    embedding = np.random.default_rng(repeat).standard_normal(HashEmbedder.dimension).tolist()

    async def stream(first: int) -> int:
        parts: list[pb.IngestGradientsRequest] = []
        for number in range(first, len(records), NUM_STREAMS):
            document = pb.Document(id=f"{repeat}-{number}", text=f"document {number} of repeat {repeat}")
            parts += upload_of(document, records[number], embedding=embedding, chunk_bytes=MAX_CHUNK_BYTES)
        return len(await client.upload(*parts))

    started = time.perf_counter()
    stored = await asyncio.gather(*(stream(first) for first in range(NUM_STREAMS)))
    elapsed = time.perf_counter() - started
    if sum(stored) != len(records):
        raise SystemExit(f"the bank must acknowledge {len(records)} documents, got {sum(stored)}")
    return elapsed


def _to_files(folder: Path, records: list[bytes]) -> float:
    """Seconds until every record is durable, by NUM_STREAMS threads at once."""
    folder.mkdir(parents=True)

    def write(item: tuple[int, bytes]) -> None:
        number, record = item
        temporary = folder / f"{number}.new"
        with temporary.open("wb") as file:
            file.write(record)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / str(number))
        fsync_folder(folder)

    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        list(pool.map(write, enumerate(records)))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
