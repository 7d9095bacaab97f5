"""SGLang on a machine without CUDA."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_fp16rl.platform import cpu_sglang_delta, half_gemm, no_compiler
from megatron_fp16rl.platform.patches import Patches, apply_all

SGLANG_VERSION = "0.5.23"
IMPORT_PATCHES, SERVER_PATCHES = Patches(), Patches()
_SCORES_PER_GROUP = 1 << 23  # attention scores held at once, fp32: 32 MiB


def server_arguments() -> list[str]:
    """Arguments of sglang.launch_server for a CPU. A recipe's `rollout.sglang` comes after them."""
    return [
        "--device=cpu",
        "--attention-backend=torch_native",
        "--sampling-backend=pytorch",
        "--disable-overlap-schedule",
        # Of models with windows: torch's attention reads a window's cache by the slots of the whole one.
        "--disable-hybrid-swa-memory",
        "--disable-radix-cache",  # on a CPU its book-keeping costs more than short prefixes save
        "--skip-server-warmup",
        "--sleep-on-idle",  # otherwise an idle server burns one of the learner's cores
        "--mem-fraction-static=0.1",
        "--max-total-tokens=65536",
    ]


def server_environment(first: int, count: int) -> dict[str, str]:
    """Environment of a server process; a CPU has no devices to assign."""
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    if count > 1:  # otherwise SGLang wants a NUMA node for each tensor-parallel rank
        cores = sorted(os.sched_getaffinity(0))
        bound = (str(cores[rank % len(cores)]) for rank in range(count))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bound)
    return environment


def prepare_sglang() -> None:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    apply_all("sglang", SGLANG_VERSION, IMPORT_PATCHES)


def prepare_server() -> None:
    """Makes an SGLang server run. Called in the server and in each process that it spawns."""
    prepare_sglang()
    apply_all("sglang", SGLANG_VERSION, SERVER_PATCHES)


class _Absent(ModuleType):
    """A module whose names all exist; calling one raises."""

    __version__ = "0.4.10"  # of sgl_kernel, which SGLang compares with the version it wants

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} does not exist on this CPU build")

        return missing


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str, has_submodules: bool) -> None:
        self.package, self.has_submodules = package, has_submodules

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == self.package or (self.has_submodules and name.startswith(f"{self.package}.")):
            return importlib.machinery.ModuleSpec(name, self, is_package=self.has_submodules)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


IMPORT_PATCHES.add("compiler", "functions are compiled, for which torch's compiler is imported")(
    no_compiler.install
)


@IMPORT_PATCHES.add("sgl-kernel", "names of CUDA kernels are imported, then never called")
def _sgl_kernel() -> None:
    # No submodules: SGLang guards `from sgl_kernel.scalar_type import ...` with except ImportError.
    if importlib.util.find_spec("sgl_kernel") is None:
        sys.meta_path.append(_AbsentFinder("sgl_kernel", has_submodules=False))


@IMPORT_PATCHES.add("torchvision", "image processors are imported even for a text model")
def _torchvision() -> None:
    from transformers.utils import is_torchvision_available

    # The answer is cached, so transformers keeps to what is really installed.
    if not is_torchvision_available():
        sys.meta_path.append(_AbsentFinder("torchvision", has_submodules=True))


@SERVER_PATCHES.add(
    "fork", "scheduler and detokenizer each import SGLang again, which takes ten seconds"
)
def _fork() -> None:
    import multiprocessing

    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose(
        "fork" if method == "spawn" else method, force=force
    )


@SERVER_PATCHES.add("pinned-memory", "the record of routed experts is pinned by CUDA")
def _pinned_memory() -> None:
    import sglang.srt.mem_cache.pool_host.common as common

    common._cuda_host_register = lambda *_: None


