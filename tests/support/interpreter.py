"""A faster interpreter: Triton's, without work that changes no result. That is two thirds of its time here."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


def make_faster() -> None:
    """Leave work of Triton's interpreter out, in this process from now on.

    A Triton whose interpreter is built in another way is left as it is.
    """
    from triton.runtime import interpreter

    if all(hasattr(interpreter, name) for name in ("interpreter_builder", "_patch_lang", "_LangPatchScope")):
        _leave_out_overflow_checks(interpreter)
        _replace_builtins_once_a_launch(interpreter)
        _compute_types_once(interpreter)


def _leave_out_overflow_checks(interpreter: Any) -> None:
    """For each sum and product of integers the interpreter computes whether it overflows. It then drops the answer,
    unless its option `debug` is on."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def _replace_builtins_once_a_launch(interpreter: Any) -> None:
    """A launch replaces the builtin functions of triton.language by interpreted ones, until it ends. The interpreter
    does so again at each call of a device function. Here a launch replaces those of a module once."""
    scope_class = interpreter._LangPatchScope
    replace_builtins, restore = interpreter._patch_lang, scope_class.restore
    replaced: set[str] = set()  # the modules whose builtins the launch has replaced so far

    @functools.cache
    def modules_used_by(function: Any) -> set[str]:
        language = (interpreter.tl, interpreter.tl.core)
        return {x.__name__ for x in function.__globals__.values() if any(x is module for module in language)}

    @functools.wraps(replace_builtins)
    def replace_builtins_once(function: Any) -> Any:
        modules = modules_used_by(function)
        if modules and modules <= replaced:
            return scope_class()  # with nothing to restore
        replaced.update(modules)
        return replace_builtins(function)

    def restore_at_the_end_of_a_launch(scope: Any) -> None:
        replaced.clear()
        restore(scope)

    interpreter._patch_lang, scope_class.restore = replace_builtins_once, restore_at_the_end_of_a_launch


def _compute_types_once(interpreter: Any) -> None:
    """Each operation makes the type of a block and a tensor, and looks for a NumPy dtype. A type checks its shape and
    formats its name, a tensor wraps its sizes, and the table of dtypes is built for each search. Here this is computed
    once for each element type and shape. Nothing changes a type or a shape later. Two blocks whose types have the same
    shape object are not broadcast."""
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    find_dtype, broadcast = interpreter._get_np_dtype, semantic.broadcast_impl_value
    types: dict[Any, dict[str, Any]] = {}  # the attributes of a block's type, by the element type's name and the sizes
    shapes: dict[tuple[int, ...], Any] = {}  # the shape of all blocks of these sizes
    tensors: dict[str, dict[str, Any]] = {}  # the attributes of a tensor, by its type's name
    dtypes: dict[str, Any] = {}  # of NumPy, by the type's name

    @functools.wraps(make_type)
    def make_type_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        key = (element_ty.name, sizes)
        if key not in types:
            make_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element_ty)

    @functools.wraps(make_tensor)
    def make_tensor_once(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle, type=type)

    @functools.wraps(find_dtype)
    def find_dtype_once(type: Any) -> Any:
        if type.name not in dtypes:
            dtypes[type.name] = find_dtype(type)
        return dtypes[type.name]

    @functools.wraps(broadcast)
    def broadcast_different_shapes(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        of_one_shape = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        return (lhs, rhs) if of_one_shape else broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = make_type_once, make_tensor_once
    interpreter._get_np_dtype, semantic.broadcast_impl_value = find_dtype_once, broadcast_different_shapes
