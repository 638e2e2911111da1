"""Text → tokens. Meta-training, the bank's encoder and the evaluation all use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regrad_vllm.prompts import Prompts


class PromptBuilder:
    """Fills a learner's templates and tokenises them with the base model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, prompts: Prompts) -> None:
        self.prompts = prompts
        self._tokenizer = tokenizer

    def document(self, title: str, text: str, max_tokens: int) -> tuple[list[int], bool]:
        """The tokens of a document for the inner loss, and whether it was cut at ``max_tokens``.

        ValueError for a document without any token.
        """
        rendered = self.prompts.render_document(title, text)
        tokens = self._tokenizer(rendered, truncation=True, max_length=max_tokens + 1)["input_ids"]
        if not tokens:
            raise ValueError("document must have at least one token, got none; give it a text")
        return tokens[:max_tokens], len(tokens) > max_tokens

    def question(self, question: str, documents: Sequence[str] = ()) -> list[int]:
        """The tokens of the chat prompt up to the answer. With ``documents`` they stand in the prompt (mode "icl")."""
        content = (
            self.prompts.render_icl(question, list(documents)) if documents else self.prompts.render_blind(question)
        )
        messages = self.prompts.messages(content)
        tokens = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(tokens)

    def answer(self, answer: str) -> list[int]:
        """The tokens of an answer, with the end of the turn."""
        tokens = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*tokens, self._tokenizer.eos_token_id]
