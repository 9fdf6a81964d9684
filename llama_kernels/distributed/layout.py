"""Which tokens of a sequence each process holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from llama_kernels.core.checks import check_count, check_dense, is_integer, message, shape_of
from llama_kernels.distributed.transport import all_gather


class Parts:
    """Increasing lists of global positions, each held by one process of a group.

    Its tensors are no inference tensors, wherever they are made: autograd could not save them for a backward later.
    """

    def __init__(self, lists: Sequence[torch.Tensor]) -> None:
        with torch.inference_mode(False):
            self.lists = tuple(x.clone() if x.is_inference() else x for x in lists)
            self._order = torch.argsort(torch.cat(self.lists))
        self._on: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def positions(self, part: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The positions of `part`, (tokens,) int64, increasing."""
        return self._moved(torch.device(device))[part]

    def keys_before(self, part: int, position: torch.Tensor) -> torch.Tensor:
        """How many of the keys of `part` are before each global position, int32."""
        held = self.positions(part, position.device)
        return torch.searchsorted(held, position.contiguous(), out_int32=True)

    def in_order(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The tokens of all parts, in the order of their positions."""
        return torch.cat(list(parts), dim).index_select(dim, self._moved(parts[0].device)[-1])

    def divided(self, x: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """The tokens of each part, of `x` that holds them in the order of their positions. Inverts `in_order`."""
        by_part = torch.empty_like(x).index_copy_(dim, self._moved(x.device)[-1], x)
        return [part.contiguous() for part in by_part.split([len(held) for held in self.lists], dim)]

    def merged(self) -> torch.Tensor:
        """All positions, increasing."""
        return torch.cat(self.lists)[self._order]

    def _moved(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The lists, and the order of all their tokens, on `device`."""
        if device not in self._on:
            with torch.inference_mode(False):
                self._on[device] = tuple(x.to(device) for x in (*self.lists, self._order))
        return self._on[device]


class Layout(Parts):
    """Which of the tokens 0 to tokens - 1 of a sequence each rank holds.

    Args:
        tokens: the number of tokens of the whole sequence.
        ranks: the number of processes that share it. Each holds tokens / ranks tokens.
        kind: "zigzag": the sequence is cut into 2 ranks chunks, and rank r holds chunks r and 2 ranks - 1 - r, which
            gives each rank the same work under a causal mask. "contiguous": rank r holds the r-th chunk of `ranks`. Or
            a list of positions for each rank, each increasing; `balanced_layout` makes those for packed documents.

    Raises:
        ValueError: tokens cannot be divided so, or the lists are not increasing or do not hold each token once.
    """

    def __init__(self, tokens: int, ranks: int, kind: str | Sequence[Sequence[int] | torch.Tensor] = "zigzag") -> None:
        check_count("Layout", "ranks", ranks, "a number of processes, at least 1")
        check_count("Layout", "tokens", tokens, "a number of tokens", least=0)
        if isinstance(kind, str):
            lists = _by_chunks(tokens, ranks, kind)
        else:
            lists = _as_lists(kind)
            _check_lists(tokens, ranks, lists)
        self.tokens, self.ranks, self.kind = tokens, ranks, kind if isinstance(kind, str) else "lists"
        super().__init__(lists)

    def __repr__(self) -> str:
        return f"Layout(tokens={self.tokens}, ranks={self.ranks}, kind={self.kind!r})"

    @property
    def local_tokens(self) -> int:
        """How many tokens each rank holds."""
        return self.tokens // self.ranks


def _by_chunks(tokens: int, ranks: int, kind: str) -> list[torch.Tensor]:
    """The positions of each rank in a layout of kind "zigzag" or "contiguous"."""
    if kind not in ("zigzag", "contiguous"):
        raise ValueError(
            message("Layout", "kind", repr(kind), '"zigzag", "contiguous" or one list of positions per rank')
        )
    chunks = ranks * (2 if kind == "zigzag" else 1)
    if tokens % chunks:
        fix = f"Pad the sequence to {-(-tokens // chunks) * chunks} tokens."
        raise ValueError(message("Layout", "tokens", tokens, f"a multiple of {chunks}, for {ranks} ranks", fix))
    cut = torch.arange(tokens).chunk(chunks) if tokens else [torch.arange(0)] * chunks
    if kind == "contiguous":
        return list(cut)
    return [torch.cat((cut[r], cut[chunks - 1 - r])) for r in range(ranks)]


def _as_lists(kind: Sequence[Sequence[int] | torch.Tensor]) -> list[torch.Tensor]:
    wanted = '"zigzag", "contiguous" or one list of positions per rank'
    try:
        return [torch.as_tensor(positions, dtype=torch.int64, device="cpu") for positions in kind]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(message("Layout", "kind", repr(kind), wanted)) from error


def _check_lists(tokens: int, ranks: int, lists: Sequence[torch.Tensor]) -> None:
    if len(lists) != ranks or any(positions.ndim != 1 or len(positions) * ranks != tokens for positions in lists):
        got = f"lists of {[positions.numel() for positions in lists]} positions"
        raise ValueError(message("Layout", "kind", got, f"{ranks} lists of {tokens} / {ranks} positions each"))
    for rank, positions in enumerate(lists):
        if not (positions.diff() > 0).all():
            raise ValueError(message("Layout", "kind", f"not increasing for rank {rank}", "increasing positions"))
    if not torch.equal(torch.cat(list(lists)).sort().values, torch.arange(tokens)):
        raise ValueError(message("Layout", "kind", "not each token once", f"each of 0 to {tokens - 1} in one list"))


def shard(
    mesh: DeviceMesh, tensors: Sequence[torch.Tensor], dims: Sequence[int], *, layout: Layout
) -> list[torch.Tensor]:
    """The tokens that this process holds, of tensors that every process has whole.

    Args:
        mesh: of one dimension, or of two, whose ranks are numbered row by row.
        tensors: with all `layout.tokens` tokens along their dimension of `dims`.
        dims: the dimension of the tokens, for each tensor.
        layout: which tokens each rank holds.

    Returns:
        for each tensor a new one, with `layout.local_tokens` tokens along its dimension. No communication.

    Raises:
        ValueError: the mesh and the layout differ in ranks, or a tensor does not have layout.tokens tokens.
    """
    rank = rank_in("shard", mesh, layout)
    _check_dims("shard", tensors, dims, layout.tokens)
    return [x.index_select(dim, layout.positions(rank, x.device)) for x, dim in zip(tensors, dims, strict=True)]


def unshard(
    mesh: DeviceMesh, tensors: Sequence[torch.Tensor], dims: Sequence[int], *, layout: Layout
) -> list[torch.Tensor]:
    """All tokens on every process, of tensors that hold those of each: inverts `shard`, by an all-gather. No gradient.

    Args and errors as in `shard`; each tensor has `layout.local_tokens` tokens.
    """
    rank_in("unshard", mesh, layout)
    _check_dims("unshard", tensors, dims, layout.local_tokens)
    return [layout.in_order(_of_all_ranks(x.detach(), mesh), dim) for x, dim in zip(tensors, dims, strict=True)]


def _of_all_ranks(x: torch.Tensor, mesh: DeviceMesh) -> list[torch.Tensor]:
    """The tensor of each rank, row by row of the mesh."""
    gathered = x.unsqueeze(0)
    for dim in reversed(range(mesh.ndim)):
        gathered = torch.cat(all_gather(gathered, mesh.get_group(dim)).wait())
    return list(gathered.unbind())


def rank_in(op: str, mesh: DeviceMesh, layout: Layout) -> int:
    """This process's rank in `layout`: its place in the mesh, row by row."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(message(op, "mesh", f"a {type(mesh).__name__}", "a torch.distributed DeviceMesh"))
    if not isinstance(layout, Layout):
        raise TypeError(message(op, "layout", f"a {type(layout).__name__}", "a llama_kernels.distributed.Layout"))
    if mesh.size() != layout.ranks:
        raise ValueError(message(op, "layout", f"of {layout.ranks} ranks", f"the {mesh.size()} of the mesh"))
    place = mesh.get_coordinate()
    if place is None:
        raise ValueError(message(op, "mesh", f"without rank {dist.get_rank()}", "a mesh that this process is in"))
    rank = 0
    for index, size in zip(place, mesh.shape, strict=True):
        rank = rank * size + index
    return rank


def _check_dims(op: str, tensors: Sequence[torch.Tensor], dims: Sequence[int], tokens: int) -> None:
    for name, given in (("tensors", tensors), ("dims", dims)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(message(op, name, f"a {type(given).__name__}", "a list or tuple, with one for each tensor"))
    if len(tensors) != len(dims):
        raise ValueError(message(op, "dims", f"{len(dims)} dimensions", f"one for each of {len(tensors)} tensors"))
    for i, (x, dim) in enumerate(zip(tensors, dims, strict=True)):
        check_dense(op, f"tensors[{i}]", x)
        if not is_integer(dim) or not -x.ndim <= dim < x.ndim:
            raise ValueError(message(op, f"dims[{i}]", repr(dim), f"a dimension of a tensor {shape_of(x)}"))
        if x.shape[dim] != tokens:
            got = f"of shape {tuple(x.shape)}, {x.shape[dim]} tokens in dimension {dim}"
            raise ValueError(message(op, f"tensors[{i}]", got, f"{tokens} tokens"))
