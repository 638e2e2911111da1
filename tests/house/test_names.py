"""One name for one thing: files and classes of different rooms don't share names."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("regrad_vllm", "bank_service", "benchmarks")
# One idea, seen from the bank and from its client.
OF_BANK_AND_CLIENT = {
    "Bank", "Condition", "CueSentence", "Document", "Hit", "Query", "RecodeProgress", "StoredDocument",
    "UpgradeProgress",
    "bank", "errors",
}  # fmt: skip
OF_EACH_FRAMEWORK = {"RegradRetriever"}
EVERYWHERE = {"__init__", "__main__"}


def _sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from (path for path in sorted((ROOT / package).rglob("*.py")) if "generated" not in path.parts)


def _shared(names: Iterator[tuple[str, Path]]) -> dict[str, list[str]]:
    """Name → its files, for names of more than one."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, path in names:
        found[name].append(str(path.relative_to(ROOT)))
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_no_two_files_share_a_name() -> None:
    """A file of the command line has the name of its command, whatever else has that name."""
    files = ((path.stem, path) for path in _sources() if path.parent != ROOT / "regrad_vllm" / "cli")
    twins = _shared((name, path) for name, path in files if name not in EVERYWHERE | OF_BANK_AND_CLIENT)
    assert not twins


def test_no_two_classes_share_a_name() -> None:
    """Private classes may: nobody outside their file meets them."""
    classes = (
        (node.name, path)
        for path in _sources()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    twins = _shared(
        (name, path) for name, path in classes if name[0] != "_" and name not in OF_BANK_AND_CLIENT | OF_EACH_FRAMEWORK
    )
    assert not twins
