"""The contract of an encoder. The bank imports no encoder; the command line passes one in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bank_service.wire.record import FloatArray, GradientSpec


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """One document's gradient δ."""

    values: FloatArray  # float32 (num_values,)
    num_tokens: int  # tokens that the encoder read
    truncated: bool  # the document has more tokens


class Encoder(Protocol):
    """Encodes documents as gradients of one learner."""

    @property
    def spec(self) -> GradientSpec:
        """The shape of every gradient that this encoder makes."""

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        """δ of each (title, text), in order. Blocking; called from one thread at a time.

        ValueError names a document that has no token to learn from.
        """

    def of_learner(self, folder: Path) -> Encoder:
        """An encoder of another learner of the same base model. Blocking, for seconds.

        ValueError for a learner that is damaged or belongs to another base model, OSError where there is none.
        """
