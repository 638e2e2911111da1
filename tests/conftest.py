"""Which tests share a process where there are several (`pytest -n 2`)."""

from __future__ import annotations

import os
from typing import Any

import pytest

# One thread for each test process and what it starts: the processes share the cores, and threads that wait for each
# other on a busy core take four times as long. vLLM's workers choose their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# They use one engine each, and engines beside each other would share the cores.
ENGINES = ("tests/serve/", "tests/house/test_demo.py", "tests/house/test_readme.py", "tests/house/test_frameworks.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests with an engine run in one process, one after the other. Every other file stays together."""
    from xdist.scheduler import LoadScopeScheduling

    class ByEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "engines" if nodeid.startswith(ENGINES) else nodeid.split("::", 1)[0]

    return ByEngine(config, log)
