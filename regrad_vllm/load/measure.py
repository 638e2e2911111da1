"""Runs a plan cell by cell and writes down what happened, line by line, so that a run cut short keeps what it has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from regrad_vllm.load.arrivals import TraceEntry
from regrad_vllm.load.cells import CellLine, Condition, RequestLine, interleaved
from regrad_vllm.load.contenders import CONTENDERS, Engine
from regrad_vllm.load.driver import run_cell
from regrad_vllm.load.engines import Engines
from regrad_vllm.load.plan import Plan, Planned
from regrad_vllm.load.processes import used
from regrad_vllm.load.results import CELLS, REQUESTS
from regrad_vllm.load.scrape import watched

_SETTLE_SECONDS = 1.5


class Measurer:
    """Of one run."""

    def __init__(
        self, engines: Engines, plan: Plan, folder: Path, seed: int, limit_s: float, trace: Sequence[TraceEntry]
    ) -> None:
        self._engines = engines
        self._plan = plan
        self._folder = folder
        self._seed = seed
        self._limit_s = limit_s
        self._trace = trace
        self._last: Engine | None = None

    async def run(self, phases: Sequence[tuple[str, Sequence[Planned], int]]) -> None:
        """phases: name, what is planned, repeats."""
        from tqdm import tqdm

        orders = [(name, interleaved(planned, repeats, self._seed)) for name, planned, repeats in phases if planned]
        with (
            (self._folder / REQUESTS).open("w", encoding="utf-8") as requests,
            (self._folder / CELLS).open("w", encoding="utf-8") as cells,
            tqdm(total=sum(len(order) for _, order in orders), unit="cell") as bar,
        ):
            for phase, order in orders:
                for condition, name, repeat in order:
                    bar.set_description(f"{phase}: {name}")
                    await self._settle(CONTENDERS[name].engine)
                    lines, cell = await self._cell(condition, name, repeat)
                    if condition.phase != "warm-up":
                        for line in lines:
                            _write(requests, asdict(line))
                        _write(cells, asdict(cell))
                    bar.update()

    async def _settle(self, engine: Engine) -> None:
        """Waits where another engine was asked before: vLLM's processes spin for a second after their last step."""
        if self._last not in (None, engine):
            await asyncio.sleep(_SETTLE_SECONDS)
        self._last = engine

    async def _cell(self, condition: Condition, name: str, repeat: int) -> tuple[list[RequestLine], CellLine]:
        contender = CONTENDERS[name]
        questions = self._plan.questions(condition, contender, repeat)
        client = self._engines.clients.get(contender.engine)
        async with watched(client) as scraped, used(self._engines.processes) as usage:
            lines = await run_cell(
                self._engines.askers[contender.engine], contender, condition, questions,
                repeat=repeat, seed=self._seed, limit_s=self._limit_s, trace=self._trace,
            )  # fmt: skip
        begun = min(line.sent_s for line in lines)
        ended = max(line.sent_s + line.end_ms / 1000 for line in lines)
        return lines, CellLine(
            condition=condition.key,
            contender=name,
            repeat=repeat,
            seconds=ended - begun,
            cpu_s=usage.cpu_s,
            peak_bytes=usage.peak_bytes,
            peak_kv_share=scraped.peak_kv_share,
            preemptions=scraped.preemptions,
            fetched_bytes=scraped.fetched_bytes,
            cache_hits=scraped.cache_hits,
        )


def _write(file: IO[str], value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()
