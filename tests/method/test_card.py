"""The learner's card says what the evaluation's reports say, and these follow from the answers beside them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from regrad_vllm.default_model import shipped_learner
from regrad_vllm.evaluate.answers import Record
from regrad_vllm.evaluate.summary import Report, summarise
from regrad_vllm.learn.train_config import TrainConfig
from regrad_vllm.reporting.intervals import Interval

ROOT = Path(__file__).parents[2]
FOLDER = shipped_learner()
CARD, EARLIER = FOLDER / "README.md", FOLDER / "EARLIER.md"  # of this learner, of the one before
PAGE_OF = {"served": CARD, "in_process": EARLIER}
# The rows of each table in order.
TABLES = {
    "served": (
        "base", "learner", "rag", "rag_learner", "ft_rag", "ft_rag_sentence", "regrad", "regrad_cue", "regrad_icl",
        "regrad_wrong", "regrad_random",
    ),
    "in_process": (
        "base", "learner", "rag", "rag_learner", "ft_rag", "cpt", "prag", "raw_gradient", "regrad", "regrad_icl",
        "regrad_gold", "regrad_wrong", "regrad_random",
    ),
}  # fmt: skip


def report(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / "evaluation" / f"{name}.json").read_text("utf-8")))


def records(name: str, *without: str) -> list[Record]:
    """The answers of an evaluation, without those of some sets."""
    path = FOLDER / "evaluation" / f"{name}.answers.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    left = {"question": "", "answers": [], "prediction": "", "answer_nll": None}
    return [Record(**left, **answer) for answer in answers if answer["set_name"] not in without]


def summary(name: str, *without: str) -> Report:
    return summarise(records(name, *without))


def percent(value: float) -> str:
    return f"{100 * value:.1f}".replace("-", "−")


def interval(value: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed and value.mean > 0 else ""
    return f"{sign}{percent(value.mean)} [{percent(value.low)}, {percent(value.high)}]"


def tables(page: Path) -> list[list[list[str]]]:
    """A page's tables as rows of cells, without their heads."""
    found: list[list[list[str]]] = []
    before = ""
    for line in page.read_text("utf-8").splitlines():
        if line and set(line) <= set("|-:"):
            found.append([])
        elif line.startswith("|") and found and before.startswith("|"):
            found[-1].append([cell.strip(" *") for cell in line.strip("|").split("|")])
        before = line
    return found


@pytest.mark.parametrize("name", TABLES)
def test_the_cards_table_is_the_reports(name: str) -> None:
    (rows,) = [table for table in tables(PAGE_OF[name]) if table[0][0] == "document retrieved"]
    said, found = report(name), summary(name)
    assert [cell for cell in rows[0][2:]] == [f"{100 * entry['recall']:.0f}" for entry in said["sets"]]
    assert len(rows) == 1 + len(TABLES[name])
    for method, cells in zip(TABLES[name], rows[1:], strict=True):
        assert cells[1] == interval(found.overall[method]), method
        assert cells[2:] == [percent(entry["rows"][method]["f1"]["mean"]) for entry in said["sets"]], method


MORE_SETS = {  # method → its label on the card
    "base": "base model", "learner": "φ* alone", "rag": "RAG, untuned", "rag_learner": "RAG + φ*",
    "rag_sentence": "RAG of two sentences", "rag_learner_sentence": "RAG of two sentences + φ*", "ft_rag": "FT-RAG",
    "ft_rag_sentence": "FT-RAG of two sentences", "regrad": "ReGrad** (mode `blind`)",
    "regrad_cue": "ReGrad + two sentences** (mode `cue`)", "regrad_icl": "ReGrad + ICL** (mode `icl`)",
    "regrad_wrong": "ReGrad, another question's document", "regrad_random": "ReGrad, a random document",
}  # fmt: skip


