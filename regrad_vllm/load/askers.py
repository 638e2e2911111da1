"""The asker of the server with ReGrad, and the parts that all askers share."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from bank_service.wire.limits import DEFAULT_CUE_SENTENCES
from regrad_vllm.client import Answer, AsyncBank, Hit, Query
from regrad_vllm.data.questions import Question
from regrad_vllm.evaluate.methods import MAX_ANSWER_TOKENS, Shown
from regrad_vllm.load.comparison import Adapter, Contender, LoadCondition
from regrad_vllm.load.corpora import by_passage
from regrad_vllm.load.streaming import AnswerError, Stream, stream_chat
from regrad_vllm.prompts import Prompts

if TYPE_CHECKING:
    import httpx

STATIC_ADAPTER, TUNED_ADAPTER = "phi-star", "ft-rag"  # φ* alone and FT-RAG's LoRA, as the server knows them
PLAIN_ADAPTERS: Mapping[Adapter, str] = {"static": STATIC_ADAPTER, "tuned": TUNED_ADAPTER}
# ReGrad with something of the hits in the prompt. All ask the same questions. A slightly different γ gives each other
# adapters, so that none finds another's prefixes in the cache.
_OPTIONS: Mapping[Shown, Mapping[str, Any]] = {
    "nothing": {"mode": "blind"},
    "cue": {"mode": "cue", "gamma": 0.9998},
    "documents": {"mode": "icl", "gamma": 0.9999},
}


@dataclass(slots=True)
class Attempt:
    """One request while it runs."""

    stream: Stream = field(default_factory=Stream)
    retrieve_ms: float = 0.0
    prepare_ms: float = 0.0
    documents: tuple[str, ...] = ()
    moved_bytes: int = 0


class Asker(Protocol):
    """Sends a question to one engine. Many questions may run at once."""

    async def ask(self, question: Question, contender: Contender, condition: LoadCondition, attempt: Attempt) -> None:
        """Fills ``attempt`` while the request runs. AnswerError, BankError, httpx.HTTPError."""


class Passages:
    """Retrieval by the client, as in a RAG application."""

    def __init__(
        self,
        bank: AsyncBank,
        prompts: Prompts,
        parts: Mapping[str, Mapping[str, tuple[str, ...]]],
        text_bytes: Mapping[str, Mapping[str, int]],
    ) -> None:
        """parts: corpus → document → the ids of its passages in the bank, if documents have several passages.
        text_bytes: corpus → passage → bytes of its title and text.
        """
        self._text_bytes = text_bytes
        self._bank = bank
        self._prompts = prompts
        self._parts = parts
        self._whole = {corpus: by_passage(documents) for corpus, documents in parts.items()}

    async def retrieve(
        self,
        question: Question,
        condition: LoadCondition,
        attempt: Attempt,
        shows: Shown = "nothing",
        cue_sentences: int = DEFAULT_CUE_SENTENCES,
    ) -> list[Hit]:
        """The passages of the best ``top_k`` documents, best document first. Its passages keep their order.

        shows: hits have their texts for "documents", and the ``cue_sentences`` nearest to the question for "cue".
        """
        start = time.perf_counter()
        query = Query(namespace=condition.corpus, text=question.question, top_k=condition.top_k, min_score=-1.0)
        if condition.corpus in self._parts:
            hits = list((await self._bank.query(query)).hits)
            query = Query(namespace=condition.corpus, document_ids=self._documents(hits, condition))
        if shows == "documents":
            query = replace(query, with_text=True)
        elif shows == "cue":
            query = replace(query, with_cue=cue_sentences, cue_text=question.question)
        hits = list((await self._bank.query(query)).hits)
        attempt.retrieve_ms = (time.perf_counter() - start) * 1000
        attempt.documents = tuple(hit.id for hit in hits)
        if shows == "documents":
            attempt.moved_bytes += self.num_bytes(condition, attempt.documents)
        attempt.moved_bytes += sum(len(sentence.text.encode()) for hit in hits for sentence in hit.cue)
        return hits

    def num_bytes(self, condition: LoadCondition, documents: Sequence[str]) -> int:
        """Bytes of the documents' texts. Unknown documents of a running bank count as 0."""
        known = self._text_bytes[condition.corpus]
        return sum(known.get(id, 0) for id in documents)

    def render(self, hits: Sequence[Hit]) -> list[str]:
        """The hits' sentences if they have any, nearest to the question first, else their texts."""
        cue = [(hit.title, sentence.text) for hit, sentence in Answer(tuple(hits), sequence=0).cue]
        return [self._prompts.render_document(*shown) for shown in cue or [(hit.title, hit.text) for hit in hits]]

    def _documents(self, hits: Sequence[Hit], condition: LoadCondition) -> tuple[str, ...]:
        """All passages of the best ``top_k`` documents. If the hits have fewer, others of the corpus fill up."""
        whole, parts = self._whole[condition.corpus], self._parts[condition.corpus]
        found = dict.fromkeys(whole[hit.id] for hit in hits if hit.id in whole)
        names = [*found, *(name for name in parts if name not in found)][: condition.top_k]
        return tuple(part for name in names for part in parts[name])


