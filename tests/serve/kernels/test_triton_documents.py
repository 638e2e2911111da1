"""The kernels for GPUs as Triton compiles them, without a GPU.

They are compiled in another process, because Triton's interpreter leaves traces in one where it ran.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kind", ["one row", "decode", "prefill"])
def test_the_kernels_compile_for_a_gpu_and_read_16_bytes_at_a_time(kind: str) -> None:
    """For a Hopper GPU, in bfloat16."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.serve.kernels.ptx", kind], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[3], env=os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"},  # else Triton warns
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    for kernel, ptx in json.loads(found.stdout).items():
        assert "ld.global.v4.b32" in ptx, kernel
        assert "ld.global.b8" not in ptx, f"{kernel} reads codes byte by byte"
        assert ("mma" in ptx) == (kind != "one row"), f"{kernel} uses tensor cores where it has rows for them"
