"""Layouts that a model or the ranks cannot have are refused, with the nearest that they can."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from pydantic import ValidationError
from transformers import AutoConfig

from megatron_fp16rl.comparison import Comparison
from megatron_fp16rl.data.batch import Batch, Prompt
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.recipe import Layout, RecipeError
from megatron_fp16rl.recipe.learner import Learner
from megatron_fp16rl.rollout.rollouts import Rollouts
from tests import models

MOE = models.QWEN3_MOE


def dense(layers):
    return {**models.QWEN3, "num_hidden_layers": layers}


def described(model, layout):
    return describe(AutoConfig.for_model(vocab_size=99, **model), layout)


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        (dense(2), {"tensor_parallel": 4}, "tensor_parallel=4 .* num_key_value_heads=2"),
        (dense(2), {"pipeline_parallel": 4}, "pipeline_parallel x model_chunks=4 .* num_hidden_l"),
        (dense(2), {"expert_parallel": 2}, "expert_parallel=2.*this qwen3 model has no experts"),
        (MOE, {"expert_parallel": 3}, "expert_parallel=3 .* num_experts=8"),
        (MOE, {"tensor_parallel": 2}, "needs learner.sequence_parallel: true"),
    ],
)
def test_layout_that_does_not_divide_the_model_is_refused(model, layout, message):
    with pytest.raises(RecipeError, match=message):
        described(model, Layout(ranks=12, **layout))


@pytest.mark.parametrize(
    ("layers", "ranks", "chunks", "first", "last", "message"),
    [  # layers of large models, their stages, and what is wrong with them
        (61, 16, 1, 3, 2, None),
        (94, 8, 2, 10, 12, None),
        (12, 2, 1, 5, 7, None),
        (2, 2, 1, 1, 2, "last_stage_layers=2: .* leaves -1 for the 0 .*"),
        (61, 8, 1, 7, None, "first_stage_layers=7: .*=61 that leaves 54 for the 7 .*"),
        (94, 8, 2, 12, 12, "leaves 70 for the 6 .*"),
        (8, 4, 1, 8, None, "leaves 0 for the 3 .*"),
    ],
)
def test_uneven_stages_hold_each_layer_once_or_are_refused(
    layers, ranks, chunks, first, last, message
):
    """As Megatron splits them."""
    stages = {"first_stage_layers": first, "last_stage_layers": last}
    layout = Layout(ranks=ranks, pipeline_parallel=ranks, model_chunks=chunks, **stages)
    if message:
        with pytest.raises(RecipeError, match=message):
            described(dense(layers), layout)
        return
    described(dense(layers), layout)
    megatron = TransformerConfig(
        num_layers=layers,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    held = []
    for chunk in range(chunks):
        for rank in range(ranks):
            vp_stage = chunk if chunks > 1 else None
            start = get_transformer_layer_offset(megatron, vp_stage, rank)
            held += range(start, start + get_num_layers_to_build(megatron, vp_stage, rank))
    assert held == list(range(layers))


STAGES = {"ranks": 2, "pipeline_parallel": 2}
CHUNKS = {**STAGES, "model_chunks": 2}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"ranks": 6, "tensor_parallel": 4}, "ranks=6 is not a multiple of tensor_parallel=4"),
        ({**STAGES, "ranks": 6, "tensor_parallel": 2}, "=2 x pipeline_parallel=2; nearest: 4, 8"),
        ({"ranks": 2, "expert_parallel": 4}, "expert_parallel=4; nearest: 4"),
        ({"ranks": 6, "context_parallel": 4}, "ranks=6 is not a multiple of context_parallel=4"),
        ({"ranks": 2, "model_chunks": 2}, "needs pipeline_parallel > 1"),
        ({"ranks": 2, "last_stage_layers": 2}, "last_stage_layers=2 needs pipeline_parallel > 1"),
        ({**CHUNKS, "first_stage_layers": 3}, "=3 is not a .* model_chunks=2; nearest: 2, 4"),
        ({**CHUNKS, "first_stage_layers": 2, "last_stage_layers": 2}, "last_stage_layers to null"),
        ({"ranks": 2, "sequence_parallel": True}, "needs tensor_parallel > 1"),
    ],
)
def test_layout_that_does_not_divide_the_ranks_is_refused(layout, message):
    with pytest.raises(ValidationError, match=message):
        Layout(**layout)


@pytest.mark.parametrize(
    ("stages", "few", "verified", "verified_of_5"), [(1, 8, 8, 5), (3, 6, 9, 6), (16, 16, 16, 16)]
)
def test_what_is_scored_besides_fills_an_interleaved_pipeline(stages, few, verified, verified_of_5):
    """Of as many sequences as it has ranks, or a multiple, each can be a micro-batch."""
    layout = Layout(ranks=stages, pipeline_parallel=stages, model_chunks=2 if stages > 1 else 1)
    learner = SimpleNamespace(world=SimpleNamespace(layout=layout))
    batch = Batch.from_token_ids([[1, 2]] * 48)
    assert len(Comparison(models.recipe(), learner).few(batch)) == few

    def sent(held_out):
        prompts = [Prompt("", [1, 2], "")] * held_out
        rollouts = SimpleNamespace(
            recipe=models.recipe().model_copy(update={"learner": layout}),
            task=SimpleNamespace(held_out_prompts=lambda count: prompts[:count]),
            publisher=SimpleNamespace(verify=lambda _, sequences, __: len(sequences)),
        )
        return Rollouts.verify(rollouts, None)

    assert (sent(50), sent(5)) == (verified, verified_of_5)


def test_an_update_that_does_not_fill_an_interleaved_pipeline_is_refused():
    pipeline = {"ranks": 8, "pipeline_parallel": 4, "model_chunks": 2}
    assert Learner(**pipeline, global_batch_size=24).data_parallel == 2
    with pytest.raises(
        ValidationError, match=r"global_batch_size=12 is not .* 8, .*nearest: 8, 16"
    ):
        Learner(**pipeline, global_batch_size=12)
    assert Learner(**{**pipeline, "model_chunks": 1}, global_batch_size=12).global_batch_size == 12
