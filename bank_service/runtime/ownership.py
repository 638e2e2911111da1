"""The contract of ownership. Only the owner may write to a bank's stores."""

from __future__ import annotations

from typing import Protocol


class Ownership(Protocol):
    """The right to write, for one process at a time. It ends with the process, even if the process is killed."""

    def take(self) -> None:
        """Becomes the owner. BankInUseError if another process is the owner, OSError if the folder can't be written."""

    def check_free(self) -> None:
        """Changes nothing. BankInUseError where ``take`` would raise it now."""

    def release(self) -> None:
        """Ends the ownership, if there is one."""
