"""Weight syncs: the closed form of transport `sliced` against a simulation, all against what others publish."""

import re
from collections import defaultdict
from fractions import Fraction

import pytest

from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.models.costs import costs
from megatron_fp16rl.models.source import shape_config
from megatron_fp16rl.recipe import load
from megatron_fp16rl.tools.plan import sync, times
from megatron_fp16rl.tools.plan.gpus import GPUS
from megatron_fp16rl.tools.plan.rank import sync_bytes
from megatron_fp16rl.tools.recipes import RECIPES, find
from tests import models
from tests.conftest import ROOT

H100 = GPUS["h100-80gb"]
MESSAGE_S, PIECE_S = sync.MESSAGE_S, sync.PIECE_S


def shape(name, **changes):
    """A model's configuration, with changes."""
    config = shape_config(str(RECIPES / "models" / f"{name}.json"))
    return type(config)(**{**config.to_dict(), **changes})


def recipe(transport, learner, servers, parts, experts=1, bucket_mib=1024):
    planned = models.recipe(
        rollout={
            "prompts": 512,
            "samples": 2,
            "max_new_tokens": 64,
            "servers": servers,
            "tensor_parallel": parts,
            "sglang": {"ep_size": experts},
        },
        learner={"global_batch_size": 1024, "sequence_parallel": False, **learner},
        precision={"dtype": "bf16"},
    )
    return by_transport(planned, transport, bucket_mib)


def by_transport(planned, transport, bucket_mib=1024):
    settings = planned.sync.model_copy(update={"transport": transport, "bucket_mib": bucket_mib})
    return planned.model_copy(update={"sync": settings})


def planned_sync(planned, config):
    return times.estimate(planned, config, H100).sync


# `sliced` against a simulation that knows nothing of it: every tensor, every shard, every message


def overlap(part, parts, other, others):
    """Of the part-th of `parts` equal slices, what is in the other-th of `others`; as a share of all."""
    low = max(Fraction(part, parts), Fraction(other, others))
    return max(Fraction(0), min(Fraction(part + 1, parts), Fraction(other + 1, others)) - low)


def tensors(config, count):
    """(layer, kind, expert, numbers) of every matrix; an embedding's layer is its stage's first or last."""
    heads, experts = count.attention, count.experts
    for layer in range(count.layers):
        yield layer, "heads", None, heads.by_head
        if heads.by_kv_head:
            yield layer, "kv", None, heads.by_kv_head
        for _ in range(6):  # norms and the like, of no size
            yield layer, "whole", None, 0
        dense = layer < count.layers - count.sparse_layers
        yield layer, "whole", None, heads.replicated + (0 if dense else count.router)
        for _ in range(3):
            if dense or count.shared:
                yield layer, "heads", None, (count.mlp if dense else count.shared) // 3
            for expert in range(0 if dense else experts):
                yield layer, "expert", expert, count.expert // 3
    yield 0, "heads", None, count.embedding
    yield count.layers - 1, "heads", None, count.embedding * (not count.tied)


