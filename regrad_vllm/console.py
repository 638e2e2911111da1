"""The output and the errors of a command. An error is one line with fault and remedy, without a traceback."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import suppress
from typing import IO


class CommandError(Exception):
    """The command failed. The error is printed as one line, and the exit status is 1."""

    exit_status = 1


class UsageError(CommandError):
    """The command was used wrongly. The error is printed as one line, and the exit status is 2."""

    exit_status = 2


def prepare_output() -> None:
    """Fits the output to where it goes. CommandError if standard output is closed.

    Characters that the encoding lacks are escaped. Progress bars, also those of child processes, need a terminal.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the life of the process
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if sys.stdout is None:
        raise CommandError("standard output is closed; send it to a terminal, a file or /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_output(*, failed: bool) -> int:
    """0, or 1 if output couldn't be written. It is dropped, so that Python doesn't report it again at its end.

    The error is reported, unless the command failed anyway or the reader of the output has ended.
    """
    status = 0
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout)
        if not failed and not isinstance(error, BrokenPipeError):
            note(f"regrad: {error}")
        status = 1
    try:
        sys.stderr.flush()
    except OSError:  # notes that nobody can read are no failure
        _drop(sys.stderr)
    return status


def _drop(stream: IO[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str = "") -> None:
    """Prints one line of the result to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_json(value: object) -> None:
    """Prints a value as one line of JSON. It stays JSON where the output's encoding lacks some of its characters."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value)
    say(text)


def note(text: str) -> None:
    """Prints one line that isn't part of the result to standard error. It is lost if nobody can read it."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def count(number: int, noun: str) -> str:
    """A number and its noun: 1 document, 2 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(id: str) -> str:
    """The id, in quotes if it contains characters that can't be printed, such as line breaks."""
    return id if id.isprintable() else repr(id)
