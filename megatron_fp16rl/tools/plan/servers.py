"""Memory of the rollout servers' GPUs: weights, KV cache, and how many sequences that holds.

SGLang 0.5.23's own rules, read from its source: arg_groups/memory_hook.py (the static share of memory),
model_executor/pool_configurator.py (bytes of a token), mem_cache/kv_cache_configurator.py (tokens and
requests), layers/vocab_parallel_embedding.py, layers/moe/fused_moe_triton/layer.py and models/ (shards).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families import FAMILIES
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.plan.costs import Costs, costs
from megatron_fp16rl.tools.plan.gpus import GIB, Gpu
from megatron_fp16rl.tools.plan.lengths import longest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_CACHE_BYTES = {"fp8_e5m2": 1, "fp8_e4m3": 1, "bf16": 2, "bfloat16": 2}
_VOCABULARY_PADDING = 64
_CONTEXT_GIB = 1.0  # CUDA context and NCCL, allocated before SGLang measures free memory


@dataclass(frozen=True)
class ServerMemory:
    """Of each GPU of a server."""

    tensor_parallel: int
    expert_parallel: int
    weights: int  # bytes
    static_fraction: (
        float  # mem_fraction_static: weights and cache, of the memory free at the start
    )
    token_bytes: int  # of the KV cache, for one token
    kv_cache: int  # bytes; negative by what is missing if the weights do not fit
    kv_tokens: int  # that the cache holds
    running: int  # sequences of the recipe's longest that run at once
    max_running: int  # SGLang's max_running_requests
    wanted: int  # sequences that a step asks of each server
    reasons: list[str]  # why SGLang would not start, or could not run one longest sequence


def server_memory(recipe: Recipe, config: "PretrainedConfig", gpu: Gpu) -> ServerMemory:
    """What the recipe's servers hold on each of their GPUs."""
    rollout, model = recipe.rollout, costs(config)
    parts, width = rollout.tensor_parallel, BYTES[recipe.precision.served]
    weights = weight_bytes(model, parts, width)
    token = token_bytes(
        model, parts, _CACHE_BYTES.get(str(option(recipe, "kv_cache_dtype")), width)
    )
    fraction = option(recipe, "mem_fraction_static")
    if fraction is None:
        fraction = static_fraction(
            gpu,
            parts,
            latent=model.attention.kv_heads == 0,
            prefill_chunk=option(recipe, "chunked_prefill_size"),
            decode_graph=option(recipe, "cuda_graph_max_bs_decode"),
        )
    static = int((gpu.memory_gib - _CONTEXT_GIB) * GIB * float(fraction))
    tokens = max(0, static - weights) // token
    limit = option(recipe, "max_total_tokens")
    if limit is not None:
        tokens = min(tokens, int(limit))
    sequence = longest(recipe).sequence
    requests = _max_running(recipe, config, tokens)
    reason = refusal(recipe, config)
    if reason is None and tokens < sequence:
        reason = (
            f"rollout.tensor_parallel: of the {static / GIB:.1f} GiB that SGLang takes of a GPU "
            f"(mem_fraction_static={float(fraction):g}) weights are {weights / GIB:.1f} GiB; the rest holds "
            f"{tokens} tokens, and the longest sequence has {sequence}. Raise it, or set rollout.sglang."
            "mem_fraction_static"
        )
    return ServerMemory(
        tensor_parallel=parts,
        expert_parallel=expert_parallel(recipe),
        weights=weights,
        static_fraction=float(fraction),
        token_bytes=token,
        kv_cache=static - weights,
        kv_tokens=tokens,
        running=min(tokens // sequence, requests),
        max_running=requests,
        wanted=-(-rollout.prompts * rollout.samples // rollout.servers),
        reasons=[] if reason is None else [reason],
    )


def option(recipe: Recipe, name: str) -> Any:
    """One of rollout.sglang's options, written with dashes or underscores; None if it is not set."""
    return {k.replace("-", "_"): v for k, v in recipe.rollout.sglang.items()}.get(name)


def expert_parallel(recipe: Recipe) -> int:
    """SGLang's ep_size, under any of its names."""
    names = ("ep_size", "ep", "expert_parallel_size")
    return int(next((v for v in (option(recipe, n) for n in names) if v is not None), 1))


def weight_bytes(model: Costs, parts: int, width: int) -> int:
    """Bytes of the weights of one of `parts` tensor-parallel ranks; width: bytes of a number.

    Experts take the same whether ranks hold whole ones (ep_size) or slices of all.
    """
    # Absorbed attention keeps kv_b_proj a second time (deepseek_weight_loader.py).
    absorbed = model.layers * (model.attention.kv_up // parts)
    embedding = 0 if model.tied else output_weights(model, parts)
    numbers = layer_weights(model, parts, model.experts) + output_weights(model, parts)
    in_fp32 = FAMILIES[model.family].sglang_fp32
    biases = model.experts * 4 if "expert_bias" in in_fp32 else 0
    routers = model.router * (4 - width) if "router" in in_fp32 else 0
    extra = model.sparse_layers * (biases + routers)
    return int(numbers + absorbed + embedding) * width + extra


def layer_weights(model: Costs, parts: int, experts: float) -> float:
    """Numbers in one rank's transformer layers, with so many experts in each sparse layer."""
    attention = model.attention
    kv_parts = min(parts, attention.kv_heads or 1)  # kv heads are repeated if there are fewer
    layer = (
        (attention.by_head + attention.q_bias) // parts
        + (attention.by_kv_head + attention.kv_bias) // kv_parts
        + attention.replicated
        + attention.norms
        + 2 * model.hidden
    )
    sparse = model.router + model.shared // parts + experts * model.expert // parts
    return (
        model.layers * layer
        + model.dense_layers * (model.mlp // parts)
        + model.sparse_layers * sparse
        + model.hidden
    )


def output_weights(model: Costs, parts: int) -> int:
    """Numbers in one rank's output layer, and in its input embedding."""
    return padded_vocabulary(model.vocabulary, parts) // parts * model.hidden


def padded_vocabulary(vocabulary: int, parts: int) -> int:
    """Rows of the embedding over all ranks."""
    unit = _VOCABULARY_PADDING
    if -(-vocabulary // unit) * unit % parts:
        unit *= parts
    return -(-vocabulary // unit) * unit


def token_bytes(model: Costs, parts: int, width: int) -> int:
    """Bytes of one rank's KV cache for one token. Every rank has all of a latent cache."""
    heads = max(1, model.attention.kv_heads // parts)
    return model.layers * heads * model.attention.cached * width


def static_fraction(
    gpu: Gpu,
    parts: int,
    latent: bool,
    prefill_chunk: int | None = None,
    decode_graph: int | None = None,
) -> float:
    """mem_fraction_static as SGLang chooses it for a CUDA GPU.

    prefill_chunk, decode_graph: chunked_prefill_size and cuda_graph_max_bs_decode, if they are set. For
    a chunk of -1 (no chunks) SGLang counts max_prefill_tokens, 16,384.
    """
    total = gpu.total_mib
    is_large = total >= 160 * 1024
    chunk = (16384 if is_large else 8192) if prefill_chunk is None else int(prefill_chunk)
    graph = (512 if is_large or parts >= 4 else 256) if decode_graph is None else int(decode_graph)
    activations = max(chunk if chunk > 0 else 16384, 2048)
    reserved = 512 + 1.5 * activations + parts / 8 * 1024 + 2 * graph
    # Latent attention: one workspace. Else a CUDA graph for each prefill size (cuda_graph_hook.py).
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256))
    sizes = [size for step in steps for size in range(*step)] + list(range(4608, chunk + 1, 512))
    reserved += 1536 if latent else 8 * sum(size <= chunk for size in sizes)
    return round((total - max(reserved, 10 * 1024)) / total, 3)


def _max_running(recipe: Recipe, config: "PretrainedConfig", tokens: int) -> int:
    """SGLang's max_running_requests: as set, or from the cache and the context's length."""
    limit = option(recipe, "max_running_requests")
    if limit is None:
        context = int(option(recipe, "context_length") or config.max_position_embeddings)
        limit = max(min(tokens * 512 // context, 4096), 2048)
    return min(int(limit), tokens // 2)


def refusal(recipe: Recipe, config: "PretrainedConfig") -> str | None:
    """Why SGLang would refuse the recipe's rollout.tensor_parallel or ep_size; None if it would not."""
    parts, experts = recipe.rollout.tensor_parallel, expert_parallel(recipe)
    reasons = _misfits(costs(config), parts, experts)
    if not reasons:
        return None
    return (
        f"rollout.tensor_parallel={parts}"
        + (f", rollout.sglang.ep_size={experts}" if experts > 1 else "")
        + f": {'; '.join(reasons)}. SGLang admits tensor_parallel {', '.join(map(str, admitted(config)))}"
    )


def admitted(config: "PretrainedConfig", most: int = 64) -> list[int]:
    """The tensor-parallel sizes that SGLang takes for a model, without expert parallelism."""
    model = costs(config)
    return [parts for parts in range(1, most + 1) if not _misfits(model, parts, 1)]


def admitted_experts(config: "PretrainedConfig", parts: int) -> list[int]:
    """The expert-parallel sizes that go with a tensor-parallel size; [1] without experts."""
    model = costs(config)
    return [n for n in range(1, parts + 1) if not _misfits(model, parts, n)]


def _misfits(model: Costs, parts: int, experts: int) -> list[str]:
    """What in the model does not divide by a tensor-parallel and an expert-parallel size."""
    attention, misfits = model.attention, []
    if attention.heads % parts:
        misfits.append(f"num_attention_heads={attention.heads} is not a multiple of it")
    groups = attention.kv_heads
    if groups and groups % parts and parts % groups:
        misfits.append(f"num_key_value_heads={groups} neither divides it nor is a multiple of it")
    if model.dense_layers and model.intermediate % parts:
        misfits.append(f"intermediate_size={model.intermediate} is not a multiple of it")
    if not model.experts:
        return misfits + ([f"ep_size={experts}, but the model has no experts"] * (experts > 1))
    if model.shared_intermediate % parts:
        misfits.append(
            f"the shared expert's size {model.shared_intermediate} is not a multiple of it"
        )
    if parts % experts:
        misfits.append(f"ep_size={experts} does not divide it")
    elif model.moe_intermediate % (parts // experts):
        misfits.append(
            f"moe_intermediate_size={model.moe_intermediate} is not a multiple of the "
            f"{parts // experts} ranks that share an expert"
        )
    if model.experts % experts:
        misfits.append(f"ep_size={experts} does not divide num_experts={model.experts}")
    if parts > model.experts:
        misfits.append(f"it is more than num_experts={model.experts}")
    return misfits
