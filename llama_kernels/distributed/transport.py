"""Sending tensors between the processes of a group. Every transfer is started first and waited for later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")


class Transfer(Generic[_T]):
    """A transfer under way. `wait` returns what was received, for use on the current stream."""

    def __init__(self, works: Sequence[dist.Work], sent: Sequence[torch.Tensor], result: Callable[[], _T]) -> None:
        self._works, self._sent, self._result = works, sent, result  # sent: alive until they have left

    def wait(self) -> _T:
        for work in self._works:
            work.wait()
        self._works = self._sent = ()  # which hold what was sent
        return self._result()


def hop(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> Transfer[list[torch.Tensor]]:
    """Send tensors to the next rank of the ring, and receive those of the rank before. All have the same shapes."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    following, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    sent = [x.contiguous() for x in tensors]
    coming = [torch.empty_like(x) for x in sent]
    sends = [dist.P2POp(dist.isend, x, following, group) for x in sent]
    receives = [dist.P2POp(dist.irecv, x, before, group) for x in coming]
    return Transfer(dist.batch_isend_irecv(sends + receives), sent, lambda: coming)


def all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> Transfer[list[torch.Tensor]]:
    """The tensor of each rank, all of one shape."""
    x = x.contiguous()
    coming = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    return Transfer([dist.all_gather(coming, x, group=group, async_op=True)], [x], lambda: coming)


def all_to_all(parts: Sequence[torch.Tensor], group: dist.ProcessGroup) -> Transfer[list[torch.Tensor]]:
    """Send part r to rank r, and receive one part of each rank. All parts of all ranks have one shape."""
    sent = torch.stack(list(parts))
    coming = torch.empty_like(sent)
    work = dist.all_to_all_single(coming, sent, group=group, async_op=True)
    works = [] if work is None else [work]  # None: this process is not in the group
    return Transfer(works, [sent], lambda: list(coming.unbind()))


def sum_of_parts(parts: Sequence[torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the parts that all ranks have for this one, added in the order of the ranks.

    reduce_scatter would promise no order.
    """
    total, *others = all_to_all(parts, group).wait()
    for part in others:
        total = total + part
    return total
