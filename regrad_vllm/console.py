"""The output and the errors of a command. An error is one line with fault and remedy, without a traceback."""

from __future__ import annotations

import sys


class CommandError(Exception):
    """The command failed. The error is printed as one line, and the exit status is 1."""

    exit_status = 1


class UsageError(CommandError):
    """The command was used wrongly. The error is printed as one line, and the exit status is 2."""

    exit_status = 2


def say(text: str = "") -> None:
    """Prints one line of the result to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Prints one line that isn't part of the result to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def count(number: int, noun: str) -> str:
    """A number and its noun: 1 document, 2 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(id: str) -> str:
    """The id, in quotes if it contains characters that can't be printed, such as line breaks."""
    return id if id.isprintable() else repr(id)
