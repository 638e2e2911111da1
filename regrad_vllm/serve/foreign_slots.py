"""Slots in which an operator's own adapter has been: they are emptied before they are ours again.

vLLM empties a slot before it writes an adapter there. Ours write their own values alone. So
the values of another adapter must go first: in modules that the learner doesn't adapt, and in ranks above its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class ForeignSlots:
    """Thread-safe as long as a slot has one owner at a time, which ``Slots`` sees to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """``tensors``: all that hold slots, the slot first in their shapes."""
        self._tensors = tensors
        self._slots: set[int] = set()

    def add(self, slot: int) -> None:
        """Another adapter is about to be written there."""
        self._slots.add(slot)

    def clear(self, slot: int) -> None:
        """Zeros where another adapter was; nothing where none was."""
        if slot in self._slots:
            for tensor in self._tensors:
                tensor[slot].zero_()
            self._slots.discard(slot)
