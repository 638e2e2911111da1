"""The gauges of a scrape, with an engine that answers and with one that is busy."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse
from prometheus_client import Gauge

from regrad_vllm.learner import Learner
from regrad_vllm.serve.api import preparer
from tests.serve.api.test_releases import EngineLists, serving
from tests.serve.support import BankThread, Worker


class Figures(EngineLists):
    """The figures of one worker, for whoever asks. ``busy``: no answer comes."""

    worker: Worker
    busy = False

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> list[Any]:
        if "regrad_figures" not in args:
            return [None]
        if self.busy:
            await asyncio.Event().wait()
        pool = {f"pool_{name}": figure for name, figure in asdict(self.worker.pool.figures()).items()}
        return [{**pool, "num_late": 0, "num_lost": 3}]


def value(gauge: Gauge) -> float:
    (sample,) = [sample for family in gauge.collect() for sample in family.samples]
    return sample.value


async def answer(body: dict[str, Any], lora_name: str) -> JSONResponse:
    return JSONResponse({"id": "cmpl-1", "choices": []})


@pytest.mark.asyncio
async def test_a_scrape_has_the_figures_of_now_and_waits_for_no_busy_engine(
    bank: BankThread, learner: Learner, learner_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Figures()
    async with serving(bank, learner, learner_folder, engine, answer) as (http, runtime, arena, worker):
        engine.worker = worker

        metrics = runtime.metrics
        hold = arena.hold()
        hold.put(hashlib.sha256(b"record").hexdigest(), b"record")
        await http.get("/metrics")
        assert (value(metrics.arena_records), value(metrics.arena_holds)) == (1, 1)
        assert value(metrics.worker_lost.labels("0/0")) == 3
        hold.release()
        engine.busy = True
        monkeypatch.setattr(preparer, "_SCRAPE_SECONDS", 0.05)
        await asyncio.wait_for(http.get("/metrics"), 5)
        assert value(metrics.arena_holds) == 0
