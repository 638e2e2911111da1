"""A step plan → token batches for the meta-step."""

from __future__ import annotations

import torch

from regrad_vllm.encode.adapted_model import TokenBatch
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learn.meta_step import MetaBatch
from regrad_vllm.learn.tasks import StepPlan


def make_batch(plan: StepPlan, builder: PromptBuilder, max_document_tokens: int, device: torch.device) -> MetaBatch:
    """Tokenises documents, prompts and answers; in icl plans the prompt shows the documents that are mixed in."""
    documents = [(builder.document(task.title, task.text, max_document_tokens)[0], 1) for task in plan.tasks]
    groups: list[list[tuple[list[int], int]]] = []
    for index, pairs in enumerate(plan.questions):
        shown = [
            builder.prompts.render_document(plan.tasks[other].title, plan.tasks[other].text)
            for other in _by_score(plan, index)
            if plan.icl
        ]
        groups.append([])
        for question, answer in pairs:
            prompt = builder.question(question, shown)
            groups[-1].append((prompt + builder.answer(answer), len(prompt)))
    return MetaBatch(
        TokenBatch.pad(documents, device),
        TokenBatch.pack(groups, device),
        torch.tensor(plan.mix, device=device),
        torch.tensor(plan.scores, device=device),
    )


def _by_score(plan: StepPlan, task: int) -> list[int]:
    """The documents in the adapter of a task, best first, as a server shows them."""
    mixed = [other for other, weight in enumerate(plan.mix[task]) if weight]
    return sorted(mixed, key=lambda other: -plan.scores[task][other])
