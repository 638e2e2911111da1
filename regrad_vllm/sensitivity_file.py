"""A learner's sensitivity on disk: ``sensitivity.safetensors`` in its folder, where it was measured.

Of each LoRA tensor "MODULE.lora_A.short" and ".long", as in ``Sensitivity``; the file's metadata says of which learner
it is and what made it.
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
    """None where it was not measured. ValueError where it is damaged, or another learner's."""
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
    """Replaces what is there, whole or not at all; nothing stays where there is none. ``about``: what made it, for its
    readers. ValueError for one that can't be used."""
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
    part.chmod(0o644)  # the library makes it private, the files beside it are not
    part.replace(path)


def _name(tensor: LoraTensor) -> str:
    return f"{tensor.module}.lora_{tensor.part}"
