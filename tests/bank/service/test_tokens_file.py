from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bank_service.service.access import Scope
from bank_service.service.tokens_file import TokensFile, new_token
from bank_service.testing.tokens import Tokens
from bank_service.values.namespace_limits import NamespaceLimits
from bank_service.wire.credentials import BankCredentials
from regrad_vllm.cli import main


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens(tmp_path)


def test_a_line_of_the_command_lets_its_secret_in_and_does_not_hold_it(
    tokens: Tokens, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["token", 'the "ci"', "--scope", "read", "--scope", "write", "--namespace", "a.b", "--namespace", "*"]
    assert main(command) == 0
    secret, line = capsys.readouterr().out.splitlines()
    assert secret not in line and hashlib.sha256(secret.encode()).hexdigest() in line
    tokens.write(line)
    grant = TokensFile(tokens.path).find(secret)
    assert grant is not None and grant.name == 'the "ci"'
    assert grant.scopes == {Scope.READ, Scope.WRITE} and grant.namespaces == {"a.b", "*"}
    assert TokensFile(tokens.path).find(secret + "x") is None and TokensFile(tokens.path).find("") is None
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[0] != secret


def test_the_command_writes_a_token_to_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "reader.token"
    command = ["token", "reader", "--scope", "read", "--namespace", "a", "--token-file", str(file)]
    assert main(command) == 0
    (line,) = capsys.readouterr().out.splitlines()
    secret = file.read_text().strip()
    assert file.stat().st_mode & 0o077 == 0
    assert hashlib.sha256(secret.encode()).hexdigest() in line and secret not in line
    assert main(command) == 1
    assert "must be a new file" in capsys.readouterr().err and file.read_text().strip() == secret


def test_a_read_that_failed_is_tried_again(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens.add("old", "read", "a")
    known = TokensFile(tokens.path)
    tokens.remove("old")
    tokens.add("new", "read", "a")
    with monkeypatch.context() as full:
        full.setattr(Path, "read_text", lambda *args: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        assert known.find(tokens.secrets["old"]) is not None
    assert known.find(tokens.secrets["old"]) is None and known.find(tokens.secrets["new"]) is not None


def test_limits_of_a_namespace_go_before_the_defaults(tokens: Tokens) -> None:
    tokens.write('limits."a.b" = { max_documents = 5, max_requests = 0 }\n')
    limits = TokensFile(tokens.path).limits
    defaults = NamespaceLimits(1, 2, 3)
    assert limits("a.b", defaults) == NamespaceLimits(5, 2, 0)
    assert limits("other", defaults) == defaults


def test_tables_are_toml_as_well_as_lines(tokens: Tokens) -> None:
    secret, line = new_token("ci", ["admin"], ["n"])
    tokens.write(f"[limits.n]\nmax_bytes = 7\n[{line.split(' ')[0]}]\n" + _as_table(line))
    file = TokensFile(tokens.path)
    assert file.find(secret) is not None and file.limits("n", NamespaceLimits()).max_bytes == 7


def _as_table(line: str) -> str:
    pairs = line.partition("{ ")[2].removesuffix(" }")
    return pairs.replace(", scopes", "\nscopes").replace(", namespaces", "\nnamespaces") + "\n"


GOOD = f'sha256 = "{"0" * 64}"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens = [", "can't be used"),
        ("token.x = {}", "the only tables must be tokens and limits, got token"),
        ("tokens.x = 3", "tokens must be a table of tables"),
        (f"tokens.x = {{ {GOOD}, scopes = ['read'] }}", "tokens.x must have namespaces, scopes, sha256"),
        ("tokens.x = { sha256 = 'secret', scopes = ['read'], namespaces = ['n'] }", "64 lower-case hex digits"),
        (f"tokens.x = {{ {GOOD}, scopes = ['all'], namespaces = ['n'] }}", "scopes must be some of read, write"),
        (f"tokens.x = {{ {GOOD}, scopes = [], namespaces = ['n'] }}", "scopes must be a list of at least one"),
        (f"tokens.x = {{ {GOOD}, scopes = ['read'], namespaces = ['a*'] }}", "tokens.x.namespaces must match"),
        (f"tokens.x = {{ {GOOD}, scopes = ['read'], namespaces = [''] }}", "must not have an empty name"),
        (
            "".join(f"tokens.{name} = {{ {GOOD}, scopes = ['read'], namespaces = ['n'] }}\n" for name in "xy"),
            "tokens.y must have a sha256 of its own, got that of x",
        ),
        ("limits.n = { max_document = 3 }", "limits.n must have some of max_documents"),
        ("limits.n = { max_documents = -1 }", "limits.n.max_documents must be a whole number"),
    ],
)
def test_a_file_that_can_t_be_used_is_told_what_is_wrong_without_its_content(
    tokens: Tokens, text: str, message: str
) -> None:
    tokens.write(text)
    with pytest.raises(ValueError, match="tokens_file .* can't be used") as caught:
        TokensFile(tokens.path)
    assert message in str(caught.value) and "secret" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="tokens_file must be a readable file, got .*nowhere"):
        TokensFile(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "two words", "a\nb", "tökén"])
def test_a_token_file_with_no_token_in_it_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(ValueError, match="must hold one token and nothing else") as caught:
        BankCredentials(token_file=path).read_token()
    assert not text or text not in str(caught.value)
