"""Runs one cell: its requests as they arrive, a line for each, whatever becomes of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from regrad_vllm.data.questions import Question
from regrad_vllm.load.arrivals import TraceEntry, offsets
from regrad_vllm.load.asking import Asker, Attempt
from regrad_vllm.load.cells import Condition, RequestLine, Status
from regrad_vllm.load.contenders import Contender


async def run_cell(
    asker: Asker,
    contender: Contender,
    condition: Condition,
    questions: Sequence[Question],
    *,
    repeat: int,
    seed: int,
    limit_s: float,
    trace: Sequence[TraceEntry] = (),
) -> list[RequestLine]:
    """A line for each question, in their order. What still runs after ``limit_s`` is stopped and "incomplete"."""
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
        self, asker: Asker, contender: Contender, condition: Condition, repeat: int, times: Sequence[float] | None
    ) -> None:
        self._asker = asker
        self._contender = contender
        self._condition = condition
        self._repeat = repeat
        self._times = times
        self._gate = asyncio.Semaphore(int(condition.arrival.value)) if times is None else None
        self._start = time.perf_counter()

    async def run(self, index: int, question: Question) -> RequestLine:
        """CancelledError where the time is up before it was sent."""
        if self._gate is None:
            await asyncio.sleep(max(0.0, self._due(index) - time.perf_counter()))
            return await self._ask(index, question)
        async with self._gate:
            return await self._ask(index, question)

    async def _ask(self, index: int, question: Question) -> RequestLine:
        sent = time.perf_counter()
        attempt, status, error = Attempt(), "completed", ""
        try:
            await self._asker.ask(question, self._contender, self._condition, attempt)
        except asyncio.CancelledError:
            status, error = "incomplete", "the cell's time was up"
        except Exception as failure:  # noqa: BLE001  # whatever it is, it is this request's, and counted
            status, error = "failed", f"{type(failure).__name__}: {failure}"
        return self.line(index, question, attempt, sent, status, error)  # type: ignore[arg-type]

    def line(
        self, index: int, question: Question, attempt: Attempt, sent: float | None, status: Status, error: str
    ) -> RequestLine:
        """sent: by the clock; None where it never was."""
        now = attempt.stream.ended or time.perf_counter()  # what is cleared up after it is nobody's wait
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
