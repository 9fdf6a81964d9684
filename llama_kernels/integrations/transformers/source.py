"""Functions as normalised text, and copies of functions with other objects for some of their global names.

A normalised text is a function printed from its syntax tree, without its name, docstrings, comments and annotations.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import linecache
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from llama_kernels.integrations.transformers.definitions import codes_in, definition_of, definition_of_code

Function = types.FunctionType
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the global name by which forwards reach AttentionInterface
# What the models of Transformers call an attention function.
_ATTENTION_NAMES = ("attention_interface", "attention_function", "attn_fn", "eager_attention_forward")
_FORWARD_OF_KERNELS = "def function(self, *args, **kwargs):\n    return func(*args, **kwargs)"


@functools.lru_cache(maxsize=4096)  # models hold copies of one another's functions
def normalised(source: str) -> str:
    """The text of the one function that `source` defines."""
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise ValueError("source is not one function definition")
    return _normalised(function)


def _normalised(function: ast.FunctionDef) -> str:
    """The text of a definition, which this changes."""
    function.name, function.decorator_list, function.returns = "function", [], None
    return _unparsed(_Plain().visit(function))


def without_unused_defaults(text: str) -> str:
    """A normalised text without its unused optional arguments, which differ between releases."""
    if not text:
        return text
    tree = ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            _drop_unused_defaults(function.args, used)
    return _unparsed(tree)


def _unparsed(tree: ast.AST) -> str:
    """The text of `tree`, which this changes.

    Every release of Python from 3.10 to 3.13 gives the same text, unless an f-string has quotes inside its braces.
    """
    return ast.unparse(_OpenTargets().visit(tree)).replace("lambda :", "lambda:")  # Python 3.10 writes the space


def text_of(function: Any) -> str:
    """The normalised text of a plain Python function; "" for a wrapper, a builtin, or if `definition_of` has none."""
    if not isinstance(function, Function) or hasattr(function, "__wrapped__"):
        return ""
    text, defaults = _read(_Identity(function.__code__))
    own = inspect.signature(function).parameters
    return text if all(repr(own[name].default) == value for name, value in defaults.items()) else ""


def called_by(function: Any) -> Any:
    """The function that an object of the package kernels wraps. Any other function is returned as it is."""
    forward: Any = getattr(type(function), "forward", None)
    if text_of(forward) != _FORWARD_OF_KERNELS or forward.__code__.co_freevars != ("func",):
        return function
    return forward.__closure__[0].cell_contents


def decorated(function: Any) -> list[Function]:
    """The wrappers of a function, as functools.wraps records them, outermost first, then the wrapped function."""
    chain = [function]
    while hasattr(chain[-1], "__wrapped__"):
        chain.append(chain[-1].__wrapped__)
    return chain


def chain_of(function: Any) -> Iterator[Any]:
    """A callable, its function if it is a bound method, and the callables that it wraps, outermost first."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        yield function
        names = ["__func__", "__wrapped__", "_torchdynamo_orig_callable"]
        names += ["func"] if isinstance(function, functools.partial) else []
        function = next((getattr(function, name) for name in names if hasattr(function, name)), None)


def name_of(function: Any) -> str:
    """A callable's own name and module, for messages: functools.wraps gives it those of the function it wraps."""
    function = _called(function)
    if isinstance(function, Function):
        name = getattr(function.__code__, "co_qualname", function.__code__.co_name)  # co_qualname: Python 3.11
        return f"{name} of {module_of(function)}"
    return f"a {type(function).__qualname__} of {module_of(function)}"


def module_of(function: Any) -> str:
    """The name of the module in which a callable was defined, or its class if it is not a function."""
    function = _called(function)
    if isinstance(function, Function):
        return str(function.__globals__.get("__name__"))
    return type(function).__module__


def _called(function: Any) -> Any:
    """The function that a bound method or a functools.partial calls; otherwise `function`."""
    function = getattr(function, "__func__", function)
    return function.func if isinstance(function, functools.partial) else function


def global_names(function: Any) -> frozenset[str]:
    """The global names and attributes that a plain function, and the functions defined in it, look up."""
    return _names_in_code(_Identity(function.__code__)) if isinstance(function, Function) else frozenset()


def with_globals(function: Function, names: dict[str, Any], text: str | None = None) -> Function | None:
    """A copy of `function` with other objects for the global `names`, and with the code of `text` if it is given.

    Decorators are kept: each wrapper is copied too, with the inner copy in its closure. None if a wrapper does not hold
    the function it wraps in its closure. The copy keeps the other globals as they are now.
    """
    *wrappers, inner = decorated(function)
    if not isinstance(inner, Function):
        return None
    globals_ = {**inner.__globals__, **names}
    globals_.pop("__name__", None)  # torch.compile would look names up in the module of this name, not here
    code = inner.__code__
    if text is not None:
        code = _compiled(text, f"<llama_kernels: {inner.__module__}.{inner.__qualname__}>")
    copy = _copied(inner, code, globals_, inner.__closure__)
    for wrapper in reversed(wrappers):
        cells = wrapper.__closure__ or ()
        held = [cell.cell_contents is inner for cell in cells]
        if not isinstance(wrapper, Function) or sum(held) != 1:
            return None
        cells = tuple(types.CellType(copy) if here else cell for here, cell in zip(held, cells, strict=True))
        inner, copy = wrapper, _copied(wrapper, wrapper.__code__, wrapper.__globals__, cells, wraps=copy)
    return copy


