"""The methods compared. They differ in their adapter, and in whether the prompt shows the documents.

All sample greedily with the learner's system prompt, and all take the same hits from the same bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# none: the base model. learner: φ* alone. retrieved: the hits of the question. gold: the document that answers it.
# wrong: the hits of another question of the same set; no hit answers this one. random: any other document.
# own: a plain LoRA adapter with the method's name, served beside ReGrad.
Adapter = Literal["none", "learner", "retrieved", "gold", "wrong", "random", "own"]

MAX_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    label: str
    adapter: Adapter
    shows_documents: bool = False  # the prompt shows the hits
    per_document: bool = False  # uses a tuned LoRA for each document, kept in a separate namespace, not its gradient
    raw: bool = False  # uses a learner without meta-training, with a separate bank and server


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
# The most important differences, paired over the same questions.
COMPARISONS = (
    ("regrad", "rag_learner"),
    ("regrad_icl", "ft_rag"),
    ("regrad", "rag"),
    ("regrad", "learner"),
    ("regrad", "regrad_wrong"),
    ("regrad_icl", "rag_learner"),
)
