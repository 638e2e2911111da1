"""Questions for a corpus that has none, written by a model behind any OpenAI-compatible server.

The model reads every passage and writes questions with short answers as JSON. A question is kept if its answer is in
the passage. It must not reveal the answer, and must not mention "the text".

The model must follow instructions, and it must be larger than the learner's base model. The default model writes hardly
any usable question.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrad_vllm.data.questions import SourceDocument
from regrad_vllm.http_client import ServerError, connect, server_errors

VALIDATION_SHARE = 0.1
MAX_ANSWER_WORDS = 8
_TIMEOUT_S = 600.0
_TOKENS_PER_QUESTION = 100  # a generous limit for a question with its answer
_PROMPT = """Read this text{title}:

{text}

Write {number} questions that this text answers, each about another fact. Name people, places and things in full in
every question, so that it can be understood without the text. Each answer must be a few words, copied from the text.
Answer with one JSON object a line and nothing else: {{"question": "…", "answer": "…"}}"""
_POINTS_AT_TEXT = re.compile(r"\b(this|the|above|given) (text|passage|article|document|paragraph)\b", re.IGNORECASE)
_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True, slots=True)
class GeneratedQuestions:
    """The questions written for a corpus, with the refused questions and the failed requests."""

    num_passages: int
    num_questions: int
    num_refused: int  # questions that the model wrote and `is_usable` refused
    failures: tuple[str, ...]  # requests that the server didn't answer


async def write_questions(
    documents: Sequence[SourceDocument], server: str, model: str, out: Path, *, per_passage: int, concurrency: int = 16
) -> GeneratedQuestions:
    """Asks ``server`` (http://host:port, the key in OPENAI_API_KEY) for questions about every document.

    Writes the splits "train" and "validation" into ``out``. A digest of a file's id chooses its split, so all passages
    of one file are in the same split.
    """
    from tqdm import tqdm

    gate = asyncio.Semaphore(concurrency)
    found: dict[str, list[tuple[str, str]]] = {}
    failures: list[str] = []
    num_refused = 0
    with tqdm(total=len(documents), unit="passage", desc="questions") as bar:
        async with connect(server, _TIMEOUT_S) as client:

            async def one(document: SourceDocument) -> None:
                nonlocal num_refused
                async with gate:
                    answer = await _ask(client, model, document, per_passage)
                if isinstance(answer, ServerError):
                    failures.append(f"{document.id}: {answer}")
                else:
                    pairs = list(parse(answer))
                    found[document.id] = [pair for pair in pairs if is_usable(*pair, document)]
                    num_refused += len(pairs) - len(found[document.id])
                bar.update()

            await asyncio.gather(*map(one, documents))
    kept = [document for document in documents if found.get(document.id)]
    _write(out, kept, found)
    return GeneratedQuestions(len(documents), sum(map(len, found.values())), num_refused, tuple(failures))


def parse(answer: str) -> Iterator[tuple[str, str]]:
    """(question, answer) of every JSON object in a model's text that has both. All other text is ignored."""
    for match in _OBJECT.finditer(answer):
        try:
            record = json.loads(match[0])
        except ValueError:
            continue
        question, said = record.get("question"), record.get("answer")
        if isinstance(question, str) and isinstance(said, str):
            yield " ".join(question.split()), " ".join(said.split())


def is_usable(question: str, answer: str, document: SourceDocument) -> bool:
    """Whether the question is clear without its document, and the answer stands in the document."""
    inside = f"{document.title}\n{document.text}".lower()
    return (
        question.endswith("?")
        and len(question.split()) >= 4
        and 1 <= len(answer.split()) <= MAX_ANSWER_WORDS
        and answer.lower().rstrip(".") in inside
        and answer.lower().rstrip(".") not in question.lower()
        and not _POINTS_AT_TEXT.search(question)
    )


async def _ask(client: Any, model: str, document: SourceDocument, number: int) -> Any:
    """The model's text. A ServerError is returned, not raised."""
    title = f", titled “{document.title}”" if document.title else ""
    prompt = _PROMPT.format(title=title, text=document.text, number=number)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": number * _TOKENS_PER_QUESTION,
    }
    try:
        with server_errors():
            response = await client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
        return response.json()["choices"][0]["message"]["content"] or ""
    except ServerError as error:
        return error
    except (ValueError, LookupError, TypeError) as error:  # one unreadable answer must not end the run
        return ServerError(f"the server's answer must be a chat completion: {error!r}")


def _write(out: Path, documents: Sequence[SourceDocument], found: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[SourceDocument]] = {"train": [], "validation": []}
    for document in documents:
        place = int.from_bytes(hashlib.sha256(document.id.partition("#")[0].encode()).digest()[:4], "big") / 2**32
        splits["validation" if place < VALIDATION_SHARE else "train"].append(document)
    for split, chosen in splits.items():
        lines = [{"id": d.id, "title": d.title, "text": d.text, "set": d.set_name} for d in chosen]
        questions = [
            {"id": f"{d.id}?{n}", "question": question, "answers": [answer], "documents": [d.id], "set": d.set_name}
            for d in chosen
            for n, (question, answer) in enumerate(found[d.id], 1)
        ]
        for name, records in (("documents", lines), ("questions", questions)):
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (out / f"{split}.{name}.jsonl").write_text(text, "utf-8")
