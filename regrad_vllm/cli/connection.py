"""The command line's connection to a bank: plain blocking gRPC."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_vllm.cli.console import CommandError, count, one_line

if TYPE_CHECKING:
    from bank_service.wire.errors import BankError

DEFAULT_PORT = 50061
DEFAULT_BANK = f"127.0.0.1:{DEFAULT_PORT}"
_CREDENTIALS = {
    "token_file": "file with the token for the bank",
    "ca": "PEM of who signed the bank's certificate, 'system' for the well-known ones; switches TLS on",
    "cert": "PEM of your certificate, where the bank asks for one",
    "key": "PEM of its key",
}


def add_bank_flags(parser: argparse.ArgumentParser, *, namespace: bool = True) -> None:
    """--bank and --namespace, for every command that talks to a bank."""
    parser.add_argument("--bank", default=DEFAULT_BANK, metavar="HOST:PORT", help="a running bank (%(default)s)")
    add_credential_flags(parser)
    if namespace:
        parser.add_argument("--namespace", default="default", help="whose documents (%(default)s)")


def add_credential_flags(parser: argparse.ArgumentParser) -> None:
    """What a bank may ask of its clients."""
    for name, what in _CREDENTIALS.items():
        flag = f"--bank-{name.replace('_', '-')}"
        variable = f"REGRAD_BANK_{name.upper()}"
        parser.add_argument(
            flag, action=_Export, const=variable, type=Path, metavar="FILE", help=f"{what} (${variable})"
        )


class _Export(argparse.Action):
    """A flag for a variable of the environment, where this process and its children look when they make a channel."""

    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        os.environ[str(self.const)] = str(values)


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """A stub of the bank's service; a failed call inside is a CommandError that says what the bank said."""
    import grpc

    from bank_service.wire.channel import open_channel
    from bank_service.wire.errors import from_rpc_error
    from bank_service.wire.generated.bank_pb2_grpc import BankServiceStub

    with open_channel(address) as channel:
        try:
            yield BankServiceStub(channel)
        except grpc.RpcError as error:
            raise CommandError(describe_failure(address, from_rpc_error(error))) from error


def each_there(ids: Sequence[str], namespace: str, call: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """Each id with what ``call`` answers. Those that are not there are named by a CommandError at the end."""
    import grpc

    missing = []
    for id in ids:
        try:
            answer = call(id)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            missing.append(id)
        else:
            yield id, answer
    if missing:
        raise CommandError(
            f"{count(len(missing), 'id')} not in namespace {namespace!r}: {', '.join(map(one_line, missing))}"
        )


def describe_failure(address: str, error: BankError) -> str:
    """One line for a failed call."""
    from bank_service.wire.errors import UnauthenticatedError, UnavailableError

    if isinstance(error, UnauthenticatedError):
        return f"{error.message}; name a file with the token: --bank-token-file or REGRAD_BANK_TOKEN_FILE"
    if isinstance(error, UnavailableError):
        advice = "start one with `regrad bank` or name it with --bank"
        reason = "no connection" if "failed to connect" in error.message else error.message
        return f"the bank at {address} is not available ({reason}); {advice}"
    return error.message
