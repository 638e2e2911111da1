from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from regrad_vllm.load.comparison import CellLine, RequestLine
from regrad_vllm.load.results import CELLS, QUESTIONS, REQUESTS, RUN, load
from regrad_vllm.load.results_page import write_report
from regrad_vllm.load.results_tables import markdown, memory_table
from tests.load.made import cell, condition, line

COST = condition()
UNCACHED = condition(prefix_cache=False)
GROWTH = [condition(phase="growth", corpus=f"tokens-{n}", passage_tokens=n, top_k=1) for n in (100, 200, 300)]
QUALITY = condition(phase="quality", output_tokens=0)


def write(folder: Path, lines: list[RequestLine], cells: list[CellLine]) -> None:
    conditions = [COST, UNCACHED, *GROWTH, QUALITY]
    run = {
        "facts": {"command": "regrad bench load", "seed": 0}, "limits": {"ttft_ms": 150, "tpot_ms": 60},
        "sizes": {"kv_bytes_per_token": 1000, "kv_block_tokens": 16, "adapter_bytes": 2_000_000},
        "corpora": [
            {"name": "natural", "documents": 10, "mean_tokens": 150.0, "seconds": 20.0, "gradient_bytes": 16_000_000}
        ],
        "conditions": {own.key: own.plain() for own in conditions},
    }  # fmt: skip
    (folder / RUN).write_text(json.dumps(run), "utf-8")
    asked = {"q": {"question": "?", "answers": ["an answer"], "document": "d1", "kind": "span", "set": "s"}}
    (folder / QUESTIONS).write_text(json.dumps(asked), "utf-8")
    (folder / REQUESTS).write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in lines), "utf-8")
    (folder / CELLS).write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in cells), "utf-8")


def whole(folder: Path) -> None:
    seconds = {"base": 1.0, "rag_learner": 4.0, "regrad": 2.0}
    lines = [
        line(own, name, repeat=r, index=i, prompt_tokens=20 + (name == "rag_learner") * own.passage_tokens)
        for own in (COST, UNCACHED, *GROWTH) for name in seconds for r in range(2) for i in range(2)
    ]  # fmt: skip
    lines += [line(QUALITY, "regrad"), line(QUALITY, "rag_learner", text="an apple"), line(QUALITY, "base", text="")]
    cells = [cell(own, name, repeat=r, seconds=taken) for own in (COST, UNCACHED) for name, taken in seconds.items()
             for r in range(2)]  # fmt: skip
    cells += [cell(own, name, repeat=r, seconds=taken * (1 + number * (name == "rag_learner")))
              for number, own in enumerate(GROWTH) for name, taken in seconds.items() for r in range(2)]  # fmt: skip
    cells += [cell(QUALITY, name) for name in seconds]
    write(folder, lines, cells)


def test_the_last_line_tells_of_the_main_comparison(tmp_path: Path) -> None:
    whole(tmp_path)
    last = load(tmp_path).last_line()
    assert last["regrad_over_rag_learner"] == 2.0 and last["regrad_over_base"] == 0.5
    assert last["regrad"] == {"requests_s": 1.0, "ttft_p50_ms": 100.0, "itl_p50_ms": 50.0, "failed": 0, "em": 1.0}
    assert last["rag_learner"]["em"] == last["base"]["em"] == 0.0
    assert last["regrad_cue_over_rag_learner"] is None, "it wasn't asked"


def test_two_sentences_have_their_own_ratios_paired_by_repeat(tmp_path: Path) -> None:
    seconds = {"rag_learner": (4.0, 6.0), "ft_rag_sentence": (1.0, 2.0), "regrad_cue": (1.0, 3.0)}
    lines = [line(COST, name, repeat=r) for name in seconds for r in range(2)]
    cells = [cell(COST, name, repeat=r, seconds=own[r]) for name, own in seconds.items() for r in range(2)]
    write(tmp_path, lines, cells)
    results = load(tmp_path)
    assert results.last_line()["regrad_cue_over_rag_learner"] == 3.0, "of 4 and 2"
    assert results.last_line()["regrad_cue_over_ft_rag_sentence"] == pytest.approx(5 / 6, abs=1e-4)
    over = results.plain()["groups"][0]["regrad_cue_over"]["rag_learner"]
    assert (over["low"], over["high"], over["repeats"]) == (2.0, 4.0, 2)
    assert "ReGrad + two sentences over RAG + φ* as a static adapter: 3 [2, 4]" in markdown(results)


def test_reuse_and_sameness_are_of_all_that_was_asked(tmp_path: Path) -> None:
    lines = [line(COST, "regrad", index=n, documents=(f"d{n % 3}",)) for n in range(4)]
    lines += [line(COST, "published", index=0, documents=("d0",)), line(COST, "published", index=1, documents=("d2",))]
    write(tmp_path, lines, [cell(COST, "regrad"), cell(COST, "published")])
    main = load(tmp_path).main
    assert main.reuse is not None and main.reuse.repeated_sets == 0.25, "though one was asked the first two alone"
    assert main.same_documents == pytest.approx(5 / 6), "four its own, one of two"


