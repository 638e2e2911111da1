"""The import rules of the house: a table of closed doors, checked on the import graph of the whole project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.import_graph import Import, ImportGraph, imports, is_within

ROOT = Path(__file__).parents[2]
PACKAGES = ("regrad_vllm", "bank_service", "benchmarks")
# The rooms that make a bank. Only the command line enters them from outside.
INSIDE_THE_BANK = tuple(
    f"bank_service.{room}"
    for room in ("testing", "service", "bank", "upkeep", "backup", "search", "records", "cache", "blobs", "catalog")
)
# Room → packages that no file in it may reach: not directly, not inside a function, not through another module.
FORBIDDEN = {
    "bank_service": ("regrad_vllm", "torch", "vllm", "transformers", "peft", "tests", "benchmarks"),
    "regrad_vllm": ("tests", "benchmarks"),
    "regrad_vllm/data": ("grpc", "vllm", "torch", "regrad_vllm.learn", "regrad_vllm.evaluate", *INSIDE_THE_BANK),
    "regrad_vllm/learn": (
        "grpc", "vllm", "regrad_vllm.serve", "regrad_vllm.client", "regrad_vllm.evaluate", "regrad_vllm.cli",
        *INSIDE_THE_BANK,
    ),
    "regrad_vllm/encode": (
        "grpc", "vllm", "regrad_vllm.serve", "regrad_vllm.client", "regrad_vllm.learn", "regrad_vllm.cli",
        *INSIDE_THE_BANK,
    ),
    "regrad_vllm/client": (
        "torch", "vllm", "transformers", "regrad_vllm.serve", "regrad_vllm.cli", "regrad_vllm.local", *INSIDE_THE_BANK,
    ),
    "regrad_vllm/frameworks": ("torch", "vllm", "transformers", *INSIDE_THE_BANK),
    "regrad_vllm/serve": ("regrad_vllm.learn", "regrad_vllm.cli", "regrad_vllm.demo", *INSIDE_THE_BANK),
    "regrad_vllm/serve/kernels": ("grpc", "vllm"),
    "regrad_vllm/serve/arena": ("grpc", "vllm", "torch", "numpy"),
    "regrad_vllm/local": ("vllm", "regrad_vllm.cli", *INSIDE_THE_BANK),
    "regrad_vllm/distributed": ("vllm", "regrad_vllm.serve", "regrad_vllm.learn", "regrad_vllm.cli", *INSIDE_THE_BANK),
    "regrad_vllm/evaluate": ("vllm", "regrad_vllm.cli", "regrad_vllm.load", *INSIDE_THE_BANK),
    "regrad_vllm/load": ("vllm", "regrad_vllm.cli", *INSIDE_THE_BANK),
    "regrad_vllm/mcp": ("vllm", "torch", "regrad_vllm.cli", *INSIDE_THE_BANK),
    "regrad_vllm/cli": ("vllm", "bank_service.testing"),
    "regrad_vllm/demo": ("vllm", "regrad_vllm.cli"),
    "regrad_vllm/doctor": ("vllm", "torch", "transformers", "regrad_vllm.cli", *INSIDE_THE_BANK),
    "benchmarks": ("tests", "regrad_vllm.cli"),
}  # fmt: skip
# Rooms of a package, from the top down: a room imports from those below it only.
BANK_ROOMS = (
    "testing",
    "service",
    "bank",
    "bank_stats",
    "upkeep",
    "backup",
    "search.vector_store",
    "search.usearch",
    "search",
    "records",
    "cache",
    "blobs",
    "catalog.factory",
    "catalog.postgres",
    "catalog.sqlite",
    "catalog.sql",
    "catalog",
    "values",
    "runtime",
    "wire",
    "errors",
)
REGRAD_ROOMS = (
    "cli", "observe", "demo", "doctor", "load", "evaluate", "console", "mcp", "local", "distributed", "learn",
    "arguments",
    "serve.plugin", "serve.launch", "serve.vllm_flags", "serve.vllm_main", "serve.api.endpoint",
    "serve.documents", "serve.api", "serve.worker", "serve.seams",
    "serve.kernels", "serve.budgets", "serve.arena", "serve.engine_flags", "serve.settings", "serve.recipe",
    "serve.process_figures", "serve", "reporting", "encode", "frameworks", "client", "default_model", "base_model",
    "flags", "compose", "learner", "prompts", "data", "http_client", "naming", "user_folders", "layout",
)  # fmt: skip
ROOMS = {"bank_service": BANK_ROOMS, "regrad_vllm": REGRAD_ROOMS}
# What bank_service offers to the other package: the wire, encoder, embedder, sentences, errors. The rest is for the
# command line.
OPEN_TO_ALL = (
    "bank_service.wire",
    "bank_service.values.encoder",
    "bank_service.values.embedder",
    "bank_service.values.sentences",
    "bank_service.errors",
)
OPEN_TO_CLIENT = ("bank_service.values.documents",)  # what a bank would refuse is known before a corpus is sent
OPEN_TO_COMMAND_LINE = (
    "bank_service.values.config",
    "bank_service.values.engine_state",
    "bank_service.runtime.data_dir",
    "bank_service.service.engine_checks",
    "bank_service.service.offline",
    "bank_service.service.preflight",
    "bank_service.backup.move",
    "bank_service.backup.restore",
    "bank_service.service.server",
    "bank_service.backup.snapshot",
    "bank_service.service.tokens_file",
)


def _sources(room: str) -> list[Path]:
    return [path for path in sorted((ROOT / room).rglob("*.py")) if "generated" not in path.parts]


@pytest.fixture(scope="module")
def graph() -> ImportGraph:
    return ImportGraph(ROOT, PACKAGES)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_reaches_nothing_behind_a_closed_door(graph: ImportGraph, room: str) -> None:
    modules = graph.within(room.replace("/", "."))
    assert modules, f"{room} has no source: mend the table"
    chains = [graph.chain(module, FORBIDDEN[room]) for module in modules]
    assert not [" → ".join(chain) for chain in chains if chain]


def test_only_the_seams_import_vllm_and_the_module_that_starts_it() -> None:
    users = {
        str(path.parent.relative_to(ROOT) if path.parent.name == "seams" else path.relative_to(ROOT))
        for path in _sources("regrad_vllm")
        if any(is_within(found.name, "vllm") for found in imports(path))
    }
    assert users == {"regrad_vllm/serve/seams", "regrad_vllm/serve/vllm_main.py"}


def test_nobody_imports_the_command_line() -> None:
    users = [
        f"{path.relative_to(ROOT)} imports {found.name}"
        for package in PACKAGES
        for path in _sources(package)
        if path.parent != ROOT / "regrad_vllm" / "cli"
        for found in imports(path)
        if is_within(found.name, "regrad_vllm.cli")
    ]
    assert not users


def test_the_bank_is_entered_through_its_wire_and_only_the_command_line_starts_it() -> None:
    for path in _sources("regrad_vllm"):
        room = path.relative_to(ROOT).parts[1]
        allowed = OPEN_TO_ALL + {"cli": OPEN_TO_COMMAND_LINE, "client": OPEN_TO_CLIENT}.get(room, ())
        for found in imports(path):
            if is_within(found.name, "bank_service"):
                assert any(is_within(found.name, package) for package in allowed), f"{path} imports {found.name}"


def _room(module: str) -> str:
    """The room of one of the project's modules, by the longest name in its package's table; else nothing."""
    package, _, inside = module.partition(".")
    return max((room for room in ROOMS.get(package, ()) if is_within(inside, room)), key=len, default="")


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_from_the_rooms_below_them_only(package: str) -> None:
    """So no chain of imports runs back up, and there are no circles."""
    rooms = ROOMS[package]
    broken = []
    for path in _sources(package):
        if path == ROOT / package / "__init__.py":
            continue
        own = _room(_module(path))
        assert own, f"{path.relative_to(ROOT)} is in no room: mend the table"
        for found in imports(path):
            other = _room(found.name) if is_within(found.name, package) else ""
            if other and rooms.index(other) < rooms.index(own):
                broken.append(f"{path.relative_to(ROOT)} imports {found.name}")
    assert not broken


def test_only_the_catalogs_factory_knows_its_stores_and_only_the_stores_know_sql() -> None:
    """Each store knows its own database alone. Both share ``catalog.sql``, which knows neither driver."""
    own = {  # package → the rooms that may import it
        "sqlalchemy": ("catalog.sql", "catalog.sqlite", "catalog.postgres"),
        "sqlalchemy.dialects.postgresql": ("catalog.postgres",),
        "sqlite3": ("catalog.sqlite",),
        "psycopg": ("catalog.postgres",),
        "bank_service.catalog.sql": ("catalog.sql", "catalog.sqlite", "catalog.postgres"),
        "bank_service.catalog.sqlite": ("catalog.sqlite", "catalog.factory"),
        "bank_service.catalog.postgres": ("catalog.postgres", "catalog.factory"),
    }
    broken = [
        f"{path.relative_to(ROOT)} imports {found.name}"
        for path in _sources("bank_service")
        for found in imports(path)
        for package, rooms in own.items()
        if is_within(found.name, package) and _room(_module(path)) not in rooms
    ]
    assert not broken


def test_only_the_factory_knows_the_vector_store_in_the_banks_process() -> None:
    users = {
        _room(_module(path))
        for path in _sources("bank_service")
        if any(is_within(found.name, "bank_service.search.usearch") for found in imports(path))
    }
    assert users == {"search.vector_store", "search.usearch"}


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import regrad_vllm", ("numpy", "torch", "vllm", "transformers", "grpc")),
        ("import regrad_vllm.cli", ("torch", "vllm", "transformers", "grpc", "safetensors")),
        ("import regrad_vllm.learner, regrad_vllm.compose", ("torch", "vllm", "transformers", "grpc")),
        ("import regrad_vllm.client", ("torch", "vllm", "transformers", "grpc", "numpy")),
        ("from regrad_vllm.client import Bank, AsyncBank", ("torch", "vllm", "transformers")),
        ("import regrad_vllm.serve.plugin", ("torch", "vllm", "transformers", "grpc", "numpy")),
        ("import bank_service.wire.record", ("torch", "grpc", "sqlalchemy")),
    ],
)
def test_light_modules_load_nothing_heavy(statement: str, heavy: tuple[str, ...]) -> None:
    program = f"import sys\n{statement}\nprint([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_walk_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text("import os\ndef f():\n    from vllm.lora import request\n    import torch.nn as nn\n")
    assert list(imports(source)) == [
        Import("os", at_load=True),
        Import("vllm.lora.request", at_load=False),
        Import("torch.nn", at_load=False),
    ]


def test_the_graph_finds_a_closed_door_behind_two_rooms_and_a_package(tmp_path: Path) -> None:
    files = {
        "house/__init__.py": "",
        "house/hall.py": "def f():\n    from house.library import shelf\n",
        "house/library/__init__.py": "import house.cellar\n",
        "house/library/shelf.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm\n",
        "house/cellar.py": "import grpc.aio\ndef f():\n    import torch\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = ImportGraph(tmp_path, ("house",))
    assert graph.chain("house.hall", ("grpc",)) == ["house.hall", "house.library", "house.cellar", "grpc.aio"]
    assert graph.chain("house.hall", ("torch", "vllm")) is None, "neither is loaded with the hall"
    assert graph.chain("house.library.shelf", ("vllm",)) == ["house.library.shelf", "vllm"]
