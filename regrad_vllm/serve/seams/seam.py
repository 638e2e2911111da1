"""A seam: a place in vLLM's private API that this project uses, and the versions of vLLM that all were read in.

``check_seams`` compares seams with the installed vLLM and reports the differences. It must pass before anything is
patched. Patches are idempotent. Without a ReGrad request they don't change vLLM's answers.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

READ_IN = "0.26.0, 0.32.0, 0.33.0"  # the versions of vLLM
PATCH_MARK = "__regrad_patch__"


class SeamError(RuntimeError):
    """The installed vLLM differs from the versions that the seams were read in."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A place in vLLM's private API that this project relies on."""

    module: str
    path: str  # attribute path within the module
    parameters: tuple[str, ...] | None  # the function's parameters in order; None: only its existence counts
    purpose: str
    others_may_follow: bool = False  # only ``parameters`` are used, by name; others may follow


def check_seams(seams: tuple[Seam, ...]) -> None:
    """SeamError names every seam at which the installed vLLM differs."""
    problems: list[str] = []
    for seam in seams:
        try:
            found: Any = importlib.import_module(seam.module)
            for name in seam.path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            problems.append(f"{seam.module}.{seam.path} must exist ({seam.purpose}; read in {READ_IN}): {error}")
            continue
        if seam.parameters is None:
            continue
        parameters = tuple(inspect.signature(inspect.unwrap(found)).parameters)
        if parameters != seam.parameters and not (seam.others_may_follow and set(seam.parameters) <= set(parameters)):
            problems.append(
                f"{seam.module}.{seam.path} must take {seam.parameters} ({seam.purpose}; read in {READ_IN}), "
                f"it takes {parameters}"
            )
    if problems:
        raise SeamError(
            f"vLLM {vllm_version()} is not one that this regrad was read against; install vllm 0.26 to 0.33, or a "
            "newer regrad. " + "; ".join(problems)
        )


def vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def replace_by(owner: Any, name: str, function: Any) -> None:
    """Replaces ``owner.name`` by ``function`` and marks it, so that a second installation notices."""
    setattr(getattr(function, "__func__", function), PATCH_MARK, True)
    setattr(owner, name, function)
