"""The project's import graph, from the syntax trees of its files. Nothing is imported to build it."""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name in one file."""

    name: str  # absolute, "package.module" or "package.module.member"
    at_load: bool  # runs when the file is loaded: not inside a function, not for type checkers only


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, at any depth."""
    yield from _imports(ast.parse(path.read_text("utf-8")), path, at_load=True)


def _imports(tree: ast.AST, path: Path, *, at_load: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide what is imported"
            yield from (Import(f"{node.module}.{alias.name}", at_load) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(ast.Module(node.body, []), path, at_load=False)
            yield from _imports(ast.Module(node.orelse, []), path, at_load=at_load)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(node, path, at_load=at_load and not is_function)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


class ImportGraph:
    """Which module loads which. Modules outside the packages are leaves."""

    def __init__(self, root: Path, packages: Sequence[str]) -> None:
        self._modules: dict[str, list[Import]] = {}
        for package in packages:
            for path in sorted((root / package).rglob("*.py")):
                if "generated" not in path.parts:
                    parts = path.relative_to(root).with_suffix("").parts
                    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                    self._modules[name] = list(imports(path))

    def within(self, package: str) -> list[str]:
        """The modules of a package, itself among them."""
        return [name for name in self._modules if is_within(name, package)]

    def chain(self, start: str, forbidden: Sequence[str]) -> list[str] | None:
        """The shortest chain of imports from a module to one of the forbidden packages; None where there is none.

        The first step takes any import of ``start``, also one inside a function. Each further step takes what a module
        loads at once, because that can't be avoided.
        """
        came_from: dict[str, str | None] = {start: None}
        queue = deque([start])
        while queue:
            module = queue.popleft()
            for target in self._targets(module, lazy=module == start):
                if target in came_from:
                    continue
                came_from[target] = module
                if any(is_within(target, package) for package in forbidden):
                    return self._path(came_from, target)
                if target in self._modules:
                    queue.append(target)
        return None

    def _targets(self, module: str, *, lazy: bool) -> Iterator[str]:
        """The modules that a module loads: those it names, and the packages that these are in."""
        for found in self._modules[module]:
            if not (found.at_load or lazy):
                continue
            parts = found.name.split(".")
            for end in range(1, len(parts)):
                if (package := ".".join(parts[:end])) in self._modules:
                    yield package
            yield found.name

    @staticmethod
    def _path(came_from: dict[str, str | None], target: str) -> list[str]:
        path: list[str] = [target]
        while (before := came_from[path[-1]]) is not None:
            path.append(before)
        return path[::-1]
