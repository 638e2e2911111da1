"""The parts that all codecs share: the shape of a gradient, the codec's protocol, and its error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Buffer = bytes | bytearray | memoryview

MAX_VALUES = 2**30  # far above any learner: rank 16 on all layers of an 8B model has 2**25 values
_SLICE_VALUES = 2**20  # values processed at once; a multiple of every block size


class GradientFormatError(ValueError):
    """A gradient record, or the values for one, violate the format."""


@dataclass(frozen=True, slots=True)
class GradientSpec:
    """The shape of a gradient: its learner and the tensors in its flat vector."""

    fingerprint: str  # of the learner, 64 hex digits
    layout_id: str  # 16 hex digits
    shapes: tuple[tuple[int, int], ...]  # of each tensor in layout order, for codecs that work per tensor

    def __post_init__(self) -> None:
        for name, value, digits in (("fingerprint", self.fingerprint, 64), ("layout_id", self.layout_id, 16)):
            if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
                raise ValueError(f"{name} must be {digits} lower-case hex digits, got {value[:80]!r}")
        if not self.shapes or any(len(shape) != 2 or min(shape) < 1 for shape in self.shapes):
            raise ValueError(f"shapes must be pairs of positive sizes, got {self.shapes!r:.200}")
        if self.num_values > MAX_VALUES:
            raise ValueError(f"num_values must be at most {MAX_VALUES}, got {self.num_values}")

    @property
    def num_values(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


class Decoder(Protocol):
    """Reads the payloads of a codec."""

    @property
    def name(self) -> str:
        """The name in a record's header: 1 to 16 characters of ASCII."""

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        """The largest size of a payload for ``spec``, in bytes."""

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        """GradientFormatError unless ``decode`` would succeed with finite values. It allocates little memory."""

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        """Writes a checked payload's values into ``out``, float32 (num_values,)."""


class Codec(Decoder, Protocol):
    """Encodes values as a payload, too. Payloads are canonical: equal values give equal bytes."""

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        """The payload of finite ``values``, float32 (num_values,). GradientFormatError if they exceed the codec's
        range."""


def slices(num_values: int) -> Iterator[slice]:
    for start in range(0, num_values, _SLICE_VALUES):
        yield slice(start, min(start + _SLICE_VALUES, num_values))


def check_length(codec: str, payload: memoryview, expected: int) -> None:
    if payload.nbytes != expected:
        raise GradientFormatError(f"a {codec} payload must be {expected} bytes for this layout, got {payload.nbytes}")
