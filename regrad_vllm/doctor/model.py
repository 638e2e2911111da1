"""Checks of the learner and of its base model."""

from __future__ import annotations

from pathlib import Path

from regrad_vllm.base_model import BaseModelError, base_digest
from regrad_vllm.default_model import default_folder
from regrad_vllm.doctor.finding import Finding
from regrad_vllm.learner import Learner, LearnerError

MAX_COMPARED_BYTES = 3 * 2**30  # larger models take more than three seconds


def check_learner(folder: Path) -> tuple[Finding, Learner | None]:
    try:
        learner = Learner.load(folder)
    except (LearnerError, OSError, ValueError) as error:
        return Finding("learner", "wrong", str(error), "name a learner's folder with --learner"), None
    return Finding("learner", "ok", f"{learner.fingerprint[:12]}, rank {learner.layout.rank}, {folder}"), learner


def check_base(model: str, learner: Learner | None) -> Finding:
    """The base model's files must be those that the learner was trained on."""
    name = "base model"
    folder = default_folder() if model == "default" else Path(model)
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    if not size:
        if model == "default":
            return Finding(name, "odd", f"not built yet: {folder}", "`regrad model` builds it, once, in 20 s")
        return Finding(name, "wrong", f"{folder} has no model*.safetensors", "name the model's folder with --model")
    if learner is None:
        return Finding(name, "odd", f"{folder}, not compared", "mend the learner first")
    if size > MAX_COMPARED_BYTES:
        return Finding(name, "ok", f"{folder}, too large to compare here; `regrad serve` does it at its start")
    try:
        found = base_digest(folder)
    except (BaseModelError, OSError, ValueError) as error:
        return Finding(name, "wrong", str(error), "copy or build the model again")
    if found != learner.config.base_digest:
        told = f"{folder} has digest {found[:12]}, the learner was trained on {learner.config.base_digest[:12]}"
        return Finding(name, "wrong", told, "name the learner's own base with --model, or another learner")
    return Finding(name, "ok", f"{found[:12]}, {folder}")