def test_the_cards_table_of_more_sets_is_that_of_their_answers() -> None:
    (rows,) = [table for table in tables(CARD) if table[0][0] == "a document of the answer retrieved"]
    more, of_three = summary("more_sets"), summary("hops_three_documents")
    by_name = {entry.name: entry for entry in more.sets}
    columns = (by_name["newpages_mixed"], by_name["hops"], of_three.sets[0])
    assert rows[0][1:] == [f"{100 * entry.recall:.0f}" for entry in columns]
    for method, cells in zip(MORE_SETS, rows[1:], strict=True):
        assert cells[0] == MORE_SETS[method].strip(" *")
        assert cells[1:] == [interval(e.rows[method].f1) if method in e.rows else "–" for e in columns], method
    page = CARD.read_text("utf-8")
    for name in ("more_sets", "hops_three_documents"):
        assert report(name)["command"] in page
    for found, set_name, pair in (
        (more, "newpages_mixed", ("regrad_cue", "ft_rag")),
        (more, "newpages_mixed", ("regrad_cue", "ft_rag_sentence")),
        (more, "newpages_mixed", ("regrad_cue", "rag_learner_sentence")),
        (of_three, "hops", ("regrad_cue", "rag_learner_sentence")),
        (of_three, "hops", ("regrad_icl", "ft_rag")),
    ):
        (difference,) = [c.by_set[set_name] for c in found.comparisons if (c.method, c.other) == pair]
        assert interval(difference, signed=True) in page, pair


def test_the_goals_of_the_answers_are_held_against_real_text_records_and_hops_together() -> None:
    rows = next(table for table in tables(CARD) if table[0][0].endswith("FT-RAG of whole documents"))
    served = records("served", "fresh", "pubmedqa")
    methods = {each.method for each in served}
    found = summarise(served + [each for each in records("more_sets") if each.method in methods])
    compared = {(each.method, each.other): each.difference for each in found.comparisons}
    pairs = (
        ("regrad_cue", "ft_rag"),
        ("regrad_cue", "ft_rag_sentence"),
        ("regrad_icl", "ft_rag"),
        ("regrad", "rag_learner"),
    )
    assert [row[2] for row in rows[:4]] == [interval(compared[pair], signed=True) for pair in pairs]
    phi, *others = (found.overall[name] for name in ("learner", "regrad_wrong", "regrad_random"))
    assert rows[4][2] == f"{percent(phi.mean)}, {' and '.join(percent(other.mean) for other in others)}"


def test_the_readmes_table_is_that_of_the_served_report() -> None:
    every, real = summary("served"), summary("served", "fresh", "pubmedqa", "records")
    rows = tables(ROOT / "README.md")[0]
    methods = ("base", "rag", "rag_learner", "ft_rag", "ft_rag_sentence", "regrad", "regrad_cue", "regrad_icl")
    for method, cells in zip(methods, rows, strict=True):
        assert cells[1].replace("*", "") == interval(every.overall[method])
        assert cells[2] == percent(real.overall[method].mean), method


@pytest.mark.parametrize("name", TABLES)
def test_the_report_follows_from_the_answers(name: str) -> None:
    said, found = report(name), summary(name)
    for method in TABLES[name]:
        for key in ("mean", "low", "high"):
            assert getattr(found.overall[method], key) == pytest.approx(said["overall"][method][key], abs=2e-4)


PAIRS = (
    ("regrad_cue", "ft_rag_sentence"), ("regrad_cue", "ft_rag"), ("regrad_cue", "regrad"), ("regrad_icl", "ft_rag"),
    ("regrad_icl", "rag_learner"), ("regrad", "rag_learner"), ("regrad", "regrad_wrong"),
)  # fmt: skip


def test_the_paired_differences_stand_on_the_card() -> None:
    (rows,) = [table for table in tables(CARD) if table[0][0].endswith("− FT-RAG of the same sentences")]
    for column, without in enumerate(((), ("pubmedqa",), ("pubmedqa", "fresh")), start=1):
        compared = {(each.method, each.other): each.difference for each in summary("served", *without).comparisons}
        assert [row[column] for row in rows] == [interval(compared[pair], signed=True) for pair in PAIRS]


