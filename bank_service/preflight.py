"""What keeps a bank from starting, as far as it can be asked in a moment: before a model is loaded for it.

``BankServer.start`` asks again by taking the folder and the ports: between the two anything can happen.
"""

from __future__ import annotations

import errno
import os
import socket

from bank_service.config import BankConfig
from bank_service.data_dir import BankAddress, DataDir
from bank_service.tls import server_credentials
from bank_service.tokens_file import TokensFile


def check_startable(config: BankConfig) -> None:
    """Takes and creates nothing. BankInUseError where another bank has the folder; RuntimeError where a port can't be
    had; OSError, ValueError where the tokens file or a file for TLS can't be used."""
    DataDir(config.data_dir).check_free()
    if config.tokens_file is not None:
        TokensFile(config.tokens_file)
    server_credentials(config)
    for flag, port in (("--port", config.port), ("--metrics-port", config.metrics_port)):
        if port:
            _check_port(config.host, port, flag)


def cannot_listen(host: str, port: int, flag: str, error: OSError | None = None) -> str:
    """The message. ``error``: why, where the operating system said it."""
    target = BankAddress(host, port, None).target
    reason = "" if error is None else f" ({os.strerror(error.errno or 0)})"
    advice = f"choose another {flag} or --host"
    if error is None or error.errno == errno.EADDRINUSE:
        advice += ", or end the program that has it"
    return f"the bank can't listen on {target}{reason}; {advice}"


def _check_port(host: str, port: int, flag: str) -> None:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RuntimeError(f"host must be a name or an address of this machine, got {host!r}") from error
    refusal: OSError | None = None
    for family, _, _, _, address in found:
        try:
            socket.create_server(address, family=family).close()
        except OSError as error:
            refusal = error
        else:
            return  # as for gRPC, one of the host's addresses is enough
    raise RuntimeError(cannot_listen(host, port, flag, refusal)) from refusal
