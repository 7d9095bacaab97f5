"""Megatron-core and SGLang on a machine without CUDA."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from megatron_fp16rl.platform import cpu_sglang, half_gemm, local_layers, no_compiler
from megatron_fp16rl.platform.patches import Patches, apply_all

if TYPE_CHECKING:  # Megatron is imported after it is patched
    from megatron.core.transformer import TransformerConfig

NAME = "cpu"
COLLECTIVES = "gloo"
PAD_TO_MULTIPLE_OF = 1
SENT_ALONE = 6 << 20  # bytes: here a copy costs more than a message
MEGATRON_VERSION = "0.19.2"
MEGATRON_PATCHES = Patches()

prepare_server = cpu_sglang.prepare_server
prepare_sglang = cpu_sglang.prepare_sglang
server_arguments = cpu_sglang.server_arguments
server_environment = cpu_sglang.server_environment


def device() -> torch.device:
    return torch.device("cpu")


def describe() -> str:
    """One line for the run's log; the same before and after :func:`prepare_learner`."""
    return f"CPU, gloo, Megatron's local layers, torch AdamW, {_threads()} thread(s) a rank"


def attention(config: "TransformerConfig", dtype: torch.dtype, tokens: int, packed: bool) -> None:
    """local_attention.py's, of all lengths."""


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


@functools.cache  # patches are applied once a process
def prepare_learner() -> None:
    torch.set_num_threads(_threads())
    apply_all("megatron-core", MEGATRON_VERSION, MEGATRON_PATCHES)


def transformer_options() -> dict[str, Any]:
    """TransformerConfig values that keep Megatron-core from asking for CUDA kernels."""
    fusions = (
        "gradient_accumulation_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "apply_rope_fusion",
        "persist_layer_norm",
        "cross_entropy_loss_fusion",
    )
    return {
        **dict.fromkeys(fusions, False),
        "use_cpu_initialization": True,
        "barrier_with_L1_time": False,
        "batch_p2p_sync": False,
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
    }


def layer_spec(config: "TransformerConfig", vp_stage: int | None) -> Any:
    """Megatron's own layers, without Transformer Engine."""
    return local_layers.block_spec(config, vp_stage)


def tune_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Lets torch's AdamW update every tensor in one fused kernel."""
    for group in optimizer.param_groups:
        group["fused"] = True


def fp32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.mm(left.float(), right.float())


_torch: Any = torch  # under this name its functions are replaced


MEGATRON_PATCHES.add(  # the first: others import Megatron
    "compiler",
    "lines of the router are compiled, which takes a C++ compiler; decorating them alone imports torch's",
)(no_compiler.install)


@MEGATRON_PATCHES.add(
    "current-device",
    "rotary embedding and tensor-parallel layers: 'Torch not compiled with CUDA enabled'",
)
def _current_device() -> None:
    _torch.cuda.current_device = device


@MEGATRON_PATCHES.add(
    "cuda-literals", "causal mask, gradient clipping, optimizer and schedules name device='cuda'"
)
def _cuda_literals() -> None:
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.grad_scaler as grad_scaler
    import megatron.core.optimizer.optimizer as optimizer
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.transformer.utils as transformer_utils
    import megatron.core.utils as utils

    for module in (clip_grads, grad_scaler, optimizer, schedules, transformer_utils, utils):
        module.torch = _TorchOnCpu()


class _TorchOnCpu:
    """torch, except that factories with device="cuda" make CPU tensors."""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch, name)
        if name not in ("tensor", "zeros", "ones", "empty"):
            return attribute

        def make(*args: Any, **options: Any) -> torch.Tensor:
            if options.get("device") == "cuda":
                options["device"] = torch.cuda.current_device()  # as patched: see current-device
            return attribute(*args, **options)

        return make


@MEGATRON_PATCHES.add(
    "tensor-type", "the FP16 optimizers refuse parameters whose type is not torch.cuda.HalfTensor"
)
def _tensor_type() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    for optimizer in (DistributedOptimizer, Float16OptimizerWithFloat16Params):
        optimizer.__init__ = _types_say_cuda()(optimizer.__init__)  # while it runs


