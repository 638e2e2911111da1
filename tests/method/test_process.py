from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import sys
from regrad_vllm.learn.process import keep_freed_memory, share_cores
assert "torch" not in sys.modules
share_cores()
keep_freed_memory()
import os, resource, torch
assert os.environ["GOMP_SPINCOUNT"] == "10000"
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_a_tensor_reuses_the_memory_of_the_one_before() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    found = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 1000, "64 MiB have 16,384 pages, and there are 20 tensors"
