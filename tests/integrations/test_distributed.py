"""Patched models that are sharded, split or replicated over processes: results are those of stock."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

import torch.distributed as dist
import transformers
from torch import nn

from llama_kernels.integrations.transformers import patch, report, unpatch
from tests.integrations import families_table, tensor_parallel
from tests.integrations.changed_models import changed, compare_with_stock, families, on_cpu, orders, replaced
from tests.integrations.families import batch, stock
from tests.integrations.small import VERSION

pytestmark = on_cpu


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- tensor parallelism ----------------------------------------------------------------------------------------------

# With norms of heads, sinks, experts, latent attention, packed projections, four norms in a layer, images.
TENSOR_PARALLEL = [
    "llama", "qwen3", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "phi3", "glm4", "gemma3", "qwen2_5_vl",
]  # fmt: skip


@pytest.fixture(scope="module")
def tensor_parallel_results():
    return tensor_parallel.results(TENSOR_PARALLEL, seconds=60)


@pytest.mark.skipif(VERSION < (5, 1), reason="with Transformers 5.0, stock models of experts do not end")
@pytest.mark.parametrize("family", TENSOR_PARALLEL)
def test_a_tensor_parallel_model_gives_the_results_of_stock(tensor_parallel_results, family):
    found = tensor_parallel_results[family]
    if transformers.__version__ != families_table.committed()[0]:
        if "stock" not in found:
            pytest.skip(f"stock fails with Transformers {transformers.__version__}: {found['error'].splitlines()[-1]}")
        try:
            tensor_parallel.check_results(family, found["stock"])
        except AssertionError as error:
            pytest.skip(f"stock is wrong with Transformers {transformers.__version__}: {error}")
    assert "error" not in found, found["error"]
    tensor_parallel.check_results(family, found["patched"])
    assert {"attention", "rms_norm", "rope"} <= {*found["ours"]}


@orders
@families
def test_norms_in_sequence_parallel_give_the_results_of_stock(process_group, family, order):
    """In SequenceParallel, weight and input of a norm are DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    def parallel(model: nn.Module) -> nn.Module:
        norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
        plan = {name: SequenceParallel(use_local_output=True) for name in norms}
        return parallelize_module(model, init_device_mesh("cpu", (1,)), plan)

    compare_with_stock(family, changed(parallel, stock(family), order))


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def sharded(model: nn.Module, norms_apart: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if norms_apart and type(module).__name__.endswith("RMSNorm"):
            fully_shard(module)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


@orders
@pytest.mark.parametrize("norms_apart", [True, False])
@families
def test_fsdp2_gives_the_results_of_stock(process_group, family, norms_apart, order):
    model = changed(functools.partial(sharded, norms_apart=norms_apart), stock(family), order)
    assert replaced(model) >= {"attention", "rms_norm", "rope"}
    compare_with_stock(family, model)
    if order == "patch first":
        assert {row.why for row in report(model).rows if row.ours} == {"through AttentionInterface", "known code"}
        with pytest.raises(ValueError, match="Unpatch before fully_shard"):
            unpatch(model)
    else:
        compare_with_stock(family, unpatch(model))


# --- DeepSpeed ZeRO-3 ------------------------------------------------------------------------------------------------


class Zero3:
    """Gathers and releases parameters when ZeRO-3 does. A released parameter has shape (0,).

    A parameter is gathered in the forward of its module, and from the start of the module's backward until the gradient
    of the parameter is complete.
    """

    def __init__(self, model: nn.Module) -> None:
        self.full: dict[nn.Parameter, torch.Tensor] = {}
        for module in model.modules():
            parameters = list(module.parameters(recurse=False))
            for parameter in parameters:
                self.full[parameter] = parameter.data
                parameter.register_post_accumulate_grad_hook(lambda parameter: self.release([parameter]))
            module.register_forward_pre_hook(lambda *call, these=parameters: self.gather(these))
            module.register_forward_hook(lambda *call, these=parameters: self.release(these))
            module.register_full_backward_pre_hook(lambda *call, these=parameters: self.gather(these))
        self.release(self.full)

    def gather(self, parameters) -> None:
        for parameter in parameters:
            parameter.data = self.full[parameter]

    def release(self, parameters) -> None:
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype)


@orders
@families
def test_zero_3_gives_the_results_of_stock(family, order):
    def partitioned(model: nn.Module) -> nn.Module:
        Zero3(model)
        return model

    model = changed(partitioned, stock(family), order)
    assert replaced(model) >= {"attention", "rms_norm", "rope"}
    compare_with_stock(family, model)
    assert all(parameter.shape == (0,) for parameter in model.parameters())


# --- context parallelism ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_context_parallel_raises(process_group, compiled):
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


# --- pipeline parallelism --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])  # the experts of gpt_oss are not exportable
def test_two_pipeline_stages_compute_what_the_model_does(family):
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
        pytest.skip(f"the stock model cannot be split like this in this Transformers: {error}"[:200])
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


# --- data parallelism, gradient checkpointing ------------------------------------------------------------------------


@orders
@families
def test_ddp_gives_the_results_of_stock(process_group, family, order):
    from torch.nn.parallel import DistributedDataParallel

    compare_with_stock(family, changed(DistributedDataParallel, stock(family), order))


@orders
@pytest.mark.parametrize("use_reentrant", [True, False])
@families
def test_checkpointing_recomputes_the_forward_and_gives_the_results_of_stock(family, use_reentrant, order):
    def checkpointed(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return model

    model, calls = changed(checkpointed, stock(family), order), []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *call: calls.append(call))
    compare_with_stock(family, model, "training")
    assert len(calls) == 2, "the backward did not recompute the forward"
