"""How sensitive tests/compiled is on the package's kernels: `python -m tests.compiled.llama.survey sm_80`.

Runs calls that reach every kernel, then every kernel again with one synchronisation dropped, weakened or moved at a
time. Prints how many of each kind show, and of each one that does not why it is right.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")

import torch

from tests.compiled.driver import running
from tests.compiled.llama.plugin import kernels_on_cpu
from tests.compiled.mutants import Result, survey


def launches(target: str, hopper: bool, D: int) -> list:
    """One launch of each kernel, by dtype: small, but with several blocks of keys and of rows. D: width of a head."""
    import llama_kernels as lk

    torch.manual_seed(0)
    found = {}
    with kernels_on_cpu(target, hopper=hopper), running(target) as log:
        log.launches = []
        for dtype in (torch.bfloat16,) if hopper else (torch.bfloat16, torch.float32):
            S = 300
            if hopper:  # rings of four key blocks, and of two blocks of rows, that turn around
                q, k, v = (torch.randn(1, 1, n, D).to(dtype).requires_grad_() for n in (320, 128, 128))
                out = lk.attention(q, k, v, is_causal=False)
                torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
                k, v = (torch.randn(1, 1, 900, D).to(dtype) for _ in range(2))
                log.launches = [each for each in log.launches if "forward" not in each.ptx]
                with torch.no_grad():
                    lk.attention(q[:, :, :128], k, v)
                continue
            q, k, v = (torch.randn(1, S, 1, D).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
            out = lk.attention(q, k, v)
            torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
            with torch.no_grad():
                lk.attention(q[:, :, :1], *(torch.randn(1, 1, 3000, D).to(dtype) for _ in range(2)))
            x, w = torch.randn(40, 1000).to(dtype).requires_grad_(), torch.randn(1000).to(dtype).requires_grad_()
            y = lk.rms_norm(x, w)
            torch.autograd.grad(y, (x, w), torch.randn_like(y))
            cos, sin = (torch.randn(S, D // 2) for _ in range(2))
            head = torch.randn(D).to(dtype).requires_grad_()
            a, b = lk.qk_norm_rope(q[:, :, :20], k[:, :, :20], head, head, cos[:20], sin[:20])
            torch.autograd.grad((a, b), (q, k, head), (torch.randn_like(a), torch.randn_like(b)))
        for launched in log.launches:
            name = Path(launched.ptx).stem
            dtypes = {str(t.dtype)[6:] for t in launched.tensors if t.dtype in (torch.bfloat16, torch.float16)}
            found.setdefault((name, *sorted(dtypes or {"float32"})), launched)
    return list(found.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compiled.llama.survey", description=__doc__.split("\n\n")[0])
    parser.add_argument("target", choices=("sm_80", "sm_90"))
    parser.add_argument("--hopper", action="store_true", help="the Hopper kernels, on sm_90")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--kernels", nargs="*", help="only kernels whose name holds one of these")
    parser.add_argument("--seeds", type=int, default=0, help="schedules drawn by chance, beside the first")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    results: list[tuple[str, Result]] = []
    for (name, *dtypes), launched in launches(args.target, args.hopper, args.width):
        if args.kernels and not any(part in name for part in args.kernels):
            continue
        begin = time.process_time()
        found = survey(launched, seeds=(None, *range(args.seeds)))
        results += [("-".join([name, *dtypes]), each) for each in found]
        right = [each for each in found if each.seen == "no"]
        seconds = time.process_time() - begin
        print(f"{name} {dtypes}: {len(found)} mutants, {len(right)} of them right, {seconds:.0f} s", flush=True)
        for each in right:
            print(f"    {each.kind}, run {each.runs:.1f} times: {each.instruction}: {each.said}", flush=True)
    by_kind: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for _, each in results:
        by_kind[each.kind][f"right: {each.said}" if each.seen == "no" else each.seen] += 1
    for kind, outcomes in sorted(by_kind.items()):
        print(f"{kind:42}{outcomes.total():5} {dict(outcomes)}")
    if args.json:
        args.json.write_text(json.dumps([(name, vars(each)) for name, each in results], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
