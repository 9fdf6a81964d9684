"""Patched models among what else replaces, moves, shards or cuts up modules of a model: equal to stock in each case."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

import torch.distributed as dist
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_kernels.integrations.transformers import patch, report, source, unpatch
from llama_kernels.integrations.transformers.attention import attention_forward
from tests.integrations import families_table, tensor_parallel
from tests.integrations.checks import CHECKS, Baseline, close
from tests.integrations.families import batch, stock
from tests.support.environment import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs on the reference path; compiled kernels have other tests"),
    pytest.mark.skipif(DEVICE == "cuda", reason="processes meet over gloo, and weights move between CPU and disk"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

# Two norms in a layer; norms of heads; four norms in a layer, of weight 1 + w; sinks, which attention itself holds.
KINDS = ["llama", "qwen3", "gemma3_text", "gpt_oss"]
ORDERS = ["patch first", "patch last"]
baseline = functools.cache(Baseline)


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process alone, as rank 0 of 1."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def is_right(family: str, model: nn.Module, check: str = "left") -> None:
    """What the check gives, by default logits and gradients with padding on the left, is what stock gives."""
    theirs, truth = baseline(family).results(check)
    ours = tensor_parallel.whole(CHECKS[check](model, batch(family)))
    close({name.removeprefix("module."): x for name, x in ours.items()}, theirs.close, truth.close)


def both(change, model: nn.Module, order: str) -> nn.Module:
    """`change` and `patch`, in this order or the other."""
    return change(patch(model)) if order == "patch first" else patch(change(model))


def ours(model: nn.Module, kind: str) -> int:
    return sum(row.count for row in report(model).rows if row.kind == kind and row.ours)


# --- tensor parallelism ----------------------------------------------------------------------------------------------

# Heads that are normed, sinks, experts, latent attention, packed projections, two norms more in a layer, images.
TENSOR_PARALLEL = [
    "llama", "qwen3", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "phi3", "glm4", "gemma3", "qwen2_5_vl",
]  # fmt: skip


@pytest.fixture(scope="module")
def tensor_parallel_results():
    return tensor_parallel.results(TENSOR_PARALLEL, seconds=60)


@pytest.mark.parametrize("family", TENSOR_PARALLEL)
def test_tensor_parallel(tensor_parallel_results, family):
    found = tensor_parallel_results[family]
    if "stock" not in found and transformers.__version__ != families_table.committed()[0]:
        pytest.skip(f"stock fails with Transformers {transformers.__version__}: {found['error'].splitlines()[-1]}")
    assert "error" not in found, found["error"]
    tensor_parallel.right(family, found["patched"])
    assert {"attention", "rms_norm", "rope"} <= {*found["ours"]}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", KINDS)
def test_norms_of_dtensors(process_group, family, order):
    """PyTorch's SequenceParallel: weight and input of a norm are DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    def parallel(model: nn.Module) -> nn.Module:
        norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
        plan = {name: SequenceParallel(use_local_output=True) for name in norms}
        return parallelize_module(model, init_device_mesh("cpu", (1,)), plan)

    is_right(family, both(parallel, stock(family), order))


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def sharded(model: nn.Module, norms_apart: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if norms_apart and type(module).__name__.endswith("RMSNorm"):
            fully_shard(module)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norms_apart", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_fsdp2(process_group, family, norms_apart, order):
    model = both(functools.partial(sharded, norms_apart=norms_apart), stock(family), order)
    assert ours(model, "rms_norm") and ours(model, "attention") and ours(model, "rope")
    is_right(family, model)
    if order == "patch first":
        with pytest.raises(ValueError, match="Unpatch before fully_shard"):
            unpatch(model)
    else:
        is_right(family, unpatch(model))


# --- DeepSpeed ZeRO-3 ------------------------------------------------------------------------------------------------


class Zero3:
    """As ZeRO-3 does it, a parameter is there inside the forward of the module that holds it, and from the start of
    that module's backward until the parameter's gradient is complete. Else it has shape (0,)."""

    def __init__(self, model: nn.Module) -> None:
        self.there: dict[nn.Parameter, torch.Tensor] = {}
        for module in model.modules():
            parameters = list(module.parameters(recurse=False))
            for parameter in parameters:
                self.there[parameter] = parameter.data
                parameter.register_post_accumulate_grad_hook(lambda parameter: self.release([parameter]))
            module.register_forward_pre_hook(lambda *call, these=parameters: self.gather(these))
            module.register_forward_hook(lambda *call, these=parameters: self.release(these))
            module.register_full_backward_pre_hook(lambda *call, these=parameters: self.gather(these))
        self.release(self.there)

    def gather(self, parameters) -> None:
        for parameter in parameters:
            parameter.data = self.there[parameter]

    def release(self, parameters) -> None:
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", KINDS)
def test_zero3(family, order):
    def partitioned(model: nn.Module) -> nn.Module:
        Zero3(model)
        return model

    model = both(partitioned, stock(family), order)
    assert ours(model, "rms_norm") and ours(model, "attention") and ours(model, "rope")
    is_right(family, model)
    assert all(parameter.shape == (0,) for parameter in model.parameters())


# --- accelerate ------------------------------------------------------------------------------------------------------


def offloaded_to_cpu(model: nn.Module, folder) -> nn.Module:
    return accelerate().cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_to_disk(model: nn.Module, folder) -> nn.Module:
    return accelerate().disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched(model: nn.Module, folder) -> nn.Module:
    """One layer stays, the other and the last norm are offloaded."""
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    parts |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    return accelerate().dispatch_model(model, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def accelerate():
    return pytest.importorskip("accelerate")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", [offloaded_to_cpu, offloaded_to_disk, dispatched])
@pytest.mark.parametrize("family", KINDS)
def test_accelerate(family, change, order, tmp_path):
    model = both(functools.partial(change, folder=tmp_path), stock(family), order)
    assert ours(model, "attention")
    assert bool(ours(model, "rms_norm")) == (order == "patch first")
    is_right(family, model, "far positions")
    is_right(family, unpatch(model), "far positions")


# --- other functions in the place of attention -----------------------------------------------------------------------


def test_a_wrapper_under_our_name_is_called():
    """As DeepSpeed's UlyssesSPAttentionHF registers itself."""
    calls = []

    def wrapper(module, *args, **kwargs):
        calls.append(module.layer_idx)
        return attention_forward(module, *args, **kwargs)

    model = patch(stock("llama"))
    ALL_ATTENTION_FUNCTIONS["llama_kernels"] = wrapper
    try:
        is_right("llama", model)
        assert calls == [0, 1]
    finally:
        del ALL_ATTENTION_FUNCTIONS["llama_kernels"]
    is_right("llama", model)
    assert calls == [0, 1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_a_wrapper_that_drops_the_mask(family):
    """As DeepSpeed's does, which brings together the keys of all ranks. Windows and documents stay."""

    def wrapper(module, query, key, value, attention_mask, *args, **kwargs):
        return attention_forward(module, query, key, value, None, *args, **kwargs)

    model, ids = patch(stock(family)), batch(family).ids
    positions = torch.cat([torch.arange(9), torch.arange(11)]).expand_as(ids)
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        ALL_ATTENTION_FUNCTIONS["llama_kernels"] = wrapper
        try:
            torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, expected)
        finally:
            del ALL_ATTENTION_FUNCTIONS["llama_kernels"]


@pytest.mark.parametrize("compiled", [False, True])
def test_context_parallel_is_refused(process_group, compiled):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh, ids = init_device_mesh("cpu", (1,)), batch("llama").ids
    model = patch(stock("llama"))
    run = torch.compile(model, backend="eager") if compiled else model
    expected = run(ids, use_cache=False).logits
    refused = pytest.raises(
        ValueError, match=r"attention_forward.*attn_implementation='sdpa' with torch's context_para"
    )
    with context_parallel(mesh, buffers=[ids.clone()], buffer_seq_dims=[1]), refused:
        run(ids, use_cache=False)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


# --- the package kernels ---------------------------------------------------------------------------------------------


def as_kernels_wraps(func):
    """What use_kernel_forward_from_hub makes of a function, in kernels 0.17."""

    class Func(nn.Module):
        def forward(self, *args, **kwargs):
            return func(*args, **kwargs)

    return Func()


def by_kernels(function):
    return pytest.importorskip("kernels").use_kernel_forward_from_hub("rotary_pos_emb")(function)


@pytest.mark.parametrize("wrap", [as_kernels_wraps, by_kernels])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_function_wrapped_by_kernels(monkeypatch, family, wrap):
    """It is ours until kernelize gives it another forward, which every model of the family then runs, ours as well."""
    module = sys.modules[type(stock(family)).__module__]
    wrapped = wrap(source.called_by(module.apply_rotary_pos_emb))
    monkeypatch.setattr(module, "apply_rotary_pos_emb", wrapped)
    theirs, model = stock(family), patch(stock(family))
    assert ours(model, "rope") and bool(ours(model, "qk_norm_rope")) == (family == "qwen3")
    is_right(family, model)
    is_right(family, copy.deepcopy(model))
    wrapped.forward = lambda q, k, cos, sin: (q * 2, k)
    ids = batch(family).ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits)


# --- cut into stages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])  # the experts of gpt_oss are not exportable
def test_pipelining(family):
    from torch.distributed.pipelining import SplitPoint, pipeline

    ids = batch(family).ids
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def staged_logits(model: nn.Module) -> tuple[list[nn.Module], torch.Tensor]:
        pipe = pipeline(model, (), arguments, split_spec={"model.layers.1": SplitPoint.BEGINNING})
        assert pipe.num_stages == 2
        stages = [pipe.get_stage_module(i) for i in range(2)]
        return stages, stages[1](*stages[0](ids, arguments["attention_mask"]))

    try:
        staged_logits(stock(family))
    except RuntimeError as error:
        pytest.skip(f"the stages of the stock model take other arguments in this Transformers: {error}"[:200])
    model = patch(stock(family))
    stages, logits = staged_logits(model)
    expected = model(**arguments).logits
    assert torch.equal(logits, expected)
    logits.sin().sum().backward()
    staged = {name: parameter.grad for stage in stages for name, parameter in stage.named_parameters()}
    if model.config.tie_word_embeddings:  # each stage has a weight of its own
        staged["model.embed_tokens.weight"] = staged["model.embed_tokens.weight"] + staged["lm_head.weight"]
    model.zero_grad()
    expected.sin().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(staged[name], parameter.grad)


# --- data parallel, checkpoints of activations -----------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", KINDS)
def test_ddp(process_group, family, order):
    from torch.nn.parallel import DistributedDataParallel

    is_right(family, both(DistributedDataParallel, stock(family), order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_gradient_checkpointing(family, use_reentrant, order):
    def checkpointed(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return model

    model, calls = both(checkpointed, stock(family), order), []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *call: calls.append(call))
    is_right(family, model, "training")
    assert len(calls) == 2, "nothing was computed again"
