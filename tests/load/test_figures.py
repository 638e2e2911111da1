from __future__ import annotations

import pytest

from regrad_vllm.load import figures as f
from tests.load.made import cell, condition, line

LIMITS = f.Limits(ttft_ms=150.0, tpot_ms=60.0)


def test_the_formulas_on_a_request_by_hand() -> None:
    request = line(condition())
    assert f.ttft_ms(request) == 100.0
    assert f.itl_ms(request) == [50.0, 60.0, 40.0]
    assert f.tpot_ms(request) == pytest.approx(150 / 3)
    assert f.within(request, LIMITS)
    assert not f.within(line(condition(), event_ms=(151.0, 200.0), end_ms=220.0), LIMITS)
    assert not f.within(line(condition(), event_ms=(100.0, 400.0), end_ms=400.0), LIMITS)
    late = line(condition(), late_ms=60.0)
    assert f.ttft_ms(late) == 160.0 and not f.within(late, LIMITS), "waiting for its turn counts"
    single = line(condition(), event_ms=(90.0,), end_ms=90.0, output_tokens=1)
    assert f.tpot_ms(single) is None and f.within(single, LIMITS)


def test_rates_are_by_repeat_and_count_what_was_completed() -> None:
    own = condition()
    lines = [
        line(own), line(own, index=1, status="failed", error="503: full", event_ms=()),
        line(own, repeat=1), line(own, repeat=1, index=1, event_ms=(400.0, 500.0), end_ms=500.0),
        line(own, repeat=2, index=1, status="incomplete", error="the cell's time was up", event_ms=()),
    ]  # fmt: skip
    cells = [
        cell(own, cpu_s={"bank": 0.2}, fetched_bytes=300.0, peak_kv_share=0.1),
        cell(own, repeat=1, seconds=4.0, cpu_s={"bank": 0.2}, cache_hits={"arena": 0.5}),
        cell(own, repeat=2, seconds=1.0),
    ]
    found = f.figures(lines, cells, LIMITS)
    assert (found.completed, found.failed, found.incomplete) == (3, 1, 1)
    assert found.requests_s == f.Spread(0.5, 0.0, 0.5, 3)
    assert found.output_tokens_s.high == 2.0 and found.goodput_s == f.Spread(0.25, 0.0, 0.5, 3)
    assert found.ttft_ms == {50: 100.0}
    assert found.moved_bytes == pytest.approx(100.0)
    assert found.cpu_s["bank"] == pytest.approx(0.1), "0.2 for one, 0.1 for each of two, none"
    assert found.cache_hits == {"arena": 0.5} and found.peak_kv_share == 0.1
    assert found.first_error == "503: full"
    assert f.rates(lines, cells) == {0: 0.5, 1: 0.5, 2: 0.0}


def test_ratios_are_paired() -> None:
    assert f.ratio({0: 2.0, 1: 6.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 3.0}) == f.Spread(2.0, 1.0, 3.0, 3)
    assert f.ratio({0: 2.0, 1: 9.0}, {0: 1.0}).repeats == 1, "of a run that was cut short"
    with pytest.raises(ValueError, match="a common repeat"):
        f.ratio({0: 1.0}, {1: 1.0})
    with pytest.raises(ValueError, match="a common repeat"):
        f.ratio({0: 1.0}, {0: 0.0})


def test_percentiles_are_values_that_were_measured() -> None:
    assert f.percentiles([float(n) for n in range(1, 101)]) == {50: 50.0, 90: 90.0, 99: 99.0}
    assert f.percentiles([float(n) for n in range(1, 51)]) == {50: 25.0, 90: 45.0}, "a p99 of fifty is the greatest"
    assert f.percentiles([7.0]) == {50: 7.0}
    assert f.percentiles([]) == {}


def test_quality_counts_every_question() -> None:
    found = f.quality([(1.0, 1.0, "a"), (0.0, 0.5, "b"), (0.0, 0.0, "b"), (0.0, 0.0, "c")])
    assert found.questions == 4 and found.em.mean == 0.25 and found.f1.mean == 0.375
    assert found.em.low <= 0.25 <= found.em.high


def test_a_slope_is_that_of_the_line() -> None:
    assert f.slope([(0.0, 1.0), (10.0, 3.0), (20.0, 5.0)]) == pytest.approx((1.0, 0.2))
    with pytest.raises(ValueError, match="3 different x"):
        f.slope([(1.0, 1.0), (1.0, 2.0)])


def test_encoding_pays_off_when_what_a_request_saves_adds_up_to_it() -> None:
    # A request takes 0.5 s the rival's way and 0.25 s ours: 0.25 s saved, and 2 s to encode.
    assert f.break_even(2.0, requests_s=4.0, rival_requests_s=2.0) == pytest.approx(8.0)
    assert f.break_even(2.0, requests_s=2.0, rival_requests_s=4.0) is None
    assert f.break_even(2.0, requests_s=2.0, rival_requests_s=0.0) is None


def test_kv_memory_is_in_whole_blocks() -> None:
    own = condition()
    found = f.figures([line(own, prompt_tokens=29, output_tokens=4)], [cell(own)], LIMITS)
    assert f.kv_bytes(found, bytes_per_token=10, block_tokens=16) == 480
