"""A bank in a child process, which can be started, measured, stopped or killed.

python -m benchmarks.bank.child_bank DATA_DIR [--values N] [--embedder minilm|hash] [--redis-url URL] [...]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bank_service.runtime.data_dir import read_address
from bank_service.service.server import serve
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.embedder import default_embedder
from benchmarks.bank_ingest import spec_with

ROOT = Path(__file__).parents[2]
START_SECONDS = 1200  # a bank of a million documents whose index has to be built anew
STOP_SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--values", type=int, default=256, help="of a gradient")
    parser.add_argument("--embedder", choices=("minilm", "hash"), default="minilm")
    parser.add_argument("--redis-url")
    parser.add_argument("--catalog")
    parser.add_argument("--catalog-read")
    parser.add_argument("--objects")
    parser.add_argument("--tokens-file", type=Path)
    parser.add_argument("--snapshot-every", type=int, default=10_000)
    parser.add_argument("--no-sentences", action="store_true", help="embed no sentences at the ingest")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    encoder = HashEncoder()
    encoder.spec = spec_with(args.values)
    config = BankConfig(
        data_dir=args.data_dir,
        redis_url=args.redis_url,
        catalog=args.catalog,
        catalog_read=args.catalog_read,
        objects=args.objects,
        tokens_file=args.tokens_file,
        snapshot_every=args.snapshot_every,
        embed_sentences=not args.no_sentences,
    )
    embedder = default_embedder() if args.embedder == "minilm" else HashEmbedder()
    asyncio.run(serve(config, encoder, embedder=embedder))


class BankProcess:
    """A running bank."""

    def __init__(self, data_dir: Path, *flags: str, log: Path | None = None) -> None:
        """Starts the bank and waits for its answer. Appends its log to ``log``. SystemExit if it doesn't start."""
        self.data_dir = data_dir
        self.started = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.bank.child_bank", str(data_dir), *flags]
        with contextlib.ExitStack() as stack:
            output = None if log is None else stack.enter_context(log.open("ab"))
            self._process = subprocess.Popen(command, cwd=ROOT, stderr=output)
        try:
            while (address := read_address(data_dir)) is None or not self._is_its_own():
                if self._process.poll() is not None or time.perf_counter() - self.started > START_SECONDS:
                    raise SystemExit("the bank must start; its error is above, or in its log")
                time.sleep(0.01)
        except BaseException:
            self.kill()
            raise
        self.target = address.target

    def _is_its_own(self) -> bool:
        """Whether the address belongs to this process, and not to a killed bank before it."""
        with contextlib.suppress(FileNotFoundError):
            return f'"pid": {self._process.pid}}}' in (self.data_dir / "address.json").read_text()
        return False

    @property
    def handle(self) -> psutil.Process:
        return psutil.Process(self._process.pid)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def redis(self) -> psutil.Process | None:
        """The bank's own Redis server. None if it uses an external one."""
        return next(iter(self.handle.children(recursive=True)), None)

    def memory_mib(self) -> dict[str, float]:
        """Resident memory of the bank and of its Redis server."""
        redis = self.redis()
        return {
            "bank": _mib(self.handle.memory_info().rss),
            "redis": 0.0 if redis is None else _mib(redis.memory_info().rss),
        }

    def cpu_seconds(self) -> float:
        """CPU time of the bank's own process so far."""
        times = self.handle.cpu_times()
        return float(times.user + times.system)

    def stop(self) -> float:
        """Sends SIGTERM. Returns the seconds until the process has ended. SystemExit if it ends with an error."""
        started = time.perf_counter()
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise SystemExit(f"the bank must stop within {STOP_SECONDS} s of SIGTERM") from None
        if status:
            raise SystemExit(f"the bank must stop with status 0, got {status}")
        return time.perf_counter() - started

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running_bank(data_dir: Path, *flags: str, log: Path | None = None) -> Iterator[BankProcess]:
    """A running bank, which is ended at the context's end, also after an error."""
    process = BankProcess(data_dir, *flags, log=log)
    try:
        yield process
        if process.is_running:
            process.stop()
    finally:
        process.kill()


def folder_bytes(data_dir: Path) -> dict[str, int]:
    """Bytes of a bank's files by part. For the blobs also the bytes of their disk blocks, and their number."""
    parts = {
        "catalog": _size(data_dir / "catalog.sqlite"),
        "wal": _size(data_dir / "catalog.sqlite-wal"),
        "index": sum(_size(path) for path in (data_dir / "index").glob("*")),
    }
    blobs = [path.stat() for path in (data_dir / "blobs").glob("??/*") if _size(path)]
    parts["blobs"] = sum(stat.st_size for stat in blobs)
    parts["blob_blocks"] = sum(stat.st_blocks * 512 for stat in blobs)
    parts["num_blobs"] = len(blobs)
    return parts


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _mib(num_bytes: int) -> float:
    return round(num_bytes / 2**20, 1)


if __name__ == "__main__":
    main()