def test_slopes_and_break_even_are_those_of_the_lines(tmp_path: Path) -> None:
    whole(tmp_path)
    results = load(tmp_path)
    slopes = results.slopes()
    assert slopes["regrad"].request.median == 1.0 and slopes["regrad"].token.median == 0.0
    line = slopes["rag_learner"]
    assert line.request.median == pytest.approx(0.0, abs=1e-9), "2, 4 and 6 s a request at 100, 200 and 300 tokens"
    assert line.token.median == pytest.approx(0.02) and line.token.repeats == 2
    assert results.break_even() == pytest.approx(2.0), "2 s a document, 1 s saved a request"


def test_a_report_is_a_page_tables_and_json_with_nothing_from_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(tmp_path)
    assert write_report(tmp_path) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["regrad_over_rag_learner"] == 2.0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("<svg") == 4 and "20000 µs a token" in page, "without a curve"
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "")
    assert "| ReGrad | 1 [1, 1] | 2 [2, 2] |" in (tmp_path / "report.md").read_text("utf-8")
    plain = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert plain["break_even_requests_a_document"] == 2.0
    assert plain["groups"][0]["same_documents"] == 1.0 and plain["groups"][0]["reuse"]["repeated_sets"] == 0.75


def test_documents_are_shared_and_a_slot_is_a_requests_own(tmp_path: Path) -> None:
    names = ("base", "learner", "regrad", "peft_folder", "published")
    pools = {name: 300_000.0 for name in ("base", "learner", "regrad")}
    cells = [cell(COST, name, repeat=r, pool_bytes=pools.get(name)) for name in names for r in range(2)]
    write(tmp_path, [line(COST, name) for name in names], [*cells, cell(COST, "regrad", repeat=2, pool_bytes=400_000)])
    results = load(tmp_path)
    head, rows = memory_table(results, results.main)
    slot, documents = (head.index(f"{what}, MB") for what in ("LoRA slot a request", "documents of all requests"))
    assert [row[slot] for row in rows] == ["0.00", "0.00", "0.00", "2.00", "0.00"]
    assert [row[documents] for row in rows] == ["–", "–", "0.40", "–", "–"]


def test_a_run_that_was_cut_short_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    lines = [line(COST, name) for name in ("rag_learner", "regrad")]
    lines.append(line(COST, "regrad", repeat=1))
    write(tmp_path, lines, [*(cell(COST, name) for name in ("rag_learner", "regrad")), cell(COST, "regrad", repeat=1)])
    with (tmp_path / REQUESTS).open("a") as file:
        file.write('{"condition": "cost/na')
    results = load(tmp_path)
    assert set(results.main.figures) == {"rag_learner", "regrad"}
    over = results.main.ratio("regrad", "rag_learner")
    assert over is not None and over.repeats == 1
    assert write_report(tmp_path) == 0
    write(tmp_path, [], [])
    with pytest.raises(ValueError, match="cut short before it"):
        load(tmp_path)


def test_a_point_where_something_failed_is_no_point_of_the_slope(tmp_path: Path) -> None:
    whole(tmp_path)
    with (tmp_path / REQUESTS).open("a") as file:
        file.write(json.dumps(asdict(line(GROWTH[1], "regrad", index=2, status="failed", event_ms=()))) + "\n")
    results = load(tmp_path)
    assert len(results.growth()["regrad"]) == 2 and "regrad" not in results.slopes(), "two points always make a line"


def test_without_a_tuned_rag_the_plain_one_is_the_rival_and_a_small_run_says_so(tmp_path: Path) -> None:
    write(tmp_path, [line(COST, "rag"), line(COST, "regrad")], [cell(COST, "rag", seconds=3.0), cell(COST, "regrad")])
    results = load(tmp_path)
    assert results.main.rival == "rag" and results.break_even() is not None
    assert results.last_line()["regrad_over_rag"] == 1.5 and results.last_line()["regrad_over_rag_learner"] is None
    text = markdown(results)
    assert "too small to conclude" in text and "| of RAG |" in text and "ReGrad over RAG: 1.5" in text
    lines = [line(COST, name, repeat=r, index=i) for name in ("rag", "regrad") for r in range(3) for i in range(7)]
    write(tmp_path, lines, [cell(COST, name, repeat=r) for name in ("rag", "regrad") for r in range(3)])
    assert "too small to conclude" not in markdown(load(tmp_path))


def test_failed_requests_are_counted_apart_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line(COST, "regrad"), line(COST, "regrad", index=1, status="failed", error="503: full", event_ms=())]
    write(tmp_path, [*lines, line(COST, "rag_learner", status="incomplete", error="time", event_ms=())],
          [cell(COST, "regrad"), cell(COST, "rag_learner")])  # fmt: skip
    assert write_report(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "2 requests failed or were stopped; the first: time" in printed and "1, 1, 0" in printed
    last = json.loads(printed.splitlines()[-1])
    assert last["regrad"]["failed"] == 1 and last["regrad_over_rag_learner"] is None
