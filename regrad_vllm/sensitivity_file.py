"""A learner's sensitivity on disk: ``sensitivity.safetensors`` in the learner's folder. Only some learners have it.

Each LoRA tensor has two entries, "MODULE.lora_A.short" and "MODULE.lora_A.long", as in ``Sensitivity``. The metadata
names the learner and the origin of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from bank_service.wire.codecs.sensitivity import Sensitivity
from regrad_vllm.layout import Layout, LoraTensor

FILE = "sensitivity.safetensors"


def read_sensitivity(folder: Path, layout: Layout, fingerprint: str) -> Sensitivity | None:
    """Reads the sensitivity. None without a file. ValueError if it is damaged or belongs to another learner."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            of = (file.metadata() or {}).get("learner")
            tensors = {name: file.get_tensor(name).astype(np.float32, copy=False) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own Rust error types
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if of != fingerprint:
        raise ValueError(
            f"{path} must be of learner {fingerprint}, got one of {of}; remove it, and measure anew with "
            "`regrad sensitivity`"
        )
    try:
        found = Sensitivity(
            tuple(tensors[f"{_name(tensor)}.short"] for tensor in layout.tensors),
            tuple(tensors[f"{_name(tensor)}.long"] for tensor in layout.tensors),
        )
    except KeyError as error:
        raise ValueError(f"{path} must hold {error}; the layout has {len(layout.tensors)} tensors") from error
    try:
        found.check(layout.shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def write_sensitivity(
    folder: Path,
    layout: Layout,
    fingerprint: str,
    sensitivity: Sensitivity | None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Replaces the file atomically. ``sensitivity`` None removes it. ValueError for an unusable sensitivity.

    about: the origin of the file, for its readers.
    """
    path = folder / FILE
    if sensitivity is None:
        path.unlink(missing_ok=True)
        return
    sensitivity.check(layout.shapes)
    tensors = {}
    for tensor, short, long in zip(layout.tensors, sensitivity.short, sensitivity.long, strict=True):
        tensors[f"{_name(tensor)}.short"], tensors[f"{_name(tensor)}.long"] = short, long
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={**(about or {}), "learner": fingerprint})
    part.chmod(0o644)  # the library makes it private, unlike the other files
    part.replace(path)


def _name(tensor: LoraTensor) -> str:
    return f"{tensor.module}.lora_{tensor.part}"
