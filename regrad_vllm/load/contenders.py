"""The ways to use what the bank finds, compared under load.

All get the same questions, the learner's system prompt, the same hits of the same bank and the same sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# regrad: vLLM with our plugin, one server for all of them. stock: vLLM without it. alone: no engine, one at a time.
Engine = Literal["regrad", "stock", "alone"]
# static: φ* as a plain LoRA adapter, the same for every request. composed: one of the request's own.
Adapter = Literal["none", "static", "composed"]


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    label: str
    engine: Engine
    adapter: Adapter
    shows_passages: bool = False  # the hits stand in the prompt

    @property
    def retrieves(self) -> bool:
        """Whether it asks the bank at all. Where it does, the asking is part of its times."""
        return self.shows_passages or self.adapter == "composed"


CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {
        contender.name: contender
        for contender in (
            Contender("base", "base model, closed book", "regrad", "none"),
            Contender("learner", "φ* alone, a static adapter", "regrad", "static"),
            Contender("rag", "RAG", "regrad", "none", shows_passages=True),
            Contender("rag_learner", "RAG + φ* as a static adapter", "regrad", "static", shows_passages=True),
            Contender("regrad", "ReGrad", "regrad", "composed"),
            Contender("regrad_icl", "ReGrad + ICL", "regrad", "composed", shows_passages=True),
            Contender("peft_folder", "stock vLLM, a PEFT folder per request", "stock", "composed"),
            Contender("published", "batch size 1, weights swapped and restored", "alone", "composed"),
        )
    }
)


def fair_rival(names: Collection[str]) -> str | None:
    """The RAG that ReGrad is compared with: the one with φ*, which was trained on questions as ReGrad was; else the
    untuned one; None where neither is among them."""
    return next((name for name in ("rag_learner", "rag") if name in names), None)