def test_the_earlier_differences_stand_on_the_earlier_card() -> None:
    page = " ".join(EARLIER.read_text("utf-8").split())
    compared = {(each.method, each.other): each.difference for each in summary("in_process", "pubmedqa").comparisons}
    for pair in (("regrad", "rag_learner"), ("regrad_icl", "ft_rag"), ("regrad_icl", "rag_learner")):
        assert interval(compared[pair], signed=True) in page, pair


def test_validation_on_the_card_is_that_of_the_experiments() -> None:
    with gzip.open(ROOT / "benchmarks" / "experiments" / "answers.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    (rows,) = [table for table in tables(CARD) if table[0][0] == "ReGrad (`blind`)"]
    ways = [("cue_third", "blind"), ("reader", "cue2"), ("cue_third", "cue2"), ("cue_third", "icl"), ("reader", "icl")]
    for row, (learner, way) in zip(rows, ways, strict=True):
        f1 = [each["f1"] for each in answers if (each["learner"], each["way"]) == (learner, way)]
        assert len(f1) == 300 and row[2] == percent(sum(f1) / len(f1)), row


def test_each_part_of_make_train_goes_on_from_an_earlier_one() -> None:
    parts = re.findall(r"cli train (\S+\.toml)", (ROOT / "Makefile").read_text("utf-8"))
    made: list[Path] = []
    for part in map(ROOT.joinpath, parts):
        config = TrainConfig.load(part, {"data_folder": "data"})
        assert {Path(found).resolve() for found in (config.start, config.teacher) if found} <= set(made), part
        made.append(Path(config.output).resolve())
    assert made[-1].name == FOLDER.name and len(made) == 8


def test_the_cards_growth_is_that_of_the_reports() -> None:
    found = {(p["curve"], p["x"], p["method"]): p for name in ("length", "documents") for p in report(name)["points"]}
    for name in ("length", "documents"):
        assert report(name)["command"] in CARD.read_text("utf-8")

    def row(*places: tuple[str, int, str]) -> list[str]:
        return [interval(Interval(**found[place]["f1"])) for place in places]

    def lengths(method: str) -> list[tuple[str, int, str]]:
        return [("length", length, method) for length in (32, 128, 512)]

    (rows,) = [table for table in tables(CARD) if table[0][0] == "a right passage is found, %"]
    assert rows[0][1:] == [f"{100 * found[place]['recall']:.0f}" for place in lengths("regrad")]
    for cells, method in zip(rows[1:4], ("regrad", "regrad_gold", "regrad_cue"), strict=True):
        assert cells[1:] == row(*lengths(method))
    for cells, method in zip(rows[4:], ("regrad", "regrad_cue"), strict=True):
        assert cells[1:] == [percent(found[place]["found_f1"]) for place in lengths(method)]
    (rows,) = [table for table in tables(CARD) if table[0][0] == "the right one is found, %"]
    for cells, method in zip(rows[1:3], ("regrad", "regrad_cue"), strict=True):
        assert cells[1:] == row(("documents", 50_000, method), ("documents_k3", 50_000, method))
    assert rows[3][1:] == [*row(("documents", 50_000, "rag_learner")), "–"]


def test_growths_points_are_those_of_the_card() -> None:
    lines = (FOLDER / "growth.jsonl").read_text("utf-8").splitlines()
    points = [
        point for point in map(json.loads, lines) if point["curve"] == "documents" and point["method"] == "regrad"
    ]
    card = " ".join(EARLIER.read_text("utf-8").split())
    first, last = points[0], points[-1]
    for point in (first, last):
        f1 = point["f1"]
        assert f"{percent(f1['mean'])} [{percent(f1['low'])}, {percent(f1['high'])}]" in card
    assert f"F1 is {percent(first['found_f1'])} → {percent(last['found_f1'])}" in card
