"""`precision.head: fp32`: logits that no engine rounds, and what they cost the learner."""

import pytest

from tests.conftest import run_ranks

TP2 = {"tensor_parallel": 2}
SP = {**TP2, "sequence_parallel": True}
ROWS = {"packing": False}
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # of a number, in half the steps between two
LORA = {"rank": 4, "alpha": 8}


def products(layout, family="qwen3", dtype="fp16", head="fp32", lora=None):
    ranks = 2 if layout.get("tensor_parallel") else 1
    arguments = {"family": family, "layout": layout, "dtype": dtype, "head": head, "lora": lora}
    return run_ranks(ranks, "head.products", **arguments)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3-tied", {}), ("qwen3", ROWS), ("qwen3", TP2), ("qwen3-tied", SP)],
    ids=["one", "rows", "tp2", "tp2-sp"],
)
def test_logits_are_fp32_products_and_gradients_are_rounded_once(family, layout):
    for result in products(layout, family):
        assert result["dtypes"] == ["torch.float32", "torch.float32", "torch.float16"]
        apart = result["apart"]
        assert apart.pop("logits") < 1e-6
        assert len(apart) == (2 if family == "qwen3" else 1)
        # Of hidden states two ranks' parts are rounded, then their sum.
        assert max(apart.values()) < (1 if layout in ({}, ROWS) else 3) * ROUNDING["fp16"]


@pytest.mark.parametrize(
    ("options", "logits", "gradient"),
    [
        ({"head": None}, "torch.float16", "torch.float16"),
        ({"dtype": "bf16"}, "torch.float32", "torch.bfloat16"),
        ({"dtype": "fp32"}, "torch.float32", "torch.float32"),
        ({"lora": LORA}, "torch.float32", "torch.float16"),
    ],
    ids=["as the dtype", "bf16", "fp32", "lora"],
)
def test_other_dtypes_and_a_frozen_weight(options, logits, gradient):
    (result,) = products({}, **options)
    assert result["dtypes"] == [logits, logits, gradient]
    if options == {"head": None}:  # the rounding that the key saves
        assert 1e-5 < result["apart"]["logits"] < ROUNDING["fp16"]
    else:
        assert result["apart"]["logits"] < 1e-6
        assert max(result["apart"].values()) < ROUNDING.get(options.get("dtype", "fp16"), 1e-6)
    assert ("of weight" in result["apart"]) == ("lora" not in options)


def test_an_fp32_model_is_the_same_with_either_head():
    (one,), (other,) = (products({}, dtype="fp32", head=head) for head in (None, "fp32"))
    assert one == other


@pytest.mark.parametrize("head", [None, "fp32"])
def test_a_context_parallel_rank_may_have_no_token_to_predict(head):
    (one,) = run_ranks(1, "head.last_token", layout={}, head=head)
    results = run_ranks(2, "head.last_token", layout={"context_parallel": 2}, head=head)
    assert sorted(result["rows"] for result in results) == [0, one["rows"]]
    for result in results:
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert result["norm"] == pytest.approx(one["norm"], rel=2e-3)


def test_fp32_logits_become_their_gradient_and_no_weight_is_whole_in_fp32():
    """On a CPU the forward pass copies the weight, which a GPU does not; here it is small beside the logits."""
    rows, vocabulary, hidden = 2048, 1000, 16
    (result,) = run_ranks(1, "head.memory", rows=rows, vocabulary=vocabulary, hidden=hidden)
    assert result["peak"] < 1.1 * 4 * rows * vocabulary
    values, of_hidden, of_weight = result["apart"]
    assert values < 5e-6
    assert max(of_hidden, of_weight) < ROUNDING["fp16"]
