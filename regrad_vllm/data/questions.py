"""The format of question-answering data. Training, evaluation and the users' own data share it.

A split is two JSON Lines files (or .jsonl.gz):
- ``<split>.documents.jsonl`` has {id, title, text, set}; id and text are required.
- ``<split>.questions.jsonl`` has {id, question, answers, documents, domain, set, kind}; question, answers and documents
  are required.

``documents`` holds the ids of the documents that answer the question, the best first. If there are several, only all
of them together answer it. "gold" is another name for this field. ``set`` names the collection that figures are
reported for. A document without ``set`` belongs to the set of its questions. ``kind`` is "span" (free text), "yesno" or
"choice".
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from regrad_vllm.data.passages import Passage, split_text

Kind = Literal["span", "yesno", "choice"]
SPLITS = ("train", "validation", "test")


class DataError(ValueError):
    """A data file can't be used. The message names the file, the line and the field."""


@dataclass(frozen=True, slots=True)
class SourceDocument:
    id: str
    title: str
    text: str
    set_name: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    question: str
    answers: tuple[str, ...]  # each of them alone is right
    documents: tuple[str, ...]  # ids of the documents that together answer it, best first
    set_name: str
    domain: str = "general"
    kind: Kind = "span"


@dataclass(frozen=True, slots=True)
class DataSplit:
    """One split: its documents by id, and its questions in the order of the file."""

    documents: Mapping[str, SourceDocument]
    questions: tuple[Question, ...]

    @property
    def set_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(question.set_name for question in self.questions))


@dataclass(frozen=True, slots=True)
class EvalData:
    """The documents of one bank, in the order of ingest, and the questions about them. Each question has its own id."""

    documents: tuple[SourceDocument, ...]
    questions: tuple[Question, ...]

    def merged(self, other: EvalData) -> EvalData:
        return EvalData(self.documents + other.documents, self.questions + other.questions)


def load_split(folder: str | Path, split: str) -> DataSplit:
    """Reads a split.

    Raises FileNotFoundError, and DataError for a bad line or for a question whose document is missing.
    """
    documents = load_documents(folder, split)
    questions: dict[str, Question] = {}
    path = _find(Path(folder), f"{split}.questions")
    for place, line in _lines(path):
        question = _question(place, line)
        missing = [key for key in question.documents if key not in documents]
        if missing:
            raise DataError(f"{place}: documents must be ids of {split}.documents, got {missing[0]!r}")
        if question.id in questions:
            raise DataError(f"{place}: id must be unique, {question.id!r} stands above")
        questions[question.id] = question
        for key in question.documents:
            if not documents[key].set_name:
                documents[key] = replace(documents[key], set_name=question.set_name)
    return DataSplit(documents, tuple(questions.values()))


def load_documents(folder: str | Path, split: str) -> dict[str, SourceDocument]:
    """The documents of a split by id. The split needs no questions. FileNotFoundError, DataError."""
    found: dict[str, SourceDocument] = {}
    for place, line in _lines(_find(Path(folder), f"{split}.documents")):
        document = SourceDocument(
            id=_text(place, line, "id"),
            title=str(line.get("title") or "").strip(),
            text=_text(place, line, "text"),
            set_name=str(line.get("set") or ""),
        )
        if document.id in found:
            raise DataError(f"{place}: id must be unique, {document.id!r} stands above")
        found[document.id] = document
    return found


def _question(place: str, line: Mapping[str, Any]) -> Question:
    answers, documents = line.get("answers"), line.get("documents", line.get("gold"))
    for name, value in (("answers", answers), ("documents", documents)):
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
            raise DataError(f"{place}: {name} must be a list of at least one text that isn't blank, got {value!r}")
    kind = line.get("kind") or "span"
    if kind not in get_args(Kind):
        raise DataError(f"{place}: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    return Question(
        id=str(line.get("id") or place),
        question=_text(place, line, "question").strip(),
        answers=tuple(text.strip() for text in cast("list[str]", answers)),
        documents=tuple(cast("list[str]", documents)),
        set_name=str(line.get("set") or "questions"),
        domain=str(line.get("domain") or "general"),
        kind=cast(Kind, kind),
    )


def _text(place: str, line: Mapping[str, Any], name: str) -> str:
    value = line.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {name} must be a text that isn't empty, got {value!r}")
    return value


def _find(folder: Path, stem: str) -> Path:
    for ending in (".jsonl", ".jsonl.gz"):
        if (folder / (stem + ending)).is_file():
            return folder / (stem + ending)
    raise FileNotFoundError(f"{folder} must hold {stem}.jsonl or {stem}.jsonl.gz")


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line that isn't blank."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{place} must be a JSON object: {error}") from error
            if not isinstance(value, dict):
                raise DataError(f"{place} must be a JSON object, got {type(value).__name__}")
            yield place, value


def in_passages(data: DataSplit) -> DataSplit:
    """The same data with long documents cut into passages, as `regrad ingest` cuts texts. Ids are "ID#1", "ID#2" ….

    A question's document is replaced by those of its passages that hold an answer word for word. A document without
    such a passage stays whole, because the right passage is unknown. An example is the answer "yes".
    """
    passages: dict[str, list[Passage]] = {}
    for key, document in data.documents.items():
        passages[key] = split_text(document.title, document.text)
    for question in data.questions:
        for key in question.documents:
            if not any(holds(passage.text, question) for passage in passages[key]):
                passages[key] = [Passage(data.documents[key].title, data.documents[key].text)]
    documents: dict[str, SourceDocument] = {}
    parts: dict[str, list[SourceDocument]] = {}
    for key, found in passages.items():
        for number, passage in enumerate(found, 1):
            part = replace(data.documents[key], id=f"{key}#{number}" if len(found) > 1 else key, text=passage.text)
            documents[part.id] = part
            parts.setdefault(key, []).append(part)
    questions = []
    for question in data.questions:
        ids: list[str] = []
        for key in question.documents:
            ids += [part.id for part in parts[key] if holds(part.text, question)] or [part.id for part in parts[key]]
        questions.append(replace(question, documents=tuple(ids)))
    return DataSplit(documents, tuple(questions))


def holds(text: str, question: Question) -> bool:
    """Whether one of the answers stands in the text word for word, without regard to case and punctuation."""
    words = f" {plain_words(text)} "
    return any(f" {plain_words(answer)} " in words for answer in question.answers)


def plain_words(text: str) -> str:
    """The words of a text in lower case, with one space between them and no punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))
