"""The command line's own behaviour: light help, one-line errors, exit statuses."""

from __future__ import annotations

import os
import pwd
import re
import socket
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from bank_service.wire.record import GradientSpec
from regrad_vllm.cli import main
from regrad_vllm.cli.export import fetch_records
from regrad_vllm.cli.main import build_parser, explained
from regrad_vllm.console import CommandError
from regrad_vllm.demo import story

ROOT = Path(__file__).parents[2]
NOWHERE = "127.0.0.1:1"  # nothing listens on port 1


def _regrad(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "regrad_vllm.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_loads_neither_torch_nor_vllm_nor_grpc() -> None:
    program = (
        "import sys\nfrom regrad_vllm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(str([name for name in ('torch', 'vllm', 'grpc', 'transformers') if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr == "[]"
    for command in (
        "demo",
        "doctor",
        "bank",
        "snapshot",
        "restore",
        "scrub",
        "serve",
        "ingest",
        "query",
        "delete",
        "stats",
        "list",
        "get",
        "export",
        "train",
    ):
        assert re.search(rf"^\s+{command}\s", result.stdout, re.MULTILINE), f"{command} is not in the help"


@pytest.mark.parametrize(
    "command",
    ["demo", "doctor", "bank", "ingest", "query", "list", "get", "delete", "stats", "export", "model", "train"],
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        build_parser().parse_args([command, "--help"])
    assert raised.value.code == 0
    assert f"usage: regrad {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["query"],
        ["query", "x", "--top-k", "many"],
        ["stats", "--no"],
        ["eval", "--concurrency", "0"],
        ["eval", "--top-k", "0"],
        ["growth", "--num-questions", "-1"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: regrad" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["query", "x"], ["stats"], ["list"], ["get", "x"], ["delete", "x"], ["ingest", str(ROOT / "README.md")]],
    ids=lambda arguments: arguments[0],
)
def test_a_bank_that_is_not_there_is_one_line_that_says_what_to_do(arguments: list[str]) -> None:
    result = _regrad(*arguments, "--bank", NOWHERE)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"regrad {arguments[0]}: the bank at {NOWHERE} is not available")
    assert "start one with `regrad bank`" in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("home", [None, "", "/"])
def test_only_a_command_that_needs_a_home_asks_for_one(
    home: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_entry(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for variable in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    assert main(["stats", "--bank", NOWHERE]) == 1
    assert capsys.readouterr().err.startswith(f"regrad stats: the bank at {NOWHERE} is not available")
    for command in (["bank"], ["snapshot", "there"], ["restore", "there"], ["scrub"], ["model"]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert re.fullmatch(rf"regrad {command[0]}: HOME or XDG_(DATA|CACHE)_HOME must be set, because .+\n", said)


def test_debug_shows_the_traceback() -> None:
    result = _regrad("--debug", "stats", "--bank", NOWHERE)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bank", "--codec", "gif"], "codec must be factors-P-Q-BITS"),
        (["bank", "--port", "70000"], "port must be in 0..65535, got 70000"),
        (["bank", "--cache-timeout-ms", "0"], "cache_timeout_ms must be in 1..60000, got 0"),
        (["bank", "--redis-url", "localhost"], "redis_url must start with redis://"),
        (["bank", "--redis-url-file", "/nowhere"], "redis_url_file must be a readable file, got /nowhere"),
        (["bank", "--port", "0", "--learner", "/nowhere"], "/nowhere/regrad.json does not exist"),
        (["bank", "--port", "0", "--model", "/nowhere"], "model must be 'default', a folder or a hub id"),
        (["train", "/nowhere.toml"], "config /nowhere.toml does not exist"),
        (["export", str(ROOT / "tests"), "--document", "x"], "must be absent or an empty folder"),
        (["ingest", "/nowhere"], "1 input can't be used, nothing was ingested; mend them or pass --skip-bad"),
        (["query", " "], "TEXT must hold what to search for, got ' '"),
        (["ingest", "--in-flight", "0", "README.md"], "--in-flight must be at least 1, got 0"),
        (["eval", "--server", "http://127.0.0.1:9"], "--server and --bank must be given together"),
        (["eval", "--in-process", "--likelihood"], "--likelihood must be left out with --in-process"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_line_that_names_it(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert main(arguments) in (1, 2)
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith(f"regrad {arguments[0]}: ")
    assert message in last
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["query", "x", "--namespace", "a\udcffb"], "namespace"),
        (["query", "x", "--filter", "a\udcffb=1"], "filter"),
        (["query", "a\udcffb"], "text"),
        (["get", "a\udcffb"], "id"),
        (["delete", "a\udcffb"], "id"),
    ],
)
def test_an_argument_that_is_not_utf_8_is_named(
    arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*arguments, "--bank", NOWHERE])
    assert capsys.readouterr().err == f"regrad {arguments[0]}: {name} must be UTF-8, got 'a\\udcffb'\n"


def test_bad_inputs_are_all_listed_before_anything_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.txt").write_text("A sentence.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "lines.jsonl").write_text('{"text": "fine"}\nnot json\n')
    # The bank is not there: had anything been sent, the message would be about the bank.
    assert main(["ingest", str(tmp_path), "--bank", NOWHERE]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"{tmp_path}/empty.txt: must hold some text") for line in lines)
    assert any(line.startswith(f"{tmp_path}/lines.jsonl:2: must be a JSON object") for line in lines)
    assert lines[-1].startswith("regrad ingest: 2 inputs can't be used, nothing was ingested")


def test_a_torchvision_of_another_torch_is_answered_with_its_removal() -> None:
    """transformers' own error has no name of a package."""
    message = explained("model", ModuleNotFoundError("Could not import module 'LlamaConfig'."))
    assert "pip uninstall torchvision" in message and "LlamaConfig" in message


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_a_missing_httpx_is_answered_with_an_extra_that_brings_it(command: str) -> None:
    message = explained(command, ModuleNotFoundError("No module named 'httpx'", name="httpx"))
    advised = re.search(r"pip install '\.\[([\w,]+)\]'", message)
    assert advised and "the package httpx must be installed" in message
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = [requirement for extra in advised[1].split(",") for requirement in extras[extra]]
    assert any(requirement.startswith("httpx>=") for requirement in brought)


def test_an_export_gives_a_bank_up_that_does_not_answer() -> None:
    spec = GradientSpec("f" * 64, "1" * 16, ((2, 3),))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(CommandError, match="no answer in time"):
            fetch_records(address, "default", spec, ["a"], timeout_ms=300)


def test_an_upload_that_ends_early_in_the_demo_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(story, "start_bank", lambda *_: (None, NOWHERE))
    monkeypatch.setattr(story, "start_server", lambda *_: (None, ""))
    assert main(["demo", "--model", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("regrad demo: ") and said.endswith("(0 documents before it are in)")
