"""Mends or drops the control characters in a text: traces of another encoding, or of a terminal."""

from __future__ import annotations

import re

# A terminal's colours and moves, then single characters: without white space, and without the zero byte of binary data.
_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x01-\x08\x0e-\x1f\x7f-\x9f]")


def mend(text: str) -> tuple[str, int]:
    """The text without control characters, and their number. A terminal's escape counts as one.

    Those from U+0080 to U+009F are read as Windows-1252: they are its quotation marks and dashes, decoded as Latin-1.
    The others are dropped.
    """
    return _CONTROL.subn(_mended, text)


def _mended(found: re.Match[str]) -> str:
    return bytes([ord(found[0])]).decode("cp1252", "ignore") if found[0] >= "\x80" else ""
