"""The limits of one namespace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NamespaceLimits:
    """The upper limits of one namespace. 0 stands for no limit."""

    max_documents: int = 0
    max_bytes: int = 0  # texts and gradients; a gradient counts for each document that has it
    max_requests: int = 0  # in flight; a stream is one


LimitsOf = Callable[[str], NamespaceLimits]


def unlimited(_namespace: str) -> NamespaceLimits:
    return NamespaceLimits()
