"""Hosts and ports: joined to one text, on this machine or elsewhere, and free for a server to listen on or not."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

DEFAULT_PORT = 50061
DEFAULT_BANK = f"127.0.0.1:{DEFAULT_PORT}"  # the default address of a bank


def target_of(host: str, port: int) -> str:
    """For a gRPC channel."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_address(address: str, setting: str) -> None:
    """ValueError, which names ``setting``, for a list of nodes that gRPC would take for one name."""
    if "," in address and not address.startswith(("ipv4:", "ipv6:", "unix:")):
        raise ValueError(
            f"{setting} must be one HOST:PORT, or for several nodes ipv4:IP:PORT,IP:PORT or a name that has all their "
            f"addresses, dns:///NAME:PORT; got {address!r}"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``. False for any name but localhost, because a name may have any
    address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_port(what: str, host: str, port: int, flag: str) -> None:
    """RuntimeError if a server can listen on none of the host's addresses. The check does not keep the port, so another
    process may take it.

    ``what`` names the server in the error, such as "the bank".
    """
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
            return  # one address is enough for gRPC; a server that needs more fails at its start
    raise RuntimeError(cannot_listen(what, host, port, flag, refusal)) from refusal


def cannot_listen(what: str, host: str, port: int, flag: str, error: OSError | None = None) -> str:
    """The message of the error. ``error`` is the operating system's, if there is one."""
    reason = "" if error is None else f" ({os.strerror(error.errno or 0)})"
    advice = f"choose another {flag} or --host"
    if error is None or error.errno == errno.EADDRINUSE:
        advice += ", or end the program that has it"
    return f"{what} can't listen on {target_of(host, port)}{reason}; {advice}"
