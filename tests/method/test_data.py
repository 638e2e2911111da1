from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from regrad_vllm.data.leaks import evaluation_without_leaks, find_leaks, without_leaks
from regrad_vllm.data.questions import (
    DataError,
    DataSplit,
    Question,
    SourceDocument,
    in_passages,
    load_documents,
    load_split,
)
from regrad_vllm.evaluate.datasets import SAMPLE

DOCUMENT = {"id": "d1", "title": "T", "text": "Some text.", "set": "s"}
QUESTION = {"id": "q1", "question": "What?", "answers": ["this"], "documents": ["d1"], "set": "s", "kind": "yesno"}


def write(folder: Path, documents: Sequence[object], questions: Sequence[object], split: str = "test") -> Path:
    for name, lines in (("documents", documents), ("questions", questions)):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (folder / f"{split}.{name}.jsonl").write_text(text, "utf-8")
    return folder


def test_a_split_is_read_plain_or_compressed_and_gold_means_documents(tmp_path: Path) -> None:
    old = {key: value for key, value in QUESTION.items() if key != "documents"} | {"gold": ["d1"], "id": "q2"}
    plain = load_split(write(tmp_path, [DOCUMENT], [QUESTION, "", old]), "test")
    assert replace(plain.questions[0], id="q2") == plain.questions[1]
    assert plain.questions[0].documents == ("d1",) and plain.questions[0].kind == "yesno"
    assert plain.documents["d1"] == SourceDocument("d1", "T", "Some text.", "s") and plain.set_names == ("s",)
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert load_split(tmp_path, "test") == plain
    with pytest.raises(FileNotFoundError, match=r"train\.documents\.jsonl"):
        load_split(tmp_path, "train")


def test_what_may_be_left_out_has_a_default(tmp_path: Path) -> None:
    bare = {"question": "What?", "answers": ["this"], "documents": ["d1"]}
    data = load_split(write(tmp_path, [{"id": "d1", "text": "x"}], [bare]), "test")
    found = data.questions[0]
    assert data.documents["d1"].set_name == "questions", "a document is in its questions' set"
    assert (found.kind, found.domain, found.set_name) == ("span", "general", "questions")


