"""Known code and the installed Transformers: the families of each entry, and results equal to those of stock."""

from __future__ import annotations

import copy
import functools
import importlib
import re
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

from llama_kernels.integrations.transformers import classes, known_code, rotaries, source
from tests.integrations.small import VERSION, Calls, not_interpreted
from tests.support.environment import DEVICE
from tests.support.judge import judge, relative_error

pytestmark = not_interpreted

MODELS = Path(transformers.__file__).parent / "models"
DTYPES = (torch.float32, torch.bfloat16)


_HELPERS = r"rotate_half\w*|_apply_rotary_emb|rotate_every_two|rotate_pairwise|reshape_for_broadcast|stack_freqs"
_HELPER = re.compile(rf"({_HELPERS})\(")


class Defined(NamedTuple):
    """A function of a file modeling_*.py of Transformers."""

    family: str
    module: str
    cls: str | None
    name: str
    text: str  # normalised


_DEFINITION = re.compile(r"( {4})?(class|def) (\w+)")
_WANTED = re.compile(rf"forward$|{_HELPERS}|_norm|\w*apply_")


def read(path: Path) -> list[Defined]:
    """The functions and methods in a file that could be known code.

    They are found by indentation, since `ast.parse` of whole files takes ten times as long.
    """
    lines, found, outer, cls = path.read_text().splitlines(), [], "", ""
    module = f"transformers.models.{path.parent.name}.{path.stem}"
    for i, line in enumerate(lines):
        if (match := _DEFINITION.match(line)) is None:
            continue
        indent, kind, name = match.groups()
        if not indent:
            outer, cls = kind, name
        if kind == "class" or (indent and outer == "def") or not _WANTED.match(name):
            continue
        after = re.compile(" {0,4}[^ )\\]]" if indent else "[^ )\\]]")  # a signature may end in a line of ")" or "]"
        end = next((j for j in range(i + 1, len(lines)) if after.match(lines[j])), len(lines))
        code = "\n".join(lines[i:end])
        if name != "forward" or re.search(r"residual \+|apply_rotary_pos_emb|rsqrt|_norm\(", code):
            found.append(Defined(path.parent.name, module, cls if indent else None, name, source.normalised(code)))
    return found


@functools.cache
def defined() -> list[Defined]:
    return [function for path in sorted(MODELS.glob("*/modeling_*.py")) for function in read(path)]


def loaded(function: Defined) -> Any:
    module = importlib.import_module(function.module)
    return getattr(module, function.cls or function.name)


def names_of(families: str) -> set[str]:
    """The installed families that an entry names. An entry is for the newest release unless it names Transformers 4."""
    if VERSION < (5, 24) and not ("of Transformers 4" in families and VERSION < (5, 0)):
        return set()
    if "of Transformers 4" in families and VERSION >= (5, 0):
        return set()
    return {name for name in re.findall(r"\w+", families) if (MODELS / name).is_dir()}


# --- texts -----------------------------------------------------------------------------------------------------------


def test_a_normalised_text_is_the_same_with_every_release_of_python():
    """Python 3.10 itself would write tuples that are assigned to in parentheses, and `lambda :`."""
    text = """def function(x):
    a, (b, *c) = x
    d, = c
    for i, j in zip(a, b):
        e = [k + n for k, n in i]
    return lambda: (d, e)"""
    assert source.normalised(f"@decorator\n{text}") == text
    assert source.without_unused_defaults(text) == text


def test_a_function_of_a_docstring_alone_has_a_text():
    """It has to be code, which `without_unused_defaults` reads again."""
    text = source.normalised('''def abstract(x):
    """Docstring."""''')
    assert source.without_unused_defaults(text) == text == "def function(x):\n    pass"


# --- norms -----------------------------------------------------------------------------------------------------------


@functools.cache
def norms_of(forward: str, norm: str) -> list[Defined]:
    forward, norm = source.normalised(forward), source.normalised(norm) if norm else ""
    helpers = {(f.module, f.cls): f.text for f in defined() if f.name == "_norm"}
    found = [f for f in defined() if f.name == "forward" and f.cls and f.text == forward]
    return [f for f in found if not norm or helpers.get((f.module, f.cls)) == norm]


