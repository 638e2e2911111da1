"""What would keep a bank from starting, asked before a model is loaded for it.

``BankServer.start`` asks again by taking folder and ports themselves: between the two anything can happen.
"""

from __future__ import annotations

import socket

from bank_service.config import BankConfig
from bank_service.data_dir import BankAddress, DataDir


def check_free(config: BankConfig) -> None:
    """BankInUseError where another bank has the folder; RuntimeError where none of the host's addresses can be had."""
    data_dir = DataDir(config.data_dir)
    data_dir.claim()
    data_dir.release()
    for flag, port in (("--port", config.port), ("--metrics-port", config.metrics_port)):
        if port:
            _check_port(config.host, port, flag)


def port_taken(host: str, port: int, flag: str) -> str:
    """The message."""
    return (
        f"the bank can't listen on {BankAddress(host, port, None).target}; choose another {flag} or --host, or end the "
        "program that has it"
    )


def _check_port(host: str, port: int, flag: str) -> None:
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise RuntimeError(f"host must be an address of this machine, got {host}: {error.strerror}") from error
    for family, _, _, _, address in found:
        try:
            socket.create_server(address, family=family).close()
        except OSError:
            continue
        return
    raise RuntimeError(port_taken(host, port, flag))
