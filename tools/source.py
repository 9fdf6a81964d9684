"""Reads the source of llama_kernels without importing it: modules, the definitions in them, and what names refer to."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llama_kernels"


class Definition(NamedTuple):
    """A function, class or constant at the top of a module."""

    module: str
    name: str

    @property
    def file(self) -> str:
        """Its file, relative to the package."""
        return path_of(self.module).relative_to(ROOT / PACKAGE).as_posix()


@functools.cache
def modules() -> tuple[str, ...]:
    """All modules of the package, with those of the reference, whose folder is a symbolic link."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py")) + sorted((ROOT / PACKAGE / "reference").glob("*.py"))
    names = (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths)
    return tuple(dict.fromkeys(name.removesuffix(".__init__") for name in names))


def path_of(module: str) -> Path:
    folder = ROOT / module.replace(".", "/")
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


@functools.cache
def definitions(module: str) -> dict[str, ast.stmt]:
    """For each name that is defined at the top of `module`, the statement that defines it."""
    found: dict[str, ast.stmt] = {}
    for statement in tree_of(module).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found[statement.name] = statement
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                found.update(_assigned(target, statement))
    return found


def _assigned(target: ast.expr, statement: ast.Assign | ast.AnnAssign) -> Iterator[tuple[str, ast.stmt]]:
    """(name, assignment) for each name in `target`. `a, b = x, y` becomes two assignments."""
    if isinstance(target, ast.Name):
        yield target.id, statement
    elif isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
        for each, value in zip(target.elts, statement.value.elts, strict=True):
            yield from _assigned(each, ast.Assign(targets=[each], value=value))


def imports(module: str) -> Iterator[tuple[str, str, str | None]]:
    """(local name, module that it is imported from, name in that module) of each import from this package.

    The third value is None if the local name is a module. The package has no relative imports.
    """
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, ast.ImportFrom) or node.module not in modules():
            continue
        for alias in node.names:
            inside = f"{node.module}.{alias.name}"
            shadowed = alias.name in definitions(node.module) or alias.name in _imported_names(node.module)
            is_module = inside in modules() and not shadowed
            yield alias.asname or alias.name, inside if is_module else node.module, None if is_module else alias.name


@functools.cache
def _imported_names(module: str) -> frozenset[str]:
    """Names that `module` imports, except its own submodules."""
    nodes = (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ImportFrom) and node.module != module)
    return frozenset(alias.asname or alias.name for node in nodes for alias in node.names)


@functools.cache
def resolve(module: str, name: str) -> Definition | str | None:
    """The definition or the module that `name` refers to in `module`. None if it is not of this package."""
    if name in definitions(module):
        return Definition(module, name)
    for local, source, there in imports(module):
        if local == name:
            return source if there is None else resolve(source, there)
    return None


def references(definition: Definition, node: ast.AST | None = None) -> list[Definition]:
    """The definitions that `definition`, or only its part `node`, refers to. Each once, in order."""
    node = definitions(definition.module)[definition.name] if node is None else node
    found = []
    for part in ast.walk(node):
        target: Definition | str | None = None
        if isinstance(part, ast.Name):
            target = resolve(definition.module, part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            module = resolve(definition.module, part.value.id)
            target = resolve(module, part.attr) if isinstance(module, str) else None
        if isinstance(target, Definition) and target != definition:
            found.append(target)
    return list(dict.fromkeys(found))
