"""Asks a running server every question under every method. Every request gives a record, even if it fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from regrad_vllm.data.questions import Question
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.evaluate.methods import MAX_ANSWER_TOKENS, Method
from regrad_vllm.evaluate.retrieve import Retrieved
from regrad_vllm.evaluate.scoring import exact_match, score
from regrad_vllm.http_client import connect
from regrad_vllm.prompts import Prompts

PER_DOCUMENT = "-prag"  # the end of the namespace that holds a tuned LoRA for each document
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, its bank, and the settings of all requests."""

    server: str  # http://host:port
    bank: str  # host:port
    model: str  # the base model's name
    namespace: str
    top_k: int
    gamma: float
    concurrency: int


@dataclass(frozen=True, slots=True)
class Record:
    """One answer."""

    question_id: str
    document_id: str  # the best of the documents that answer it
    set_name: str
    method: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    em: float
    f1: float  # accuracy (0 or 1) for questions of the kinds "yesno" and "choice"
    gold_retrieved: bool  # a document that answers the question was among the hits
    error: str  # empty if the server answered
    answer_nll: float | None = None  # mean negative log-likelihood of the first answer's tokens; None: not asked for


async def ask_all(
    endpoint: Endpoint,
    prompts: Prompts,
    questions: Sequence[Retrieved],
    methods: Sequence[Method],
    out: Path,
    builder: PromptBuilder | None = None,
) -> list[Record]:
    """Asks every question under every method, with the methods in turns. Each answer becomes a line of ``out``.

    ``endpoint.concurrency`` requests run at the same time. With ``builder`` a second request for each question gets the
    likelihood of the right answer.
    """
    from tqdm import tqdm

    jobs = [(question, method) for question in questions for method in methods]
    permits = asyncio.Semaphore(endpoint.concurrency)
    records: list[Record] = []
    with out.open("a", encoding="utf-8") as file, tqdm(total=len(jobs), unit="answer", desc="eval") as bar:
        async with connect(endpoint.server, _TIMEOUT_S) as client:

            async def one(asked: Retrieved, method: Method) -> None:
                async with permits:
                    body = request_of(endpoint, prompts, asked, method)
                    prediction, error = await _ask(client, body)
                    nll = await _nll(client, body, builder, asked, method) if builder and not error else None
                records.append(replace(record_of(asked, method, prediction, error), answer_nll=nll))
                file.write(json.dumps(asdict(records[-1]), ensure_ascii=False) + "\n")
                bar.update()

            await asyncio.gather(*(one(*job) for job in jobs))
    return records


def request_of(endpoint: Endpoint, prompts: Prompts, asked: Retrieved, method: Method) -> dict[str, Any]:
    """The body of the chat request."""
    question = asked.question.question
    namespace = endpoint.namespace + PER_DOCUMENT if method.per_document else endpoint.namespace
    # The prompt has its text already, whatever the server's mode is.
    options: dict[str, Any] = {"namespace": namespace, "gamma": endpoint.gamma, "mode": "blind"}
    if method.adapter == "none":
        options = {"enabled": False}  # a server may apply ReGrad by default
    elif method.adapter == "learner":
        options |= {"query": question, "gamma": 0.0}  # γ = 0: φ* alone
    elif method.adapter == "retrieved":
        options["query"] = question
    elif method.adapter == "wrong":
        options["query"] = asked.wrong_query or ""
    elif method.adapter in ("gold", "random"):
        options["document_ids"] = [asked.question.documents[0] if method.adapter == "gold" else asked.random_id]
    if "query" in options:
        options |= {
            "top_k": endpoint.top_k,
            "min_score": -1.0,
        }  # the same documents that RAG shows, whatever the server's settings
    texts = shown(asked, method, prompts)
    content = prompts.render_icl(question, texts) if texts else prompts.render_blind(question)
    return {
        "model": method.own_adapter if method.adapter == "own" else endpoint.model,
        "messages": [{"role": "system", "content": prompts.system}, {"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": MAX_ANSWER_TOKENS,
        **({} if method.adapter == "own" else {"regrad": options}),
    }


def shown(asked: Retrieved, method: Method, prompts: Prompts) -> list[str]:
    """The rendered documents or sentences for the prompt, best first; empty for a method that shows none."""
    documents = tuple((hit.title, hit.text) for hit in asked.hits)
    passages = {"nothing": (), "cue": asked.cue, "documents": documents}[method.shows]
    return [prompts.render_document(*passage) for passage in passages]


def record_of(asked: Retrieved, method: Method, prediction: str, error: str = "") -> Record:
    """Scores one answer. A missing answer is wrong."""
    question: Question = asked.question
    return Record(
        question_id=question.id,
        document_id=question.documents[0],
        set_name=question.set_name,
        method=method.name,
        question=question.question,
        answers=question.answers,
        prediction=prediction,
        em=exact_match(prediction, question.answers),
        f1=score(prediction, question.answers, question.kind),
        gold_retrieved=asked.gold_retrieved,
        error=error,
    )


async def _ask(client: Any, body: dict[str, Any]) -> tuple[str, str]:
    """(answer, error). One of the two is empty."""
    import httpx

    try:
        response = await client.post("/v1/chat/completions", json=body)
    except httpx.HTTPError as failure:
        return "", f"{type(failure).__name__}: {failure}"
    if response.status_code != 200:
        return "", f"{response.status_code}: {response.text[:300]}"
    return (response.json()["choices"][0]["message"]["content"] or "").strip(), ""


async def _nll(
    client: Any, body: dict[str, Any], builder: PromptBuilder, asked: Retrieved, method: Method
) -> float | None:
    """Mean −log p of the first answer's tokens and the end token, under the same model and adapter.

    None if the server refuses.
    """
    import httpx

    question = asked.question
    prompt = builder.question(question.question, shown(asked, method, builder.prompts))
    answer = builder.answer(question.answers[0])
    scored = {name: value for name, value in body.items() if name in ("model", "temperature", "regrad")}
    scored |= {"prompt": prompt + answer, "max_tokens": 1, "prompt_logprobs": 0}
    try:
        response = await client.post("/v1/completions", json=scored)
        response.raise_for_status()
    except httpx.HTTPError:
        return None
    positions = response.json()["choices"][0]["prompt_logprobs"][-len(answer) :]
    return -float(sum(next(iter(position.values()))["logprob"] for position in positions)) / len(answer)
