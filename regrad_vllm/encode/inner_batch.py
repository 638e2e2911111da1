"""Documents, each with questions about it or without, as the rows of the inner loss.

A document's tokens are learnt as running text. Its questions are learnt as the model meets them when it serves: a chat
prompt, then the answer. So a later question finds the fact in the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.encode.token_batch import TokenBatch


@dataclass(frozen=True, slots=True)
class InnerRow:
    """One document as tokens."""

    tokens: list[int]
    truncated: bool  # the document has more tokens
    questions: list[tuple[list[int], int]]  # (prompt and answer, tokens of the prompt) each

    @property
    def length(self) -> int:
        return len(self.tokens) + sum(len(tokens) for tokens, _ in self.questions)


def inner_row(
    builder: PromptBuilder, title: str, text: str, questions: Sequence[tuple[str, str]], max_tokens: int
) -> InnerRow:
    """questions: (question, answer) each. ValueError for a document without any token."""
    tokens, truncated = builder.document(title, text, max_tokens)
    asked = [(builder.question(question), builder.answer(answer)) for question, answer in questions]
    return InnerRow(tokens, truncated, [(prompt + answer, len(prompt)) for prompt, answer in asked])


def inner_batch(rows: Sequence[InnerRow], question_weight: float, device: str | torch.device = "cpu") -> TokenBatch:
    """One row for each document. All its questions together count ``question_weight`` times as much as its text."""
    documents = TokenBatch.pad([(row.tokens, 1) for row in rows], device)
    if not any(row.questions for row in rows):
        return documents
    return documents.beside(TokenBatch.pack([row.questions for row in rows], device), question_weight)
