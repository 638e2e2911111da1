"""The wheel: everything that the packages need, nothing else, and it works away from the repository."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

from tests.wheel import ROOT, build_wheel, tracked

PACKAGES = ("regrad_vllm", "bank_service")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build_wheel(folder)) as wheel:
        wheel.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_has_each_file_of_the_packages_and_no_other(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith(info.name)} == set(tracked(*PACKAGES))
    assert {f"{package}/py.typed" for package in PACKAGES} <= files


def test_the_wheel_names_its_version_extras_and_entry_points(unpacked: Path, project: dict[str, Any]) -> None:
    (info,) = unpacked.glob("*.dist-info")
    metadata = (info / "METADATA").read_text("utf-8").splitlines()
    assert f"Version: {project['version']}" in metadata
    extras = {line.removeprefix("Provides-Extra: ") for line in metadata if line.startswith("Provides-Extra: ")}
    assert extras == set(project["optional-dependencies"])
    entry_points = ConfigParser()
    entry_points.read(info / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == project["scripts"]
    assert {name: dict(entry_points[name]) for name in entry_points.sections() if "vllm" in name} == {
        "vllm.general_plugins": {"regrad": "regrad_vllm.serve.plugin:register"},
        "vllm.endpoint_plugins": {"regrad": "regrad_vllm.serve.plugin:endpoint_plugin"},
    }


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("import regrad_vllm, bank_service; print(regrad_vllm.__file__)", "/regrad_vllm/__init__"),
        ("from regrad_vllm.learner import Learner; from regrad_vllm.default_model import shipped_learner; "
         "print(Learner.load(shipped_learner()).fingerprint)", ""),
        ("from regrad_vllm.demo.quiz import load_questions; print(len(load_questions()))", ""),
        ("from importlib.metadata import entry_points; found = entry_points(name='regrad'); "
         "print(len({point.group for point in found}), *[point.load() for point in found])", "3 "),
        ("from regrad_vllm.cli import main; main(['--version'])", "regrad 0."),
    ],
)  # fmt: skip
def test_the_wheel_works_away_from_the_repository(unpacked: Path, tmp_path: Path, program: str, printed: str) -> None:
    """Every module of ours that the program loads is the wheel's."""
    checked = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\ntry:\n    exec({program!r})\nfinally:\n"
        "    ours = [m.__file__ for n, m in list(sys.modules.items()) if n.partition('.')[0] in ('regrad_vllm', "
        f"'bank_service')]\n    assert ours and all(f.startswith({str(unpacked)!r}) for f in ours), ours\n"
    )
    result = subprocess.run([sys.executable, "-I", "-c", checked], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert printed in result.stdout and result.stdout.strip()