@pytest.mark.parametrize(
    ("documents", "questions", "message"),
    [
        ([DOCUMENT, DOCUMENT], [], r"documents\.jsonl:2: id must be unique"),
        ([DOCUMENT | {"text": " "}], [], r"documents\.jsonl:1: text must be"),
        (["[1]"], [], "must be a JSON object, got list"),
        (["{"], [], "must be a JSON object"),
        ([DOCUMENT], [QUESTION | {"answers": "this"}], r"questions\.jsonl:1: answers must be a list"),
        ([DOCUMENT], [QUESTION | {"answers": ["yes", " "]}], "answers must be a list of at least one text that isn't"),
        ([DOCUMENT], [QUESTION | {"documents": []}], "documents must be a list"),
        ([DOCUMENT], [QUESTION, QUESTION], r"questions\.jsonl:2: id must be unique"),
        ([DOCUMENT], [QUESTION | {"documents": ["d2"]}], "got 'd2'"),
        ([DOCUMENT], [QUESTION | {"kind": "essay"}], "kind must be one of span, yesno, choice"),
        ([DOCUMENT], [QUESTION, QUESTION | {"question": 3}], r"questions\.jsonl:2: question must be"),
    ],
)
def test_a_bad_line_is_named_with_its_field(
    documents: list[object], questions: list[object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_split(write(tmp_path, documents, questions), "test")


def split(texts: Mapping[str, str], questions: Mapping[str, tuple[str, str, str]]) -> DataSplit:
    """texts by document id; (question, answer, document id) by question id."""
    made = {key: SourceDocument(key, "", text, "s") for key, text in texts.items()}
    asked = (Question(key, q, (a,), (d,), "s", "general", "span") for key, (q, a, d) in questions.items())
    return DataSplit(made, tuple(asked))


OTHER = " ".join(f"other{n}" for n in range(60))
LONG = " ".join(f"word{n}" for n in range(60))


def test_the_same_text_in_other_clothes_is_a_leak_and_a_quotation_is_not() -> None:
    training = split(
        {"same": LONG.upper().replace(" ", ", "), "quotes": f"{OTHER} {' '.join(LONG.split()[:18])}"},
        {"t1": ("Who?", "Ada", "quotes"), "t2": ("Where is it?", "Rome", "quotes"), "t3": ("Why?", "x", "same"),
         "t4": ("WHO", "ada", "quotes")},
    )  # fmt: skip
    evaluation = split(
        {"long": LONG, "short": "Other3 OTHER4, other5!", "new": "Nothing that stands anywhere else at all."},
        {"e1": ("who", "ada", "new"), "e2": ("Where is it?", "Oslo", "new")},
    )
    found = {(leak.kind, leak.evaluation_id, leak.training_id) for leak in find_leaks(training, evaluation)}
    assert found == {
        ("document", "long", "same"),
        ("document", "short", "quotes"),
        ("question", "e1", "t1"),
        ("question", "e1", "t4"),
    }
    (inside,) = find_leaks(split({"part": LONG[60:260]}, {}), split({"whole": LONG}, {}))
    assert inside.shared > 0.9, "training text that stands in a longer evaluation text"
    (tiny,) = find_leaks(split({"part": "word7 word8 word9"}, {}), split({"whole": LONG}, {}))
    assert (tiny.training_id, tiny.evaluation_id) == ("part", "whole")
    kept, left_out = evaluation_without_leaks(evaluation, training)
    assert left_out == ("e1", "long", "short") and set(kept.documents) == {"new"}
    alone = split({"long": LONG}, {})
    kept, left_out = without_leaks(training, [alone])
    assert left_out == ("same",) and set(kept.documents) == {"quotes"}
    assert [question.id for question in kept.questions] == ["t1", "t2", "t4"], "a question goes with its document"
    kept, _ = without_leaks(training, [evaluation])
    assert not find_leaks(kept, evaluation) and [question.id for question in kept.questions] == []


def test_the_sample_that_ships_is_whole_and_its_sets_may_be_passed_on() -> None:
    data = load_split(SAMPLE, "test")
    assert data.set_names == ("squad", "nq", "qamr", "pubmedqa", "records")
    assert all(len({q.documents[0] for q in data.questions if q.set_name == name}) == 40 for name in data.set_names)
    sources = (SAMPLE / "SOURCES.md").read_text("utf-8")
    haystack = {document.set_name for document in load_documents(SAMPLE, "haystack").values()}
    assert all(f"| {name} |" in sources for name in {*data.set_names, *haystack})


def test_long_documents_become_passages_and_questions_ask_those_that_hold_the_answer() -> None:
    sentences = [f"Sentence number {n} tells of the town of Aberfell{n} and its many bridges." for n in range(60)]
    data = split({"long": " ".join(sentences), "short": "Brief."}, {"q": ("Where?", "Aberfell4", "long")})
    cut = in_passages(data)
    parts = [key for key in cut.documents if key.startswith("long#")]
    assert len(parts) > 4 and cut.documents["short"] == data.documents["short"]
    assert all("Aberfell4 " in cut.documents[key].text for key in cut.questions[0].documents)
    assert 1 <= len(cut.questions[0].documents) <= 2, "Aberfell4 is not Aberfell40"
    assert in_passages(cut) == cut, "passages are short enough"
    both = in_passages(replace(data, questions=(replace(data.questions[0], documents=("long", "short")),)))
    assert both.questions[0].documents == (*cut.questions[0].documents, "short"), "it needs both"
    yesno = replace(data.questions[0], id="y", kind="yesno", answers=("yes",))
    whole = in_passages(replace(data, questions=(*data.questions, yesno)))
    assert set(whole.documents) == {"long", "short"}, "nobody can tell which passage says yes"
