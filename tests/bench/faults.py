"""Works and providers that fail on demand."""

from __future__ import annotations

import torch

from bench.providers.eager import Eager
from bench.providers.provider import Provider
from bench.works.norms import AddRMSNorm
from bench.works.rotations import Rope

ADD = AddRMSNorm(shape="add", M=10, N=32, dtype=torch.float16)
ROPE = Rope(shape="rope", B=2, S=9, Hq=4, Hkv=2, D=16, dtype=torch.float16)


class Bad(Provider):
    """Calls `does` when its function is built ("build") or called ("call")."""

    name, cpu = "bad", True

    def __init__(self, does, when="call") -> None:
        self.does, self.when = does, when

    def rms_norm(self, work, device):
        if self.when == "build":
            self.does()
        plain = Eager().rms_norm(work, device)

        def f(x, weight):
            if self.when == "call":
                self.does()
            return plain(x, weight)

        return f


def fail(e: BaseException):
    def does():
        raise e

    return does


def reasons(made, provider="bad"):
    return {r.reason for r in made if r.provider == provider}
