"""A step plan → token batches for the meta-step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regrad_vllm.encode.adapted_model import TokenBatch
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learn.meta_step import MetaBatch
from regrad_vllm.learn.tasks import Passage, StepPlan


def make_batch(plan: StepPlan, builder: PromptBuilder, max_document_tokens: int, device: torch.device) -> MetaBatch:
    """Tokenises the plan's documents, prompts and answers."""
    documents = [(builder.document(*task.passage, max_document_tokens)[0], 1) for task in plan.tasks]
    return MetaBatch(
        TokenBatch.pad(documents, device),
        _questions(plan, plan.shown, builder, device),
        torch.tensor(plan.mix, device=device),
        torch.tensor(plan.scores, device=device),
    )


def make_reading(plan: StepPlan, builder: PromptBuilder, device: torch.device) -> TokenBatch:
    """The plan's questions, packed as in ``make_batch``, but with all documents that they need in the prompt."""
    shown = [[passages] * len(pairs) for passages, pairs in zip(plan.answering, plan.questions, strict=True)]
    return _questions(plan, shown, builder, device)


def _questions(
    plan: StepPlan, shown: Sequence[Sequence[Sequence[Passage]]], builder: PromptBuilder, device: torch.device
) -> TokenBatch:
    groups: list[list[tuple[list[int], int]]] = []
    for pairs, passages_of in zip(plan.questions, shown, strict=True):
        groups.append([])
        for (question, answer), passages in zip(pairs, passages_of, strict=True):
            prompt = builder.question(question, [builder.prompts.render_document(*passage) for passage in passages])
            groups[-1].append((prompt + builder.answer(answer), len(prompt)))
    return TokenBatch.pack(groups, device)
