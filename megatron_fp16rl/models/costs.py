"""The size and the arithmetic of a model, counted from its transformers configuration alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Attention:
    """The attention of one layer. Weights are numbers of parameters, without biases and norms."""

    heads: int
    kv_heads: int  # 0: latent attention, whose cache has no heads
    by_head: int  # weights that tensor parallelism splits by query heads
    by_kv_head: int  # weights that it splits by key-value heads
    replicated: int  # weights that every rank holds in full: latent down-projections
    cached: int  # numbers that the KV cache keeps for a token: of one kv head, or of all if latent
    pair_flops: int  # of one query with one key, over all heads
    decode_pair_flops: int  # the same while decoding: latent attention then works on the latents


@dataclass(frozen=True)
class DeltaNet:
    """The gated delta nets that some layers have in place of attention."""

    share: float  # of all layers
    key_heads: int
    by_head: int  # weights of one layer, which tensor parallelism splits by heads
    flops: int  # of one token in one layer, without its linear layers
    state: int  # numbers, fp32, that a request keeps a layer
    window: int  # and in the dtype of its weights: the convolution's last inputs


@dataclass(frozen=True)
class Costs:
    """A model, counted: numbers of parameters, before any parallelism."""

    layers: int
    sparse_layers: int  # those with experts
    embedding: int
    tied: bool
    mlp: int  # of a dense layer: gate, up and down
    experts: int  # of a sparse layer
    top_k: int
    router: int
    expert: int  # one of them
    shared: int  # the shared expert
    moe_intermediate: int
    attention: Attention
    delta_net: DeltaNet | None = None

    @property
    def delta_layers(self) -> float:
        return self.layers * self.delta_net.share if self.delta_net else 0

    @property
    def attention_layers(self) -> float:
        return self.layers - self.delta_layers

    @property
    def parameters(self) -> int:
        """Of matrices: norms and biases are less than 0.1 % of a large model."""
        return self._linear(self.experts) + self.embedding * (1 if self.tied else 2)

    @property
    def layer_flops(self) -> int:
        """Of one token, forward, in the linear layers and delta nets of all transformer layers."""
        delta = self.delta_layers * self.delta_net.flops if self.delta_net else 0
        return 2 * self._linear(self.top_k) + int(delta)

    @property
    def output_flops(self) -> int:
        """Of one token, forward, in the output layer."""
        return 2 * self.embedding

    def attention_flops(self, pairs: float) -> float:
        """Of so many pairs of query and key, forward, in all layers."""
        return self.attention_layers * self.attention.pair_flops * pairs

    def work(self, tokens: int) -> float:
        """Operations of one sequence, forward, in all layers: long ones take more a token."""
        return self.layer_flops * tokens + self.attention_flops(tokens**2 / 2)

    def distinct_experts(self, tokens: float) -> float:
        """How many of a layer's experts a batch of tokens is expected to choose, if at random."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def _linear(self, experts: int) -> int:
        """Weights of all layers' linear layers, with so many routed experts in each sparse layer."""
        attention = self.attention
        delta = self.delta_layers * self.delta_net.by_head if self.delta_net else 0
        layer = attention.by_head + attention.by_kv_head + attention.replicated
        return (
            int(self.attention_layers * layer + delta)
            + (self.layers - self.sparse_layers) * self.mlp
            + self.sparse_layers * (self.router + self.shared + experts * self.expert)
        )


def costs(config: "PretrainedConfig") -> Costs:
    """Counts a model of one of the families (models/families/)."""
    options: dict[str, Any] = FAMILIES[config.model_type].options(config)
    hidden, experts = config.hidden_size, options.get("num_moe_experts", 0)
    moe_intermediate = options.get("moe_ffn_hidden_size", 0)
    return Costs(
        layers=config.num_hidden_layers,
        sparse_layers=sum(options.get("moe_layer_freq", ())),
        embedding=config.vocab_size * hidden,
        tied=bool(config.tie_word_embeddings),
        mlp=3 * hidden * config.intermediate_size,
        experts=experts,
        top_k=options.get("moe_router_topk", 0),
        router=hidden * experts,
        expert=3 * hidden * moe_intermediate,
        shared=3 * hidden * (options.get("moe_shared_expert_intermediate_size") or 0),
        moe_intermediate=moe_intermediate,
        attention=_latent(config)
        if "kv_lora_rank" in options
        else _grouped(config, gated=options.get("attention_output_gate", False)),
        delta_net=_delta_net(options, hidden) if "linear_attention_freq" in options else None,
    )


def _delta_net(options: dict[str, Any], hidden: int) -> DeltaNet:
    pattern = options["linear_attention_freq"]
    key_heads, heads = options["linear_num_key_heads"], options["linear_num_value_heads"]
    key, value = options["linear_key_head_dim"], options["linear_value_head_dim"]
    channels = 2 * key_heads * key + heads * value
    width = options["linear_conv_kernel_dim"]
    return DeltaNet(
        share=sum(pattern) / len(pattern),
        key_heads=key_heads,
        by_head=hidden * (channels + 2 * heads * value + 2 * heads) + channels * width,
        # Three products with the state, and in a chunk of 64 tokens two with keys and one with values.
        flops=heads * (6 * key * value + 64 * (4 * key + 2 * value)),
        state=heads * key * value,
        window=channels * (width - 1),
    )


def _grouped(config: "PretrainedConfig", gated: bool) -> Attention:
    """Grouped-query attention. gated: its output is, by as many gates as there are queries."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        by_head=(3 if gated else 2) * hidden * heads * size,
        by_kv_head=2 * hidden * kv_heads * size,
        replicated=0,
        cached=2 * size,
        pair_flops=4 * heads * size,
        decode_pair_flops=4 * heads * size,
    )


def _latent(config: "PretrainedConfig") -> Attention:
    """DeepSeek-V3's: queries, keys and values go through low ranks; the cache holds the latter's."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    latent, rope, value = config.kv_lora_rank, config.qk_rope_head_dim, config.v_head_dim
    q_latent = config.q_lora_rank or 0
    key = config.qk_nope_head_dim + rope
    kv_up = latent * heads * (config.qk_nope_head_dim + value)
    return Attention(
        heads=heads,
        kv_heads=0,
        by_head=(q_latent or hidden) * heads * key + kv_up + heads * value * hidden,
        by_kv_head=0,
        replicated=hidden * (latent + rope + q_latent),
        cached=latent + rope,
        pair_flops=2 * heads * (key + value),
        decode_pair_flops=2 * heads * (2 * latent + rope),
    )
