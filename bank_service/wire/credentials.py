"""A client's credentials for a bank, and the certificates by which it trusts the bank.

Only this module reads their REGRAD_BANK_* variables. The variables contain no secrets. They name files, which are read
when a channel is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc

SYSTEM_ROOTS = "system"
VARIABLES = {
    "token_file": "REGRAD_BANK_TOKEN_FILE",
    "ca": "REGRAD_BANK_CA",
    "cert": "REGRAD_BANK_CERT",
    "key": "REGRAD_BANK_KEY",
}
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class BankCredentials:
    """A token, and the files of certificates and keys."""

    token_file: Path | None = None  # a file with only the token in it
    token: str | None = field(
        default=None, repr=False
    )  # for programs that keep it elsewhere; then the file is not read
    ca: Path | None = None  # PEM of the bank's certificate authority; "system": gRPC's own list; None: no TLS
    cert: Path | None = None  # PEM of the client's certificate, if the bank asks for one
    key: Path | None = None  # PEM of its key

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("the bank's client certificate and its key must be given together, got one of them")
        if self.cert is not None and self.ca is None:
            raise ValueError("a client certificate for the bank must come with the bank's CA, got it alone")
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise ValueError("the bank's token must be printable ASCII without spaces, got something else")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> BankCredentials:
        """Reads REGRAD_BANK_TOKEN_FILE, REGRAD_BANK_CA, REGRAD_BANK_CERT and REGRAD_BANK_KEY. ValueError."""
        files: dict[str, Any] = {  # an empty variable counts as absent
            name: Path(environment[variable]) for name, variable in VARIABLES.items() if environment.get(variable)
        }
        return cls(**files)

    def read_token(self) -> str | None:
        """The token, or None. ValueError if the file's content can't be a token; the message doesn't show it.
        OSError."""
        if self.token is not None or self.token_file is None:
            return self.token
        token = _read(self.token_file, "the bank's token file").decode("utf-8", "replace").strip()
        if not _TOKEN.fullmatch(token):
            raise ValueError(f"the bank's token file must hold one token and nothing else, got {self.token_file}")
        return token

    def read_certificates(self) -> grpc.ChannelCredentials | None:
        """gRPC's credentials from the files; None if TLS is off. OSError."""
        import grpc

        if self.ca is None:
            return None
        roots = None if str(self.ca) == SYSTEM_ROOTS else _read(self.ca, "the bank's CA")
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(roots)
        key, cert = _read(self.key, "the client key for the bank"), _read(self.cert, "the client certificate")
        return grpc.ssl_channel_credentials(roots, key, cert)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{what} must be a readable file, got {path}: {error.strerror}") from None
