"""Context parallelism of patched Hugging Face models: a context manager that shards the inputs of their forwards."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from llama_kernels.core.checks import message
from llama_kernels.distributed.layout import Layout, rank_in

_OP = "context_parallel"
_KINDS = {"full_attention", "sliding_attention"}  # of layers that `cp_attention` computes
_OF_SEQUENCES = {  # arguments of modules that combine tokens
    "attention_mask", "cache", "cache_params", "past_key_value", "past_key_values", "cu_seq_lens_q", "seq_idx",
}  # fmt: skip
_OF_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels")  # what is sharded
_NO_CP = "Train this model without context parallelism."


class Context(NamedTuple):
    """How attention runs inside `context_parallel`."""

    mesh: DeviceMesh
    layout: Layout
    method: str | tuple[str, str]


@contextlib.contextmanager
def context_parallel(
    model: nn.Module, mesh: DeviceMesh, *, layout: Layout, method: str | tuple[str, str] = "ring"
) -> Iterator[None]:
    """A context in which a patched model for causal language modelling computes this process's share of each sequence.

    Every process calls the model with the same whole batch: input_ids or inputs_embeds, and labels and position_ids if
    there are any. The tokens of the layout's rank are computed: RoPE gets their global positions, attention sees the
    keys of all processes, and documents stay apart. A document begins where position_ids do not grow by 1. The results
    are those of these tokens, but `loss` is that of the whole batch on every process: the mean over its tokens, or
    their sum divided by num_items_in_batch. Run the backward inside too, since checkpointed layers are computed again
    there.

        with context_parallel(model, mesh, layout=Layout(tokens, mesh.size())):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()

    The gradients of parameters are this process's share: sum them over the mesh, which is W times the mean that DDP and
    FSDP take.

    Args:
        model: patched by `llama_kernels.integrations.transformers.patch`, or with attn_implementation="llama_kernels";
            also in a DistributedDataParallel. Its inputs are text, also those of a multimodal model.
        mesh, layout, method: as in `cp_attention`.

    Raises:
        TypeError, ValueError: the mesh and the layout do not fit, or the model has layers that combine tokens otherwise
            than by our attention, full or in a sliding window: attention in chunks, recurrent layers, convolutions; in
            a forward, also if it has an attention_mask, a cache, a loss of router logits, images, position_ids that
            are not (B, tokens), or another number of tokens than the layout, or if a hook drops the mask of a layer.
    """
    rank = rank_in(_OP, mesh, layout)
    if not isinstance(model, nn.Module):
        raise TypeError(message(_OP, "model", f"a {type(model).__name__}", "a torch.nn.Module"))
    _refuse_other_layers(model)
    # DistributedDataParallel passes its arguments on to a model, and has no config.
    inner = next(module for module in model.modules() if hasattr(module, "config"))

    def shard_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Any]:
        return (), _sharded(module, args, kwargs, layout, rank)

    def sum_loss(module: nn.Module, args: Any, output: Any) -> Any:
        if getattr(output, "loss", None) is not None:
            output.loss = _SumOverRanks.apply(output.loss, mesh)
        return output

    hooks = [
        inner.register_forward_pre_hook(shard_inputs, with_kwargs=True, prepend=True),
        inner.register_forward_hook(sum_loss),
    ]
    from llama_kernels.integrations.transformers.attention import context_parallels

    context_parallels.append(Context(mesh, layout, method))
    try:
        yield
    finally:
        context_parallels.pop()
        for hook in hooks:
            hook.remove()


def _refuse_other_layers(model: nn.Module) -> None:
    """Raise if the model has no attention of ours, or a layer that would see other tokens than in one process."""
    from llama_kernels.integrations.transformers.places import attention_modules

    attentions = attention_modules(model)
    if not attentions:
        fix = "Call llama_kernels.integrations.transformers.patch first."
        raise ValueError(message(_OP, "model", "not patched", "a model whose attention is that of this package", fix))
    _refuse_listed_kinds(model, attentions.values())
    around = {".".join(path[:n]) for path in (name.split(".") for name in attentions) for n in range(len(path))}
    for name, module in model.named_modules():
        cls: Any = type(module)
        if name not in attentions and name not in around and _combines_tokens(cls):
            got = f"a {type(model).__name__} with a {cls.__name__}, which combines tokens"
            raise ValueError(message(_OP, "model", got, "layers that combine tokens by our attention only", _NO_CP))


def _refuse_listed_kinds(model: nn.Module, attentions: Iterable[nn.Module]) -> None:
    """Raise if a config of these modules lists a kind of layer that `cp_attention` does not compute."""
    listed: list[Any] = [getattr(module.config, "layer_types", None) or () for module in attentions]
    if kinds := {kind for layer_types in listed for kind in layer_types} - _KINDS:
        got = f"a {type(model).__name__} with layers of {', '.join(sorted(kinds))}"
        raise ValueError(message(_OP, "model", got, f"layers of {' and '.join(sorted(_KINDS))} only", _NO_CP))


@functools.cache
def _combines_tokens(cls: type[nn.Module]) -> bool:
    """Whether modules of this class may combine tokens: its forward takes a mask or a cache, as those of attention and
    of recurrent layers do, or it is a convolution over a sequence or a recurrent network of PyTorch."""
    return issubclass(cls, (nn.Conv1d, nn.RNNBase)) or not _OF_SEQUENCES.isdisjoint(
        inspect.signature(cls.forward).parameters
    )


def _sharded(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout, rank: int
) -> dict[str, Any]:
    """The arguments of a forward for this rank's tokens, of those for the whole batch."""
    from llama_kernels.integrations.transformers.documents import IGNORED, strict_document_starts
    from llama_kernels.integrations.transformers.packed_masks import pack_documents

    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in ("attention_mask", "past_key_values", "cache"):
        if given.get(name) is not None:
            fix = "Pack documents with position_ids instead of padding them." if name == "attention_mask" else ""
            raise ValueError(message(_OP, name, "given", "None", fix))
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and x.ndim > 1 and name not in _OF_TOKENS:
            raise ValueError(message(_OP, name, "given", f"None: text only, in {', '.join(_OF_TOKENS)}"))
    if given.get("output_router_logits") or getattr(module.config, "output_router_logits", False):
        wanted = "False: the loss that balances experts is not a mean over tokens"
        raise ValueError(message(_OP, "output_router_logits", True, wanted))
    inputs = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    if inputs is None or inputs.shape[1] != layout.tokens:
        got = "missing" if inputs is None else f"of shape {tuple(inputs.shape)}"
        raise ValueError(message(_OP, "input_ids", got, f"(B, {layout.tokens}), the whole sequences of {layout}"))

    B, tokens, device = inputs.shape[0], layout.tokens, inputs.device
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens, device=device)[None]
    if positions.ndim != 2 or positions.shape[0] not in (1, B) or positions.shape[1] != tokens:
        wanted = f"(B, {tokens}) or (1, {tokens}): one position for each token, as text has"
        raise ValueError(message(_OP, "position_ids", f"of shape {tuple(positions.shape)}", wanted))
    for name in ("labels", "shift_labels"):
        if (x := given.get(name)) is not None and x.shape != (B, tokens):
            raise ValueError(message(_OP, name, f"of shape {tuple(x.shape)}", f"({B}, {tokens}), as input_ids"))
    labels = given.get("labels")
    if labels is not None:
        following = torch.cat((labels[:, 1:], labels.new_full((B, 1), IGNORED)), 1)
        given["shift_labels"] = following
        if given.get("num_items_in_batch") is None:  # what the sum of the losses is divided by
            given["num_items_in_batch"] = (following != IGNORED).sum()
    mine = layout.positions(rank, device)
    given |= {"position_ids": positions, "starts": strict_document_starts(positions).expand(B, -1)}
    for name in (*_OF_TOKENS, "starts"):
        if given.get(name) is not None:
            given[name] = given[name].index_select(1, mine)
    given["attention_mask"] = pack_documents(given.pop("starts"))
    return {**given, "use_cache": False}


class _SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' shares of the loss. The gradient of a share is that of the sum."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        total = loss.detach().clone()
        for dim in range(mesh.ndim):
            dist.all_reduce(total, group=mesh.get_group(dim))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
