"""What the ops are for: a decoder layer and a whole Llama of Transformers, a training step, stock and otherwise.

The same weights and tokens for everyone. A variation is a way to make a model of a stock one, and what must hold while
it runs: Liger replaces functions of Transformers' module, which would change the others too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from bench import records, roofline, timing
from bench.attention import pairs
from bench.capture import Lost
from bench.contain import Contained, mark_unfinished
from bench.processes import Journal
from bench.providers import OURS, Unsupported
from bench.records import NOT_RUN, Record
from bench.runner import Clock, in_turns
from bench.work import MODELS, UNIT, Model, relative_errors


@dataclasses.dataclass(frozen=True)
class Scale:
    """A model, as many layers of it as are run, and the tokens of a step."""

    shape: str
    whole: bool  # a model with its embedding, head, loss and AdamW step; else one decoder layer
    model: Model
    B: int
    S: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def op(self) -> str:
        return "llama" if self.whole else "decoder_layer"

    @property
    def direction(self) -> str:
        return "step" if self.whole else "both"

    @property
    def sizes(self) -> dict[str, Any]:
        return {**self.model._asdict(), "B": self.B, "S": self.S}


def scales() -> Iterator[Scale]:
    for name in ("Llama 3.2 1B", "Llama 3.1 8B"):
        yield Scale(name, False, MODELS[name]._replace(layers=1, vocab=64), 2, 4096)
    yield Scale("4 layers of Llama 3.2 1B", True, MODELS["Llama 3.2 1B"]._replace(layers=4, vocab=32000), 2, 4096)


# --- variations ------------------------------------------------------------------------------------------------------


class Variation:
    name: str
    compiled = False
    cpu = True

    def change(self, model: nn.Module) -> nn.Module:
        """`model`, or what to run in its place. Raises Unsupported."""
        return model

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around every call."""
        return contextlib.nullcontext()


class Stock(Variation):
    def __init__(self, compiled: bool) -> None:
        self.name, self.compiled, self.cpu = ("stock, compiled" if compiled else "stock"), compiled, not compiled


class Ours(Variation):
    def __init__(self, compiled: bool) -> None:
        self.name, self.compiled, self.cpu = (f"{OURS}, compiled" if compiled else OURS), compiled, not compiled

    def change(self, model: nn.Module) -> nn.Module:
        from llama_kernels.integrations.transformers import patch

        return patch(model)


class Liger(Variation):
    """`everything`: what Liger does by default, its SwiGLU and its loss that never writes the logits among it; else the
    ops that we have too."""

    cpu = False

    def __init__(self, everything: bool) -> None:
        self.name, self.everything = ("liger, with MLP and loss" if everything else "liger, RoPE and norm"), everything
        self._names: dict[str, Any] = {}

    def change(self, model: nn.Module) -> nn.Module:
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama
        except ImportError:
            raise Unsupported("not installed (pip install liger-kernel)") from None
        from transformers.models.llama import modeling_llama

        before = dict(vars(modeling_llama))
        apply_liger_kernel_to_llama(model=model, swiglu=self.everything, fused_linear_cross_entropy=self.everything)
        self._names = {name: x for name, x in vars(modeling_llama).items() if before.get(name) is not x}
        for name in self._names:
            setattr(modeling_llama, name, before[name])
        return model

    def active(self) -> contextlib.AbstractContextManager[Any]:
        from transformers.models.llama import modeling_llama

        return mock.patch.multiple(modeling_llama, **self._names) if self._names else contextlib.nullcontext()


VARIATIONS: tuple[Variation, ...] = (
    Stock(False), Stock(True), Liger(False), Liger(True), Ours(False), Ours(True),
)  # fmt: skip


# --- a step ----------------------------------------------------------------------------------------------------------


def _llama(scale: Scale, device: str, dtype: torch.dtype) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise Unsupported("not installed (pip install transformers)") from None
    m = scale.model
    config = LlamaConfig(
        vocab_size=m.vocab, hidden_size=m.hidden, intermediate_size=m.mlp, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim,
        max_position_embeddings=max(scale.S, 8192), rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).train()


