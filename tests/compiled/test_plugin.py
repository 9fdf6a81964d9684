"""The plugin on kernels that are not llama_kernels': a right one passes; a race and an access out of bounds fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A user's own test file. `planted` is the line that makes the kernel wrong.
USERS_TEST = '''
import torch
import triton
import triton.language as tl


@triton.jit
def row_sums(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """out[i]: the sum of row i of x."""
    row = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + j, mask={mask}, other=0.0)
    tl.store(out_ptr + row, tl.sum(x, 0))


@triton.jit
def exchange(out_ptr, BLOCK: tl.constexpr):
    """Each thread passes its number, in shared memory, to a thread of another warp."""
    i = tl.arange(0, BLOCK)
    passed = tl.inline_asm_elementwise(
        """{{
        .reg .b32 at;
        .shared .align 4 .b8 buffer[512];
        mov.b32 at, buffer;
        mad.lo.u32 at, $1, 4, at;
        st.shared.b32 [at], $1;
        {barrier}
        xor.b32 at, at, 256;
        ld.shared.b32 $0, [at];
        }}""",
        "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1,
    )
    tl.store(out_ptr + i, passed)


def test_row_sums():
    x, out = torch.randn(5, 100), torch.empty(5)
    row_sums[(5,)](x, out, 100, BLOCK=128)
    torch.testing.assert_close(out, x.sum(1))


def test_exchange():
    out = torch.empty(128, dtype=torch.int32)
    exchange[(1,)](out, BLOCK=128, num_warps=4)
    assert torch.equal(out, torch.arange(128, dtype=torch.int32) ^ 64)
'''
RIGHT = {"mask": "j < columns", "barrier": "bar.sync 0;"}


def _pytest(folder: Path, target: str, test: str, *options: str) -> str:
    """What pytest prints of a user's test file, whose folder has no conftest and knows nothing of this package."""
    (folder / "test_users_kernels.py").write_text(test)
    plugin = f"{__package__}.plugin"
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", "--compiled", target]
    root = Path(__file__).parents[len(__package__.split("."))]
    program = f"import sys; sys.path.insert(0, {str(root)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    run = [command[0], "-c", program, *command[3:], "-c", "/dev/null", f"--rootdir={folder}", *options, str(folder)]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_right_kernels_pass(target, tmp_path):
    said = _pytest(tmp_path, target, USERS_TEST.format(**RIGHT))
    assert "2 passed" in said and "row_sums" in said and "1 launches" in said, said


def test_a_planted_read_out_of_bounds_fails(tmp_path):
    said = _pytest(tmp_path, "sm_80", USERS_TEST.format(**{**RIGHT, "mask": "j < BLOCK"}))
    assert "1 failed, 1 passed" in said
    assert "out of bounds: 4 bytes at byte 2000 of x_ptr (float32 of shape (5, 100)" in said, said
    assert "test_users_kernels.py:12" in said, said


def test_a_planted_race_fails(tmp_path):
    said = _pytest(tmp_path, "sm_80", USERS_TEST.format(**{**RIGHT, "barrier": ""}))
    assert "1 failed, 1 passed" in said and "race in shared memory" in said, said
