"""The diagrams and the table of docs/architecture.md, made from the source of llama_kernels.

    python -m tools.diagrams            print them
    python -m tools.diagrams --write    put them into docs/architecture.md

The source is parsed, not imported. tests/installation/test_docs.py fails where the page differs from the source.
"""

from __future__ import annotations

import argparse
import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llama_kernels"
PAGE = ROOT / "docs/architecture.md"


class Definition(NamedTuple):
    """A function, class or constant at the top of a module."""

    module: str
    name: str

    @property
    def file(self) -> str:
        """Its file, relative to the package."""
        return _path_of(self.module).relative_to(ROOT / PACKAGE).as_posix()


# --- reading the source ----------------------------------------------------------------------------------------------


@functools.cache
def modules() -> tuple[str, ...]:
    """All modules of the package. The reference, which is a link to a folder beside it, is one of them."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py")) + sorted((ROOT / PACKAGE / "reference").glob("*.py"))
    names = (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths)
    return tuple(dict.fromkeys(name.removesuffix(".__init__") for name in names))


def _path_of(module: str) -> Path:
    folder = ROOT / module.replace(".", "/")
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path_of(module).read_text(encoding="utf-8"))


@functools.cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    """The statements at the top of `module` that define a name, by that name."""
    found: dict[str, ast.stmt] = {}
    for statement in _tree(module).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found[statement.name] = statement
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                found.update(_assigned(target, statement))
    return found


def _assigned(target: ast.expr, statement: ast.Assign | ast.AnnAssign) -> Iterator[tuple[str, ast.stmt]]:
    """(name, statement that gives it its value) of what is assigned to. `a, b = x, y` is two assignments."""
    if isinstance(target, ast.Name):
        yield target.id, statement
    elif isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
        for each, value in zip(target.elts, statement.value.elts, strict=True):
            yield from _assigned(each, ast.Assign(targets=[each], value=value))


def _imports(module: str) -> Iterator[tuple[str, str, str | None]]:
    """(name in `module`, module it comes from, name there or None for a module itself), of this package's modules."""
    package = module if _path_of(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(_tree(module)):
        if not isinstance(node, ast.ImportFrom):
            continue
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        source = ".".join([*parents, *([node.module] if node.module else [])])
        if source not in modules():
            continue
        for alias in node.names:
            inside = f"{source}.{alias.name}"
            shadowed = alias.name in _definitions(source) or alias.name in _imported_names(source)
            is_module = inside in modules() and not shadowed
            yield alias.asname or alias.name, inside if is_module else source, None if is_module else alias.name


@functools.cache
def _imported_names(module: str) -> frozenset[str]:
    """Names that the module imports from modules, its own submodules aside."""
    nodes = (node for node in ast.walk(_tree(module)) if isinstance(node, ast.ImportFrom) and node.module != module)
    return frozenset(alias.asname or alias.name for node in nodes for alias in node.names)


@functools.cache
def _resolve(module: str, name: str) -> Definition | str | None:
    """What `name` means in `module`: a definition, the name of a module, or None where it is not of this package."""
    if name in _definitions(module):
        return Definition(module, name)
    for local, source, there in _imports(module):
        if local == name:
            return source if there is None else _resolve(source, there)
    return None


def _references(definition: Definition, node: ast.AST | None = None) -> list[Definition]:
    """The definitions that a definition, or `node` in it, names; each once, in their order."""
    node = _definitions(definition.module)[definition.name] if node is None else node
    found = []
    for part in ast.walk(node):
        target: Definition | str | None = None
        if isinstance(part, ast.Name):
            target = _resolve(definition.module, part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            module = _resolve(definition.module, part.value.id)
            target = _resolve(module, part.attr) if isinstance(module, str) else None
        if isinstance(target, Definition) and target != definition:
            found.append(target)
    return list(dict.fromkeys(found))


# --- which modules import which --------------------------------------------------------------------------------------


def group_of(module: str) -> str:
    """The box of the diagram that a module is in: a folder, or a file of ops/."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    if parts[0] == "ops":
        return "/".join(parts[:3]) if parts[1:3] == ["attention", "hopper"] else "/".join(parts[:2])
    return "/".join(parts[:2]) if parts[0] == "integrations" else parts[0]


def import_edges() -> list[tuple[str, str]]:
    """(box, box that it imports), each once."""
    edges = set()
    for module in modules():
        for _, source, _ in _imports(module):
            if source != PACKAGE or group_of(module) == "diagnose":
                edges.add((group_of(module), group_of(source)))
    return sorted((a, b) for a, b in edges if a != b and "integrations" not in (a, b) and "ops" not in (a, b))


def import_diagram() -> str:
    """Which folders import which, as mermaid. Core and the reference, which everything imports, have no arrows."""
    edges = [(a, b) for a, b in import_edges() if b not in ("core", "reference")]
    boxes = sorted({box for edge in edges for box in edge})
    ops = [box for box in boxes if box.startswith("ops/")]
    lines = ["flowchart TD", "    subgraph ops"]
    lines += [f"        {_id(box)}[{box.removeprefix('ops/')}]" for box in ops] + ["    end"]
    lines += [f"    {_id(box)}[{box}]" for box in boxes if box not in ops]
    drawn = set()
    for a, b in edges:
        a, b = ("ops" if a in ops and b not in ops else a), ("ops" if b in ops and a not in ops else b)
        drawn.add((_id(a), _id(b)))
    return "\n".join([*lines, *(f"    {a} --> {b}" for a, b in sorted(drawn))])


def _id(box: str) -> str:
    return box.replace("/", "_").strip("_")


# --- what a call goes through ----------------------------------------------------------------------------------------

KINDS = ("public function", "autograd.Function", "registered op", "launcher", "kernel")


@functools.cache
def _kernels() -> frozenset[Definition]:
    """What the launchers launch: the first argument of each Launch."""
    found = set()
    for module in modules():
        for node in ast.walk(_tree(module)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Launch":
                target = _resolve(module, node.args[0].id) if node.args and isinstance(node.args[0], ast.Name) else None
                found |= {target} if isinstance(target, Definition) else set()
    return frozenset(found)


def public_functions() -> list[str]:
    """Of the package, those that lead to a kernel."""
    names = ast.literal_eval(_definitions(PACKAGE)["__all__"].value)
    return [name for name in names if _chain(name)]


def _registration(definition: Definition) -> ast.Call | None:
    """The call of `register` that makes a registered op."""
    node = _definitions(definition.module)[definition.name]
    call = node.value if isinstance(node, ast.Assign) else None
    named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register"
    return call if named and definition.module != f"{PACKAGE}.core.registry" else None


@functools.cache
def kind_of(definition: Definition) -> str | None:
    """One of KINDS, or None for what only passes a call on."""
    node = _definitions(definition.module)[definition.name]
    if _registration(definition):
        return "registered op"
    if definition in _kernels():
        return "kernel"
    if isinstance(node, ast.ClassDef):
        return "autograd.Function" if any(_named(base, "Differentiable") for base in node.bases) else None
    launches = any(isinstance(part, ast.Call) and _named(part.func, "Launch") for part in ast.walk(node))
    return "launcher" if isinstance(node, ast.FunctionDef) and launches else None


def _named(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def label_of(definition: Definition) -> str:
    """Its name; of a registered op, the name that it is registered under."""
    call = _registration(definition)
    if call is None:
        return definition.name
    schema = call.args[0].values[0] if isinstance(call.args[0], ast.JoinedStr) else call.args[0]
    return f"llama_kernels::{schema.value.partition('(')[0]}"


@functools.cache
def _next(definition: Definition) -> tuple[Definition, ...]:
    """What a definition leads to, passing through those that have no kind. A registered op leads to its kernel's
    launcher; its reference, which CPU tensors run, is not drawn."""
    call = _registration(definition)
    start = next(keyword.value for keyword in call.keywords if keyword.arg == "kernel") if call else None
    found: dict[Definition, None] = {}
    seen, waiting = {definition}, _references(definition, start)
    while waiting:
        target = waiting.pop(0)
        if target in seen or target.module.startswith((f"{PACKAGE}.core", f"{PACKAGE}.reference")):
            continue
        seen.add(target)
        if kind_of(target):
            found[target] = None
        else:
            waiting += _references(target)
    return tuple(found)


@functools.cache
def _chain(name: str) -> tuple[tuple[Definition, Definition], ...]:
    """The edges of what a call of the public function leads to. Empty where no kernel is among it."""
    start = _resolve(PACKAGE, name)
    if not isinstance(start, Definition):
        return ()
    edges, seen, waiting = [], {start}, [start]
    while waiting:
        definition = waiting.pop(0)
        for target in _next(definition) if kind_of(definition) != "kernel" else ():
            edges.append((definition, target))
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return tuple(edges) if any(kind_of(b) == "kernel" for _, b in edges) else ()


def call_diagram(name: str) -> str:
    """What a call of the public function leads to, as mermaid."""
    edges = _chain(name)
    nodes = list(dict.fromkeys(definition for edge in edges for definition in edge))
    ids = {definition: f"n{i}" for i, definition in enumerate(nodes)}
    lines = ["flowchart LR"]
    for definition in nodes:
        kind = kind_of(definition) or KINDS[0]
        lines.append(f'    {ids[definition]}["{label_of(definition)}<br><i>{kind}, {definition.file}</i>"]')
    return "\n".join([*lines, *(f"    {ids[a]} --> {ids[b]}" for a, b in edges)])


def table() -> str:
    """For each public function, the autograd.Function, registered ops and kernels of its calls, and their files.
    Functions whose calls go through the same share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in public_functions():
        nodes = list(dict.fromkeys(definition for edge in _chain(name) for definition in edge))
        cells = [_link(nodes[0])]
        for kind in ("autograd.Function", "registered op"):
            labels = (label_of(each).removeprefix("llama_kernels::") for each in nodes if kind_of(each) == kind)
            cells.append("<br>".join(f"`{label}`" for label in dict.fromkeys(labels)))
        kernels = sorted((each.file, each) for each in nodes if kind_of(each) == "kernel")
        by_file = {_link(each): [other.name for name, other in kernels if name == file] for file, each in kernels}
        cells.append("<br>".join(f"{link}: {', '.join(f'`{n}`' for n in names)}" for link, names in by_file.items()))
        rows.setdefault(tuple(cells), []).append(name)
    lines = ["| public function | in | autograd.Function | registered ops | kernels |", "|---|---|---|---|---|"]
    for cells, names in rows.items():
        lines.append("| " + " | ".join(["<br>".join(f"`{name}`" for name in names), *cells]) + " |")
    return "\n".join(lines)


def _link(definition: Definition) -> str:
    return f"[{definition.file}](../{PACKAGE}/{definition.file})"


# --- the page --------------------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    """The parts of the page that are made here, by the name in their marks."""
    return {
        "imports": f"```mermaid\n{import_diagram()}\n```",
        "rms_norm": f"```mermaid\n{call_diagram('rms_norm')}\n```",
        "attention": f"```mermaid\n{call_diagram('attention')}\n```",
        "ops": table(),
    }


def with_sections(page: str) -> str:
    """`page` with each part between its marks as it is now."""
    for name, text in sections().items():
        begin, end = f"<!-- {name}: made by python -m tools.diagrams --write -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"docs/architecture.md has no {begin} ... {end}; wanted both marks.")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.diagrams", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.relative_to(ROOT)}")
    if parser.parse_args().write:
        PAGE.write_text(with_sections(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(sections().values()))


if __name__ == "__main__":
    main()
