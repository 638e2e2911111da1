"""What the worker does against a heap that grows."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Buffers of 100 kB between small objects that stay, as adapters lie between what vLLM keeps.
CHURN = """
from regrad_vllm.serve.process import process_figures, return_free_memory
buffers, kept = [], []
for n in range(2000):
    buffers.append(bytearray(b"x" * 100_000))
    kept.append(bytearray(600))
del buffers
before = process_figures("x")["resident_bytes"]
assert return_free_memory()
print(before - process_figures("x")["resident_bytes"])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps such holes, and can give them back")
def test_free_holes_in_the_heap_go_back_to_the_system() -> None:
    ran = subprocess.run([sys.executable, "-c", CHURN], capture_output=True, text=True, timeout=120, check=True)
    assert int(ran.stdout) > 150_000_000
