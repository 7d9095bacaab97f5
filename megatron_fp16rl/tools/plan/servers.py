"""Memory of the rollout servers' GPUs: weights, KV cache, and how many sequences that holds.

SGLang 0.5.23's own rules, read from its source: arg_groups/memory_hook.py (the static share of memory),
model_executor/pool_configurator.py (bytes of a token), mem_cache/kv_cache_configurator.py (tokens and
requests), layers/vocab_parallel_embedding.py, layers/moe/fused_moe_triton/layer.py and models/ (shards).
"""

from dataclasses import dataclass

from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.plan.arithmetic import Costs, costs
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.lengths import longest

GIB = 2**30
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_CACHE_BYTES = {"auto": None, "fp8_e5m2": 1, "fp8_e4m3": 1, "bf16": 2, "bfloat16": 2}
_VOCABULARY_PADDING = 64
_FP32_ROUTER, _EXPERT_BIAS = "glm4_moe", ("glm4_moe", "deepseek_v3")  # the biases are fp32, too
_CONTEXT_GIB = 1.0  # CUDA context and NCCL, which are there before SGLang looks at free memory


@dataclass(frozen=True)
class ServerMemory:
    """Of each GPU of a server.

    weights, kv_cache   bytes; the cache is negative by what is missing where weights do not fit
    static_fraction     mem_fraction_static: weights and cache, of the memory that is free at the start
    token_bytes         of the KV cache, for one token
    kv_tokens           that the cache holds
    running             sequences of the recipe's longest that run at once
    max_running         SGLang's max_running_requests
    wanted              sequences that a step asks of each server
    reasons             why SGLang would not start, or could not run even one of the longest sequences
    """

    tensor_parallel: int
    expert_parallel: int
    weights: int
    static_fraction: float
    token_bytes: int
    kv_cache: int
    kv_tokens: int
    running: int
    max_running: int
    wanted: int
    reasons: list[str]

    @property
    def fits(self) -> bool:
        return not self.reasons


