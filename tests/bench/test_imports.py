"""No modules of bench import each other in a circle, not even by imports inside functions."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.once


def modules(folder: Path) -> dict[str, Path]:
    """Every module below `folder` by its dotted name, which begins with the name of `folder`."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(folder: Path) -> dict[str, set[str]]:
    """For each module, the modules below `folder` that it imports. A module also imports its packages."""
    paths = modules(folder)
    graph = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        named = {package}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: 1 - node.level or None] if node.level else []
                source = ".".join([*above, *filter(None, [node.module])])
                named |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
        graph[name] = named & paths.keys() - {name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def test_no_module_of_bench_imports_in_a_circle():
    graph = imports(ROOT / "bench")
    assert {"bench.commands.run", "bench.measuring.runner"} <= graph.keys() and "bench.host" not in graph["bench"]
    assert circle(graph) == []


def test_no_folder_of_bench_imports_in_a_circle():
    """So there is an order in which the folders can be read."""
    folders: dict[str, set[str]] = {}
    for name, named in imports(ROOT / "bench").items():
        folder, used = name.split(".")[1:2], {x.split(".")[1] for x in named if "." in x}
        if folder:
            folders.setdefault(folder[0], set()).update(used - {folder[0]})
    assert circle(folders) == []


@pytest.mark.parametrize(
    "importing", ["import pack.a.one", "from pack.a import one", "from pack.a.one import x", "from . import one",
                  "from ..a.one import x", "def f():\n    from pack.a import one"],
)  # fmt: skip
def test_an_import_circle_is_found(importing, tmp_path):
    (tmp_path / "pack" / "a").mkdir(parents=True)
    for name, text in {"__init__": "", "a/__init__": "", "a/one": "import pack.a.two", "a/two": importing}.items():
        (tmp_path / "pack" / f"{name}.py").write_text(text)
    assert set(circle(imports(tmp_path / "pack"))) == {"pack.a.one", "pack.a.two"}
