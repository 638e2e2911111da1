"""Runs a schedule cell by cell. Each request gets its line at once, so that an interrupted run keeps its results."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from regrad_vllm.data.questions import Question
from regrad_vllm.load.askers import Asker, Attempt
from regrad_vllm.load.comparison import CONTENDERS, CellLine, Contender, Engine, LoadCondition, RequestLine, Status
from regrad_vllm.load.engines import Engines
from regrad_vllm.load.results import CELLS, REQUESTS
from regrad_vllm.load.schedule import Planned, Schedule, interleaved
from regrad_vllm.load.traffic import TraceEntry, offsets
from regrad_vllm.load.watching import used, watched

_SETTLE_SECONDS = 1.5


async def run_cell(
    asker: Asker,
    contender: Contender,
    condition: LoadCondition,
    questions: Sequence[Question],
    *,
    repeat: int,
    seed: int,
    limit_s: float,
    trace: Sequence[TraceEntry] = (),
) -> list[RequestLine]:
    """A line for each question, in order. Requests that still run after ``limit_s`` are stopped as "incomplete"."""
    rng = random.Random(f"regrad.load.arrivals.{seed}.{repeat}")
    times = offsets(condition.arrival, len(questions), rng, trace)
    cell = _Cell(asker, contender, condition, repeat, times)
    tasks = [asyncio.create_task(cell.run(index, question)) for index, question in enumerate(questions)]
    _, late = await asyncio.wait(tasks, timeout=limit_s)
    for task in late:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    lines = []
    for index, (question, outcome) in enumerate(zip(questions, outcomes, strict=True)):
        if isinstance(outcome, asyncio.CancelledError):
            error = f"not sent within the cell's {limit_s:g} s"
            outcome = cell.line(index, question, Attempt(), None, "incomplete", error)
        elif isinstance(outcome, BaseException):
            raise outcome
        lines.append(outcome)
    return lines


class _Cell:
    def __init__(
        self, asker: Asker, contender: Contender, condition: LoadCondition, repeat: int, times: Sequence[float] | None
    ) -> None:
        self._asker = asker
        self._contender = contender
        self._condition = condition
        self._repeat = repeat
        self._times = times
        self._permits = asyncio.Semaphore(int(condition.arrival.value)) if times is None else None
        self._start = time.perf_counter()

    async def run(self, index: int, question: Question) -> RequestLine:
        """CancelledError if the time is up before the request is sent."""
        if self._permits is None:
            await asyncio.sleep(max(0.0, self._due(index) - time.perf_counter()))
            return await self._ask(index, question)
        async with self._permits:
            return await self._ask(index, question)

    async def _ask(self, index: int, question: Question) -> RequestLine:
        sent = time.perf_counter()
        attempt, status, error = Attempt(), "completed", ""
        try:
            await self._asker.ask(question, self._contender, self._condition, attempt)
        except asyncio.CancelledError:
            status, error = "incomplete", "the cell's time was up"
        except Exception as failure:  # noqa: BLE001  # any error counts as a failure of this request
            status, error = "failed", f"{type(failure).__name__}: {failure}"
        return self.line(index, question, attempt, sent, status, error)  # type: ignore[arg-type]

    def line(
        self, index: int, question: Question, attempt: Attempt, sent: float | None, status: Status, error: str
    ) -> RequestLine:
        """The request's line. sent: its start by the clock; None if it wasn't sent."""
        now = attempt.stream.ended or time.perf_counter()  # cleaning up after the answer doesn't count
        begun = now if sent is None else sent
        return RequestLine(
            condition=self._condition.key,
            contender=self._contender.name,
            repeat=self._repeat,
            index=index,
            question_id=question.id,
            sent_s=begun - self._start,
            late_ms=0.0 if self._times is None else (begun - self._due(index)) * 1000,
            status=status,
            error=error,
            retrieve_ms=attempt.retrieve_ms,
            prepare_ms=attempt.prepare_ms,
            event_ms=tuple((at - begun) * 1000 for at in attempt.stream.event_times),
            end_ms=(now - begun) * 1000,
            prompt_tokens=attempt.stream.prompt_tokens,
            output_tokens=attempt.stream.output_tokens,
            documents=attempt.documents,
            moved_bytes=attempt.moved_bytes,
            server_ms=dict(attempt.stream.regrad.get("timings_ms", {})),
            text=attempt.stream.text.strip(),
        )

    def _due(self, index: int) -> float:
        assert self._times is not None
        return self._start + self._times[index]


class Measurer:
    """Measures the cells of one run."""

    def __init__(
        self, engines: Engines, schedule: Schedule, folder: Path, seed: int, limit_s: float, trace: Sequence[TraceEntry]
    ) -> None:
        self._engines = engines
        self._schedule = schedule
        self._folder = folder
        self._seed = seed
        self._limit_s = limit_s
        self._trace = trace
        self._last: Engine | None = None

    async def run(self, phases: Sequence[tuple[str, Sequence[Planned], int]]) -> None:
        """Runs all cells. phases: (name, planned conditions, repeats)."""
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
        """Waits after a change of engine, because vLLM's processes spin for a second after their last step."""
        if self._last not in (None, engine):
            await asyncio.sleep(_SETTLE_SECONDS)
        self._last = engine

    async def _cell(self, condition: LoadCondition, name: str, repeat: int) -> tuple[list[RequestLine], CellLine]:
        contender = CONTENDERS[name]
        questions = self._schedule.questions(condition, contender, repeat)
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
            pool_bytes=scraped.pool_bytes,
            cache_hits=scraped.cache_hits,
        )


def _write(file: IO[str], value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()
