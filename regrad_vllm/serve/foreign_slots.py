"""Clears the slots that held an operator's own adapter, before a composed adapter uses them.

vLLM clears a whole slot before it writes an adapter. A composition writes only the learner's values. The values of an
operator's adapter must be cleared before, in modules that the learner doesn't adapt and in ranks above the learner's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class ForeignSlots:
    """The slots to clear. Thread-safe as long as a slot has one owner at a time, which ``Slots`` guarantees."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: all tensors that hold slots. The slot is the first dimension of each."""
        self._tensors = tensors
        self._slots: set[int] = set()

    def add(self, slot: int) -> None:
        """vLLM is about to write an operator's adapter into the slot."""
        self._slots.add(slot)

    def clear(self, slot: int) -> None:
        """Fills the slot with zeros if it held an operator's adapter."""
        if slot in self._slots:
            for tensor in self._tensors:
                tensor[slot].zero_()
            self._slots.discard(slot)
