"""The texts of a learner's prompts: templates that are filled in at the names in braces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompts:
    """The templates that a learner was trained with. ValueError for one without a name that it needs."""

    system: str = "Answer the question with a short phrase."
    document: str = "{title}\n{text}"
    document_untitled: str = "{text}"
    blind: str = "{question}"
    icl: str = "{documents}\n\n{question}"

    def __post_init__(self) -> None:
        for name, needed in (
            ("document", ("{title}", "{text}")),
            ("document_untitled", ("{text}",)),
            ("blind", ("{question}",)),
            ("icl", ("{documents}", "{question}")),
        ):
            for placeholder in needed:
                if placeholder not in getattr(self, name):
                    raise ValueError(f"prompts.{name} must contain {placeholder}, got {getattr(self, name)!r}")

    def render_document(self, title: str, text: str) -> str:
        """The text whose language-model loss is the inner loss."""
        return _fill(self.document if title else self.document_untitled, title=title, text=text)

    def render_blind(self, question: str) -> str:
        return _fill(self.blind, question=question)

    def render_icl(self, question: str, documents: Sequence[str]) -> str:
        """``documents``: rendered, best first."""
        return _fill(self.icl, question=question, documents="\n\n".join(documents))

    def messages(self, content: str) -> list[dict[str, str]]:
        """The chat messages: the system prompt, if there is one, and the user's text."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": content}]


def _fill(template: str, **values: str) -> str:
    """Fills in every {name} in one pass, so that braces in a value stay unchanged."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)