@SERVER_PATCHES.add(
    "batched-attention", "attention computes one sequence at a time, and knows no sinks"
)
def _batched_attention() -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    loop_over_extends = Backend._run_sdpa_forward_extend
    loop_over_decodes = Backend._run_sdpa_forward_decode

    # Arguments: query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, ...
    def extend(self: Backend, *arguments: Any, **options: Any) -> torch.Tensor:
        *batch, encoder_lens = arguments  # prefix_lens and extend_lens come after seq_lens
        if _unusual(encoder_lens, options):
            return loop_over_extends(self, *arguments, **options)
        return attend(*batch, **options, sinks=self.sinks)

    def decode(self: Backend, *arguments: Any, **options: Any) -> torch.Tensor:
        *batch, encoder_lens = arguments
        if _unusual(encoder_lens, options):
            return loop_over_decodes(self, *arguments, **options)
        seq_lens = batch[-1]
        batch += [seq_lens - 1, torch.ones_like(seq_lens)]  # each sequence has one new token
        options["causal"] = True
        return attend(*batch, **options, sinks=self.sinks)

    def with_sinks(forward: Any) -> Any:
        def call(self: Backend, *arguments: Any, sinks: Any = None, **options: Any) -> Any:
            self.sinks = sinks
            return forward(self, *arguments, **options)

        return call

    Backend._run_sdpa_forward_extend = extend
    Backend._run_sdpa_forward_decode = decode
    if not hasattr(Backend, "sinks"):  # a child of the server comes here once more
        Backend.sinks = None
        Backend.forward_extend = with_sinks(Backend.forward_extend)
        Backend.forward_decode = with_sinks(Backend.forward_decode)


def _unusual(encoder_lens: torch.Tensor | None, options: dict[str, Any]) -> bool:
    """Whether a call needs SGLang's own loop: encoders, cross attention."""
    return encoder_lens is not None or bool(options["is_cross_attn"])


def attend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    *,
    scaling: float | None,
    causal: bool,
    sliding_window_size: int | None = None,
    sinks: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Attention of many sequences in few calls, instead of SGLang's one call per sequence.

    query, output: [tokens, heads, dim], the new tokens of all sequences one after the other.
    k_cache, v_cache: [slots, kv_heads, dim]; req_to_token: [requests, context] slot of each token.
    seq_lens = prefix_lens + extend_lens: [sequences] tokens in all, already cached, and new.
    sliding_window_size: tokens that are seen before a token's own. sinks: [heads], as scores are.
    Sequences of similar length are padded together; products and softmax are fp32, the result
    is rounded to the query's dtype, as flash attention does on a GPU. Writes and returns `output`.
    """
    first_row = torch.cumsum(extend_lens, 0) - extend_lens
    for group in _groups_by_length(extend_lens.tolist(), seq_lens.tolist(), query.shape[1]):
        new, total = extend_lens[group], seq_lens[group]
        q_step, k_step = torch.arange(int(new.max())), torch.arange(int(total.max()))
        q_valid = q_step < new[:, None]
        k_valid = k_step < total[:, None]
        rows = (first_row[group][:, None] + q_step).clamp(max=query.shape[0] - 1)
        slots = req_to_token[req_pool_indices[group], : len(k_step)].long() * k_valid

        q = query[rows].float().transpose(1, 2)
        k, v = _cached(k_cache, slots), _cached(v_cache, slots)
        seen = k_valid[:, None, :].expand(-1, len(q_step), -1)
        place = (prefix_lens[group][:, None] + q_step)[:, :, None]
        if causal:
            seen = seen & (k_step <= place)
        if sliding_window_size is not None:
            seen = seen & (k_step >= place - sliding_window_size)
        if sinks is not None:
            q, k, v, seen = _with_sinks(q, k, v, seen, sinks.float(), scaling)
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=seen[:, None], scale=scaling, enable_gqa=True
        )[..., : output.shape[-1]]
        output[rows[q_valid]] = attended.transpose(1, 2)[q_valid].to(output.dtype)
    return output


def _with_sinks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    sinks: torch.Tensor,
    scaling: float | None,
) -> tuple[torch.Tensor, ...]:
    """One more key, of value zero, whose score is each head's sink; see local_attention.py."""
    width = q.shape[-1]
    scale = width**-0.5 if scaling is None else scaling
    column = (sinks / scale)[:, None, None].expand(*q.shape[:-1], 1)
    k, v = pad(k, (0, 1, 1, 0)), pad(v, (0, 1, 1, 0))
    k[:, :, 0, width] = 1.0
    return torch.cat([q, column], -1), k, v, pad(seen, (1, 0), value=True)


