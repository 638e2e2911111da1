"""The time until all traces of a purge are erased. A purge rebuilds the index of its namespace."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from typing import Any

import numpy as np

from bank_service.testing.client import Client, upload_of
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, encode_gradient
from benchmarks.bank.child_bank import BankProcess
from benchmarks.bank.drawn_corpus import DrawnCorpus
from regrad_vllm.reporting.intervals import spread

POLL_SECONDS = 0.1


async def measure_purges(process: BankProcess, corpus: DrawnCorpus, repeats: int) -> dict[str, Any]:
    """Stores one more document and purges it, ``repeats`` times.

    seconds: from the purge's acknowledgement until the bank has recorded its end. cpu_seconds: of the bank meanwhile.
    """
    seconds, cpu_seconds = [], []
    values = np.ones(corpus.spec.num_values, np.float32)
    async with Client(process.target) as client:
        for question in corpus.questions(repeats):
            document = pb.Document(id="purged", text=question.words)
            record = encode_gradient(values, corpus.spec, DEFAULT_CODEC)
            await client.upload(*upload_of(document, record, embedding=question.vector.tolist()))
            await client.query(vector=question.vector.tolist(), top_k=1)  # waits for the index
            await client.delete("purged", purge=True)
            started, cpu = time.perf_counter(), process.cpu_seconds()
            while _num_unfinished(process):
                await asyncio.sleep(POLL_SECONDS)
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(process.cpu_seconds() - cpu)
    return {"seconds": spread(seconds), "cpu_seconds": spread(cpu_seconds)}


def _num_unfinished(process: BankProcess) -> int:
    with closing(sqlite3.connect(process.data_dir / "catalog.sqlite")) as connection:
        return int(connection.execute("SELECT count(*) FROM pending_erasures").fetchone()[0])
