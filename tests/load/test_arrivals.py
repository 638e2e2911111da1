from __future__ import annotations

import random
from pathlib import Path

import pytest

from regrad_vllm.load.traffic import Arrival, TraceEntry, load_trace, offsets


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