def _cached(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Keys or values [sequences, heads, tokens, dim] in fp32 at slots [sequences, tokens] of a cache.

    Whole rows are copied, and no head is repeated for its queries: at 128 sequences of 64 tokens attention
    takes a fifth of the time that indexing by slot and head took, to the same bits. torch's kernel reads a
    head's tokens 1.6 times faster where they lie side by side.
    """
    rows = cache.flatten(1).index_select(0, slots.flatten())
    heads = rows.view(*slots.shape, *cache.shape[1:]).transpose(1, 2)
    return heads.to(torch.float32, memory_format=torch.contiguous_format)


def _groups_by_length(new: list[int], total: list[int], heads: int) -> list[torch.Tensor]:
    """Indices of sequences, sorted by length, in groups of at most _SCORES_PER_GROUP scores."""
    if len(new) * max(new) * max(total) * heads <= _SCORES_PER_GROUP:
        return [torch.arange(len(new))]  # each new token comes here once a layer
    groups: list[torch.Tensor] = []
    current: list[int] = []
    widest = longest = 0
    for i in sorted(range(len(new)), key=lambda i: (new[i], total[i])):
        widest, longest = max(widest, new[i]), max(longest, total[i])
        if current and (len(current) + 1) * widest * longest * heads > _SCORES_PER_GROUP:
            groups.append(torch.tensor(current))
            current, widest, longest = [], new[i], total[i]
        current.append(i)
    return [*groups, torch.tensor(current)]


@SERVER_PATCHES.add(
    "deterministic", "deterministic inference refuses a CPU's attention and wants Triton kernels"
)
def _deterministic() -> None:
    """Samples from each request's own seed.

    Products may still depend in the last bit on which requests are computed together.
    """
    import sglang.srt.batch_invariant_ops as batch_invariant_ops
    import sglang.srt.layers.sampler as sampler
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices

    add_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *_, **__: None
    sampler.murmur_hash32 = murmur3


def murmur3(seeds: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bits, seed 0) of seed (64 bits), position and column (32 bits each).

    seeds, positions: [rows]; columns: [columns]. Returns [rows, columns] in int64. SGLang's own is a
    Triton kernel, or part of sgl_kernel. Algorithm: Austin Appleby, in the public domain.
    """
    seeds, low = seeds.to(torch.int64), 0xFFFFFFFF
    state = torch.zeros(len(seeds), 1, dtype=torch.int64)
    for block in (seeds[:, None], seeds[:, None] >> 32, positions[:, None], columns[None]):
        mixed = (block.to(torch.int64) & low) * 0xCC9E2D51 & low
        state = state ^ (_rotate_left(mixed, 15) * 0x1B873593 & low)
        state = (_rotate_left(state, 13) * 5 + 0xE6546B64) & low
    state = state ^ 16  # the length in bytes
    state = (state ^ state >> 16) * 0x85EBCA6B & low
    state = (state ^ state >> 13) * 0xC2B2AE35 & low
    return state ^ state >> 16


def _rotate_left(words: torch.Tensor, bits: int) -> torch.Tensor:
    return (words << bits | words >> (32 - bits)) & 0xFFFFFFFF


@SERVER_PATCHES.add(
    "latent-attention",
    "prefill takes whole keys, but torch's attention reads the cache, which holds latent ones",
)
def _latent_attention() -> None:
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        AttnForwardMethod,
    )

    AttentionBackendRegistry.register("torch_native", lambda *_: AttnForwardMethod.MLA)


@SERVER_PATCHES.add(
    "gpt-oss",
    "torch's attention is refused, for it had no sinks; weights are in config.json's dtype, not the server's",
)
def _gpt_oss() -> None:
    import sglang.srt.arg_groups.model_hook as model_hook
    from sglang.srt.models.gpt_oss import GptOssForCausalLM as Model

    chosen = model_hook.attention_backends_of
    model_hook.attention_backends_of = lambda config: tuple(
        "triton" if name == "torch_native" else name for name in chosen(config)
    )
    build = Model.__init__

    def in_the_servers_dtype(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        config.dtype = torch.get_default_dtype()
        build(self, config, *arguments, **options)

    Model.__init__ = in_the_servers_dtype


SERVER_PATCHES.add("delta-rule", "delta nets' kernels are sgl_kernel's")(cpu_sglang_delta.install)
SERVER_PATCHES.add("half-gemm", "16-bit products are slow, and accumulate as the CPU likes")(
    half_gemm.install
)