class Served:
    """Asks the server with ReGrad, for every contender that runs there."""

    def __init__(self, client: httpx.AsyncClient, model: str, prompts: Prompts, passages: Passages) -> None:
        self._client = client
        self._model = model
        self._prompts = prompts
        self._passages = passages

    async def ask(self, question: Question, contender: Contender, condition: LoadCondition, attempt: Attempt) -> None:
        regrad: dict[str, Any] = {"enabled": False}
        hits: list[Hit] = []
        if contender.adapter == "retrieved":
            regrad = await self._options(question, contender, condition, attempt)
        elif contender.retrieves:
            hits = await self._passages.retrieve(question, condition, attempt, contender.shows, contender.cue_sentences)
        content = self._prompts.render_blind(question.question)
        if hits:
            content = self._prompts.render_icl(question.question, self._passages.render(hits))
        if contender.adapter in PLAIN_ADAPTERS:  # asked for by its model name
            body = chat_body(PLAIN_ADAPTERS[contender.adapter], self._prompts, content, condition)
        else:
            body = {**chat_body(self._model, self._prompts, content, condition), "regrad": regrad}
        await stream_chat(self._client, body, attempt.stream)
        if contender.adapter == "retrieved":
            if attempt.stream.regrad.get("adapter") is None:
                raise AnswerError(f"answered without an adapter: {attempt.stream.regrad.get('reason')}")
            attempt.documents = tuple(entry["id"] for entry in attempt.stream.regrad["documents"])
            if contender.shows == "documents":
                attempt.moved_bytes += self._passages.num_bytes(condition, attempt.documents)
            cue = attempt.stream.regrad.get("cue", ())
            attempt.moved_bytes += sum(len(sentence["text"].encode()) for sentence in cue)

    async def _options(
        self, question: Question, contender: Contender, condition: LoadCondition, attempt: Attempt
    ) -> dict[str, Any]:
        options: dict[str, Any] = {"namespace": condition.corpus, **_OPTIONS[contender.shows]}
        if contender.shows == "cue":
            options["cue_sentences"] = contender.cue_sentences
        if contender.asks_again:
            options["mode"] = "auto"
        if condition.passage_tokens:  # only the client knows which passages make a whole document
            hits = await self._passages.retrieve(question, condition, attempt)
            return {**options, "document_ids": [hit.id for hit in hits]}
        return {**options, "query": question.question, "top_k": condition.top_k, "min_score": -1.0}


def chat_body(model: str, prompts: Prompts, content: str, condition: LoadCondition) -> dict[str, Any]:
    """The chat request. Sampling is greedy for all, with a fixed number of tokens or up to the end token."""
    length: dict[str, Any] = {"max_tokens": MAX_ANSWER_TOKENS}
    if condition.output_tokens:
        length = {"max_tokens": condition.output_tokens, "ignore_eos": True}
    # A request with a unique salt shares no KV blocks. So one server also measures the cost without prefix caching.
    salt = {} if condition.prefix_cache else {"cache_salt": uuid.uuid4().hex}
    return {"model": model, "messages": prompts.messages(content), "temperature": 0, **length, **salt}


class OneAtATime:
    """Lets one request through at a time, for an asker that can't handle several."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._lock = asyncio.Lock()

    async def ask(self, question: Question, contender: Contender, condition: LoadCondition, attempt: Attempt) -> None:
        async with self._lock:
            await self._asker.ask(question, contender, condition, attempt)