norms = pytest.mark.parametrize("known", known_code.NORMS, ids=[known.families for known in known_code.NORMS])


def stock_norm(known: known_code.Norm, size: int) -> nn.Module:
    if not (found := norms_of(known.forward, known.norm)):
        pytest.skip(f"no class of Transformers {transformers.__version__}")
    cls = loaded(found[0])
    norm = cls.__new__(cls)
    nn.Module.__init__(norm)
    setattr(norm, known.eps, 1e-2)
    norm.with_scale = known.weighted
    if known.weighted:
        norm.weight = nn.Parameter(torch.randn(size, device=DEVICE))
    return norm


@norms
def test_the_families_of_a_norm_entry_have_its_text(known):
    served = {function.family for function in norms_of(known.forward, known.norm)}
    assert names_of(known.families) <= served
    added_later = VERSION < (5, 24)  # as that of inkling2 was
    assert served or added_later, "no class of this Transformers"


@norms
def test_a_norm_class_is_known_but_not_a_subclass_with_another_forward(known):
    cls = type(stock_norm(known, 8))
    assert known_code.norm_of(cls) == known
    own = type("Own", (cls,), {"forward": lambda self, x: x})
    assert known_code.norm_of(own) is None
    if known.norm:
        assert known_code.norm_of(type("Own", (cls,), {"_norm": lambda self, x: x})) is None


@norms
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replaced_norm_gives_the_results_of_stock(known, dtype, weight_dtype):
    stock = stock_norm(known, 32).to(weight_dtype)
    ours = copy.deepcopy(stock)
    ours.__class__ = classes.class_of(type(stock), ("rms_norm",))
    x = torch.randn(4, 7, 32, device=DEVICE, dtype=dtype)
    dy = torch.randn(4, 7, 32, device=DEVICE, dtype=dtype)

    def run(norm: nn.Module) -> list[torch.Tensor]:
        given = x.detach().clone().requires_grad_()
        y = norm(given)
        y.backward(dy.to(y.dtype))
        return [y.detach(), given.grad, *(p.grad for p in norm.parameters())]

    def exact(number: torch.dtype) -> list[torch.Tensor]:
        given = x.detach().to(number).requires_grad_()
        weights = [p.detach().to(number).requires_grad_() for p in stock.parameters()]
        y = given * torch.rsqrt(given.square().mean(-1, keepdim=True) + 1e-2)
        y = y * (known.offset + weights[0]) if weights else y
        y.backward(dy.to(number))
        return [y.detach(), given.grad, *(w.grad for w in weights)]

    with Calls() as calls:
        results = run(ours)
    same_dtype = not known.promotes or torch.promote_types(dtype, weight_dtype) == dtype
    same_dtype = same_dtype and (not known.as_weight or dtype == weight_dtype)
    assert any(name.startswith("llama_kernels::rms_norm") for name, _ in calls.made) == same_dtype
    for K, theirs, R, I in zip(results, run(stock), exact(torch.float64), exact(torch.float32), strict=True):
        assert K.dtype == theirs.dtype
        if dtype == weight_dtype == torch.float32:
            judge("ours", K, R, I)
            judge("stock", theirs, R, I)
        else:
            assert relative_error(K, R) <= 1.15 * relative_error(theirs, R)


# --- rotary embeddings -----------------------------------------------------------------------------------------------


def rotary_text(function: Defined) -> str:
    return source.without_unused_defaults(re.sub(r"rotate_half\w*\(", "rotate_half(", function.text))


@functools.cache
def rotaries_of(text: str) -> list[Defined]:
    text = source.without_unused_defaults(source.normalised(text))
    return [f for f in defined() if f.cls is None and "rotary" in f.name and rotary_text(f) == text]


of_rotaries = pytest.mark.parametrize(
    "known", known_code.ROTARIES, ids=[known.families for known in known_code.ROTARIES]
)


