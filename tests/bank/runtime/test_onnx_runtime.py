"""ONNX Runtime is loaded before usearch, whichever module is asked for first, and tells nobody of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

USE = "from bank_service.values.embedder import default_embedder; print(default_embedder().embed('a text').shape)"


@pytest.mark.parametrize(
    "first", ["bank_service.service.offline", "bank_service.search.usearch.usearch_index", "bank_service.bank", "torch"]
)
def test_any_module_may_be_imported_first(first: str, tmp_path: Path) -> None:
    """In a process of its own: in this one everything is loaded already."""
    code = f"import {first}, torch, bank_service.search.usearch.usearch_index; {USE}"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "(384,)\n"), done.stderr[-2000:]
    assert not list(tmp_path.rglob("deviceid")), "no telemetry"
