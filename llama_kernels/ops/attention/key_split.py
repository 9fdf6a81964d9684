"""How a forward with few row tiles and many keys is split over the keys: a chunk of a prompt, for example.

One program for each row tile and head would leave most SMs idle. So several programs compute a chunk of the keys each,
and combine.py combines their results. Calls with still fewer rows are in decode.py, where query heads share a tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from llama_kernels.core.device import SMS, lanes_of, processors_of_family
from llama_kernels.core.tensors import cdiv
from llama_kernels.ops.attention.call import AttentionCall
from llama_kernels.ops.attention.tables import tile_for

# The fewest keys of a chunk. Where a large batch fills the GPU without a split, the split then makes it at most a fifth
# slower, by writing and reading the result of each chunk.
LEAST_KEYS = 2048
# The overhead of a chunk, as a number of keys that take as long: its program starts and ends, and its float32 result is
# written and read.
_KEYS_OF_A_CHUNK = 256
_GAIN = 1.15  # keys are split if that is estimated to be this much faster
_NEAR = 1.05  # of the numbers of chunks whose estimated time is within this factor of the least, the smallest is taken
_ALIGNMENT = 128  # of the first key of a chunk
_THREADS = 256  # of the programs that fit an SM together
_MOST_ROWS = 128 * max(SMS.values())  # of all heads: more fill every GPU


class KeySplit(NamedTuple):
    """Chunk c is keys [first + c * keys, first + (c + 1) * keys). No query sees a key before `first`."""

    first: int
    keys: int
    chunks: int


def split_of(call: AttentionCall) -> KeySplit | None:
    """How the keys of `call` are split. None: they are not.

    It depends on the sizes of one sequence and on the family of GPUs alone, so that the same query and keys give the
    same bits in any batch, and on every GPU of a family. Packed batches are not split, since only the GPU knows the
    lengths of the sequences.
    """
    Sq, Sk, Hq = call.longest_q, call.longest_k, call.q.shape[1]
    if Sk < 2 * LEAST_KEYS or Sq * Hq > _MOST_ROWS or call.packed or not Sq * Hq:
        return None
    device, left, first = call.q.device, call.window.left, 0
    if left is not None and call.kv_prefix is None:
        first = max(Sk - Sq - left, 0) // _ALIGNMENT * _ALIGNMENT
    tile, keys = tile_for("forward", call), Sk - first
    threads = min(tile.num_warps * lanes_of(device), _THREADS)
    chunks = _chunks(cdiv(Sq, tile.BLOCK_M) * Hq * threads, processors_of_family(device) * _THREADS, keys)
    if chunks == 1:
        return None
    of_chunk = cdiv(cdiv(keys, chunks), _ALIGNMENT) * _ALIGNMENT
    return KeySplit(first, of_chunk, cdiv(keys, of_chunk))


@functools.lru_cache(maxsize=1024)
def _chunks(threads: int, on_gpu: int, keys: int) -> int:
    """The fewest chunks whose estimated time is nearly the least.

    threads: of all programs without a split. on_gpu: how many threads run at a time. keys: of a sequence.
    """
    if threads >= on_gpu:
        return 1
    most = max(keys // LEAST_KEYS, 1)
    times = [cdiv(threads * n, on_gpu) * (keys / n + _KEYS_OF_A_CHUNK) for n in range(1, most + 1)]
    least = min(times)
    if times[0] < _GAIN * least:
        return 1
    return next(n for n, time in enumerate(times, 1) if time <= _NEAR * least)
