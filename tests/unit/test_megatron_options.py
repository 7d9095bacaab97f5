"""Options that are passed on to Megatron: each is either proved, or refused with a reason."""

import dataclasses

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fp16rl.recipe import Lora, megatron_options
from megatron_fp16rl.recipe.learner import Learner


@pytest.mark.parametrize(
    ("table", "config"),
    [
        (megatron_options.DDP, DistributedDataParallelConfig),
        (megatron_options.OPTIMIZER, OptimizerConfig),
    ],
    ids=["ddp", "optimizer"],
)
def test_every_option_of_this_megatron_is_decided(table, config):
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert table.keys() == fields.keys()
    for name, allowed in table.items():
        if isinstance(allowed, type):  # Megatron's own words: bool, Optional[int], Optional[float]
            assert allowed.__name__ in str(fields[name].type), name


def test_what_other_keys_say_is_megatrons():
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert megatron_options.SAID_ELSEWHERE.keys() <= fields


def learner(**settings):
    return Learner(ranks=4, global_batch_size=4, distributed_optimizer=True, **settings)


def test_overlap_that_would_miss_parameters_is_refused():
    gather = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    learner(ddp=gather)
    with pytest.raises(ValueError, match="does not gather lora's adapters"):
        learner(ddp=gather, lora=Lora(rank=2, alpha=2.0))
    aligned = {**gather, "align_param_gather": True}
    learner(ddp=aligned, pipeline_parallel=2, model_chunks=2)
    with pytest.raises(ValueError, match="needs model_chunks > 1"):
        learner(ddp=aligned, pipeline_parallel=2)
    with pytest.raises(ValueError, match="overlap_param_gather=True needs overlap_grad_reduce"):
        learner(ddp={"overlap_param_gather": True})