class _Step:
    """One variation's model, and a step of it on its tokens or its hidden states."""

    def __init__(self, scale: Scale, variation: Variation, device: str, dtype: torch.dtype, stock: nn.Module) -> None:
        self.scale, self.variation = scale, variation
        if device == "cpu" and not variation.cpu:
            raise Unsupported("needs a GPU")
        self.model = variation.change(copy.deepcopy(stock).to(dtype))
        module = self.model if scale.whole else self.model.model.layers[0]
        self.module = torch.compile(module, dynamic=False) if variation.compiled else module
        self.parameters = list(module.parameters())
        torch.manual_seed(1)
        if scale.whole:
            self.tokens = torch.randint(scale.model.vocab, (scale.B, scale.S), device=device)
            fused = device == "cuda"
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=fused)
        else:
            shape = (scale.B, scale.S, scale.model.hidden)
            self.x = torch.randn(shape, device=device).to(dtype).requires_grad_()
            self.dy = torch.randn(shape, device=device).to(dtype)
            positions = torch.arange(scale.S, device=device)[None]
            self.angles = self.model.model.rotary_emb(self.x.detach(), positions)

    def forward(self) -> torch.Tensor:
        if self.scale.whole:
            return self.module(input_ids=self.tokens, labels=self.tokens).loss
        y = self.module(self.x, attention_mask=None, position_embeddings=self.angles)
        return y[0] if isinstance(y, tuple) else y

    def backward(self, y: torch.Tensor) -> None:
        y.backward(None if self.scale.whole else self.dy)

    def gradients(self) -> list[torch.Tensor]:
        with self.variation.active():
            self.backward(self.forward())
        leaves = self.parameters if self.scale.whole else [self.x, *self.parameters]
        grads = [p.grad for p in leaves]
        self.forget()
        return grads

    def forget(self) -> None:
        for p in (*self.parameters, *(() if self.scale.whole else (self.x,))):
            p.grad = None

    def __call__(self) -> None:
        with self.variation.active():
            self.backward(self.forward())
            if self.scale.whole:
                self.optimizer.step()
        self.forget()


def _disparity(step: _Step, truth: list[torch.Tensor], theirs: list[float]) -> tuple[float | None, str | None]:
    """The largest relative error of a gradient, if it is finite, and why it is wrong, or None.

    The bar is that of bench.work.disparity.
    """
    worst, reason = 0.0, None
    for grad, exact, stock in zip(step.gradients(), truth, theirs, strict=True):
        error, _ = relative_errors(grad, exact)
        bar = 2 * stock + 2 * UNIT[step.scale.dtype]
        worst = max(worst, error, key=lambda e: (e != e, e))
        if not error <= bar:
            reason = f"wrong numbers: a gradient of shape {tuple(exact.shape)} is off by {error:.1e}, allowed {bar:.1e}"
    return worst if math.isfinite(worst) else None, reason


# --- measuring -------------------------------------------------------------------------------------------------------


def run(
    scales: Iterable[Scale],
    variations: Sequence[Variation],
    *,
    device: str,
    clock: Clock | None,
    ceilings: Mapping[str, float],
    about: Mapping[str, Any],
    seconds: float = 4.0,
    out_of_time: Callable[[], bool] = lambda: False,
    journal: Journal | None = None,
) -> Iterator[list[Record]]:
    """The records of each scale: time of a step, tokens a second, memory, parity on its first 256 tokens.

    What a variation raises is the reason of its row. Raises Lost as bench.runner.run does.
    """
    for scale in scales:
        rows = rows_of(scale, variations, about)
        if out_of_time():
            for r in rows.values():
                r.reason = f"{NOT_RUN}: out of time"
            yield list(rows.values())
            continue
        lost = None
        try:
            contained = Contained(next(iter(rows.values())).work, device, journal or Journal())
            _Bench(scale, rows, device, clock, ceilings, seconds, contained).run(variations)
        except Lost as e:
            lost = e
            mark_unfinished(rows.values(), clock is not None)
        yield records.with_ratios(rows.values())
        if lost is not None:
            raise lost


def rows_of(scale: Scale, variations: Sequence[Variation], about: Mapping[str, Any]) -> dict[str, Record]:
    """By variation, a record that is still empty."""
    return {v.name: _row(scale, v.name, about) for v in variations}


def _row(scale: Scale, name: str, about: Mapping[str, Any]) -> Record:
    return Record(op=scale.op, direction=scale.direction, shape=scale.shape, sizes=scale.sizes,
                  dtype=str(scale.dtype)[6:], provider=name,
                  **records.repeated(about))  # fmt: skip


