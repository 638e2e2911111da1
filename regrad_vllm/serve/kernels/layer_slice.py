"""One output of a layer, as the kernels of CPUs and of GPUs get it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_RANK = 512  # of a learner: the kernels are tested up to it


@dataclass(frozen=True, slots=True, eq=False)
class LayerSlice:
    """One of the outputs that a (merged) linear layer computes, such as gate of gate and up: this worker's shard."""

    outputs: int  # width of this slice in y on this worker
    a: Tensor | None = None  # φ*: (R, inputs on this worker), None where the learner has no part here
    b: Tensor | None = None  # φ*: (outputs, R), without the scaling
    tensor_a: int = -1  # index in the layout, −1 where documents have no part in A
    tensor_b: int = -1  # the same for B
    first_input: int = 0  # where this worker's shard begins in the long side of A
    first_output: int = 0  # where it begins in the long side of B
    whole: tuple[int, int] = (0, 0)  # the long sides of A and B over all workers; GPU kernels align reads by them

    def __post_init__(self) -> None:
        """ValueError if the shapes don't fit together, or documents have a part without φ*."""
        if self.a is None or self.b is None:
            if self.a is not None or self.b is not None or self.tensor_a >= 0 or self.tensor_b >= 0:
                raise ValueError("a slice must have both a and b where documents or the learner have a part")
            return
        rank = self.a.shape[0]
        if self.a.dim() != 2 or self.b.shape != (self.outputs, rank):
            raise ValueError(
                f"a must be (R, inputs), b ({self.outputs}, R), got {tuple(self.a.shape)} and {tuple(self.b.shape)}"
            )
        if self.first_input < 0 or self.first_output < 0:
            raise ValueError(f"a shard must begin at 0 or later, got {self.first_input} and {self.first_output}")
