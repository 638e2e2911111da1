"""Opens a client's channel to a bank. It uses TLS if the credentials name an authority or a certificate. Each call
carries the token.

An address may name several nodes of one bank: ``dns:///bank:50061``, of which each address is a node, or
``ipv4:10.0.0.1:50061,10.0.0.2:50061``. Then gRPC sends one call to each in turn. It leaves out those that can't be
reached, and those whose health is not SERVING.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import grpc

from bank_service.wire.credentials import VARIABLES, BankCredentials
from bank_service.wire.limits import channel_options
from bank_service.wire.ports import check_address, is_loopback

logger = logging.getLogger(__name__)

SERVICE = "regrad.bank.v1.BankService"
_IN_TURN = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": SERVICE}}

Details: TypeAlias = Any  # grpc.ClientCallDetails; grpc and grpc.aio have different classes
Option: TypeAlias = tuple[str, str | int]


def open_channel(
    address: str, credentials: BankCredentials | None = None, more_options: Sequence[Option] = ()
) -> grpc.Channel:
    """A blocking channel. Without ``credentials``, it uses those of the environment. OSError or ValueError if a file
    can't be used. ValueError for a list of nodes without ``ipv4:``."""
    credentials = credentials or BankCredentials.from_environment()
    tls, token = _prepared(address, credentials)
    options = _options(address, more_options)
    if tls is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        channel = grpc.secure_channel(address, tls, options=options)
    return channel if token is None else grpc.intercept_channel(channel, _WithToken(token))


def open_aio_channel(
    address: str, credentials: BankCredentials | None = None, more_options: Sequence[Option] = ()
) -> grpc.aio.Channel:
    """A channel for the running event loop. See ``open_channel``."""
    credentials = credentials or BankCredentials.from_environment()
    tls, token = _prepared(address, credentials)
    options = _options(address, more_options)
    interceptors = [] if token is None else [kind(token) for kind in _AIO_KINDS]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(address, tls, options=options, interceptors=interceptors)


def may_have_nodes(address: str) -> bool:
    """Whether an address may stand for several nodes of a bank."""
    return address.startswith("dns:") or "," in address


def _prepared(address: str, credentials: BankCredentials) -> tuple[grpc.ChannelCredentials | None, str | None]:
    check_address(address, "the bank's address")
    tls, token = credentials.read_certificates(), credentials.read_token()
    if token is not None and tls is None and not _is_here(address):
        logger.warning(
            "the bank's token should go over TLS, got a plain connection to %s: who reads the network gets it; set %s",
            address,
            VARIABLES["ca"],
        )
    return tls, token


def _options(address: str, more_options: Sequence[Option]) -> list[Option]:
    options = {**dict(channel_options()), **dict(more_options)}
    if _is_here(address):
        # gRPC takes the environment's proxy for every address, also for one on this machine, where no proxy can help.
        options["grpc.enable_http_proxy"] = 0
    if may_have_nodes(address):
        options["grpc.service_config"] = json.dumps(
            {**json.loads(str(options.get("grpc.service_config", "{}"))), **_IN_TURN}
        )
    return list(options.items())


def _is_here(address: str) -> bool:
    """Whether the address is on this machine, or all of its addresses are."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        return True
    targets = {"dns": [rest.rpartition("/")[2]], "ipv4": rest.split(","), "ipv6": rest.split(",")}.get(
        scheme, [address]
    )
    return all(is_loopback(target.rpartition(":")[0].strip("[]")) for target in targets)


class _Token:
    """Adds the token to a call's metadata. It has no repr, which would show the token."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def _metadata(self, details: Details) -> list[tuple[str, str | bytes]]:
        return [*(details.metadata or ()), self._entry]


class _WithToken(
    _Token,
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """For blocking channels."""

    def _intercept(self, continuation: Callable[..., Any], details: Details, request: Any) -> Any:
        return continuation(details._replace(metadata=self._metadata(details)), request)

    intercept_unary_unary = _intercept
    intercept_unary_stream = _intercept
    intercept_stream_stream = _intercept


class _AioToken(_Token):
    async def _intercept(self, continuation: Callable[..., Any], details: Details, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*self._metadata(details))
        return await continuation(details._replace(metadata=metadata), request)


class _AioUnaryUnary(_AioToken, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    intercept_unary_unary = _AioToken._intercept


class _AioUnaryStream(_AioToken, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    intercept_unary_stream = _AioToken._intercept


class _AioStreamStream(_AioToken, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    intercept_stream_stream = _AioToken._intercept


# aio uses an interceptor for the first kind that matches.
_AIO_KINDS = (_AioUnaryUnary, _AioUnaryStream, _AioStreamStream)
