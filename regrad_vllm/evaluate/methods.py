"""The methods compared, each as the request that it makes of one running server.

Every request has the learner's system prompt and asks greedily, so that the methods differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from regrad_vllm.evaluate.datasets import EvalQuestion
from regrad_vllm.learner import Prompts

MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Asking:
    """One question and what the methods may use for it."""

    question: EvalQuestion
    retrieved: Sequence[tuple[str, str]]  # (title, text) of the bank's hits, best first
    wrong_document_id: str  # a document of the same set that doesn't answer it
    prompts: Prompts
    top_k: int | None  # None: the server's default


def _regrad(extra: Mapping[str, Any]) -> Callable[[Asking], dict[str, Any]]:
    def body(asking: Asking) -> dict[str, Any]:
        options: dict[str, Any] = {"query": asking.question.question, **extra}
        if asking.top_k is not None:
            options["top_k"] = asking.top_k
        return {"regrad": options, "messages": _messages(asking, asking.prompts.render_blind(asking.question.question))}

    return body


def _base(asking: Asking) -> dict[str, Any]:
    return {"messages": _messages(asking, asking.prompts.render_blind(asking.question.question))}


def _rag(asking: Asking) -> dict[str, Any]:
    documents = [asking.prompts.render_document(title, text) for title, text in asking.retrieved]
    return {"messages": _messages(asking, asking.prompts.render_icl(asking.question.question, documents))}


def _wrong(asking: Asking) -> dict[str, Any]:
    """One document, whatever top_k is: the control for k = 1."""
    return _base(asking) | {"regrad": {"document_ids": [asking.wrong_document_id]}}


def _gold(asking: Asking) -> dict[str, Any]:
    return _base(asking) | {"regrad": {"document_ids": [asking.question.document_id]}}


def _messages(asking: Asking, content: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": asking.prompts.system}, {"role": "user", "content": content}]


METHODS: Mapping[str, Callable[[Asking], dict[str, Any]]] = MappingProxyType(
    {
        "base": _base,
        "learner": _regrad({"gamma": 0.0}),  # φ* alone: the documents count nothing
        "regrad": _regrad({}),
        "regrad_wrong": _wrong,
        "regrad_gold": _gold,
        "rag": _rag,
        "rag_learner": _regrad({"gamma": 0.0, "mode": "icl"}),
        "regrad_icl": _regrad({"mode": "icl"}),
    }
)
DEFAULT_METHODS = ("base", "learner", "regrad", "regrad_wrong", "rag")
