"""What a model costs: parameters, FLOPs, bytes of KV cache, from its transformers configuration alone."""

from dataclasses import dataclass
from functools import cached_property

from megatron_fp16rl.models.families import FAMILIES


@dataclass(frozen=True)
class Attention:
    """The attention of one layer, in numbers of weights and sizes.

    by_head      weights of linear layers that tensor parallelism cuts by (query) heads
    by_kv_head   the same by key-value heads, biases with them; none in latent attention
    replicated   weights of linear layers that every rank has whole (latent down-projections)
    up_kv        of by_head: latent attention's kv_b_proj
    bias         of query heads
    norms        of queries and keys, or of latents
    kv_heads     0 in latent attention, whose cache is not of heads
    cached       numbers kept in the KV cache: of one kv head, or of all in latent attention
    pair_flops   multiply-adds x 2 for one query and one key, all heads
    """

    by_head: int
    by_kv_head: int
    replicated: int
    up_kv: int
    bias: int
    norms: int
    heads: int
    kv_heads: int
    cached: int
    pair_flops: int
    latent_pair_flops: int


@dataclass(frozen=True)
class Costs:
    """A model, counted. Weights are numbers of parameters, of one layer or one expert.

    family       its model_type
    mlp          of a dense layer: gate, up, down
    expert       the same of one expert, shared of the shared ones of a layer (0: none)
    router       of a sparse layer
    shared_gate  qwen2_moe's gate of the shared expert
    """

    family: str
    layers: int
    sparse_layers: int
    hidden: int
    intermediate: int
    moe_intermediate: int
    shared_intermediate: int
    vocabulary: int
    tied: bool
    attention: Attention
    mlp: int
    experts: int
    top_k: int
    expert: int
    shared: int
    shared_gate: int
    router: int

    @property
    def dense_layers(self) -> int:
        return self.layers - self.sparse_layers

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @cached_property
    def attention_weights(self) -> int:
        """Of one layer's linear layers, without biases and norms."""
        attention = self.attention
        return attention.by_head + attention.by_kv_head + attention.replicated

    @cached_property
    def others(self) -> int:
        """Norms and biases of the whole model."""
        attention = self.attention
        kv_bias = 2 * attention.kv_heads * self.kv_bias_width
        return self.layers * (2 * self.hidden + attention.norms + attention.bias + kv_bias) + (
            self.hidden
        )

    @property
    def kv_bias_width(self) -> int:
        return self.attention.cached // 2 if self.attention.bias else 0

    @cached_property
    def parameters(self) -> int:
        """All of transformers' parameters; buffers (expert biases of sigmoid routers) are none."""
        return self._layers(self.experts) + self.others + self.embedding * (1 if self.tied else 2)

    @cached_property
    def active(self) -> int:
        """Parameters that one token meets: as `parameters`, with top_k of the experts."""
        return self._layers(self.top_k) + self.others + self.embedding * (1 if self.tied else 2)

    def _layers(self, experts: float) -> float:
        """Weights of all layers' linear layers, with so many experts in a sparse one."""
        sparse = self.router + self.shared + self.shared_gate + experts * self.expert
        return (
            self.layers * self.attention_weights
            + self.dense_layers * self.mlp
            + self.sparse_layers * sparse
        )

    @cached_property
    def layer_flops(self) -> int:
        """Of a token in the linear layers of all transformer layers, forward, without attention."""
        return 2 * self._layers(self.top_k)

    @property
    def output_flops(self) -> int:
        """Of a token in the output layer, forward."""
        return 2 * self.embedding

    def attention_flops(self, pairs: float) -> float:
        """Of so many pairs of query and key, in all layers, forward."""
        return self.layers * self.attention.pair_flops * pairs

    def forward_flops(self, seq: int, causal: bool = True) -> float:
        """Of one sequence, output layer and all. causal: only pairs that the mask leaves."""
        pairs = causal_pairs(seq) if causal else seq * seq
        return seq * (self.layer_flops + self.output_flops) + self.attention_flops(pairs)

    @property
    def kv_numbers(self) -> int:
        """Numbers that the KV cache keeps for one token, in all layers, without replicas."""
        return self.layers * self.attention.cached * (self.attention.kv_heads or 1)

    def distinct_experts(self, tokens: float) -> float:
        """Of a layer's experts, how many so many tokens are expected to choose; as if at random."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


def causal_pairs(seq: float) -> float:
    """Pairs of a query and a key that is not after it."""
    return seq * (seq + 1) / 2


def costs(config: object) -> Costs:
    """Counts a model of one of the families (weights/families.py)."""
    values = FAMILIES[config.model_type].options(config)
    hidden = config.hidden_size
    experts = values.get("num_moe_experts", 0)
    moe = values.get("moe_ffn_hidden_size", 0)
    shared = values.get("moe_shared_expert_intermediate_size") or 0
    return Costs(
        family=config.model_type,
        layers=config.num_hidden_layers,
        sparse_layers=sum(values.get("moe_layer_freq", ())),
        hidden=hidden,
        intermediate=config.intermediate_size,
        moe_intermediate=moe,
        shared_intermediate=shared,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        attention=_latent(config) if "kv_lora_rank" in values else _grouped(config, values),
        mlp=3 * hidden * config.intermediate_size,
        experts=experts,
        top_k=values.get("moe_router_topk", 0),
        expert=3 * hidden * moe,
        shared=3 * hidden * shared,
        shared_gate=hidden if values.get("moe_shared_expert_gate") else 0,
        router=hidden * experts,
    )


def _grouped(config: object, values: dict[str, object]) -> Attention:
    hidden, heads, groups = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    size = getattr(config, "head_dim", None) or hidden // heads
    return Attention(
        by_head=2 * hidden * heads * size,
        by_kv_head=2 * hidden * groups * size,
        replicated=0,
        up_kv=0,
        bias=heads * size if values.get("add_qkv_bias") else 0,
        norms=2 * size if values.get("qk_layernorm") else 0,
        heads=heads,
        kv_heads=groups,
        cached=2 * size,
        pair_flops=4 * heads * size,
        latent_pair_flops=0,
    )


def _latent(config: object) -> Attention:
    """DeepSeek-V3's: queries and key-values go through low ranks; the cache holds the latter's."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    key, value = config.qk_nope_head_dim + rope, config.v_head_dim
    up_kv = latent * heads * (config.qk_nope_head_dim + value)
    queries = (config.q_lora_rank or hidden) * heads * key
    down = hidden * (latent + rope) + hidden * (config.q_lora_rank or 0)
    return Attention(
        by_head=queries + up_kv + heads * value * hidden,
        by_kv_head=0,
        replicated=down,
        up_kv=up_kv,
        bias=0,
        norms=latent + (config.q_lora_rank or 0),
        heads=heads,
        kv_heads=0,
        cached=latent + rope,
        pair_flops=2 * heads * (key + value),
        latent_pair_flops=2 * heads * (2 * latent + rope),
    )
