"""Which tests share a process where there are several (`pytest -n 2 --dist loadgroup`)."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# They use one engine each, and engines beside each other would share the cores.
ENGINES = {"serve", "house/test_demo.py", "house/test_readme.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts all tests with an engine in one group, and every other file in a group of its own."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item.path.relative_to(TESTS))))


def _group(path: Path) -> str:
    return "engines" if ENGINES & {path.as_posix(), path.parts[0]} else path.as_posix()