def pieces(planned, config):
    """{(sender, server rank): bytes of each piece}. Replicas share: who has sent least so far sends next."""
    layout, parts, count = planned.learner, planned.rollout.tensor_parallel, costs(config)
    ep_size = planned.rollout.sglang["ep_size"]
    sharing, ranks = parts // ep_size, layout.ranks // layout.pipeline_parallel
    edges, sent = defaultdict(list), [0] * layout.ranks
    for layer, kind, expert, numbers in tensors(config, count):
        stage = layer * layout.pipeline_parallel // count.layers
        etp, tp = layout.expert_tensor_parallel, layout.tensor_parallel
        shards = defaultdict(list)
        for rank in range(stage * ranks, (stage + 1) * ranks):
            if kind != "expert":
                shards[0 if kind == "whole" else rank % tp].append(rank)
            elif rank // etp % layout.expert_parallel == (
                expert * layout.expert_parallel // count.experts
            ):
                shards[rank % etp].append(rank)
        for shard, holders in shards.items():
            sender = min(holders, key=sent.__getitem__)
            for server_rank in range(parts):
                if kind == "whole":
                    share = Fraction(1)
                elif kind == "expert":
                    here = server_rank // sharing == expert * ep_size // count.experts
                    share = here * overlap(shard, etp, server_rank % sharing, sharing)
                elif kind == "kv":
                    kv = min(parts, count.attention.kv_heads)
                    share = overlap(shard, tp, server_rank * kv // parts, kv)
                else:
                    share = overlap(shard, tp, server_rank, parts)
                if share:
                    edges[sender, server_rank].append(2 * float(numbers * share))
                    sent[sender] += 2 * float(numbers * share)
    return edges


def simulated(planned, config):
    """Seconds until the last piece is in its place: pack, send, unpack, message by message.

    A sender is busy while it packs and sends, a server rank while it receives and unpacks; both take their
    partners round by round.
    """
    senders, parts = planned.learner.ranks, planned.rollout.tensor_parallel
    edges, limit = pieces(planned, config), planned.sync.bucket_mib << 19
    wire, memory = H100.network * times.NETWORK, H100.hbm * times.MEMORY
    rounds = max(senders, parts)
    sender_free, rank_free = [0.0] * senders, [0.0] * parts

    for edge in sorted(edges, key=lambda edge: (edge[0] - edge[1]) % rounds):
        messages, sizes = [[]], edges[edge]
        for size in sizes:
            if messages[-1] and sum(messages[-1]) + size > limit:
                messages.append([])
            messages[-1].append(size)
        for message in messages:
            copied = len(message) * PIECE_S + 2 * sum(message) / memory
            ready = max(sender_free[edge[0]] + copied, rank_free[edge[1]])
            sent = ready + MESSAGE_S + sum(message) / wire
            sender_free[edge[0]], rank_free[edge[1]] = sent, sent + copied
    return max(rank_free)


MOE, DENSE, LATENT = "qwen3-30b-a3b-base", "qwen3-8b-base", "deepseek-v3"
# What each is there for is its name. The model and its changes; learner; ranks of a server, their EP.
LAYOUTS = {
    "dense, of several stages": (DENSE, {}, {"ranks": 16, "tensor_parallel": 4, "pipeline_parallel": 2}, 2, 1),
    "few senders": (MOE, {"num_hidden_layers": 12}, {"ranks": 2, "expert_parallel": 2}, 8, 1),
    "servers' EP": (MOE, {}, {"ranks": 32, "tensor_parallel": 4, "expert_parallel": 8}, 8, 8),
    "ETP": (MOE, {"num_hidden_layers": 12}, {"ranks": 16, "expert_parallel": 4, "expert_tensor_parallel": 4}, 2, 1),
    "latents": (
        LATENT,
        {"num_hidden_layers": 16, "n_routed_experts": 128},
        {"ranks": 32, "tensor_parallel": 2, "pipeline_parallel": 4, "expert_parallel": 8},
        16,
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_closed_form_is_what_a_simulation_says(layout):
    name, changes, learner, parts, experts = LAYOUTS[layout]
    config = shape(name, **changes)
    planned = recipe("sliced", learner, 4, parts, experts)
    parts_s = planned_sync(planned, config).parts
    predicted = sum(parts_s.values()) - parts_s["fixed"]
    assert predicted == pytest.approx(simulated(planned, config), rel=0.1)


def test_what_an_update_takes_follows_the_transport():
    """Qwen3-30B-A3B: 61 GB; TP 2 halves all but the router."""
    layout = {"ranks": 16, "tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 8}
    config = shape(MOE)
    router = 2 * 48 * 2048 * 128
    size = 2 * costs(config).parameters
    each = {
        transport: planned_sync(recipe(transport, layout, 8, 2), config)
        for transport in ("sliced", "distributed", "disk")
    }
    assert each["sliced"].server_rank_bytes == (size + router) // 2
    assert each["sliced"].sender_bytes == pytest.approx((size + router) / 16, rel=0.01)
    assert each["sliced"].senders == 16
    assert each["distributed"].server_rank_bytes == each["distributed"].sender_bytes == size
    assert each["distributed"].messages == -(-size // ((1 << 30) // 3))
    assert each["sliced"].seconds < each["distributed"].seconds < each["disk"].seconds
    # A smaller bucket costs messages, and requests where each has its own.
    small = {
        transport: planned_sync(recipe(transport, layout, 8, 2, bucket_mib=64), config)
        for transport in ("sliced", "distributed")
    }
    more = {name: small[name].seconds - each[name].seconds for name in small}
    assert 0 < more["sliced"] < 0.5 < more["distributed"]
    # Within a node all goes over NVLink.
    one = planned_sync(recipe("sliced", {"ranks": 4, "tensor_parallel": 2}, 2, 2), config)
    assert one.parts["wire"] == pytest.approx(one.server_rank_bytes / (450e9 * times.NETWORK))


def test_memory_of_ranks_follows_the_transport():
    largest, bucket = 10**9, 1 << 30
    held = {
        transport: [
            sync_bytes(recipe(transport, {"ranks": 2}, 1, 1), stage, largest) for stage in (0, 1)
        ]
        for transport in ("sliced", "distributed", "disk")
    }
    assert held["sliced"] == [128 << 20] * 2  # two messages
    assert held["distributed"] == held["disk"] == [bucket + 3 * largest, 0]


# All transports against what others publish


WIDE = {"ranks": 64, "tensor_parallel": 4, "pipeline_parallel": 4, "expert_parallel": 16}
QWEN3_235B, GLM_AIR = "qwen3-235b-a22b", "glm-4.5-air"
KIMI_K2 = {
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
}
NARROW = {**WIDE, "ranks": 16, "pipeline_parallel": 2, "expert_parallel": 8}
KIMI = {**WIDE, "ranks": 256, "tensor_parallel": 8, "pipeline_parallel": 8, "expert_parallel": 32}
# Model, its changes, learner, servers, ranks of each, their expert-parallel size. CP is counted as DP.
MILES_30B = (MOE, {}, {"ranks": 16, "tensor_parallel": 4, "expert_parallel": 8}, 2, 8, 8)
MILES_AIR = (GLM_AIR, {}, {"ranks": 32, "pipeline_parallel": 4, "expert_parallel": 8}, 4, 8, 8)
MILES_235B = (QWEN3_235B, {}, WIDE, 2, 32, 32)
SKYRL_235B = (QWEN3_235B, {}, NARROW, 1, 16, 16)
NEMO_30B = (MOE, {}, {"ranks": 16, "pipeline_parallel": 2, "expert_parallel": 8}, 2, 8, 1)
NEMO_V3 = (LATENT, {}, {"ranks": 256, "pipeline_parallel": 16, "expert_parallel": 16}, 8, 32, 1)
ROWS = {
    "NeMo-RL reshard, Qwen3-30B-A3B, 16 to 16 GPUs": ("sliced", NEMO_30B),
    "NeMo-RL reshard, DeepSeek-V3, 256 to 256": ("sliced", NEMO_V3),
    "SkyRL RDT, Qwen3-235B-A22B, 16 to 16": ("sliced", SKYRL_235B),
    "SkyRL RDT, Kimi-K2, 256 to 128": ("sliced", (LATENT, KIMI_K2, KIMI, 4, 32, 32)),
    "miles P2P, Qwen3-30B-A3B, 16 to 16": ("sliced", MILES_30B),
    "miles P2P, GLM-4.5-Air, 32 to 32": ("sliced", MILES_AIR),
    "miles P2P, Qwen3-235B-A22B, 64 to 64": ("sliced", MILES_235B),
    "miles NCCL, Qwen3-30B-A3B, 16 to 16": ("distributed", MILES_30B),
    "miles NCCL, GLM-4.5-Air, 32 to 32": ("distributed", MILES_AIR),
    "miles NCCL, Qwen3-235B-A22B, 64 to 64": ("distributed", MILES_235B),
    "SkyRL NCCL, Qwen3-235B-A22B, 16 to 16": ("distributed", SKYRL_235B),
}


def test_the_table_of_recipes_is_what_the_model_says():
    page = (ROOT / "docs/planner.md").read_text()
    table = re.findall(r"^\| (\S+-\d+n8g) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert len(table) == 3
    for name, *cells in table:
        planned = load(find(name))
        config = model_config(planned.model)
        seconds = [
            planned_sync(by_transport(planned, transport), config).seconds
            for transport in ("sliced", "distributed")
        ]
        assert [float(cell) for cell in cells] == [pytest.approx(s, rel=0.03) for s in seconds], (
            name,
            seconds,
        )


def test_the_table_of_syncs_is_what_the_model_says():
    page = (ROOT / "docs/planner.md").read_text()
    for name, (transport, (model, changes, *setting)) in ROWS.items():
        found = re.search(rf"^\| {re.escape(name)} \| (.+) \|$", page, re.MULTILINE)
        planned = planned_sync(recipe(transport, *setting), shape(model, **changes)).seconds
        published, *cells = found[1].split(" | ") if found else ("1",)
        low, _, high = published.partition("-")
        middle = (float(low) + float(high or low)) / 2
        expected = [transport, f"{planned:.1f}", f"{planned / middle:.2f}"]
        assert cells == expected, f"{name}: {expected}"
