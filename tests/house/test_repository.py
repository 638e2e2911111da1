"""Rules for every file in the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Put together here, so that this file passes its own test.
MACHINE_PATHS = re.compile(
    "|".join(("/" + "work/", "/" + "root/", "/" + r"tmp/[a-z]", "/" + r"home/[a-z]", "/opt/" + "(wheels|pypi)"))
)
HOSTS = re.compile(r"https?://([A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)")
# Hosts that may be named. PyTorch's wheel index is the only registry among them.
KNOWN_HOSTS = {
    "download.pytorch.org", "github.com", "creativecommons.org", "arxiv.org", "localhost", "127.0.0.1",
    "www.apache.org", "example.com",
    "www.w3.org",  # the namespace of SVG
}  # fmt: skip
MAX_LINES = 350


def _tracked() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    ).stdout.splitlines()
    files = [ROOT / name for name in names if (ROOT / name).is_file()]
    assert len(files) > 20
    return files


def _text_files() -> list[tuple[Path, str]]:
    found = []
    for path in _tracked():
        data = path.read_bytes()
        if b"\0" not in data[:4096] and path.name != "LICENSE" and "data" not in path.parts:
            found.append((path, data.decode("utf-8")))
    return found


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path, text in _text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert not found


def test_no_file_names_a_package_registry_or_an_unknown_host() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {host}"
        for path, text in _text_files()
        for host in HOSTS.findall(text)
        if host not in KNOWN_HOSTS
    }
    assert not found


def test_source_files_stay_short() -> None:
    sources = [path for path in _tracked() if path.suffix == ".py" and "generated" not in path.parts]
    long = {str(path.relative_to(ROOT)): n for path in sources if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_every_pip_command_in_a_message_names_the_projects_folder_and_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    commands = [
        (path, name, given)
        for path, text in _text_files()
        if path.suffix in (".py", ".md") and path.parts[-2:-1] != ("house",)
        for name, given in re.findall(r"pip install '?([\w.-]+)\[([\w,{}-]+)\]", text)
    ]
    assert len(commands) > 5
    for path, name, given in commands:
        known = given == "{extra}" or set(given.split(",")) <= extras
        assert name == "." and known, f"{path.relative_to(ROOT)}: {name}[{given}]"


def test_every_file_that_the_packages_need_is_in_the_installation() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in ("regrad_vllm", "bank_service"):
        folder = ROOT / package
        patterns = tool["package-data"].get(package, [])
        shipped = {path for pattern in patterns for path in folder.glob(pattern)}
        others = {path for path in _tracked() if folder in path.parents and path.suffix not in (".py", ".pyi")}
        assert not others - shipped


def test_nothing_prints() -> None:
    for path in _tracked():
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("regrad_vllm", "bank_service"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path


def test_the_generated_protobuf_code_is_what_the_contract_gives() -> None:
    pytest.importorskip("grpc_tools")
    from bank_service.wire.generate import compile_contract, stale_files

    assert not stale_files(compile_contract(ROOT / "proto"), ROOT / "bank_service/wire/generated")


def test_ci_has_a_rule_for_each_long_test_and_its_rules_name_tests_that_exist() -> None:
    table = (ROOT / ".ci" / "run").read_text("utf-8").split('table="\n')[1].split('\n"')[0]
    targets = [line.split()[2].partition("::") for line in table.splitlines()]
    for path, _, test in targets:
        assert (ROOT / path).exists() and (not test or f"def {test}(" in (ROOT / path).read_text("utf-8")), path
    files = sorted((ROOT / "tests").rglob("*.py"))
    marked = [file for file in files if "mark.only_test_all" in file.read_text("utf-8") and file != Path(__file__)]
    assert len(marked) > 3
    for file in marked:
        own = file.parent if file.name == "conftest.py" else file
        assert any(own.is_relative_to(ROOT / path) for path, _, test in targets if not test), own
