"""Checkpoints of the paper's published code (arXiv 2606.15734) → a learner.

A folder holds ``meta_state_dict.pth`` (φ* and step sizes by parameter name), ``peft_config.json`` and
``learner_config.json``. torch's weights-only loader reads the first file, so no code in it runs.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regrad_vllm.base_model import base_digest
from regrad_vllm.layout import Layout, LoraTensor
from regrad_vllm.learner import Learner, LearnerConfig, LearnerError, StepSizeKind
from regrad_vllm.prompts import Prompts

_PREFIX = "base_model.base_model.model."


def load_published(folder: str | Path, model_folder: str | Path, prompts: Prompts | None = None) -> Learner:
    """Reads a published checkpoint made for the base model in ``model_folder``.

    prompts: the templates that it was trained with, because its files don't have them. LearnerError if a file or a
    tensor is missing, or a tensor is unknown or has another shape.
    """
    folder = Path(folder)
    peft = _read_json(folder / "peft_config.json")
    settings = _read_json(folder / "learner_config.json")
    try:
        state: dict[str, torch.Tensor] = torch.load(
            folder / "meta_state_dict.pth", weights_only=True, map_location="cpu"
        )
    except (FileNotFoundError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise LearnerError(f"{folder / 'meta_state_dict.pth'} can't be read as plain weights: {error}") from error
    kind: StepSizeKind = settings.get("alpha_mode", "tie")
    for name in ("r", "lora_alpha"):
        if not isinstance(peft.get(name), int | float):
            raise LearnerError(f"{folder / 'peft_config.json'}: {name} must be a number, got {peft.get(name)!r}")
    if peft.get("use_rslora") or peft.get("use_dora"):
        raise LearnerError(
            f"{folder / 'peft_config.json'}: use_rslora and use_dora must be off; only plain LoRA composes"
        )
    rank = int(peft["r"])
    layout = Layout.build(rank, _modules(state, rank))
    phi = np.empty(layout.num_values, np.float32)
    for tensor, view in layout.views(phi):
        view[...] = _take(state, _phi_name(tensor), tensor.shape)
    steps = _step_sizes(state, layout, kind, float(settings.get("init_alpha", 1e-2)))
    if state:
        raise LearnerError(f"{folder}: meta_state_dict.pth holds parameters that are no learner's: {sorted(state)[:3]}")
    config = LearnerConfig(
        base_digest=base_digest(model_folder),
        lora_alpha=float(peft["lora_alpha"]),
        step_size_kind=kind,
        prompts=prompts or Prompts(),
        max_document_tokens=2048,
        training={"published": str(settings.get("base_model_name_or_path", ""))},
    )
    return Learner(config, layout, phi, steps)


def _modules(state: Mapping[str, torch.Tensor], rank: int) -> list[tuple[str, int, int]]:
    """(module, in_features, out_features) by layer. Within a layer gate, up and down have the file's order."""
    found: list[tuple[str, int, int]] = []
    for name, value in state.items():
        if name.startswith(_PREFIX) and name.endswith(".lora_A.default.weight"):
            module = name.removeprefix(_PREFIX).removesuffix(".lora_A.default.weight")
            other = state.get(f"{_PREFIX}{module}.lora_B.default.weight")
            if other is None or value.shape[0] != rank or other.shape[1] != rank:
                raise LearnerError(f"{module} must have lora_A and lora_B of rank {rank} as in peft_config.json")
            found.append((module, value.shape[1], other.shape[0]))
    if not found:
        raise LearnerError("meta_state_dict.pth must hold LoRA parameters, found none")
    return found


def _step_sizes(state: dict[str, torch.Tensor], layout: Layout, kind: str, fixed: float) -> NDArray[np.float32]:
    if kind == "fix":
        return np.array([fixed], np.float32)
    if kind == "same":
        return _take(state, "alpha", ()).reshape(1)
    if kind not in ("tie", "full"):
        raise LearnerError(f"alpha_mode must be tie, same, full or fix, got {kind!r}")
    parts = []
    for tensor in layout.tensors:
        name = "alpha_" + _phi_name(tensor).removeprefix("base_model.").replace(".", "-")
        parts.append(_take(state, name, () if kind == "tie" else tensor.shape).reshape(-1))
    return np.concatenate(parts)


def _phi_name(tensor: LoraTensor) -> str:
    return f"{_PREFIX}{tensor.module}.lora_{tensor.part}.default.weight"


def _take(state: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    value = state.pop(name, None)
    if value is None:
        raise LearnerError(f"meta_state_dict.pth must hold {name}; is it of this peft_config.json?")
    if tuple(value.shape) != shape:
        raise LearnerError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    return value.detach().float().numpy()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LearnerError(f"{path} can't be read: {error}") from error
    if not isinstance(document, dict):
        raise LearnerError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document
