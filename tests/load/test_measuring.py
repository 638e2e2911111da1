"""Cells run by a contender that does nothing but take time, or fail."""

from __future__ import annotations

import asyncio
import time

import pytest

from regrad_vllm.data.questions import Question
from regrad_vllm.load.askers import Attempt, OneAtATime
from regrad_vllm.load.comparison import CONTENDERS, Contender, LoadCondition, RequestLine
from regrad_vllm.load.measuring import run_cell
from regrad_vllm.load.schedule import interleaved
from regrad_vllm.load.streaming import AnswerError
from regrad_vllm.load.traffic import Arrival, TraceEntry
from tests.load.made import condition

QUESTIONS = [Question(f"q{n}", f"{n}?", ("a",), (f"d{n}",), "set") for n in range(6)]


class Timed:
    """Takes 50 ms; fails for question 2, never ends for question 4."""

    def __init__(self) -> None:
        self.running = self.most = 0

    async def ask(self, question: Question, contender: Contender, condition: LoadCondition, attempt: Attempt) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.05)
            attempt.stream.event_times.append(time.perf_counter())
            if question.id == "q2":
                raise AnswerError("503: full")
            if question.id == "q4":
                await asyncio.Event().wait()
            attempt.stream.text = " yes "
        finally:
            self.running -= 1


def run(asker: Timed | OneAtATime, arrival: Arrival, num: int, limit_s: float = 5.0) -> list[RequestLine]:
    own = condition(arrival=arrival)
    trace = [TraceEntry(0.1 * n, "?") for n in range(num)]
    cell = run_cell(asker, CONTENDERS["regrad"], own, QUESTIONS[:num], repeat=1, seed=0, limit_s=limit_s, trace=trace)
    return asyncio.run(cell)


def test_every_request_has_its_line_whatever_becomes_of_it() -> None:
    lines = run(Timed(), Arrival("closed", 2), 6, limit_s=0.6)
    assert [line.index for line in lines] == list(range(6))
    assert [line.status for line in lines] == [
        "completed",
        "completed",
        "failed",
        "completed",
        "incomplete",
        "completed",
    ]
    assert lines[2].error == "AnswerError: 503: full" and lines[4].error == "the cell's time was up"
    assert lines[0].text == "yes" and 45 < lines[0].event_ms[0] <= lines[0].end_ms < 500


def test_what_was_never_sent_is_incomplete_and_says_so() -> None:
    lines = run(OneAtATime(Timed()), Arrival("poisson", 0.1), 3, limit_s=0.3)
    assert [line.status for line in lines] == ["completed", "incomplete", "incomplete"]
    assert "not sent within" in lines[2].error


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_closed_loop_has_so_many_at_a_time(number: int) -> None:
    asker = Timed()
    run(asker, Arrival("closed", number), 4)
    assert asker.most == number


def test_an_open_loop_sends_in_time_whoever_is_still_running() -> None:
    timed = Timed()
    lines = run(timed, Arrival("trace", 4.0), 4)
    due = [line.sent_s - line.late_ms / 1000 for line in lines]
    assert due == pytest.approx([0, 0.025, 0.05, 0.075], abs=1e-3)
    assert all(line.late_ms >= 0 for line in lines)
    assert timed.most > 1, "a request takes 50 ms, and the next one is due after 25"


def test_one_at_a_time_means_the_others_wait() -> None:
    timed = Timed()
    lines = run(OneAtATime(timed), Arrival("closed", 4), 2)
    assert timed.most == 1 and lines[1].end_ms > lines[0].end_ms + 40


def test_contenders_take_turns_in_another_order_each_time() -> None:
    own, other = condition(), condition(prefix_cache=False)
    names = list("abcdefgh")
    order = interleaved([(own, names), (other, ["a", "b"])], 3, seed=0)
    assert (
        order == interleaved([(own, names), (other, ["a", "b"])], 3, seed=0) != interleaved([(own, names)], 3, seed=1)
    )
    repeats = [[name for which, name, repeat in order if which is own and repeat == number] for number in range(3)]
    assert all(sorted(names) == sorted(found) for found in repeats)
    pairs = [set(zip(found, found[1:], strict=False)) for found in repeats]
    assert not pairs[0] & pairs[1] & pairs[2], "nobody always comes after the same one"
    assert [repeat for _, _, repeat in order] == sorted(repeat for _, _, repeat in order)
