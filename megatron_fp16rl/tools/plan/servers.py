"""Memory of the rollout servers' GPUs: weights, KV cache, and how many sequences that holds.

How weights are split is read from SGLang 0.5.23's source (models/, layers/moe/fused_moe_triton/layer.py).
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_fp16rl.models.costs import Costs, costs
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.plan.gpus import GIB, Gpu
from megatron_fp16rl.tools.plan.lengths import longest

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_CACHE_BYTES = {"fp8_e5m2": 1, "fp8_e4m3": 1, "bf16": 2, "bfloat16": 2}
_CONTEXT_GIB = 1.0  # CUDA context and NCCL, allocated before SGLang measures free memory
# SGLang chooses 0.82 to 0.86 for GPUs of 80 GB and more, by sizes of chunks and graphs.
_STATIC_FRACTION = 0.8
_MOST_RUNNING = 4096  # sequences, where max_running_requests is not set (kv_cache_configurator.py)
# mamba_full_memory_ratio of SGLang: memory of delta nets' states over that of the KV cache; and the states that
# a request has with the radix cache and overlap (mem_cache/kv_cache_configurator.py).
_STATES, _STATES_OF_A_REQUEST = 0.9, 5


@dataclass(frozen=True)
class ServerMemory:
    """Of each GPU of a server."""

    tensor_parallel: int
    weights: int  # bytes
    static_fraction: (
        float  # mem_fraction_static: weights and cache, of the memory free at the start
    )
    token_bytes: int  # of the KV cache, for one token
    kv_cache: int  # bytes; negative by what is missing if the weights do not fit
    kv_tokens: int  # that the cache holds
    logits: int  # bytes beside these while all that a step asks are decoded; see logits_bytes
    running: int  # sequences of the recipe's longest that run at once
    wanted: int  # sequences that a step asks of each server
    reasons: list[str]  # why SGLang would not start, or could not run one longest sequence


def server_memory(recipe: Recipe, config: PretrainedConfig, gpu: Gpu) -> ServerMemory:
    """What the recipe's servers hold on each of their GPUs."""
    rollout, model = recipe.rollout, costs(config)
    parts, width = rollout.tensor_parallel, BYTES[recipe.precision.served]
    weights = int(rank_weights(model, parts, model.experts) * width)
    if not model.tied:  # the input embedding
        weights += model.embedding // parts * width
    heads = max(1, model.attention.kv_heads // parts)  # every rank has all of a latent cache
    cache_width = _CACHE_BYTES.get(str(recipe.rollout.sglang.get("kv_cache_dtype")), width)
    token = int(model.attention_layers * heads * model.attention.cached * cache_width)
    fraction = float(recipe.rollout.sglang.get("mem_fraction_static") or _STATIC_FRACTION)
    static = int((gpu.memory_gib - _CONTEXT_GIB) * GIB * fraction)
    state = state_bytes(model, parts, width)
    free = max(0, static - weights)
    states = _STATES / (1 + _STATES) * free if state else 0.0
    tokens = int(free - states) // token
    tokens = min(tokens, int(recipe.rollout.sglang.get("max_total_tokens") or tokens))
    sequence = longest(recipe).sequence
    running = tokens // sequence
    if state:
        running = min(running, int(states // state - 1) // _STATES_OF_A_REQUEST)
    reasons = refusals(model, parts, expert_parallel(recipe))
    if not reasons and not running:
        reasons = [
            f"rollout.tensor_parallel: of the {static / GIB:.1f} GiB that SGLang takes of a GPU "
            f"(mem_fraction_static={fraction:g}) weights are {weights / GIB:.1f} GiB; the rest holds "
            f"{tokens} tokens, and the longest sequence has {sequence}. Raise it, or set rollout.sglang."
            "mem_fraction_static"
        ]
    wanted = -(-rollout.prompts * rollout.samples // rollout.servers)
    rows = min(wanted, int(recipe.rollout.sglang.get("max_running_requests") or _MOST_RUNNING))
    logits = rows * logits_bytes(config.vocab_size, parts, width, recipe.precision.head == "fp32")
    beside = int((gpu.memory_gib - _CONTEXT_GIB) * GIB) - static
    if logits > beside:
        reasons.append(
            f"rollout.servers: logits of {rows} sequences are {logits / GIB:.1f} GiB, and beside "
            f"mem_fraction_static={fraction:g} a GPU has {beside / GIB:.1f} GiB; lower it, or set "
            "rollout.sglang.max_running_requests"
        )
    return ServerMemory(
        tensor_parallel=parts,
        weights=weights,
        static_fraction=fraction,
        token_bytes=token,
        kv_cache=static - weights - int(states),
        kv_tokens=tokens,
        logits=logits,
        running=min(running, int(recipe.rollout.sglang.get("max_running_requests") or running)),
        wanted=wanted,
        reasons=reasons,
    )


def logits_bytes(vocabulary: int, parts: int, width: int, fp32: bool) -> int:
    """Of one sequence in a decode step, on each GPU, as SGLang's logits_processor.py has them at once.

    A shared fp32 buffer, whatever the head. Into it an fp32 product is written straight, from the weight as it is;
    16-bit logits are cast into it. Of several ranks their shards and the gathered logits are there, too.
    """
    width = 4 if fp32 else width
    if parts == 1:
        return vocabulary * (4 if fp32 else 4 + width)
    return vocabulary * (4 + width) + -(-vocabulary // parts) * width


def state_bytes(model: Costs, parts: int, width: int) -> float:
    """Of a request's states in all delta nets on one rank; 0 for a model without."""
    net = model.delta_net
    if net is None:
        return 0.0
    return model.delta_layers * (4 * net.state + width * net.window) / parts


def rank_weights(model: Costs, parts: int, experts: float) -> float:
    """Numbers in one tensor-parallel rank's layers and output layer, with so many experts a layer.

    Experts take the same whether ranks hold whole ones (ep_size) or slices of all.
    """
    attention = model.attention
    kv_parts = min(parts, attention.kv_heads or 1)  # kv heads are repeated if there are fewer
    layer = attention.by_head / parts + attention.by_kv_head / kv_parts + attention.replicated
    layers = model.attention_layers * layer
    if model.delta_net:
        layers += model.delta_layers * model.delta_net.by_head / parts
    sparse = model.router + (model.shared + experts * model.expert) / parts
    split = (model.layers - model.sparse_layers) * model.mlp + model.embedding
    return layers + model.sparse_layers * sparse + split / parts


def expert_parallel(recipe: Recipe) -> int:
    """SGLang's ep_size, under any of its names."""
    values = (recipe.rollout.sglang.get(name) for name in ("ep_size", "ep", "expert_parallel_size"))
    return int(next((value for value in values if value is not None), 1))


def refusals(model: Costs, parts: int, experts: int) -> list[str]:
    """Why SGLang would refuse a tensor-parallel and an expert-parallel size; empty if it would not."""
    heads, groups = model.attention.heads, model.attention.kv_heads
    size = f"rollout.tensor_parallel={parts}"
    reasons = []
    if model.delta_net and model.delta_net.key_heads % parts:
        reasons.append(
            f"{size}: linear_num_key_heads={model.delta_net.key_heads} is not a multiple of it"
        )
    if heads % parts:
        reasons.append(f"{size}: num_attention_heads={heads} is not a multiple of it")
    if groups and groups % parts and parts % groups:
        reasons.append(
            f"{size}: num_key_value_heads={groups} neither divides it nor is a multiple of it"
        )
    # Ranks hold whole experts in groups of so many; those of a group share each expert's weights.
    sharing, rest = divmod(parts, experts)
    if rest or model.experts % experts or (experts > 1 and not model.experts):
        reasons.append(
            f"rollout.sglang.ep_size={experts} must divide tensor_parallel={parts} and the model's "
            f"{model.experts} experts"
        )
    elif model.moe_intermediate % sharing:
        reasons.append(
            f"{size}: moe_intermediate_size={model.moe_intermediate} is not a multiple of the {sharing} "
            "ranks that share an expert"
        )
    return reasons
