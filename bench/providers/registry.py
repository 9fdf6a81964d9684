"""All providers, in the order in which reports list them."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from bench.providers.eager import Compiled, Eager
from bench.providers.flash_attention import FlashAttention2, FlashAttention3, FlashAttention4
from bench.providers.libraries import Liger, Quack, TransformerEngine, Unsloth, Xformers
from bench.providers.ours import Apart, Ours
from bench.providers.provider import Provider
from bench.providers.pytorch import Flex, Sdpa, TorchNorm, TorchVarlen

PROVIDERS: tuple[Provider, ...] = (
    Ours(),
    Apart(),
    Eager(),
    Compiled(),
    TorchNorm(),
    Sdpa("sdpa", None),
    Sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    Sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    Sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
    Flex(),
    TorchVarlen(),
    Liger(),
    Quack(),
    FlashAttention2(),
    FlashAttention3(),
    FlashAttention4(),
    Xformers(),
    TransformerEngine(),
    Unsloth(),
)
