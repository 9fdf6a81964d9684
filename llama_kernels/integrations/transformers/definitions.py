"""The definition of a function in its source file, where the file still has the code that runs.

A file may change after its import: a module is edited in a notebook session, a package is upgraded. The text at the old
lines is then that of other code. So a definition counts only if the file, compiled, has the bytecode of the function.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator

_COMPARED = (
    "co_name", "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_posonlyargcount",
    "co_kwonlyargcount", "co_exceptiontable",
)  # fmt: skip


def definition_of(function: object) -> ast.FunctionDef | None:
    """The syntax tree of a plain function. None for other callables, and where `definition_of_code` has none."""
    return definition_of_code(function.__code__) if isinstance(function, types.FunctionType) else None


def definition_of_code(code: types.CodeType) -> ast.FunctionDef | None:
    """The syntax tree of the function with this code. None without a source file, or if the file has other code now.

    A function that has moved within its file is found. Of several with this code, it is the nearest to the old line.
    """
    try:
        lines, _ = inspect.findsource(code)
        same = [other for other in _functions_in("".join(lines)) if _same(code, other)]
        if not same:
            return None
        place = min((other.co_firstlineno for other in same), key=lambda line: abs(line - code.co_firstlineno))
        definition = ast.parse(textwrap.dedent("".join(inspect.getblock(lines[place - 1 :])))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return None
    return definition if isinstance(definition, ast.FunctionDef) else None


@functools.lru_cache(maxsize=16)
def _functions_in(text: str) -> tuple[types.CodeType, ...]:
    """The code of every function that the text of a file defines."""
    return tuple(codes_in(compile(text, "<file>", "exec", dont_inherit=True)))


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function or file, and of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def _same(a: object, b: object) -> bool:
    """Whether two constants, or the code of two functions, are the same but for their places in files."""
    if isinstance(a, types.CodeType) and isinstance(b, types.CodeType):
        alike = all(getattr(a, name, None) == getattr(b, name, None) for name in _COMPARED)
        return alike and len(a.co_consts) == len(b.co_consts) and all(map(_same, a.co_consts, b.co_consts))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    # repr tells 0.0 from -0.0. That of a set of strings may have another order.
    return type(a) is type(b) and a == b and (isinstance(a, frozenset) or repr(a) == repr(b))
