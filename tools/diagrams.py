"""Makes the diagrams and the table of docs/architecture.md from the source of llama_kernels.

    python -m tools.diagrams            print them
    python -m tools.diagrams --write    write them into docs/architecture.md

The source is parsed, not imported. tests/installation/test_docs.py fails if the page differs from the source.
"""

from __future__ import annotations

import argparse
import ast
import functools

from tools.source import PACKAGE, ROOT, Definition, definitions, imports, modules, references, resolve, tree_of

PAGE = ROOT / "docs/architecture.md"

# --- imports ---------------------------------------------------------------------------------------------------------


def group_of(module: str) -> str:
    """The box of the diagram that `module` belongs to: a folder, or a file of ops/."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    if parts[0] == "ops":
        return "/".join(parts[:3]) if parts[1:3] == ["attention", "hopper"] else "/".join(parts[:2])
    return "/".join(parts[:2]) if parts[0] == "integrations" else parts[0]


def import_edges() -> list[tuple[str, str]]:
    """Pairs (box, imported box), each once."""
    edges = set()
    for module in modules():
        for _, source, _ in imports(module):
            if source != PACKAGE or group_of(module) == "diagnose":
                edges.add((group_of(module), group_of(source)))
    return sorted((a, b) for a, b in edges if a != b and "integrations" not in (a, b) and "ops" not in (a, b))


def import_diagram() -> str:
    """The imports between folders as a mermaid diagram, without core and the reference, which all import."""
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


# --- calls -----------------------------------------------------------------------------------------------------------

KINDS = ("public function", "autograd.Function", "registered op", "launcher", "kernel")


@functools.cache
def _kernels() -> frozenset[Definition]:
    """The kernels: the first argument of each Launch."""
    found = set()
    for module in modules():
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Launch":
                target = resolve(module, node.args[0].id) if node.args and isinstance(node.args[0], ast.Name) else None
                found |= {target} if isinstance(target, Definition) else set()
    return frozenset(found)


def public_functions() -> list[str]:
    """The public functions of the package whose calls launch a kernel."""
    names = ast.literal_eval(definitions(PACKAGE)["__all__"].value)
    return [name for name in names if _chain(name)]


def _registration(definition: Definition) -> ast.Call | None:
    """The call of `register` by which `definition` is a registered op, or None."""
    node = definitions(definition.module)[definition.name]
    call = node.value if isinstance(node, ast.Assign) else None
    named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register"
    return call if named and definition.module != f"{PACKAGE}.core.registry" else None


@functools.cache
def kind_of(definition: Definition) -> str | None:
    """One of KINDS after the first, or None for a helper function."""
    node = definitions(definition.module)[definition.name]
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
    """The name of a definition. For a registered op, the name under which it is registered."""
    call = _registration(definition)
    if call is None:
        return definition.name
    schema = call.args[0].values[0] if isinstance(call.args[0], ast.JoinedStr) else call.args[0]
    return f"llama_kernels::{schema.value.partition('(')[0]}"


@functools.cache
def _next(definition: Definition) -> tuple[Definition, ...]:
    """The next definitions with a kind in a call of `definition`; helper functions between them are skipped.

    After a registered op comes the launcher of its kernel, not its reference.
    """
    call = _registration(definition)
    start = next(keyword.value for keyword in call.keywords if keyword.arg == "kernel") if call else None
    found: dict[Definition, None] = {}
    seen, waiting = {definition}, references(definition, start)
    while waiting:
        target = waiting.pop(0)
        if target in seen or target.module.startswith((f"{PACKAGE}.core", f"{PACKAGE}.reference")):
            continue
        seen.add(target)
        if kind_of(target):
            found[target] = None
        else:
            waiting += references(target)
    return tuple(found)


@functools.cache
def _chain(name: str) -> tuple[tuple[Definition, Definition], ...]:
    """The edges (definition, next definition) of a call of the public function. Empty if it launches no kernel."""
    start = resolve(PACKAGE, name)
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
    """The definitions that a call of the public function passes through, as a mermaid diagram."""
    edges = _chain(name)
    nodes = list(dict.fromkeys(definition for edge in edges for definition in edge))
    ids = {definition: f"n{i}" for i, definition in enumerate(nodes)}
    lines = ["flowchart LR"]
    for definition in nodes:
        kind = kind_of(definition) or KINDS[0]
        lines.append(f'    {ids[definition]}["{label_of(definition)}<br><i>{kind}, {definition.file}</i>"]')
    return "\n".join([*lines, *(f"    {ids[a]} --> {ids[b]}" for a, b in edges)])


def table() -> str:
    """A table of the autograd.Function, the registered ops and the kernels of each public function, with their files.

    Functions with the same cells share a row.
    """
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
    """The text of each generated part of the page, by the name in its marks."""
    return {
        "imports": f"```mermaid\n{import_diagram()}\n```",
        "rms_norm": f"```mermaid\n{call_diagram('rms_norm')}\n```",
        "attention": f"```mermaid\n{call_diagram('attention')}\n```",
        "ops": table(),
    }


def with_sections(page: str) -> str:
    """`page` with the generated parts between their marks. Raises ValueError if a mark is missing."""
    for name, text in sections().items():
        begin, end = f"<!-- {name}: made by python -m tools.diagrams --write -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"docs/architecture.md has no {begin} ... {end}; add both marks.")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.diagrams", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write them into {PAGE.relative_to(ROOT)}")
    if parser.parse_args().write:
        PAGE.write_text(with_sections(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(sections().values()))


if __name__ == "__main__":
    main()
