"""The contract of an encoder. The command line hands one in; the bank imports none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bank_service.wire.codec import FloatArray, GradientSpec


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """One document's δ."""

    values: FloatArray  # (num_values,)
    num_tokens: int  # that the encoder read
    truncated: bool  # the document was longer than that


class Encoder(Protocol):
    """Documents → gradients of one learner."""

    @property
    def spec(self) -> GradientSpec:
        """Of every gradient that this encoder makes."""

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        """δ of each (title, text), in order. Blocking; called from one thread at a time.

        ValueError names a document that has no token to learn from.
        """
