"""Fills a bank by IngestGradients over loopback. It continues an interrupted build."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from bank_service.errors import UnavailableError
from bank_service.testing.client import Client
from benchmarks.bank.child_bank import BankProcess
from benchmarks.bank.drawn_corpus import BLOCK, DrawnCorpus

NUM_STREAMS = 16  # of BLOCK documents each
PROGRESS_SECONDS = 15
RETRIES = 5  # of a block, while the bank says that it is overloaded


async def build(process: BankProcess, corpus: DrawnCorpus, folder: Path) -> dict[str, Any]:
    """Stores the documents that the bank doesn't have yet.

    ``folder``/blocks lists the stored blocks, and ``folder``/build.json has the figures of the first whole build.
    """
    done_file, report_file = folder / "blocks", folder / "build.json"
    done = set(map(int, done_file.read_text().split())) if done_file.exists() else set()
    missing = [block for block in range(corpus.num_blocks) if block not in done]
    if not missing and report_file.exists():
        return dict(json.loads(report_file.read_text()))
    progress = _Progress(process, sum(map(corpus.block_size, missing)))
    rest = iter(missing)

    async def stream(client: Client) -> None:
        for block in rest:
            await _store(client, await asyncio.to_thread(corpus.uploads, block))
            with done_file.open("a") as file:
                file.write(f"{block}\n")
            progress.stored(corpus.block_size(block))

    async with Client(process.target) as client:
        await asyncio.gather(*(stream(client) for _ in range(NUM_STREAMS)))
        # An acknowledged document may not be indexed yet. A query waits for the index.
        indexed = time.perf_counter()
        await client.query(vector=corpus.questions(1)[0].vector.tolist(), top_k=1)
        indexed = time.perf_counter() - indexed
    report = progress.report()
    report |= {"streams": NUM_STREAMS, "resumed": bool(done), "wait_for_index_seconds": round(indexed, 2)}
    report |= {"memory_mib": process.memory_mib()}
    report_file.write_text(json.dumps(report))
    return report


async def touch(process: BankProcess, corpus: DrawnCorpus, count: int, note: str) -> None:
    """Stores about ``count`` documents again with another note in their metadata.

    The index has to follow these changes, and then it has the same vectors as before.
    """
    async with Client(process.target) as client:
        for block in range(min(corpus.num_blocks, max(1, count // BLOCK))):
            await _store(client, corpus.uploads(block, note))


async def _store(client: Client, parts: list[Any]) -> None:
    num_documents = sum(part.HasField("header") for part in parts)
    for last_try in [False] * (RETRIES - 1) + [True]:
        try:
            responses = await client.upload(*parts)
        except UnavailableError as error:
            if last_try:
                raise
            sys.stderr.write(f"a block is sent again: {error}\n")
            await asyncio.sleep(1)
        else:
            if len(responses) != num_documents:
                raise SystemExit(f"the bank must acknowledge {num_documents} documents, got {len(responses)}")
            return


class _Progress:
    """Counts documents and prints the progress."""

    def __init__(self, process: BankProcess, total: int) -> None:
        self._process = process
        self._total = total
        self._count = 0
        self._started = self._told = time.perf_counter()
        self._marks: list[float] = []  # seconds at each tenth
        self._cpu, self._own_cpu = process.cpu_seconds(), time.process_time()

    def stored(self, count: int) -> None:
        self._count += count
        now = time.perf_counter()
        elapsed = now - self._started
        # Blocks arrive in waves, one from each stream. So a few blocks are too few for times by tenths.
        while self._total > 20 * NUM_STREAMS * BLOCK and self._count >= (len(self._marks) + 1) * self._total / 10:
            self._marks.append(elapsed)
        if now - self._told > PROGRESS_SECONDS or self._count == self._total:
            self._told = now
            rate = self._count / elapsed
            rest = (self._total - self._count) / rate
            sys.stderr.write(
                f"{self._count} of {self._total} documents, {rate:.0f}/s, {self._process.memory_mib()['bank']} MiB, "
                f"{rest / 60:.1f} minutes to go\n"
            )

    def report(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        steps = [end - start for start, end in zip([0.0, *self._marks], self._marks, strict=False)]
        return {
            "stored": self._count,
            "seconds": round(seconds, 1),
            "documents_per_s": round(self._count / seconds, 1),
            "cpu_seconds_bank": round(self._process.cpu_seconds() - self._cpu, 1),
            "cpu_seconds_client": round(time.process_time() - self._own_cpu, 1),
            "documents_per_s_by_tenth": [round(self._total / 10 / step, 1) for step in steps if step],
        }
