"""The methods compared: which adapter answers, and whether the documents stand in the prompt.

All ask greedily with the learner's system prompt and take the same hits from the same bank. So they differ in nothing
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# none: the base model. learner: φ* alone. retrieved: the hits of the question. gold: the document that answers it.
# wrong: the hits of another question of the same set, none of which answers this one. random: one document, any.
# own: a plain LoRA adapter of the method's own name, served beside.
Adapter = Literal["none", "learner", "retrieved", "gold", "wrong", "random", "own"]

MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    label: str
    adapter: Adapter
    shows_documents: bool = False  # the hits stand in the prompt
    per_document: bool = False  # a tuned LoRA of each document in place of its gradient, in a namespace of their own
    raw: bool = False  # by a learner without meta-training, at a bank and server of its own


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("base", "base model, closed book", "none"),
            Method("learner", "φ* alone", "learner"),
            Method("rag", "RAG", "none", shows_documents=True),
            Method("rag_learner", "RAG + φ*", "learner", shows_documents=True),
            Method("ft_rag", "RAG + LoRA tuned for it (FT-RAG)", "own", shows_documents=True),
            Method("cpt", "continual pre-training on the corpus (CPT)", "own"),
            Method("prag", "a LoRA per document (PRAG)", "retrieved", per_document=True),
            Method("raw_gradient", "raw gradients, no meta-training", "retrieved", raw=True),
            Method("regrad", "ReGrad", "retrieved"),
            Method("regrad_icl", "ReGrad + ICL", "retrieved", shows_documents=True),
            Method("regrad_gold", "ReGrad, the right document given", "gold"),
            Method("regrad_wrong", "ReGrad, another question's documents", "wrong"),
            Method("regrad_random", "ReGrad, a random document", "random"),
        )
    }
)
DEFAULT_METHODS = (
    "base", "learner", "rag", "rag_learner", "ft_rag", "regrad", "regrad_icl", "regrad_wrong", "regrad_random",
)  # fmt: skip
# What a sceptic asks first: paired over the same questions.
COMPARISONS = (
    ("regrad", "rag_learner"),
    ("regrad_icl", "ft_rag"),
    ("regrad", "rag"),
    ("regrad", "learner"),
    ("regrad", "regrad_wrong"),
    ("regrad_icl", "rag_learner"),
)
