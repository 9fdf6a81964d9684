"""Functions of the standard library, as prompts and completions for TRL's trainers."""

from __future__ import annotations

import ast
from typing import NamedTuple

from examples import common


class Function(NamedTuple):
    header: str  # "def f(x):"
    body: str  # the lines after it, with the line break before each


def functions(seed: int = 0, most: int = 600, characters: int = 300) -> list[Function]:
    """Top-level functions whose body has at least three lines and at most `characters`: at most `most`, shuffled."""
    found = []
    for _, source in common.standard_library("*.py"):
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
                first = node.body[0].lineno - 1
                header, body = lines[node.lineno - 1 : first], lines[first : node.end_lineno]
                if len(body) >= 3 and len("".join(body)) <= characters:
                    found.append(Function("".join(header).rstrip(), "\n" + "".join(body).rstrip()))
    return common.shuffled(found, seed)[:most]