@functools.cache
def passes_mask_on(function: Function) -> bool:
    """Whether an attention forward passes its attention_mask to the attention function without computing with it.

    It may choose between masks, compare one with None, and slice one without an offset. It may not compute a new mask.
    True for a forward that does not call an attention function itself.
    """
    tree = definition_of(function)
    if tree is None:
        return False
    attention = {*_ATTENTION_NAMES} | {
        ast.unparse(target).split(".")[-1]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and INTERFACE in ast.unparse(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_attention(node.func, attention)]
    if not calls:
        return True
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    masks = {name for name in ("attention_mask", "encoder_attention_mask") if name in ast.unparse(tree)}
    masks |= {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and any(isinstance(part, ast.Name) and part.id in masks for part in _choices(node.value))
    }
    for node in ast.walk(tree):
        is_mask = isinstance(node, ast.Name) and node.id in masks and isinstance(node.ctx, ast.Load)
        if is_mask and not _only_passed_on(node, parents, attention):
            return False
    for node in calls:
        given = [k.value for k in node.keywords if k.arg == "attention_mask"] or node.args[4:5]
        if any(not (isinstance(x, ast.Name) and x.id in masks) and not _is_none(x) for x in given):
            return False
    return True


def _only_passed_on(name: ast.AST, parents: dict[ast.AST, ast.AST], attention: set[str]) -> bool:
    """Whether a mask is used only in the ways that `passes_mask_on` allows.

    name: the place where it is read. attention: the names of attention functions.
    """
    node: ast.AST = parents[name]
    if isinstance(node, ast.keyword):
        node = parents[node]
    if isinstance(node, ast.Call):
        return _is_attention(node.func, attention)
    if isinstance(node, ast.Compare):
        return all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
    if isinstance(node, ast.Subscript):
        sides = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
        return len(sides) == 4 and all(isinstance(side, ast.Slice) and not side.lower for side in sides)
    return isinstance(node, (ast.Assign, ast.IfExp))


def _choices(node: ast.expr) -> list[ast.expr]:
    """The expressions that `a if c else b` chooses from, without subscripts."""
    if isinstance(node, ast.IfExp):
        return [*_choices(node.body), *_choices(node.orelse)]
    return [node.value] if isinstance(node, ast.Subscript) else [node]


def _is_attention(function: ast.expr, names: set[str]) -> bool:
    text = ast.unparse(function)
    return (isinstance(function, (ast.Name, ast.Attribute)) and text.split(".")[-1] in names) or (
        isinstance(function, (ast.Subscript, ast.Call)) and INTERFACE in text
    )


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


class _Plain(ast.NodeTransformer):
    """Removes docstrings and annotations from a function and the functions in it."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        return ast.Assign([node.target], node.value, lineno=node.lineno) if node.value else ast.Pass()


class _OpenTargets(ast.NodeTransformer):
    """Writes tuples that are assigned to without parentheses, as Python does from 3.11 on: a, b = c."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        node.targets = [*map(self._open, node.targets)]
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        node.target = self._open(node.target)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        self.generic_visit(node)
        node.target = self._open(node.target)
        return node

    @staticmethod
    def _open(target: ast.expr) -> ast.expr:
        if not isinstance(target, ast.Tuple) or not target.elts:
            return target
        names = ", ".join(map(ast.unparse, target.elts))
        return ast.Name(names if len(target.elts) > 1 else f"{names},", ast.Store())


def _drop_unused_defaults(arguments: ast.arguments, used: set[str]) -> None:
    """Remove the optional arguments whose names are not in `used`."""
    first = len(arguments.args) - len(arguments.defaults)
    kept = [
        (argument, default)
        for argument, default in zip(arguments.args[first:], arguments.defaults, strict=True)
        if argument.arg in used
    ]
    arguments.args = [*arguments.args[:first], *(argument for argument, _ in kept)]
    arguments.defaults = [default for _, default in kept]


class _Identity:
    """A cache key that compares by identity: equal code objects may come from different files."""

    def __init__(self, code: types.CodeType) -> None:
        self.code = code

    def __hash__(self) -> int:
        return id(self.code)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.code is other.code


@functools.cache
def _read(key: _Identity) -> tuple[str, dict[str, str]]:
    """The normalised text of the function with this code, and those of its defaults that are literals, by argument.

    Defaults are not part of a function's code, but of that of the file or class around it.
    """
    definition = definition_of_code(key.code)
    if definition is None:
        return "", {}
    args = definition.args
    positional = [*args.posonlyargs, *args.args]
    pairs = [*zip(positional[len(positional) - len(args.defaults) :], args.defaults, strict=True)]
    pairs += [(arg, value) for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True) if value is not None]
    literals = {}
    for argument, value in pairs:
        with contextlib.suppress(ValueError):
            literals[argument.arg] = repr(ast.literal_eval(value))
    return _normalised(definition), literals


@functools.cache
def _names_in_code(key: _Identity) -> frozenset[str]:
    return frozenset(name for code in codes_in(key.code) for name in code.co_names)


@functools.cache
def _compiled(text: str, filename: str) -> types.CodeType:
    """The code of the function that `text` defines. Tracebacks show the text as file `filename`."""
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    module = compile(text, filename, "exec", dont_inherit=True)  # not run, since defaults may name globals of the file
    (code,) = (x for x in module.co_consts if isinstance(x, types.CodeType) and x.co_name == "function")
    return code


def _copied(function: Function, code: types.CodeType, globals_: dict[str, Any], closure: Any, wraps: Any = None) -> Any:
    """A copy of `function` with this code, these globals and this closure. wraps: the function that the copy wraps."""
    copy: Any = types.FunctionType(code, globals_, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function).__wrapped__ = wraps
    if wraps is None:
        del copy.__wrapped__
    return copy