def server_memory(recipe: Recipe, config: object, gpu: Gpu) -> ServerMemory:
    """What the recipe's servers hold on each of their GPUs."""
    rollout, model = recipe.rollout, costs(config)
    width = BYTES[recipe.precision.served]
    parts, experts = rollout.tensor_parallel, expert_parallel(recipe)
    weights = weight_bytes(model, parts, width)
    cached = str(option(recipe, "kv_cache_dtype", "auto"))
    token = token_bytes(model, parts, _CACHE_BYTES.get(cached) or width)
    fraction = option(recipe, "mem_fraction_static")
    if fraction is None:
        chunk, graph = (
            option(recipe, "chunked_prefill_size"),
            option(recipe, "cuda_graph_max_bs_decode"),
        )
        fraction = static_fraction(gpu, parts, model.attention.kv_heads == 0, chunk, graph)
    fraction = float(fraction)
    cache = int((gpu.memory_gib - _CONTEXT_GIB) * GIB * fraction) - weights
    tokens = max(0, cache // token)
    limit = option(recipe, "max_total_tokens")
    if limit is not None:
        tokens = min(tokens, int(limit))
    sequence = longest(recipe).sequence
    requests = _max_running(recipe, config, tokens)
    reasons = [refusal(recipe, config) or _too_small(gpu, weights, fraction, tokens, sequence)]
    return ServerMemory(
        tensor_parallel=parts,
        expert_parallel=experts,
        weights=weights,
        static_fraction=fraction,
        token_bytes=token,
        kv_cache=cache,
        kv_tokens=tokens,
        running=min(tokens // sequence, requests),
        max_running=requests,
        wanted=-(-rollout.prompts * rollout.samples // rollout.servers),
        reasons=[reason for reason in reasons if reason],
    )


def _too_small(gpu: Gpu, weights: int, fraction: float, tokens: int, sequence: int) -> str | None:
    if tokens >= sequence:
        return None
    static = (gpu.memory_gib - _CONTEXT_GIB) * fraction
    return (
        f"rollout.tensor_parallel: of the {static:.1f} GiB that SGLang takes of a GPU "
        f"(mem_fraction_static={fraction:g}) weights are {weights / GIB:.1f} GiB; the rest holds {tokens} "
        f"tokens, and the longest sequence has {sequence}. Raise it, or set rollout.sglang."
        "mem_fraction_static"
    )


def option(recipe: Recipe, name: str, default: object = None) -> object:
    """One of rollout.sglang's options, with dashes or underscores."""
    return {k.replace("-", "_"): v for k, v in recipe.rollout.sglang.items()}.get(name, default)


def expert_parallel(recipe: Recipe) -> int:
    """SGLang's ep_size, under any of its names."""
    names = ("ep_size", "ep", "expert_parallel_size")
    return int(next((v for v in (option(recipe, n) for n in names) if v is not None), 1))


def weight_bytes(model: Costs, parts: int, width: int) -> int:
    """Of one rank of a server of `parts` tensor-parallel ranks; width: bytes of a number.

    Kv heads are repeated where there are fewer than ranks; embedding and output layer are padded and
    cut. Whether ranks have whole experts (ep_size) or slices of all is the same number.
    """
    # kv_b_proj once more, in the shape of absorbed attention (deepseek_weight_loader.py)
    absorbed = model.layers * (model.attention.up_kv // parts)
    embedding = 0 if model.tied else output_weights(model, parts)
    met = layer_weights(model, parts, model.experts) + output_weights(model, parts)
    return (met + absorbed + embedding) * width + _fp32_bytes(model, width)


def bytes_read(model: Costs, parts: int, width: int, sequences: float) -> float:
    """Of the same rank, what one decode step of so many sequences reads of its weights.

    Of the experts those that the batch is expected to choose; of the input embedding a few rows.
    """
    met = layer_weights(model, parts, model.distinct_experts(sequences))
    return (met + output_weights(model, parts)) * width + _fp32_bytes(model, width)


def layer_weights(model: Costs, parts: int, experts: float) -> float:
    """Numbers of one rank's transformer layers, with so many experts of each sparse one."""
    attention = model.attention
    kv_ranks = min(parts, attention.kv_heads or 1)
    layer = (
        attention.by_head // parts
        + attention.by_kv_head // kv_ranks
        + attention.replicated
        + attention.bias // parts
        + attention.norms
        + 2 * model.hidden
    )
    if attention.bias:
        layer += attention.cached * attention.kv_heads // kv_ranks
    sparse = (
        model.router + model.shared_gate + model.shared // parts + experts * model.expert // parts
    )
    return (
        model.layers * layer
        + model.dense_layers * (model.mlp // parts)
        + model.sparse_layers * sparse
        + model.hidden
    )


def output_weights(model: Costs, parts: int) -> int:
    """Numbers of one rank's output layer, and of its input embedding."""
    return padded_vocabulary(model.vocabulary, parts) // parts * model.hidden


def _fp32_bytes(model: Costs, width: int) -> int:
    """Of routers and expert biases, what they take because they are fp32."""
    biases = model.experts * 4 if model.family in _EXPERT_BIAS else 0
    router = model.router * 2 if model.family == _FP32_ROUTER and width == 2 else 0
    return model.sparse_layers * (biases + router)


def padded_vocabulary(vocabulary: int, parts: int) -> int:
    """Rows of the embedding over all ranks."""
    unit = _VOCABULARY_PADDING
    if -(-vocabulary // unit) * unit % parts:
        unit *= parts
    return -(-vocabulary // unit) * unit


def token_bytes(model: Costs, parts: int, width: int) -> int:
    """Of the KV cache of one rank, for one token. Latent attention's is not cut: every rank has it."""
    heads = max(1, model.attention.kv_heads // parts)
    return model.layers * heads * model.attention.cached * width


def static_fraction(
    gpu: Gpu, parts: int, latent: bool, chunk: int | None = None, graph: int | None = None
) -> float:
    """mem_fraction_static as SGLang chooses it for a CUDA GPU, all its other options at their defaults.

    chunk, graph: chunked_prefill_size and cuda_graph_max_bs_decode, where they are set. A chunk of -1 (no
    chunks) makes SGLang reckon with max_prefill_tokens, 16,384.
    """
    total = gpu.total_mib
    is_large = total >= 160 * 1024
    if chunk is None:
        chunk = 16384 if is_large else 8192
    if graph is None:
        graph = 512 if is_large or parts >= 4 else 256
    activations = max(int(chunk) if int(chunk) > 0 else 16384, 2048)
    reserved = 512 + 1.5 * activations + parts / 8 * 1024 + 2 * int(graph)
    reserved += 1536 if latent else 8 * _prefill_graphs(int(chunk))
    return round((total - max(reserved, 10 * 1024)) / total, 3)


def _prefill_graphs(largest: int) -> int:
    """How many sizes of prefill SGLang captures (cuda_graph_hook.py)."""
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256))
    sizes = [size for step in steps for size in range(*step)] + list(range(4608, largest + 1, 512))
    return sum(size <= largest for size in sizes)


def _max_running(recipe: Recipe, config: object, tokens: int) -> int:
    """SGLang's max_running_requests: asked for, or from the cache and the context's length."""
    asked = option(recipe, "max_running_requests")
    if asked is None:
        context = int(option(recipe, "context_length") or config.max_position_embeddings)
        asked = max(min(tokens * 512 // context, 4096), 2048)
    return min(int(asked), tokens // 2)


def refusal(recipe: Recipe, config: object) -> str | None:
    """Why SGLang would refuse the recipe's rollout.tensor_parallel or ep_size; None if it would not."""
    parts, experts = recipe.rollout.tensor_parallel, expert_parallel(recipe)
    reasons = list(_against(costs(config), parts, experts))
    if not reasons:
        return None
    good = [str(p) for p in admitted(config) if p <= 64]
    return (
        f"rollout.tensor_parallel={parts}"
        + (f", rollout.sglang.ep_size={experts}" if experts > 1 else "")
        + f": {'; '.join(reasons)}. SGLang admits tensor_parallel {', '.join(good)}"
    )


def admitted(config: object, most: int = 64) -> list[int]:
    """The tensor-parallel sizes that SGLang admits for a model, without expert parallelism."""
    model = costs(config)
    return [parts for parts in range(1, most + 1) if not list(_against(model, parts, 1))]


def admitted_experts(config: object, parts: int) -> list[int]:
    """The expert-parallel sizes that go with a tensor-parallel size; [1] without experts."""
    model = costs(config)
    return [n for n in range(1, parts + 1) if not list(_against(model, parts, n))]


def _against(model: Costs, parts: int, experts: int) -> list[str]:
    attention, found = model.attention, []
    if attention.heads % parts:
        found.append(f"num_attention_heads={attention.heads} is not a multiple of it")
    groups = attention.kv_heads
    if groups and groups % parts and parts % groups:
        found.append(f"num_key_value_heads={groups} neither divides it nor is a multiple of it")
    if model.dense_layers and model.intermediate % parts:
        found.append(f"intermediate_size={model.intermediate} is not a multiple of it")
    if not model.experts:
        return found + ([f"ep_size={experts}, but the model has no experts"] * (experts > 1))
    if model.shared_intermediate % parts:
        found.append(
            f"the shared expert's size {model.shared_intermediate} is not a multiple of it"
        )
    if parts % experts:
        found.append(f"ep_size={experts} does not divide it")
    elif model.moe_intermediate % (parts // experts):
        found.append(
            f"moe_intermediate_size={model.moe_intermediate} is not a multiple of the "
            f"{parts // experts} ranks that share an expert"
        )
    if model.experts % experts:
        found.append(f"ep_size={experts} does not divide num_experts={model.experts}")
    if parts > model.experts:
        found.append(f"it is more than num_experts={model.experts}")
    return found