def variants(known: known_code.Rotary) -> list[tuple[Any, known_code.Rotary]]:
    """A function for each helper in its files, and the entry with the fields that the helper decides."""
    found: dict[known_code.Rotary, Any] = {}
    helpers = {(f.module, f.name): f.text for f in defined() if not f.cls}
    pairings = {source.normalised(text): pairing for text, pairing in known_code.PAIRINGS.items()}
    for function in rotaries_of(known.text):
        wanted = known
        if helper := _HELPER.search(function.text):
            pairing = pairings.get(helpers.get((function.module, helper[1]), ""))
            if pairing is None:
                continue
            wanted = known._replace(interleaved=pairing.interleaved, inverse=pairing.inverse)
        if wanted not in found:
            stock = loaded(function)
            # Where the package kernels is installed, some releases of Transformers wrap the function.
            assert known_code.rotary_of(source.called_by(stock)) == wanted
            found[wanted] = stock
    return [(stock, wanted) for wanted, stock in found.items()]


@of_rotaries
def test_the_families_of_a_rotary_entry_have_its_text(known):
    served = {function.family for function in rotaries_of(known.text)}
    assert names_of(known.families) <= served
    added_later = VERSION < (5, 23)  # as mistral_large4 was
    assert served or "of Transformers 4" in known.families or added_later, "no function of this Transformers"


@pytest.mark.skipif(VERSION < (5, 23), reason="some of the texts are of later releases of Transformers")
def test_every_helper_text_is_in_transformers():
    texts = {f.text for f in defined() if f.cls is None}
    for text in known_code.PAIRINGS:
        assert source.normalised(text) in texts


class Given(NamedTuple):
    """The arguments of a rotary function."""

    heads: tuple[torch.Tensor, ...]  # q and k, or one of them
    rest: tuple[Any, ...]


def rotary_inputs(known: known_code.Rotary, heads: int, R: int, rows: int, dtype: torch.dtype) -> Given:
    """q, k and tables whose halves differ."""
    B, S, D = 2, 6, 16

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype)

    shapes = {1: lambda H: (B, H, S, D), 2: lambda H: (B, S, H, D), -2: lambda H: (S, H, D)}
    q, k = (drawn(*shapes[heads](H)) for H in (4, 2))
    width = R // 2 if known.tables == "pairs" else R
    if known.form == "complex":
        return Given((q, k), (torch.complex(*(drawn(rows, S, width) for _ in range(2))),))
    if known.form == "complex grid":
        return Given((q, k), (torch.complex(*(drawn(S, 1, width) for _ in range(2))),))
    shape = {
        "grid": (1,) * rows + (S, width),
        "memory": (1, 1, S, width),
        "patches": (S - rows, width),  # one token or two before them
        "sections": (3, rows, S, width),
    }.get(known.form, (rows, S, width) if heads > 0 else (S, width))
    tables = drawn(*shape), drawn(*shape)
    if known.form == "sections":
        return Given((q, k), (*tables, [2, 3, 3]))
    if known.form == "last tokens" and rows == 1:
        q = q[:, :, -4:]
    if known.form == "memory" and rows == 2:
        k = drawn(B, 2, 3 * S + 2, D)
        return Given((q, k), (*tables, 2, True))
    if known.form == "x, sin, cos":
        tables = tables[::-1]
    return Given((k,) if known.form in ("x, cos, sin", "x, sin, cos", "last elements") else (q, k), tables)


