"""Options of Megatron's data parallelism and optimizer: the same numbers as without, to the last bit."""

import pytest

from tests.conftest import assert_replicas_agree, run_ranks

OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 3000}
GATHER = {**OVERLAP, "overlap_param_gather": True}
PADDED = {"pad_buckets_for_high_nccl_busbw": True}
TP2, PP2 = {"tensor_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2}
CHUNKS = {**PP2, "model_chunks": 2}


SHARDED = {"distributed_optimizer": True}
VARIANTS = {
    "plain": {},
    "overlap": {"ddp": OVERLAP},
    "sharded": SHARDED,
    "sharded overlap": {**SHARDED, "ddp": OVERLAP},
    "sharded gather": {**SHARDED, "ddp": GATHER},
    "sharded padded": {**SHARDED, "ddp": {**GATHER, **PADDED}},
    "sharded aligned": {**SHARDED, "ddp": {**GATHER, "align_param_gather": True}},
}


@pytest.mark.parametrize(
    ("ranks", "layout", "family", "names"),
    [
        (2, {}, "qwen3-tied", [*VARIANTS][:-1]),
        (2, {"expert_parallel": 2}, "deepseek-v3", ["plain", "overlap", "sharded gather"]),
        (4, TP2, "qwen3-tied", ["plain", "sharded gather"]),
        (4, PP2, "qwen3-tied", ["plain", "overlap", "sharded gather"]),
        (4, CHUNKS, "qwen3-deep", ["plain", "overlap", "sharded aligned"]),
    ],
    ids=["dp2", "ep2", "dp2-tp2", "dp2-pp2", "dp2-pp2-interleaved"],
)
def test_overlap_changes_no_number(ranks, layout, family, names):
    """Several micro-batches; one update overflows in the backward pass and is skipped.

    But for the last bits of a gradient norm that the distributed optimizer's ranks sum.
    """
    variants = {name: VARIANTS[name] for name in names}
    arguments = {"layout": layout, "family": family, "variants": variants}
    results = run_ranks(ranks, "ddp.variants", timeout=500, **arguments)
    for name in variants:
        assert_replicas_agree([result[name]["shards"] for result in results])
    for result in results:
        for name, got in result.items():
            for what in ("log", "shards", "exported", "scores"):
                assert got[what] == result["plain"][what], (name, what)
            # The distributed optimizer's ranks count no gradient twice.
            alike = [other for other in names if ("sharded" in other) == ("sharded" in name)]
            assert got["underflow"] == result[alike[0]]["underflow"], name
            assert got["norms"] == pytest.approx(result["plain"]["norms"], rel=1e-6)
            stepped = [entry[0] for entry in got["log"] if isinstance(entry, list)]
            assert stepped == [True, False, True]
            assert got["kept"]
            assert got["micro_batches"] > 1
            assert got["scores"][0] == got["scores"][1]
            # What it is for: reductions run when the backward pass ends, parameters come with the forward.
            options = variants[name].get("ddp", {})
            assert all(got["in_flight"][1:]) == options.get("overlap_grad_reduce", False), name
            stale = any(other[name]["stale"] for other in results)
            assert stale == options.get("overlap_param_gather", False), name
    # Megatron's buckets are the first stage's: there reductions end last.
    buckets = {name: results[0][name]["buckets"] for name in names}
    assert buckets[names[-1]] > buckets["plain"]


def test_adapters_overlap_their_reduction():
    lora = {"lora": {"rank": 4, "alpha": 8.0}}
    variants = {"plain": lora, "overlap": {**lora, "ddp": {**OVERLAP, "bucket_size": 500}}}
    arguments = {"layout": {}, "family": "qwen3-tied", "variants": variants}
    for result in run_ranks(2, "ddp.variants", **arguments):
        plain, overlap = result["plain"], result["overlap"]
        assert overlap["buckets"] > plain["buckets"]
        assert all(overlap["in_flight"][1:])
        for what in ("log", "shards", "exported", "scores"):
            assert overlap[what] == plain[what], what


def optimizer(**options):
    # A decay that is beyond fp16's rounding at once.
    return {"optimizer": {"weight_decay": 10.0, "megatron": options}}


@pytest.mark.parametrize("layout", [{}, PP2], ids=["dp2", "pp2"])
def test_options_of_groups_of_parameters_reach_only_these(layout):
    """pp2: the last stage has a copy of the embedding."""
    decoupled = {"decoupled_lr": 1e-3, "decoupled_min_lr": 0.0}
    variants = {
        "plain": optimizer(),
        "the same": optimizer(**decoupled, apply_wd_to_qk_layernorm=False),
        "slow embedding": optimizer(**{**decoupled, "decoupled_lr": 1e-4}),
        "decayed": optimizer(apply_wd_to_qk_layernorm=True),
        "slow embedding, sharded": {
            **optimizer(**{**decoupled, "decoupled_lr": 1e-4}),
            "distributed_optimizer": True,
        },
    }
    arguments = {"layout": layout, "family": "qwen3-tied", "variants": variants}
    results = run_ranks(2, "ddp.variants", one_update=True, **arguments)
    for result in results:
        plain = result["plain"]["shards"]
        changed = {
            name: {shard for shard, bits in got["shards"].items() if bits != plain[shard]}
            for name, got in result.items()
        }
        assert changed["the same"] == set()
        assert changed["slow embedding"] == {"embedding.word_embeddings.weight 0"}
        assert changed["slow embedding, sharded"] == changed["slow embedding"]
        norms = {shard for shard in plain if "q_layernorm" in shard or "k_layernorm" in shard}
        assert norms
        assert changed["decayed"] == norms
