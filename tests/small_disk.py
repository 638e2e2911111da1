"""A small file system of a test's own.

It lies outside of pytest's folders: pytest can't remove a folder on which a killed run left a file system, and then
each later run fails.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A tmpfs of ``size``, such as 4m. Skips the test where none can be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="regrad-disk-"))
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, timeout=10).returncode:
            pytest.skip("mounting a disk needs root and a kernel that lets it")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)
    finally:
        folder.rmdir()
