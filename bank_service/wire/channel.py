"""A client's channel to a bank: TLS where an authority or a certificate is named, and the token with each call.

Nothing secret is ever in a setting: settings name files, which are read when a channel is made.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from bank_service.wire.limits import channel_options

logger = logging.getLogger(__name__)

SYSTEM_ROOTS = "system"
VARIABLES = {
    "token_file": "REGRAD_BANK_TOKEN_FILE",
    "ca": "REGRAD_BANK_CA",
    "cert": "REGRAD_BANK_CERT",
    "key": "REGRAD_BANK_KEY",
}
_TOKEN = re.compile(r"[\x21-\x7e]+")
_LOOPBACK = re.compile(r"(127\.[\d.]+|localhost|\[::1\]):\d+|unix:.*")

Details: TypeAlias = Any  # grpc.ClientCallDetails, of which each library has its own


@dataclass(frozen=True, slots=True, kw_only=True)
class BankCredentials:
    """How a client shows who it is, and how it knows the bank. Paths only."""

    token_file: Path | None = None  # the token alone
    ca: Path | None = None  # PEM of who signed the bank's certificate; "system": gRPC's own list; None: no TLS
    cert: Path | None = None  # PEM of the client's certificate, where the bank asks for one
    key: Path | None = None  # PEM of its key

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("the bank's client certificate and its key must be given together, got one of them")
        if self.cert is not None and self.ca is None:
            raise ValueError("a client certificate for the bank must come with the bank's CA, got it alone")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> BankCredentials:
        """As REGRAD_BANK_TOKEN_FILE, REGRAD_BANK_CA, REGRAD_BANK_CERT and REGRAD_BANK_KEY say."""
        given = {name: environment.get(variable) for name, variable in VARIABLES.items()}
        return cls(**{name: Path(value) for name, value in given.items() if value})

    def token(self) -> str | None:
        """ValueError, which does not show it, where it can't be one; OSError."""
        if self.token_file is None:
            return None
        token = _read(self.token_file, "the bank's token file").decode("utf-8", "replace").strip()
        if not _TOKEN.fullmatch(token):
            raise ValueError(f"the bank's token file must hold one token and nothing else, got {self.token_file}")
        return token

    def tls(self) -> grpc.ChannelCredentials | None:
        """None where TLS is off. OSError."""
        if self.ca is None:
            return None
        roots = None if str(self.ca) == SYSTEM_ROOTS else _read(self.ca, "the bank's CA")
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(roots)
        key, cert = _read(self.key, "the client key for the bank"), _read(self.cert, "the client certificate")
        return grpc.ssl_channel_credentials(roots, key, cert)


def open_channel(address: str, credentials: BankCredentials | None = None) -> grpc.Channel:
    """A blocking channel; without ``credentials`` as the environment says. OSError, ValueError."""
    credentials = credentials or BankCredentials.from_environment()
    tls, token = _prepared(address, credentials)
    options = channel_options()
    if tls is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        channel = grpc.secure_channel(address, tls, options=options)
    return channel if token is None else grpc.intercept_channel(channel, _WithToken(token))


def open_aio_channel(address: str, credentials: BankCredentials | None = None) -> grpc.aio.Channel:
    """As ``open_channel``, for the running event loop."""
    credentials = credentials or BankCredentials.from_environment()
    tls, token = _prepared(address, credentials)
    interceptors = [] if token is None else [kind(token) for kind in _AIO_KINDS]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=channel_options(), interceptors=interceptors)
    return grpc.aio.secure_channel(address, tls, options=channel_options(), interceptors=interceptors)


def _prepared(address: str, credentials: BankCredentials) -> tuple[grpc.ChannelCredentials | None, str | None]:
    tls, token = credentials.tls(), credentials.token()
    if token is not None and tls is None and not _LOOPBACK.fullmatch(address):
        logger.warning(
            "the bank's token should go over TLS, got a plain connection to %s: who reads the network gets it; set %s",
            address,
            VARIABLES["ca"],
        )
    return tls, token


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{what} must be a readable file, got {path}: {error.strerror}") from None


class _Token:
    """Adds the token to a call's metadata. No repr: that would show it."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def _metadata(self, details: Details) -> list[tuple[str, str | bytes]]:
        return [*(details.metadata or ()), self._entry]


class _WithToken(
    _Token,
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """For blocking channels."""

    def _intercept(self, continuation: Callable[..., Any], details: Details, request: Any) -> Any:
        return continuation(details._replace(metadata=self._metadata(details)), request)

    intercept_unary_unary = _intercept
    intercept_unary_stream = _intercept
    intercept_stream_unary = _intercept
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


_AIO_KINDS = (_AioUnaryUnary, _AioUnaryStream, _AioStreamStream)  # aio files each by the first kind that it is
