"""Asks a running server every question under every method; one record per answer, wrong or missing ones too."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regrad_vllm.adapt.bank_client import BankClient, Query
from regrad_vllm.evaluate.datasets import EvalData, EvalQuestion
from regrad_vllm.evaluate.methods import MAX_TOKENS, METHODS, Asking
from regrad_vllm.evaluate.metrics import exact_match, token_f1
from regrad_vllm.learner import Learner

_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server and its bank, and how to ask them."""

    server: str  # http://host:port
    bank: str  # host:port
    model: str  # the base model's name
    namespace: str
    top_k: int | None
    concurrency: int


@dataclass(frozen=True, slots=True)
class Record:
    """One answer."""

    set_name: str
    method: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    em: float
    f1: float
    gold_retrieved: bool  # the document that answers it was among the retrieved
    error: str  # empty where the server answered


async def ask_all(
    endpoint: Endpoint, data: EvalData, learner: Learner, methods: Sequence[str], seed: int, out: Path
) -> list[Record]:
    """Every question under every method, interleaved, ``concurrency`` at a time; each answer a line of ``out``."""
    import httpx
    from tqdm import tqdm

    askings = await _retrieve(endpoint, data, learner, seed)
    jobs = [(asking, hits, method) for asking, hits in askings for method in methods]
    gate = asyncio.Semaphore(endpoint.concurrency)
    records: list[Record] = []
    with out.open("w", encoding="utf-8") as file, tqdm(total=len(jobs), unit="answer", desc="eval") as bar:
        async with httpx.AsyncClient(base_url=endpoint.server, timeout=_TIMEOUT_S) as client:

            async def one(asking: Asking, gold_retrieved: bool, method: str) -> None:
                async with gate:
                    record = await _ask(client, endpoint, asking, gold_retrieved, method)
                records.append(record)
                file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
                bar.update()

            await asyncio.gather(*(one(*job) for job in jobs))
    return records


async def _ask(client: Any, endpoint: Endpoint, asking: Asking, gold_retrieved: bool, method: str) -> Record:
    import httpx

    body = {"model": endpoint.model, "temperature": 0, "max_tokens": MAX_TOKENS, **METHODS[method](asking)}
    if "regrad" in body:
        body["regrad"] = {**body["regrad"], "namespace": endpoint.namespace}
    prediction = error = ""
    try:
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code == 200:
            prediction = (response.json()["choices"][0]["message"]["content"] or "").strip()
        else:
            error = f"{response.status_code}: {response.text[:300]}"
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"
    question = asking.question
    return Record(
        question.set_name, method, question.question, question.answers, prediction,
        exact_match(prediction, question.answers), token_f1(prediction, question.answers), gold_retrieved, error,
    )  # fmt: skip


async def _retrieve(endpoint: Endpoint, data: EvalData, learner: Learner, seed: int) -> list[tuple[Asking, bool]]:
    """What the bank finds for each question, by the server's own retrieval, and whether the gold document is in it."""
    bank = BankClient(endpoint.bank, learner.spec, timeout_ms=60_000)
    rng = random.Random(f"regrad.evaluate.wrong.{seed}")
    top_k = endpoint.top_k or learner.config.top_k
    found = []
    try:
        for question in data.questions:
            query = Query(namespace=endpoint.namespace, text=question.question, top_k=top_k, with_text=True)
            hits = await bank.query(query)
            asking = Asking(
                question, [(hit.title, hit.text) for hit in hits], _other_document(data, question, rng),
                learner.config.prompts, endpoint.top_k,
            )  # fmt: skip
            found.append((asking, question.document_id in {hit.id for hit in hits}))
    finally:
        await bank.close()
    return found


def _other_document(data: EvalData, question: EvalQuestion, rng: random.Random) -> str:
    """A document that another question of the same set is about."""
    others = {other.document_id for other in data.questions if other.set_name == question.set_name}
    others.discard(question.document_id)
    if not others:
        raise ValueError(f"set {question.set_name!r} must have questions about two documents at least, for the control")
    return rng.choice(sorted(others))
