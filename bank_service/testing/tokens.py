"""Tokens of a bank: the file that the bank reads, and a file for each bearer."""

from __future__ import annotations

from pathlib import Path

from bank_service.service.tokens_file import new_token
from bank_service.wire.credentials import BankCredentials


class Tokens:
    """A tokens file in ``folder``, to which tokens are added."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / "tokens.toml"
        self.path.touch(0o600)
        self.secrets: dict[str, str] = {}

    def add(self, name: str, scopes: str, *namespaces: str) -> BankCredentials:
        """``scopes``: separated by spaces."""
        secret, line = new_token(name, scopes.split(), namespaces)
        self.write(self.path.read_text() + line + "\n")
        self.secrets[name] = secret
        bearer = self._folder / f"{name}.token"
        bearer.write_text(secret + "\n")
        return BankCredentials(token_file=bearer)

    def remove(self, name: str) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        self.write("".join(line for line in lines if not line.startswith(f'tokens."{name}"')))

    def write(self, text: str) -> None:
        self.path.write_text(text)
