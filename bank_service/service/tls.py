"""The bank's side of TLS: its certificate, and the authority that signs its clients' certificates."""

from __future__ import annotations

from pathlib import Path

import grpc

from bank_service.service.private_file import check_private
from bank_service.values.config import BankConfig


def server_credentials(config: BankConfig) -> grpc.ServerCredentials | None:
    """Reads the files for TLS; None for a bank without TLS. OSError or ValueError if a file can't be used."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    check_private(config.tls_key, "tls_key")
    key = _pem(config.tls_key, "tls_key", "PRIVATE KEY-----")
    cert = _pem(config.tls_cert, "tls_cert", "-----BEGIN CERTIFICATE-----")
    client_ca = None
    if config.tls_client_ca is not None:
        client_ca = _pem(config.tls_client_ca, "tls_client_ca", "-----BEGIN CERTIFICATE-----")
    return grpc.ssl_server_credentials([(key, cert)], client_ca, require_client_auth=client_ca is not None)


def _pem(path: Path, setting: str, mark: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"{setting} must be a readable file, got {path}: {error.strerror}") from None
    if mark.encode() not in content:  # gRPC would only report that the port can't be bound
        raise ValueError(f"{setting} must be a PEM file with {mark.strip('-')}, got {path}")
    return content