@contextlib.contextmanager
def _types_say_cuda() -> Iterator[None]:
    native: Any = torch.Tensor.type

    def reported(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        name = native(tensor, *args, **options)
        if not isinstance(name, str):
            return name
        return f"torch.cuda.{name.rsplit('.', 1)[1]}"  # of torch.HalfTensor, torch.meta.HalfTensor

    _torch.Tensor.type = reported
    try:
        yield
    finally:
        _torch.Tensor.type = native


@MEGATRON_PATCHES.add(
    "rng", "the RNG tracker around dropout asks for the state of a CUDA generator"
)
def _rng() -> None:
    import megatron.core.tensor_parallel.random as random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    _torch.cuda.manual_seed = torch.manual_seed
    _torch.cuda.get_rng_state = get_state
    _torch.cuda.set_rng_state = set_state
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


@MEGATRON_PATCHES.add("streams", "the experts' token dispatcher makes CUDA streams and events")
def _streams() -> None:
    class Event:
        """Nothing is asynchronous: every event has happened."""

        def record(self, *_: Any) -> None: ...
        def wait(self, *_: Any) -> None: ...
        def synchronize(self) -> None: ...

    class Stream(Event):
        def wait_stream(self, _: Any) -> None: ...
        def wait_event(self, _: Any) -> None: ...
        def record_event(self, _: Any = None) -> Event:
            return Event()

    _torch.cuda.Event, _torch.cuda.Stream = Event, Stream
    _torch.cuda.current_stream = lambda *_: Stream()
    _torch.cuda.stream = lambda _: contextlib.nullcontext()


@MEGATRON_PATCHES.add("synchronize", "pipelines of varying lengths wait for a CUDA device")
def _synchronize() -> None:
    _torch.cuda.synchronize = lambda *_: None


@MEGATRON_PATCHES.add("tensor-cuda", "a tied embedding's copy on the last stage is moved to CUDA")
def _tensor_cuda() -> None:
    _torch.Tensor.cuda = lambda tensor, *_, **__: tensor


@MEGATRON_PATCHES.add(
    "all-to-all-splits", "lengths for all_to_all stay tensors where they are on the CPU already"
)
def _all_to_all_splits() -> None:
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


@MEGATRON_PATCHES.add(
    "context-positions", "the positions of a context-parallel rank are pinned, and moved to a GPU"
)
def _context_positions() -> None:
    import megatron.core.models.common.embeddings.rotary_pos_embedding as rotary
    import megatron.core.models.common.embeddings.yarn_rotary_pos_embedding as yarn

    def get_pos_emb_on_this_cp_rank(emb: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
        chunks = emb.chunk(2 * group.size(), dim)
        return torch.cat([chunks[group.rank()], chunks[-1 - group.rank()]], dim)

    rotary.get_pos_emb_on_this_cp_rank = get_pos_emb_on_this_cp_rank
    yarn.get_pos_emb_on_this_cp_rank = get_pos_emb_on_this_cp_rank


@MEGATRON_PATCHES.add(
    "uneven-collectives",
    "gloo gathers and scatters equal parts only; an expert's ranks hold unequal ones",
)
def _uneven_collectives() -> None:
    import megatron.core.tensor_parallel.mappings as mappings

    even_gather, even_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def gather(
        tensor: torch.Tensor, group: Any, sizes: list[int] | None = None, buffer: bool = False
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even_gather(tensor, group, sizes, buffer)
        longest = max(sizes)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def scatter(
        tensor: torch.Tensor, group: Any, sizes: list[int] | None = None, buffer: bool = False
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even_scatter(tensor, group, sizes, buffer)
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(list(sizes))[group.rank()].clone()

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter


@MEGATRON_PATCHES.add(
    "delta-rule", "gated delta nets ask for flash-linear-attention, whose kernels are a GPU's"
)
def _delta_rule() -> None:
    from megatron.core.ssm.gated_delta_net import common, gdn

    from megatron_fp16rl.platform import delta_rule

    common.HAVE_FLA = True
    common.l2norm = delta_rule.l2norm
    gdn.causal_conv1d = delta_rule.causal_conv1d
    gdn.chunk_gated_delta_rule = delta_rule.chunk_gated_delta_rule


MEGATRON_PATCHES.add("half-gemm", "16-bit products are slow, and accumulate as the CPU likes")(
    half_gemm.install
)
