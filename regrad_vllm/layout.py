"""The layout: one fixed order of a learner's LoRA tensors, so that a document is one flat vector.

Layers ascend. Within a layer the modules keep the learner's order. Within a module A comes before B. Every tensor is
C-contiguous in the flat vector. It works with numpy arrays and torch tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeVar

Part = Literal["A", "B"]


class FlatArray(Protocol):
    """The operations on numpy arrays and torch tensors that the layout uses."""

    def __getitem__(self, item: slice, /) -> FlatArray: ...
    def reshape(self, shape: tuple[int, int], /) -> FlatArray: ...


ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True, slots=True)
class LoraTensor:
    """One LoRA tensor of a learner and its place in the flat vector."""

    module: str  # full module path in the base model, e.g. "model.layers.15.mlp.gate_proj"
    part: Part  # "A": (rank, in_features); "B": (out_features, rank)
    shape: tuple[int, int]
    offset: int  # index of the first value

    @property
    def num_values(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def slice(self) -> slice:
        return slice(self.offset, self.offset + self.num_values)


@dataclass(frozen=True)
class Layout:
    """All LoRA tensors of a learner in order."""

    rank: int
    tensors: tuple[LoraTensor, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.tensors or len(self.tensors) % 2:
            raise ValueError(f"tensors must come in pairs A, B, got {len(self.tensors)} of them")
        offset = 0
        for index, tensor in enumerate(self.tensors):
            rank = tensor.shape[0] if tensor.part == "A" else tensor.shape[1]
            if tensor.part != "AB"[index % 2] or tensor.offset != offset or rank != self.rank:
                raise ValueError(f"tensor {index} ({tensor}) breaks the order A, B or the rank {self.rank}")
            if index % 2 and tensor.module != self.tensors[index - 1].module:
                raise ValueError(f"tensor {index} must belong to {self.tensors[index - 1].module}, got {tensor.module}")
            offset += tensor.num_values

    @classmethod
    def build(cls, rank: int, modules: Sequence[tuple[str, int, int]]) -> Layout:
        """Layout of ``modules``: (module path, in_features, out_features) in order."""
        tensors: list[LoraTensor] = []
        offset = 0
        for module, in_features, out_features in modules:
            shapes: tuple[tuple[Part, tuple[int, int]], ...] = (("A", (rank, in_features)), ("B", (out_features, rank)))
            for part, shape in shapes:
                tensors.append(LoraTensor(module, part, shape, offset))
                offset += shape[0] * shape[1]
        return cls(rank, tuple(tensors))

    @cached_property
    def num_values(self) -> int:
        return sum(tensor.num_values for tensor in self.tensors)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        return tuple(tensor.module for tensor in self.tensors[::2])

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple(tensor.shape for tensor in self.tensors)

    @cached_property
    def id(self) -> str:
        """16 hex digits. Equal ids mean equal tensors in equal order."""
        plain = [self.rank, [[tensor.module, tensor.part, *tensor.shape] for tensor in self.tensors]]
        return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()[:16]

    def views(self, flat: ArrayT) -> Iterator[tuple[LoraTensor, ArrayT]]:
        """Each tensor with its view into ``flat`` (num_values,)."""
        for tensor in self.tensors:
            yield tensor, flat[tensor.slice].reshape(tensor.shape)  # type: ignore[index]
