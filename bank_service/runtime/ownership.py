"""The contract of ownership: who may write to a bank's stores."""

from __future__ import annotations

from typing import Protocol


class Ownership(Protocol):
    """The right to write, which one process has at a time. It ends with the process, however that ends."""

    def take(self) -> None:
        """Becomes the owner. BankInUseError where somebody else is; OSError where there is no place to own."""

    def check_free(self) -> None:
        """Changes nothing. BankInUseError where ``take`` would raise it now."""

    def release(self) -> None:
        """Ends the ownership, if there is one."""
