"""The result of a check of the engines that a bank stands on."""

from __future__ import annotations

from dataclasses import dataclass

NO_START = "the bank doesn't start"


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that an engine lacks."""

    missing: str
    cost: str  # to the bank's users
    remedy: str

    @property
    def stops(self) -> bool:
        """Without it the bank can't start."""
        return self.cost == NO_START


@dataclass(frozen=True, slots=True)
class EngineState:
    """One engine."""

    engine: str
    reached: bool | None  # None: not used, or not asked
    version: str = ""
    lacks: tuple[Lack, ...] = ()
