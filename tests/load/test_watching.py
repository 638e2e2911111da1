"""Counters and processes as they really are."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from regrad_vllm.load.watching import Processes, used, watched
from regrad_vllm.serve.api.plugin_metrics import Metrics


def test_counters_are_read_between_two_moments() -> None:
    registry = CollectorRegistry()
    ours = Metrics.create(registry)
    hits = Counter("vllm:prefix_cache_hits", "x", ["engine"], registry=registry)
    queries = Counter("vllm:prefix_cache_queries", "x", ["engine"], registry=registry)
    Counter("vllm:num_preemptions", "x", ["engine"], registry=registry).labels("0").inc(2)
    usage = Gauge("vllm:kv_cache_usage_perc", "x", ["engine"], registry=registry)
    usage.labels("0").set(0.25)
    ours.fetched_bytes.inc(1000)
    app = FastAPI()

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(registry))

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            async with watched(client) as scraped:
                await asyncio.sleep(0.1)
                ours.fetched_bytes.inc(500)
                ours.arena_lookups.labels("hit").inc(3)
                ours.arena_lookups.labels("miss").inc(1)
                ours.worker_lookups.labels("0/0", "hit").set(1)
                ours.worker_lookups.labels("0/0", "miss").set(1)
                ours.worker_bytes.labels("0/0").set(300)
                ours.worker_bytes.labels("0/1").set(200)
                queries.labels("0").inc(10)
                hits.labels("0").inc(4)
            assert scraped.pool_bytes == 500, "of both workers"
            assert scraped.fetched_bytes == 500 and scraped.peak_kv_share == 0.25 and scraped.preemptions == 0
            assert scraped.cache_hits == {"prefix": 0.4, "arena": 0.75, "worker": 0.5}

    asyncio.run(run())


def test_cpu_time_and_memory_are_counted_by_role_with_children() -> None:
    burn = "import time; block = bytearray(64 * 2**20); start = time.process_time()\n"
    burn += "while time.process_time() - start < 0.5: pass\ntime.sleep(30)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    parent = subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    try:
        processes = Processes({"bank": parent.pid, "client": os.getpid()}, servers=(), alone=("client",))

        async def run() -> None:
            async with used(processes) as usage:
                begun = time.monotonic()
                while processes.cpu_seconds()["bank"] < 0.5 and time.monotonic() - begun < 20:
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.6)
            assert usage.cpu_s["bank"] >= 0.45
            assert usage.peak_bytes["bank"] > 64 * 2**20
            assert usage.cpu_s["client"] < usage.cpu_s["bank"], "children have roles of their own"

        asyncio.run(run())
    finally:
        os.killpg(parent.pid, 9)
        parent.wait()


def test_who_is_gone_is_left_out() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    processes = Processes({"bank": gone.pid, "client": os.getpid()}, servers=(), alone=("client",))
    assert set(processes.cpu_seconds()) == set(processes.memory_bytes()) == {"client"}
    assert processes.memory_bytes()["client"] > 2**20


@pytest.mark.parametrize("role", ["server", "stock"])
def test_a_servers_children_are_named_as_vllm_titles_them(role: str) -> None:
    script = "import setproctitle, time; setproctitle.setproctitle('VLLM::Worker_TP0'); time.sleep(30)"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"],
        start_new_session=True,
    )
    try:
        processes = Processes({role: parent.pid}, servers=("server", "stock"), alone=())
        deadline = time.monotonic() + 20
        while f"{role} Worker" not in processes.memory_bytes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert {f"{role} API", f"{role} Worker"} <= set(processes.memory_bytes())
    finally:
        os.killpg(parent.pid, 9)
        parent.wait()
