"""Rewritten forwards with fused operations: residual add + norm, or the norms of q and k + RoPE.

A rewrite changes a few lines of a forward, so that they compute the same whatever the other lines are. The add and the
norm are consecutive statements. Between the norms of q and k and RoPE there are only projections and views of other
tensors. The rewrite does not call the norm modules. A call runs the forward without it if one of them has hooks or is
not ours.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from llama_kernels.integrations.transformers import modules, source

ADD_NORM, QK_NORM_ROPE = "add_rms_norm", "qk_norm_rope"

_RESIDUAL = re.compile(
    r"^(?P<indent> +)(?P<x>(?!residual\b)\w+) = residual \+ (?P=x)\n(?P=indent)residual = (?P=x)\n"
    r"(?P=indent)(?P=x) = self\.(?P<norm>\w*norm\w*)\((?P=x)\)$",
    re.M,
)
_HEADS = {"query_states": "q_norm", "key_states": "k_norm"}
_ROTARY = ast.dump(
    ast.parse("query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)").body[0]
)
# What may be called between the norms and RoPE, beside modules whose names end in "proj": it changes no tensor.
_VIEWS = {"chunk", "contiguous", "flatten", "reshape", "split", "transpose", "unflatten", "unsqueeze", "view"}
# The parts of expressions that have no effect.
_PLAIN = (
    ast.Attribute, ast.BinOp, ast.Constant, ast.Name, ast.Slice, ast.Starred, ast.Subscript, ast.Tuple, ast.UnaryOp,
    ast.keyword, ast.operator, ast.unaryop, ast.expr_context,
)  # fmt: skip


class Fusion(NamedTuple):
    """A rewritten text, and the norm modules that it does not call. text: None if it would not compute the same."""

    text: str | None
    norms: tuple[str, ...]


def fusion_of(kind: str, text: str) -> Fusion | None:
    """The rewrite of a normalised forward. None where it does not have the lines of this kind."""
    if not text:
        return None
    if kind == QK_NORM_ROPE:
        return _with_norms_in_rope(text)
    found = list(_RESIDUAL.finditer(text))
    line = r"\g<indent>\g<x>, residual = add_and_norm(self.\g<norm>, \g<x>, residual)"
    return Fusion(_RESIDUAL.sub(line, text), tuple(match["norm"] for match in found)) if found else None


def _with_norms_in_rope(text: str) -> Fusion | None:
    """The fusion of the norms of q and k with RoPE."""
    (function,) = ast.parse(text).body
    body = function.body if isinstance(function, ast.FunctionDef) else []
    bare = [(i, name, new) for i, old in enumerate(body) for name in _HEADS if (new := _without_norm(old, name))]
    rotary = [i for i, statement in enumerate(body) if ast.dump(statement) == _ROTARY]
    if len(rotary) != 1 or [name for _, name, _ in bare] != [*_HEADS]:
        return None
    (at_q, _, new_q), (at_k, _, new_k) = bare
    if not at_q < at_k < rotary[0]:
        return None
    until_k, until_rope = body[at_q + 1 : at_k], body[at_k + 1 : rotary[0]]
    views = all(_is_view(statement, {"query_states"}) for statement in (*until_k, new_k))
    if not views or not all(_is_view(statement, {*_HEADS}) for statement in until_rope):
        return Fusion(None, (*_HEADS.values(),))
    body[at_q], body[at_k] = new_q, new_k
    body[rotary[0] : rotary[0] + 1] = ast.parse(
        "query_states, key_states = norm_and_rotate(self.q_norm, self.k_norm, query_states, key_states, cos, sin)"
    ).body
    return Fusion(ast.unparse(function), (*_HEADS.values(),))


def _without_norm(statement: ast.stmt, name: str) -> ast.Assign | None:
    """`name = x`, or `name = x.transpose(1, 2)`, for a statement that assigns the norm of x, or its transpose."""
    match statement:
        case ast.Assign([ast.Name(target)], ast.Call(ast.Attribute(norm, "transpose"), dims, [])) if target == name:
            x = _normed(norm, name)
            if x is None or [ast.unparse(dim) for dim in dims] != ["1", "2"]:
                return None
            x = ast.Call(ast.Attribute(x, "transpose", ast.Load()), dims, [])
        case ast.Assign([ast.Name(target)], norm) if target == name and (x := _normed(norm, name)):
            pass
        case _:
            return None
    return ast.Assign([ast.Name(name, ast.Store())], x, lineno=statement.lineno)


def _normed(call: ast.expr, name: str) -> ast.expr | None:
    """x, if the expression is the call of the norm of q or of k with x."""
    match call:
        case ast.Call(ast.Attribute(ast.Name("self"), norm), [x], []) if norm == _HEADS[name]:
            return None if isinstance(x, ast.Starred) else x
    return None


def _is_view(statement: ast.stmt, unread: set[str]) -> bool:
    """Whether a statement assigns projections or views of tensors. It must not name any of `unread`."""
    if not isinstance(statement, ast.Assign):
        return False
    targets = [part for target in statement.targets for part in getattr(target, "elts", [target])]
    if not all(isinstance(target, ast.Name) for target in targets):
        return False
    if unread & {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}:
        return False
    for node in ast.walk(statement.value):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if called not in _VIEWS and not called.endswith("proj"):
                return False
        elif not isinstance(node, _PLAIN):
            return False
    return True


def fused_forward(forward: Any, plain: Callable[..., Any], fusion: Fusion, names: dict[str, Any]) -> Any:
    """A forward that runs the rewrite of `forward` if all its norms may be skipped, and otherwise `plain`."""
    fused: Any = source.with_globals(forward, names, fusion.text)

    @functools.wraps(plain)
    def forward_of(self: Any, *args: Any, **kwargs: Any) -> Any:
        skipped = all(modules.may_be_skipped(getattr(self, norm, None)) for norm in fusion.norms)
        return (fused if skipped else plain)(self, *args, **kwargs)

    return forward_of