@of_rotaries
@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("R", [16, 8, 12])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_a_replaced_rotary_function_gives_the_results_of_stock(known, unsqueeze_dim, R, rows):
    found = variants(known)
    if not found:
        pytest.skip(f"no function of Transformers {transformers.__version__}")
    chosen = known.heads is None and known.form not in ("grid", "patches", "memory", "last tokens")
    if not chosen and unsqueeze_dim != 1:
        pytest.skip("the heads are always in the same dimension")
    for stock, variant in found:
        given = rotary_inputs(known, known.heads or unsqueeze_dim, R, rows, torch.float64)
        how = {"unsqueeze_dim": unsqueeze_dim} if chosen else {}

        def run(function: Any, number: torch.dtype, given: Given = given, how: Any = how) -> list[torch.Tensor]:
            leaves = [x.to(number).requires_grad_() for x in given.heads]
            rest = given.rest
            if number is not torch.float64:
                rest = [
                    x.to(torch.complex64 if x.is_complex() else number) if isinstance(x, torch.Tensor) else x
                    for x in rest
                ]
            out = function(*leaves, *rest, **how)
            out = out if isinstance(out, tuple) else (out,)
            torch.manual_seed(6)
            torch.autograd.backward(out, [torch.randn(x.shape, dtype=torch.float64).to(x) for x in out])
            return [*(x.detach() for x in out), *(x.grad for x in leaves)]

        try:
            theirs = run(stock, torch.float32)
        except RuntimeError:
            assert R < 16  # it rotates whole heads only
            continue
        with Calls() as calls:
            ours = run(rotaries.rotary_like(stock, variant), torch.float32)
        assert [name for name, _ in calls.made if name.startswith("llama_kernels::rope")]
        for K, R64, I in zip(ours, run(stock, torch.float64), theirs, strict=True):
            assert K.dtype == I.dtype and K.shape == I.shape
            judge("rotated", K, R64, I)


def in_float64(given: Given) -> Given:
    return given


def with_gradients_of_tables(given: Given) -> Given:
    number = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    moved = [x.to(number[x.dtype]) if isinstance(x, torch.Tensor) else x for x in (*given.heads, *given.rest)]
    heads, rest = moved[: len(given.heads)], moved[len(given.heads) :]
    return Given((*heads,), tuple(x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in rest))


@of_rotaries
@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("changed", [in_float64, with_gradients_of_tables])
def test_a_replaced_rotary_function_runs_stock_code_where_rope_would_give_another_result(known, changed, rows):
    found = variants(known)
    if not found:
        pytest.skip(f"no function of Transformers {transformers.__version__}")
    for stock, variant in found:
        given = changed(rotary_inputs(known, known.heads or 1, 16, rows, torch.float64))
        leaves = [x for x in given.rest if isinstance(x, torch.Tensor) and x.requires_grad]

        def run(function: Any, given: Given = given, leaves: Any = leaves) -> list[torch.Tensor]:
            out = function(*given.heads, *given.rest)
            out = out if isinstance(out, tuple) else (out,)
            return [*out, *(torch.autograd.grad([x.square().sum() for x in out], leaves) if leaves else ())]

        with Calls() as calls:
            ours = run(rotaries.rotary_like(stock, variant))
        assert not calls.ours()
        assert all(map(torch.equal, ours, run(stock)))


@of_rotaries
def test_a_replaced_rotary_function_takes_q_and_k_of_other_batches(known):
    found = variants(known)
    if not found:
        pytest.skip(f"no function of Transformers {transformers.__version__}")
    for stock, variant in found:
        given = rotary_inputs(known, known.heads or 1, 16, 1, torch.float32)
        if len(given.heads) == 1 or given.heads[0].ndim == 3:
            continue  # q or k alone, or packed
        q, k = given.heads
        theirs, ours = (function(q, k[:1], *given.rest) for function in (stock, rotaries.rotary_like(stock, variant)))
        torch.testing.assert_close(ours, theirs)


def with_another_torch(function: Any) -> Any:
    copied = types.FunctionType(function.__code__, {**function.__globals__, "torch": object()})
    copied.__defaults__ = function.__defaults__
    return copied


def test_functions_with_known_texts_and_another_torch_are_not_known():
    """A file may import something else under this name."""
    rotary, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    rotary = source.called_by(rotary)
    assert known_code.rotary_of(rotary) is not None and known_code.norm_of(norm) is not None
    assert known_code.rotary_of(with_another_torch(rotary)) is None
    own = type("Own", (norm,), {"forward": with_another_torch(norm.forward)})
    assert known_code.norm_of(own) is None
