"""The methods compared. They differ in their adapter, and in how much of the documents the prompt shows.

All sample greedily with the learner's system prompt, and all take the same hits from the same bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# none: the base model. learner: φ* alone. retrieved: the hits of the question. gold: the document that answers it.
# wrong: the hits of another question of the same set; no hit answers this one. random: any other document.
# own: a plain LoRA adapter, served beside ReGrad.
Adapter = Literal["none", "learner", "retrieved", "gold", "wrong", "random", "own"]
Shown = Literal["nothing", "cue", "documents"]  # cue: the hits' sentences nearest to the question

MAX_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    label: str
    adapter: Adapter
    shows: Shown = "nothing"  # of the hits, in the prompt
    per_document: bool = False  # uses a tuned LoRA for each document, kept in a separate namespace, not its gradient
    raw: bool = False  # uses a learner without meta-training, with a separate bank and server
    shared_adapter: str = ""  # another method whose own adapter this one uses

    @property
    def own_adapter(self) -> str:
        """The name of the method's own adapter."""
        return self.shared_adapter or self.name


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("base", "base model, closed book", "none"),
            Method("learner", "φ* alone", "learner"),
            Method("rag", "RAG", "none", shows="documents"),
            Method("rag_learner", "RAG + φ*", "learner", shows="documents"),
            Method("ft_rag", "RAG + LoRA tuned for it (FT-RAG)", "own", shows="documents"),
            Method("rag_sentence", "RAG of sentences", "none", shows="cue"),
            Method("rag_learner_sentence", "RAG of sentences + φ*", "learner", shows="cue"),
            Method("ft_rag_sentence", "FT-RAG of sentences", "own", shows="cue", shared_adapter="ft_rag"),
            Method("cpt", "continual pre-training on the corpus (CPT)", "own"),
            Method("prag", "a LoRA per document (PRAG)", "retrieved", per_document=True),
            Method("raw_gradient", "raw gradients, no meta-training", "retrieved", raw=True),
            Method("regrad", "ReGrad", "retrieved"),
            Method("regrad_cue", "ReGrad + sentences", "retrieved", shows="cue"),
            Method("regrad_icl", "ReGrad + ICL", "retrieved", shows="documents"),
            Method("regrad_gold", "ReGrad, the right document given", "gold"),
            Method("regrad_wrong", "ReGrad, another question's documents", "wrong"),
            Method("regrad_random", "ReGrad, a random document", "random"),
        )
    }
)
DEFAULT_METHODS = (
    "base", "learner", "rag", "rag_learner", "ft_rag", "ft_rag_sentence", "regrad", "regrad_cue", "regrad_icl",
    "regrad_wrong", "regrad_random",
)  # fmt: skip
# The most important differences, paired over the same questions.
COMPARISONS = (
    ("regrad", "rag_learner"),
    ("regrad_icl", "ft_rag"),
    ("regrad", "rag"),
    ("regrad", "learner"),
    ("regrad", "regrad_wrong"),
    ("regrad_icl", "rag_learner"),
    ("regrad_cue", "ft_rag_sentence"),
    ("regrad_cue", "rag_learner_sentence"),
    ("regrad_cue", "ft_rag"),
    ("regrad_cue", "regrad"),
)
