"""The import rules of the house: a table, and a walk over every file's syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Room → packages that no file in it may import, not even inside a function.
FORBIDDEN = {
    "bank_service": ("regrad_vllm", "torch", "vllm", "transformers", "peft"),
    "regrad_vllm/learn": (
        "grpc",
        "vllm",
        "regrad_vllm.serve",
        "regrad_vllm.adapt.bank_client",
        "bank_service.service",
    ),
    "regrad_vllm/encode": (
        "grpc",
        "vllm",
        "regrad_vllm.serve",
        "regrad_vllm.adapt.bank_client",
        "bank_service.service.server",
    ),
    "regrad_vllm/adapt": ("vllm", "regrad_vllm.serve", "regrad_vllm.cli"),
    "regrad_vllm/serve": ("regrad_vllm.learn", "regrad_vllm.cli", "regrad_vllm.demo"),
    "regrad_vllm/evaluate": ("vllm", "regrad_vllm.cli"),
    "regrad_vllm/load": ("vllm", "regrad_vllm.cli"),
    "regrad_vllm/cli": ("vllm",),
    "regrad_vllm/demo": ("vllm",),
    "regrad_vllm/local": ("vllm",),
}
# What bank_service offers to the other package: the wire, encoder and embedder, errors; the rest to the command line.
# The bank's rooms, from the top down: a room imports from those below it only.
BANK_ROOMS = (
    "service",
    "bank",
    "bank_stats",
    "upkeep",
    "backup",
    "search",
    "records",
    "cache",
    "blobs",
    "catalog.factory",
    "catalog.sqlite",
    "catalog",
    "values",
    "runtime",
    "wire",
    "errors",
)
OPEN_TO_ALL = (
    "bank_service.wire",
    "bank_service.values.encoder",
    "bank_service.values.embedder",
    "bank_service.errors",
)
OPEN_TO_COMMAND_LINE = (
    "bank_service.values.config",
    "bank_service.runtime.data_dir",
    "bank_service.values.documents",
    "bank_service.service.offline",
    "bank_service.service.preflight",
    "bank_service.backup.restore",
    "bank_service.service.server",
    "bank_service.backup.snapshot",
    "bank_service.service.tokens_file",
)


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth, as absolute names."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _sources(room: str) -> list[Path]:
    return [path for path in sorted((ROOT / room).rglob("*.py")) if "generated" not in path.parts]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_through_a_closed_door(room: str) -> None:
    sources = _sources(room)
    assert sources, f"{room} has no source: mend the table"
    broken = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources
        for module in _imports(path)
        if any(_is_within(module, package) for package in FORBIDDEN[room])
    ]
    assert not broken


def test_only_the_serve_room_imports_vllm() -> None:
    users = {
        path.relative_to(ROOT).parts[1]
        for path in _sources("regrad_vllm")
        if any(_is_within(module, "vllm") for module in _imports(path))
    }
    assert users == {"serve"}


def test_the_bank_is_entered_through_its_wire_and_only_the_command_line_starts_it() -> None:
    for path in _sources("regrad_vllm"):
        room = path.relative_to(ROOT).parts[1]
        allowed = OPEN_TO_ALL + (OPEN_TO_COMMAND_LINE if room == "cli" else ())
        for module in _imports(path):
            if _is_within(module, "bank_service"):
                assert any(_is_within(module, package) for package in allowed), f"{path} imports {module}"


def _bank_room(module: str) -> str:
    """The room of one of the bank's modules, by the longest name in the table."""
    inside = module.removeprefix("bank_service.")
    return max((room for room in BANK_ROOMS if _is_within(inside, room)), key=len, default="")


def test_the_banks_rooms_import_from_the_rooms_below_them_only() -> None:
    sources = [
        path for path in _sources("bank_service") if path.parent.name != "bank_service" or path.stem != "__init__"
    ]
    broken = []
    for path in sources:
        own = _bank_room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert own, f"{path.relative_to(ROOT)} is in no room: mend the table"
        for module in _imports(path):
            other = _bank_room(module) if _is_within(module, "bank_service") else ""
            if other and BANK_ROOMS.index(other) < BANK_ROOMS.index(own):
                broken.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not broken


def test_only_the_catalogs_factory_knows_its_store_and_only_the_store_knows_sql() -> None:
    broken = []
    for path in _sources("bank_service"):
        room = _bank_room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in _imports(path):
            is_store = _is_within(module, "bank_service.catalog.sqlite") and room != "catalog.factory"
            is_sql = any(_is_within(module, package) for package in ("sqlalchemy", "sqlite3"))
            if room != "catalog.sqlite" and (is_store or is_sql):
                broken.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not broken


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import regrad_vllm", ("numpy", "torch", "vllm", "transformers", "grpc")),
        ("import regrad_vllm.cli", ("torch", "vllm", "transformers", "grpc", "safetensors")),
        ("import regrad_vllm.learner, regrad_vllm.adapt.compose", ("torch", "vllm", "transformers", "grpc")),
        ("import regrad_vllm.serve.plugin", ("torch", "vllm", "transformers", "grpc", "numpy")),
        ("import bank_service.wire.codec", ("torch", "grpc", "sqlalchemy")),
    ],
)
def test_light_modules_load_nothing_heavy(statement: str, heavy: tuple[str, ...]) -> None:
    program = f"import sys\n{statement}\nprint([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_walk_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text("def f():\n    from vllm.lora import request\n    import torch.nn as nn\n")
    assert list(_imports(source)) == ["vllm.lora.request", "torch.nn"]
