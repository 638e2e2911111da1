"""Shared by all codecs: the shape of a gradient, the protocol, the error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs.sensitivity import Sensitivity

FloatArray = npt.NDArray[np.float32]
Buffer = bytes | bytearray | memoryview

MAX_VALUES = 2**30  # far above any learner: rank 16 on all of an 8B model is 2**25
_SLICE_VALUES = 2**20  # values worked on at once; a multiple of every block size


class GradientFormatError(ValueError):
    """A gradient record, or the values for one, break the format."""


@dataclass(frozen=True, slots=True)
class GradientSpec:
    """The shape of a gradient: its learner and the tensors in its flat vector."""

    fingerprint: str  # of the learner, 64 hex digits
    layout_id: str  # 16 hex digits
    shapes: tuple[tuple[int, int], ...]  # of each tensor in layout order, for codecs that work per tensor
    # Says which errors matter to this learner. Only encoding needs it.
    sensitivity: Sensitivity | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, value, digits in (("fingerprint", self.fingerprint, 64), ("layout_id", self.layout_id, 16)):
            if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
                raise ValueError(f"{name} must be {digits} lower-case hex digits, got {value[:80]!r}")
        if not self.shapes or any(len(shape) != 2 or min(shape) < 1 for shape in self.shapes):
            raise ValueError(f"shapes must be pairs of positive sizes, got {self.shapes!r:.200}")
        if self.num_values > MAX_VALUES:
            raise ValueError(f"num_values must be at most {MAX_VALUES}, got {self.num_values}")
        if self.sensitivity is not None:
            self.sensitivity.check(self.shapes)

    @property
    def num_values(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


class Codec(Protocol):
    """Values ↔ payload. Payloads are canonical: equal values give equal bytes."""

    @property
    def name(self) -> str:
        """1 to 16 characters of ASCII, as it stands in the header."""

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        """No payload for ``spec`` is larger."""

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        """Payload of finite ``values`` (num_values,). GradientFormatError where they don't fit its range."""

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        """GradientFormatError unless ``decode`` would succeed with finite values. Allocates nothing large."""

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        """Writes a checked payload's values into ``out`` (num_values,)."""


def slices(num_values: int) -> Iterator[slice]:
    for start in range(0, num_values, _SLICE_VALUES):
        yield slice(start, min(start + _SLICE_VALUES, num_values))


def check_length(codec: str, payload: memoryview, expected: int) -> None:
    if payload.nbytes != expected:
        raise GradientFormatError(f"a {codec} payload must be {expected} bytes for this layout, got {payload.nbytes}")
