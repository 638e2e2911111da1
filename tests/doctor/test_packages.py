"""Packages of other versions: the folders that pip would make for them, in front of the installed ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from regrad_vllm.doctor.packages import check_package, check_torchvision, check_vllm


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(folder: Path, name: str, version: str) -> None:
    made = folder / f"{name}-{version}.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_what_make_env_installs_is_ok() -> None:
    found = [check_vllm(), check_package("torch"), check_package("transformers"), check_torchvision()]
    assert [finding.state for finding in found] == ["ok"] * 4, found


@pytest.mark.parametrize(
    ("version", "state", "found"),
    [
        ("0.25.1", "wrong", "vllm 0.25.1; it must be <0.34,>=0.26"),
        ("0.30.0", "odd", "vllm 0.30.0; it was read in 0.26.0, 0.32.0, 0.33.0"),
        ("0.33.0+cu130", "ok", "vllm 0.33.0+cu130"),
    ],
)
def test_vllm_is_compared_with_the_versions_that_were_read(folder: Path, version: str, state: str, found: str) -> None:
    install(folder, "vllm", version)
    finding = check_vllm()
    assert finding.state == state and finding.found.startswith(found)
    assert bool(finding.remedy) is (state != "ok")


def test_a_package_out_of_its_range_or_missing_is_wrong(folder: Path) -> None:
    install(folder, "transformers", "4.57.0")
    old = check_package("transformers")
    assert old.state == "wrong" and old.found == "4.57.0; it must be <5.20,>=5.18" and "pip install" in old.remedy
    missing = check_package("regrad-no-such-package")
    assert missing.state == "wrong" and missing.found.startswith("not installed")


def test_a_torchvision_for_another_torch_is_wrong(folder: Path) -> None:
    install(folder, "torchvision", "0.28.0")
    install(folder, "torch", "2.13.0+cpu")
    finding = check_torchvision()
    assert finding.state == "wrong" and finding.found == "0.28.0 beside torch 2.13.0+cpu; it breaks transformers"
    assert finding.remedy == "pip uninstall torchvision torchaudio torchcodec"
