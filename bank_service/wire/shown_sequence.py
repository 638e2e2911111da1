"""The sequence that a client shows in a call's metadata, under ``regrad-sequence``: of the last change that it made.

A query's answer has this change, also where the bank reads a replica. Above the bank's last sequence, the bank reads no
replica.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from bank_service.errors import InvalidArgumentError

KEY = "regrad-sequence"
NEWEST = 2**63 - 1  # above every sequence


class ShownSequence:
    """The sequence of one client. Safe to use from many threads."""

    def __init__(self) -> None:
        self._value = 0
        self._is_unknown = False

    def advance(self, sequence: int) -> None:
        """The client has made this change."""
        self._value = max(self._value, sequence)
        self._is_unknown = False

    def lose(self) -> None:
        """The client may have made a change without an answer. Until ``advance``, it asks for the newest state."""
        self._is_unknown = True

    @contextmanager
    def change(self) -> Iterator[None]:
        """A change is made inside the block. Any error loses it."""
        try:
            yield
        except BaseException:
            self.lose()
            raise

    def metadata(self, *, newest: bool = False) -> list[tuple[str, str]]:
        """For a call. ``newest``: the answer must have every change acknowledged before."""
        value = NEWEST if newest or self._is_unknown else self._value
        return [(KEY, str(value))] if value else []


def shown_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> int | None:
    """The sequence in a call's metadata, 0 without one. None: the caller wants the newest state.

    InvalidArgumentError.
    """
    given = [value for key, value in metadata or () if key == KEY]
    for value in given:
        if not (isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 19):
            raise InvalidArgumentError(f"{KEY} must be a sequence, 0 or more, got {value!r}", field=KEY)
    shown = max(map(int, given), default=0)
    return shown if shown < NEWEST else None
