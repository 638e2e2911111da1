"""The connection of a command to its bank: flags, and messages for failed calls."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bank_service.errors import BankError, DeadlineExceededError, NotFoundError, UnauthenticatedError, UnavailableError
from bank_service.wire.credentials import VARIABLES
from bank_service.wire.limits import DEFAULT_NAMESPACE
from bank_service.wire.ports import DEFAULT_BANK
from regrad_vllm.arguments import whole
from regrad_vllm.console import CommandError, count, one_line

if TYPE_CHECKING:
    from bank_service.wire.record import GradientSpec
    from regrad_vllm.client import Bank

T = TypeVar("T")

_CREDENTIALS = {
    "token_file": "file with the token for the bank",
    "ca": "PEM of who signed the bank's certificate, 'system' for the well-known ones; switches TLS on",
    "cert": "PEM of your certificate, where the bank asks for one",
    "key": "PEM of its key",
}


def add_bank_flags(parser: argparse.ArgumentParser, *, namespace: bool = True) -> None:
    """Adds --bank, --namespace and the flags for credentials, for every command that talks to a bank."""
    parser.add_argument("--bank", default=DEFAULT_BANK, metavar="HOST:PORT", help="a running bank (%(default)s)")
    add_credential_flags(parser)
    if namespace:
        parser.add_argument("--namespace", default=DEFAULT_NAMESPACE, help="whose documents (%(default)s)")


def add_timeout_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --timeout, for commands whose calls are short."""
    parser.add_argument(
        "--timeout", type=whole(1), default=20, metavar="SECONDS", help="longest wait for an answer (%(default)s)"
    )


def add_credential_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags for the credentials that a bank may require."""
    for name, what in _CREDENTIALS.items():
        flag, variable = f"--bank-{name.replace('_', '-')}", VARIABLES[name]
        parser.add_argument(
            flag, action=_Export, const=variable, type=Path, metavar="FILE", help=f"{what} (${variable})"
        )


class _Export(argparse.Action):
    """A flag that sets an environment variable. This process and its children read the variable when they connect."""

    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        os.environ[str(self.const)] = str(values)


@contextmanager
def connect(address: str, spec: GradientSpec | None = None, timeout_ms: int | None = None) -> Iterator[Bank]:
    """A client of the bank. A failed call inside the context becomes a CommandError with the bank's message."""
    from regrad_vllm.client import Bank

    with Bank(address, spec=spec, timeout_ms=timeout_ms) as bank:
        try:
            yield bank
        except BankError as error:
            raise CommandError(describe_failure(address, error)) from error


def each_there(ids: Sequence[str], namespace: str, call: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """(id, result of ``call``) for each id. At the end a CommandError names the unknown ids."""
    missing = []
    for id in ids:
        try:
            answer = call(id)
        except NotFoundError:
            missing.append(id)
        else:
            yield id, answer
    if missing:
        raise CommandError(
            f"{count(len(missing), 'id')} not in namespace {namespace!r}: {', '.join(map(one_line, missing))}"
        )


def describe_failure(address: str, error: BankError) -> str:
    """One line about a failed call, with the remedy."""
    if isinstance(error, UnauthenticatedError):
        return f"{error.message}; name a file with the token: --bank-token-file or REGRAD_BANK_TOKEN_FILE"
    if isinstance(error, DeadlineExceededError):
        return (
            f"the bank at {address} gave no answer in time; look at its log and at PostgreSQL, "
            "or wait longer with --timeout"
        )
    if isinstance(error, UnavailableError) and not error.by_bank:
        advice = "start one with `regrad bank` or name it with --bank"
        reason = "no connection" if "failed to connect" in error.message else error.message
        return f"the bank at {address} is not available ({reason}); {advice}"
    return error.message
