"""The traffic: times of arrival, and the popularity of documents."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from regrad_vllm.data.questions import Question
from regrad_vllm.load.traffic import (
    Arrival,
    Popular,
    TraceEntry,
    in_own_words,
    load_trace,
    offsets,
    reuse,
    zipf_exponent,
)


def test_a_poisson_process_has_its_rate_and_starts_at_once() -> None:
    times = offsets(Arrival("poisson", 20.0), 5000, random.Random(1))
    assert times is not None and times[0] == 0.0 and times == sorted(times)
    assert times[-1] / 4999 == pytest.approx(1 / 20, rel=0.05)
    gaps = sorted(later - earlier for earlier, later in zip(times, times[1:], strict=False))
    assert gaps[len(gaps) // 2] == pytest.approx(0.693 / 20, rel=0.1), "exponential, not even"


def test_a_trace_is_replayed_at_its_speed_and_a_closed_loop_has_no_times() -> None:
    trace = [TraceEntry(0.0, "a"), TraceEntry(3.0, "b")]
    assert offsets(Arrival("trace", 2.0), 2, random.Random(1), trace) == [0.0, 1.5]
    assert offsets(Arrival("closed", 4), 9, random.Random(1)) is None
    with pytest.raises(ValueError, match="poisson arrival's value must be above 0, got 0"):
        Arrival("poisson", 0)


def test_a_trace_begins_with_its_first_request(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"at_s": 5, "question": " a "}\n\n{"at_s": 6.5, "question": "b", "more": 1}\n', "utf-8")
    assert load_trace(path) == [TraceEntry(0.0, "a"), TraceEntry(1.5, "b")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{", "t.jsonl:1 must be a JSON object"),
        ("[1]", "t.jsonl:1 must be a JSON object, got list"),
        ('{"at_s": 1, "question": "a"}\n{"at_s": 0.5, "question": "b"}', "t.jsonl:2: at_s must be .* got 0.5"),
        ('{"at_s": NaN, "question": "a"}', "at_s must be"),
        ('{"at_s": true, "question": "a"}', "at_s must be .* got True"),
        ('{"at_s": 1, "question": " "}', "question must be"),
        ("", "at least one request"),
    ],
)
def test_a_bad_trace_is_refused_by_line_and_field(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(lines, "utf-8")
    with pytest.raises(ValueError, match=message):
        load_trace(path)


def _questions(num: int) -> list[Question]:
    return [Question(f"q{n}", f"question {n}?", ("a",), (f"d{n // 2}",), "set") for n in range(num)]


@pytest.mark.parametrize("num", [5, 50, 1000])
@pytest.mark.parametrize("share", [0.3, 0.74])
def test_the_first_fifth_of_a_fitted_zipf_has_its_share(num: int, share: float) -> None:
    exponent = zipf_exponent(num, share)
    weights = [rank**-exponent for rank in range(1, num + 1)]
    assert sum(weights[: num // 5]) / sum(weights) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("share", [0.19, 1.0])
def test_a_share_that_no_zipf_has_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"share must be .* got {share}"):
        zipf_exponent(10, share)


def test_drawn_questions_are_as_popular_as_their_documents() -> None:
    questions = _questions(400)
    for popularity, expected in (("zipf", 0.74), ("uniform", 0.2)):
        drawn = Popular(questions, popularity, seed=1).draw(20_000, random.Random(2))  # type: ignore[arg-type]
        counts = sorted((sum(q.documents[0] == f"d{n}" for q in drawn) for n in range(200)), reverse=True)
        assert sum(counts[:40]) / 20_000 == pytest.approx(expected, abs=0.04)
        assert len({question.id for question in drawn if question.documents[0] == drawn[0].documents[0]}) == 2


def test_hardly_anyone_asks_in_anothers_words() -> None:
    asked = in_own_words(_questions(2) * 100, random.Random(3))
    assert len({question.question for question in asked}) > 195
    assert [question.id for question in asked[:3]] == ["q0", "q1", "q0"] and asked[0].question.startswith(
        "question 0? ("
    )


def test_the_same_seed_gives_the_same_ranks_and_another_gives_others() -> None:
    def first(seed: int) -> list[str]:
        return [q.id for q in Popular(_questions(100), "zipf", seed).draw(30, random.Random(0))]

    assert first(1) == first(1) != first(2)


def test_reuse_counts_sets_that_came_before_in_any_order() -> None:
    found = reuse([("a", "b"), ("b", "a"), ("a", "c"), ("d", "e"), ("a", "b")])
    assert found.repeated_sets == pytest.approx(2 / 5)
    assert found.top_fifth_share == pytest.approx(4 / 10), "of five documents the most popular one"
    with pytest.raises(ValueError, match="at least one request"):
        reuse([])
