"""Seconds until a bank answers again: after SIGTERM, and after kill -9 with changes that its index snapshot lacks."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np

from bank_service.search.usearch.index_follower import snapshot_after
from bank_service.testing.client import Client
from bank_service.values.config import BankConfig
from benchmarks.bank.build import touch
from benchmarks.bank.child_bank import BankProcess, running_bank
from benchmarks.bank.drawn_corpus import BLOCK, DrawnCorpus

MAX_UNSAVED = 20_000  # two minutes of writing; the time grows with the number


def measure_restarts(data_dir: Path, flags: list[str], corpus: DrawnCorpus) -> dict[str, Any]:
    """The bank must be stopped before, and it is stopped afterwards. So its index snapshot contains all documents."""
    question = corpus.questions(1)[0].vector
    with running_bank(data_dir, *flags) as process:
        clean = _answered(process, question)
        due = snapshot_after(BankConfig(data_dir=data_dir).snapshot_every, corpus.num_documents)
        unsaved = min(MAX_UNSAVED, max(due * 9 // 10, BLOCK))  # the bank has saved none by itself then
        asyncio.run(touch(process, corpus, unsaved, f"at {time.time()}"))
        process.kill()
    with running_bank(data_dir, *flags) as process:
        killed = _answered(process, question)
        stop_seconds = process.stop()
    return {
        "after_sigterm": clean,
        "after_kill": {**killed, "unsaved_changes": unsaved},
        "stop_seconds": round(stop_seconds, 2),
    }


def _answered(process: BankProcess, vector: np.ndarray) -> dict[str, Any]:
    """The seconds from the start of the process, with Python's imports, to the first answer."""

    async def ask() -> None:
        async with Client(process.target) as client:
            await client.query(vector=vector.tolist(), top_k=10)

    ready = time.perf_counter() - process.started
    asyncio.run(ask())
    return {
        "ready_seconds": round(ready, 2),
        "first_answer_seconds": round(time.perf_counter() - process.started, 2),
        "memory_mib": process.memory_mib(),
    }
