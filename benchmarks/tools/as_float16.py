"""Writes a learner whose φ* is stored as float16, at half the bytes: python -m benchmarks.tools.as_float16 LEARNER OUT

OUT must be a new folder. Its learner has the values that float16 has, so its fingerprint is another one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from regrad_vllm.learner import Learner

_ADAPTER = "adapter_model.safetensors"


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    as_float16(Path(sys.argv[1]), Path(sys.argv[2]))


def as_float16(folder: Path, out: Path) -> None:
    """FileExistsError if ``out`` is there. LearnerError if a value is too large for float16."""
    out.mkdir(parents=True)
    learner = Learner.load(folder)
    with np.errstate(over="ignore"):  # an infinite value is refused below
        rounded = learner.phi.astype(np.float16).astype(np.float32)
    replace(learner, phi=rounded).save(out)
    with safe_open(out / _ADAPTER, framework="numpy") as file:
        metadata = file.metadata()
    tensors = {name: values.astype(np.float16) for name, values in load_file(out / _ADAPTER).items()}
    save_file(tensors, out / _ADAPTER, metadata)


if __name__ == "__main__":
    main()
