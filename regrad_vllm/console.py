"""The words and the failures of a command. A failure is one line with fault and remedy, without a traceback."""

from __future__ import annotations

import sys


class CommandError(Exception):
    """The command can't do its work. It is printed as one line, and the exit status is 1."""

    exit_status = 1


class UsageError(CommandError):
    """The command was given something that it can't use. It is printed as one line, and the exit status is 2."""

    exit_status = 2


def say(text: str = "") -> None:
    """One line of result, to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """One line beside the result, to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def count(number: int, noun: str) -> str:
    """A number and its noun: 1 document, 2 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(id: str) -> str:
    """An id as it is, or in quotes where it would spread over more than its part of a line."""
    return id if id.isprintable() else repr(id)
