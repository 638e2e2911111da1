"""The demo. Ingested documents change the answers, and a deleted document takes its answer with it."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from regrad_vllm.client import Bank
from regrad_vllm.client.corpus import CorpusDocument, find_files, read_corpus
from regrad_vllm.client.upload import upload
from regrad_vllm.console import count, say
from regrad_vllm.default_model import ensure_default_model, resolve_model, shipped_learner
from regrad_vllm.demo import by_hand
from regrad_vllm.demo.chat import ChatAnswer, ChatRequest, ask_all
from regrad_vllm.demo.quiz import DOCUMENTS, QuizQuestion, load_questions, share_right
from regrad_vllm.demo.table import render, shorten
from regrad_vllm.http_client import get
from regrad_vllm.local.pair import start_bank, start_server, wait_for_server
from regrad_vllm.local.processes import Services

BASE, REGRAD = "smollm2", "smollm2-regrad"
_COLUMNS = (36, 22, 22, 31)
_WEIGHTS_SECONDS = 120.0  # the longest wait for the digests of all base weights


def run_demo(*, model: str | None, learner: Path | None) -> int:
    """Plays the whole demo. Returns 0 if every result is as expected. ServiceFailure if a service ends."""
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="regrad-demo-"))
    model_folder = resolve_model(model) if model else ensure_default_model()
    stage = Stage(folder, model_folder, learner or shipped_learner(), load_questions())
    try:
        with Services(folder) as services:
            figures = stage.play(services)
    except BaseException:
        say(f"the demo did not end well; its logs are in {folder}")
        raise
    shutil.rmtree(folder)
    by_hand.show()
    figures["seconds"] = round(time.monotonic() - begun, 1)
    say(json.dumps(figures))
    better = figures["regrad_em"] > max(figures["base_em"], figures["learner_em"])
    return 0 if better and figures["deleted_ok"] and figures["base_weights_unchanged"] else 1


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of the demo, with its folder, model, learner and questions."""

    folder: Path
    model: Path
    learner: Path
    questions: tuple[QuizQuestion, ...]
    namespace: str = "demo"  # the server's own

    def play(self, services: Services) -> dict[str, Any]:
        """Plays all steps with a bank and a server of its own, and returns the figures."""
        _, bank = start_bank(services, self.model, self.learner, self.folder / "bank")
        flags = ["--max-model-len", "1024"]
        server, url = start_server(services, self.model, self.learner, bank, BASE, self.namespace, flags)
        self._ingest(bank)
        wait_for_server(server, url)
        return self.tell(bank, url)

    def tell(self, bank: str, url: str) -> dict[str, Any]:
        """Plays from questions to figures, with a bank and a server that have the documents. Deletes one of them."""
        weights = base_weights(url)
        base, learner_alone, regrad = self._ask_everything(url)
        self._show(base, learner_alone, regrad)
        deleted_ok = self._delete_one(url, bank, regrad)
        unchanged = base_weights(url) == weights
        say(f"SHA-256 of the base model's weights before and after: {'equal' if unchanged else 'DIFFERENT'}")
        return {
            "questions": len(self.questions),
            "base_em": share_right(self.questions, [answer.text for answer in base]),
            "learner_em": share_right(self.questions, [answer.text for answer in learner_alone]),
            "regrad_em": share_right(self.questions, [answer.text for answer in regrad]),
            "deleted_ok": deleted_ok,
            "base_weights_unchanged": unchanged,
        }

    def _ingest(self, bank: str) -> None:
        files, _, _ = find_files([DOCUMENTS])
        num_documents = sum(isinstance(item, CorpusDocument) for item in read_corpus(files))
        say(f"ingesting {count(num_documents, 'document')} from {DOCUMENTS} (the server starts meanwhile)")
        with Bank(bank) as client, tqdm(total=num_documents, unit="doc", desc="ingest") as bar:
            outcome = upload(client, files, namespace=self.namespace, progress=bar.update)
        say(outcome.summary())

    def _ask_everything(self, url: str) -> tuple[list[ChatAnswer], list[ChatAnswer], list[ChatAnswer]]:
        """Asks every question three times, all at once: the base model, φ* alone, and ReGrad."""
        texts = [question.text for question in self.questions]
        asks = [
            *(ChatRequest(BASE, text) for text in texts),
            *(ChatRequest(REGRAD, text, {"gamma": 0.0}) for text in texts),
            *(ChatRequest(REGRAD, text, {}) for text in texts),
        ]
        say(
            f"asking {len(texts)} questions of the base model, the learner without documents and ReGrad: "
            f"{len(asks)} requests at once"
        )
        answers = asyncio.run(ask_all(url, self._system_prompt(), asks))
        n = len(texts)
        return answers[:n], answers[n : 2 * n], answers[2 * n :]

    def _system_prompt(self) -> str:
        from regrad_vllm.learner import Learner

        return Learner.load(self.learner).config.prompts.system

    def _show(
        self, base: Sequence[ChatAnswer], learner_alone: Sequence[ChatAnswer], regrad: Sequence[ChatAnswer]
    ) -> None:
        rows = [("question → right answer", "base model", "ReGrad", "documents used, with scores")]
        for question, plain, answer in zip(self.questions, base, regrad, strict=True):
            used = "\n".join(shorten(f"{score:.2f} {name}", _COLUMNS[-1]) for name, score in answer.documents)
            asked = f"{question.text} → {question.answers[0]}"
            rows.append((asked, _marked(question, plain), _marked(question, answer), used))
        say("\n" + "\n".join(render(_COLUMNS, rows)) + "\n")
        for kind, title in ((True, "about invented things, which no model knows"), (False, "about real text")):
            places = [place for place, question in enumerate(self.questions) if question.invented is kind]
            right = [
                sum(self.questions[place].is_answered_by(answers[place].text) for place in places)
                for answers in (base, learner_alone, regrad)
            ]
            asked = f"right of {count(len(places), 'question')} {title}"
            say(f"{asked}: base model {right[0]}, learner without documents {right[1]}, ReGrad {right[2]}")
        say("(case and articles don't count; real text is where this learner is weak)")

    def _delete_one(self, url: str, bank: str, regrad: Sequence[ChatAnswer]) -> bool:
        """Deletes the document of a question that ReGrad answered right, and asks again.

        True if the right answer is gone.
        """
        right = [i for i, question in enumerate(self.questions) if question.is_answered_by(regrad[i].text)]
        if not right:
            say("ReGrad answered no question right, so there is no answer to take away")
            return False
        question, before = self.questions[right[0]], regrad[right[0]]
        with Bank(bank) as client:
            client.delete(question.document_id, namespace=self.namespace)
        (after,) = asyncio.run(ask_all(url, self._system_prompt(), [ChatRequest(REGRAD, question.text, {})]))
        say(f"deleted {question.document_id} and asked again: {question.text}")
        used_before, used_after = ([name for name, _ in answer.documents] for answer in (before, after))
        say(f"  before: {before.text} (right, from {', '.join(used_before)})")
        say(f"  after:  {after.text} (wrong: a guess from the nearest documents left, {', '.join(used_after)})")
        gone = question.document_id in used_before and question.document_id not in used_after
        return gone and not question.is_answered_by(after.text)


def _marked(question: QuizQuestion, answer: ChatAnswer) -> str:
    return f"{'✓' if question.is_answered_by(answer.text) else '✗'} {' '.join(answer.text.split())}"


def base_weights(url: str) -> Any:
    """The digests of the workers' present base weights. ServerError."""
    return get(url, "/v1/regrad/status?base_weights=true", _WEIGHTS_SECONDS).json()["base_weights"]