@dataclasses.dataclass
class _Bench:
    """One scale. Fills in `rows`."""

    scale: Scale
    rows: Mapping[str, Record]
    device: str
    clock: Clock | None
    ceilings: Mapping[str, float]
    seconds: float
    contained: Contained

    def run(self, variations: Sequence[Variation]) -> None:
        prepared = None
        with self.contained.step("", "inputs", self.rows.values()):
            self.contained.admit("")
            prepared = self.prepare()
        if prepared is None:
            return
        sampled: dict[str, timing.Sampling] = {}
        for variation in variations:
            name, step = variation.name, None
            with self.contained.step(name, "numbers and memory", [self.rows[name]]):
                self.contained.admit(name)
                step = self.checked(variation, *prepared)
            if step is not None and self.clock is not None:
                with self.contained.step(name, "timing by events", [self.rows[name]]):
                    sampled[name] = self.clock.eager_sampler(step)
        del prepared
        for name in in_turns(sampled, self.seconds, self.contained, self.rows):
            _put_rate(self.rows[name], self.scale, self.ceilings)

    def prepare(self) -> tuple[Scale, nn.Module, list[torch.Tensor], list[float]]:
        """The first tokens, the stock model, and there its float64 gradients and the errors of its own."""
        torch.compiler.reset()
        short = dataclasses.replace(self.scale, B=1, S=min(self.scale.S, 256))
        stock = _llama(self.scale, self.device, self.scale.dtype)
        truth = _Step(short, Stock(False), self.device, torch.float64, stock).gradients()
        plain = _Step(short, Stock(False), self.device, self.scale.dtype, stock).gradients()
        return short, stock, truth, [relative_errors(g, exact)[0] for g, exact in zip(plain, truth, strict=True)]

    def checked(
        self, variation: Variation, short: Scale, stock: nn.Module, truth: list[torch.Tensor], theirs: list[float]
    ) -> _Step | None:
        """A step of `variation`, if it gives right gradients."""
        r, dtype = self.rows[variation.name], self.scale.dtype
        r.error, r.reason = _disparity(_Step(short, variation, self.device, dtype, stock), truth, theirs)
        if r.reason is not None:
            return None
        step = _Step(self.scale, variation, self.device, dtype, stock)
        step()  # compiled, and the optimizer has its state
        with variation.active():
            r.saved = timing.saved_for_backward(step.forward)
        r.memory = timing.peak_memory(step, self.device)
        return step


def _put_rate(r: Record, scale: Scale, ceilings: Mapping[str, float]) -> None:
    """Tokens a second; the ceiling is what the matrix products alone would take."""
    tokens = scale.B * scale.S
    r.rate, r.unit = tokens / r.ms * 1e3, "tokens/s"
    r.ceiling = tokens / (flops(scale) / ceilings[r.dtype] / 1e9) * 1e3
    r.percent = 100 * r.rate / r.ceiling


def flops(scale: Scale) -> int:
    """Of the matrix products of a step, forward and backward."""
    tokens, m = scale.B * scale.S, scale.model
    heads = 2 * m.heads + 2 * m.kv_heads  # q and out, k and v
    weights = m.layers * (m.hidden * heads * m.head_dim + 3 * m.hidden * m.mlp)
    weights += m.hidden * m.vocab if scale.whole else 0
    attention = m.layers * 14 * m.heads * m.head_dim * scale.B * pairs(scale.S)
    return 6 * tokens * weights + attention


# --- without a GPU ---------------------------------------------------------------------------------------------------


def estimates(scales: Iterable[Scale], about: Mapping[str, Any]) -> list[Record]:
    """Bounds from below, as bench.roofline has them, of stock and ours; the optimizer's step is not in them."""
    out = []
    for scale in scales:
        stock = _llama(scale, "meta", scale.dtype)
        # It looks at the tokens' values.
        no_mask = mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", lambda *_, **__: None)
        for variation in (Stock(False), Ours(False)):
            step = _Step(scale, variation, "meta", scale.dtype, stock)
            with roofline.counting_flash(), no_mask:
                tally = roofline.count(lambda step=step: step.backward(step.forward()))
                saved = timing.saved_for_backward(step.forward)
            for gpu, model in roofline.GPUS.items():
                r = _row(scale, variation.name, {**about, "gpu": gpu, "driver": "none"})
                r.ms, r.method, r.estimate, r.saved = (
                    tally.milliseconds(model.ceilings, r.dtype), "model", True, saved)  # fmt: skip
                _put_rate(r, scale, model.ceilings)
                out.append(r)
    return records.with_ratios(out)
