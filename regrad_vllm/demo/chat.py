"""Asks a running server many questions at once, as any OpenAI client does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regrad_vllm.http_client import connect, server_errors

_MAX_TOKENS = 24
_TIMEOUT_SECONDS = 600.0


class AskError(RuntimeError):
    """The server refused a request or sent a malformed answer. The message is the server's."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request. ``regrad`` is the field "regrad" of the request's body; None asks the base model."""

    model: str
    question: str
    regrad: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    text: str
    documents: tuple[tuple[str, float], ...]  # (id, score) of the gradients used, best first
    prompt_tokens: int  # with the chat template


async def ask_all(
    base_url: str, system_prompt: str, asks: Sequence[ChatRequest], *, progress: bool = True
) -> list[ChatAnswer]:
    """Sends all requests at the same time, with a progress bar. Returns the answers in their order. AskError,
    ServerError."""
    from tqdm import tqdm

    with server_errors(), tqdm(total=len(asks), unit="answer", desc="ask", disable=None if progress else True) as bar:
        async with connect(base_url, _TIMEOUT_SECONDS) as client:

            async def one(ask: ChatRequest) -> ChatAnswer:
                answer = await _ask(client, system_prompt, ask)
                bar.update()
                return answer

            return await asyncio.gather(*map(one, asks))


async def _ask(client: Any, system_prompt: str, ask: ChatRequest) -> ChatAnswer:
    body: dict[str, Any] = {
        "model": ask.model,
        "messages": [{"role": "system", "content": system_prompt}, {"role": "user", "content": ask.question}],
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
    }
    if ask.regrad is not None:
        body["regrad"] = dict(ask.regrad)
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise AskError(f"the server answered {response.status_code} to {ask.question!r}: {response.text[:500]}")
    result = response.json()
    used = result.get("regrad") or {}
    documents = tuple((document["id"], float(document["score"])) for document in used.get("documents", ()))
    text, tokens = result["choices"][0]["message"]["content"].strip(), int(result["usage"]["prompt_tokens"])
    return ChatAnswer(text, documents, tokens)
