"""The demo. Ingested documents change the answers, and a deleted document takes its answer with it."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
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
from regrad_vllm.demo.quiz import DOCUMENTS, QuizQuestion, load_questions
from regrad_vllm.demo.table import render, shorten
from regrad_vllm.demo.ways import BASE, DEFAULT_WAY, NUM_TIMED, REGRAD, WAYS, Told, ask_every_way
from regrad_vllm.http_client import get
from regrad_vllm.local.pair import start_bank, start_server, wait_for_server
from regrad_vllm.local.processes import Services
from regrad_vllm.prompts import Prompts

_COLUMNS = (35, 18, 18, 18, 19)
_SUMMARY = (40, 26, 19, 19, 10)
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
    better = figures[f"{DEFAULT_WAY}_right"] > figures["base_right"]
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
        say(f"asking {len(self.questions)} questions in {len(WAYS)} ways: a few one at a time, then all at once")
        told = ask_every_way(url, bank, self.namespace, self._prompts(), self.questions)
        self._show(told)
        deleted_ok = self._delete_one(url, bank, told[DEFAULT_WAY].answers)
        unchanged = base_weights(url) == weights
        say(f"SHA-256 of the base model's weights before and after: {'equal' if unchanged else 'DIFFERENT'}")
        shares = {
            f"{name}_right": round(one.right(self.questions) / len(self.questions), 3) for name, one in told.items()
        }
        records = sum(not question.invented for question in self.questions)
        return {
            "questions": len(self.questions),
            **shares,
            "records_right": round(told[DEFAULT_WAY].right(self.questions, invented=False) / records, 3),
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

    def _prompts(self) -> Prompts:
        from regrad_vllm.learner import Learner

        return Learner.load(self.learner).config.prompts

    def _show(self, told: Mapping[str, Told]) -> None:
        rows: list[Sequence[str]] = [("question → right answer", "base model", "RAG", "ReGrad", "document used")]
        shown = (told["base"].answers, told["rag"].answers, told[DEFAULT_WAY].answers)
        for question, *answers in zip(self.questions, *shown, strict=True):
            used = "\n".join(shorten(f"{score:.2f} {name}", _COLUMNS[-1]) for name, score in answers[-1].documents)
            asked = f"{question.text} → {question.answers[0]}"
            rows.append((asked, *(_marked(question, answer) for answer in answers), used))
        say("\n" + "\n".join(render(_COLUMNS, rows)) + "\n")
        kinds = [sum(question.invented is kind for question in self.questions) for kind in (True, False)]
        heads = (f"right of {kinds[0]} invented facts", f"right of {kinds[1]} records")
        table: list[Sequence[str]] = [("asked", *heads, "tokens of a prompt", "ms alone")]
        for way in WAYS:
            one = told[way.name]
            right = (str(one.right(self.questions, invented=kind)) for kind in (True, False))
            table.append((way.title, *right, f"{one.prompt_tokens:.0f}", f"{one.milliseconds:.0f}"))
        say("\n".join(render(_SUMMARY, table)) + "\n")
        say("An answer counts if it contains the right one, word for word.")
        say("The model that reads for RAG is not tuned here. The README compares with one that is.")
        say(f"Milliseconds are the median of {NUM_TIMED} questions, asked one at a time, other ones in each line.")
        say("Records are warranties, profiles, guides, case notes and software pages.")

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
        (after,) = asyncio.run(ask_all(url, self._prompts().system, [ChatRequest(REGRAD, question.text, {})]))
        say(f"deleted {question.document_id} and asked again: {question.text}")
        used_before, used_after = ([name for name, _ in answer.documents] for answer in (before, after))
        say(f"  before: {before.text} (right, from {', '.join(used_before)})")
        still = "still right" if question.is_answered_by(after.text) else "wrong: a guess"
        say(f"  after:  {after.text} ({still}, from the nearest documents left, {', '.join(used_after)})")
        gone = question.document_id in used_before and question.document_id not in used_after
        return gone and not question.is_answered_by(after.text)


def _marked(question: QuizQuestion, answer: ChatAnswer) -> str:
    return f"{'✓' if question.is_answered_by(answer.text) else '✗'} {' '.join(answer.text.split())}"


def base_weights(url: str) -> Any:
    """The digests of the workers' present base weights. ServerError."""
    return get(url, "/v1/regrad/status?base_weights=true", _WEIGHTS_SECONDS).json()["base_weights"]
