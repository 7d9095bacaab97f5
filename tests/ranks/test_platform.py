"""Patches: each does its work, and without it the work fails. Choices of the CUDA platform."""

import importlib.util
import struct
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_fp16rl import platform
from megatron_fp16rl.platform import cpu, cpu_sglang, cuda, patches
from megatron_fp16rl.platform.cpu_sglang import murmur3
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.tools import doctor
from megatron_fp16rl.utils.files import write_text
from tests import models
from tests.conftest import python, run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="patches are for CPUs")


def run(code, *arguments, check=True):
    return python("-c", textwrap.dedent(code), *arguments, check=check)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    configs = {"dense": models.QWEN3, "experts": models.QWEN3_MOE, "latent": models.DEEPSEEK_V3}
    for name, config in configs.items():
        models.hf_model(config, root / name)
    return root


PP2, EP2 = {"pipeline_parallel": 2}, {"expert_parallel": 2}
EP2_ETP2 = {**EP2, "tensor_parallel": 2, "sequence_parallel": True, "expert_tensor_parallel": 2}


@pytest.mark.parametrize(
    ("patch", "complaint", "model", "layout"),
    [
        ("none", None, "dense", {}),
        ("current-device", "Torch not compiled with CUDA enabled", "dense", {}),
        ("cuda-literals", "Torch not compiled with CUDA enabled", "dense", {}),
        ("tensor-type", "Wrapped parameters must be one of", "dense", {}),
        ("rng", "Torch not compiled with CUDA enabled", "dense", {}),
        ("synchronize", "Torch not compiled with CUDA enabled", "dense", PP2),
        ("tensor-cuda", "Torch not compiled with CUDA enabled", "dense", PP2),
        ("streams", "Stream requires CUDA support", "experts", {}),
        ("te-gemm", "te_general_gemm", "experts", {}),
        ("all-to-all-splits", "incompatible function arguments", "experts", EP2),
        ("latent-te", r"isinstance\(\) arg 2 must be a type", "latent", {}),
        ("latent-widths", "unexpected keyword argument 'k_channels'", "latent", {}),
        ("uneven-collectives", "invalid tensor size", "experts", EP2_ETP2),
    ],
)
def test_a_step_fails_without_a_patch(folders, patch, complaint, model, layout):
    ranks = 4 if layout is EP2_ETP2 else 2 if layout else 1
    arguments = {"patch": patch, "folder": str(folders / model), "layout": layout}
    if complaint is None:
        assert (
            "stepped=True"
            in run_ranks(ranks, "parity.without_patch", imported="torch", **arguments)[0]
        )
        return
    with pytest.raises(AssertionError, match=complaint):
        run_ranks(ranks, "parity.without_patch", imported="torch", **arguments)


def test_a_step_needs_no_compiler(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    arguments = {"folder": str(folders / "latent"), "layout": {}}
    assert (
        "stepped=True"
        in run_ranks(1, "parity.without_patch", imported="nothing", patch="none", **arguments)[0]
    )
    with pytest.raises(AssertionError, match=r"no-such-compiler|InvalidCxxCompiler"):
        run_ranks(1, "parity.without_patch", imported="nothing", patch="compiler", **arguments)


def test_stock_latent_attention_has_a_wrong_gradient_under_tensor_parallelism(folders):
    layout = {"tensor_parallel": 2, "sequence_parallel": True}
    arguments = {"folder": str(folders / "latent"), "layout": layout}
    latent, shared_key = run_ranks(2, "parity.stock_latent_attention", **arguments)[0]
    assert latent < 1e-5
    assert shared_key > 0.1  # when this fails, LatentSelfAttention can go


def test_a_weight_that_every_rank_holds_counts_once_in_the_gradient_norm(folders):
    layout = {"tensor_parallel": 2, "sequence_parallel": True}
    arguments = {"folder": str(folders / "latent"), "layout": layout}
    found = run_ranks(2, "parity.as_transformer_engine", **arguments)[0]
    plain, marked = found["norms"]
    assert marked == pytest.approx(plain, rel=1e-6)
    # And of the other things that Transformer Engine brings.
    assert found["fused"] == [True, False]
    assert not found["rope"]


def test_transformer_engines_layers_accumulate_in_fp32_without_apex():
    from megatron_fp16rl.learner.workarounds import accumulate_in_fp32

    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    layers[0].fuse_wgrad_accumulation = False  # the attribute of Transformer Engine's
    accumulate_in_fp32(layers)
    assert layers[0].fuse_wgrad_accumulation
    assert not hasattr(layers[1], "fuse_wgrad_accumulation")


PRODUCTS = """
    import sys, torch
    from megatron_fp16rl.platform import half_gemm
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 1000), torch.randn(2, 1000, 128)
    c = torch.randn(2, 64, 128)
    if sys.argv[1] == "with":
        half_gemm.install()
        half_gemm.install()  # a second time changes nothing
    products = {
        "mm": lambda a, b, c: a[0] @ b[0],
        "mm_transposed": lambda a, b, c: b[0].t() @ a[0].t(),
        "bmm": lambda a, b, c: a @ b,
        "addmm": lambda a, b, c: torch.addmm(c[0], a[0], b[0], beta=0.5),
        "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b, beta=0.0, alpha=0.1),
        "linear": lambda a, b, c: torch.nn.functional.linear(a, b[0].t(), c[0, 0]),
    }
    half = [t.half() for t in (a, b, c)]
    for name, product in products.items():
        ours = product(*half)
        assert ours.dtype is torch.float16
        print(name, torch.equal(ours, product(*(t.float() for t in half)).half()))
    assert torch.allclose((a[0] @ b[0]).double(), a[0].double() @ b[0].double(), atol=1e-3)
    x = half[0].requires_grad_()
    (x @ half[1]).sum().backward()
    assert x.grad.dtype is torch.float16
"""


def test_half_products_are_fp32_products_rounded_once():
    with_patch = dict(line.split() for line in run(PRODUCTS, "with").stdout.splitlines())
    without = dict(line.split() for line in run(PRODUCTS, "without").stdout.splitlines())
    assert len(with_patch) == 6
    assert set(with_patch.values()) == {"True"}
    assert "False" in without.values()


IMPORT_SERVER = """
    import sys
    from megatron_fp16rl.platform import cpu_sglang
    cpu_sglang.IMPORT_PATCHES = [p for p in cpu_sglang.IMPORT_PATCHES if p.name != sys.argv[1]]
    cpu_sglang.prepare_sglang()
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler
    print("imported")
"""


@pytest.mark.parametrize(
    ("patch", "module"), [("torchvision", "torchvision"), ("sgl-kernel", "sgl_kernel")]
)
def test_sglang_does_not_import_without_a_patch(patch, module):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed here")
    assert "imported" in run(IMPORT_SERVER, "none").stdout
    done = run(IMPORT_SERVER, patch, check=False)
    assert done.returncode != 0
    assert module in done.stderr


PINNED = """
    from megatron_fp16rl.platform import cpu_sglang
    cpu_sglang.prepare_sglang()
    from sglang.srt.state_capturer.base import BaseHostCache
    try:
        BaseHostCache(7, 3, 2, "routed_experts", "cpu")
    except AssertionError as error:
        print(error)
    cpu_sglang._pinned_memory()
    print(tuple(BaseHostCache(7, 3, 2, "routed_experts", "cpu").buffer.shape))
"""


def test_a_record_of_experts_is_not_pinned():
    without, with_patch = run(PINNED).stdout.splitlines()[-2:]
    assert without == "Torch not compiled with CUDA enabled"
    assert with_patch == "(7, 3, 2)"


def test_absent_modules_raise_when_called():
    finder = cpu_sglang._AbsentFinder("absent_package", has_submodules=True)
    module = finder.create_module(finder.find_spec("absent_package.part"))
    assert finder.find_spec("other") is None
    with pytest.raises(NotImplementedError, match=r"absent_package.part.kernel does not exist"):
        module.kernel(1)


ATTENTION = """
    import sys, torch
    from megatron_fp16rl.platform import cpu_sglang
    cpu_sglang.prepare_sglang()
    import sglang.srt.layers.attention.torch_native_backend as backend
    calls = []
    for module in (backend, cpu_sglang):
        def counted(*args, sdpa=module.scaled_dot_product_attention, **options):
            calls.append(1)
            return sdpa(*args, **options)
        module.scaled_dot_product_attention = counted
    torch.manual_seed(0)
    prefix = torch.tensor([0, 3, 17, 0, 5, 1])
    new = torch.tensor([4, 1, 9, 30, 5, 1])
    heads, groups, dim = 6, 2, 16
    total = prefix + new
    slots = torch.randperm(200)
    table = torch.zeros(8, 64, dtype=torch.int32)
    rows = torch.tensor([5, 2, 7, 0, 1, 6])
    for row, n, at in zip(rows, total, torch.cumsum(total, 0) - total):
        table[row, :n] = slots[at : at + n]
    k, v = torch.randn(2, 200, groups, dim)

    def extend():
        q = torch.randn(int(new.sum()), heads, dim, generator=torch.Generator().manual_seed(1))
        return backend.TorchNativeAttnBackend._run_sdpa_forward_extend(
            None, q, torch.empty_like(q), k, v, table, rows, total, prefix, new, None,
            scaling=0.3, enable_gqa=True, causal=True, is_cross_attn=False, sliding_window_size=None)

    def decode():
        q = torch.randn(len(rows), heads, dim, generator=torch.Generator().manual_seed(2))
        return backend.TorchNativeAttnBackend._run_sdpa_forward_decode(
            None, q, torch.empty_like(q), k, v, table, rows, total, None,
            scaling=0.3, enable_gqa=True, causal=False, is_cross_attn=False, sliding_window_size=None)

    loops = extend(), decode()
    before = len(calls)
    cpu_sglang._batched_attention()
    batched = extend(), decode()
    print(before, len(calls) - before, max((a - b).abs().max().item() for a, b in zip(loops, batched)))
    cpu_sglang._SCORES_PER_GROUP = 6 * 9 * 26  # the long sequences no longer fit one group
    calls.clear()
    print(len(calls), (extend() - loops[0]).abs().max().item(), len(calls))
"""


def test_batched_attention_equals_the_loop_in_fewer_calls():
    first, second = run(ATTENTION).stdout.splitlines()
    loop_calls, batched_calls, difference = first.split()
    assert (int(loop_calls), int(batched_calls)) == (12, 2)
    assert float(difference) < 1e-6
    _, difference, calls = second.split()
    assert float(difference) < 1e-6
    assert 1 < int(calls) < 6


def test_patches_refuse_another_version():
    with pytest.raises(RuntimeError, match=r"numpy .* is installed, .* written for numpy 0.0.1"):
        patches.apply_all("numpy", "0.0.1", [])


def test_the_platform_follows_the_device(monkeypatch):
    platform.current.cache_clear()
    assert platform.current() is cpu
    platform.current.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert platform.current() is cuda
    platform.current.cache_clear()


def test_both_platforms_offer_the_same():
    for name in (
        *("NAME", "COLLECTIVES", "device", "describe", "prepare_learner", "layer_spec"),
        *("transformer_options", "tune_optimizer", "prepare_server", "prepare_sglang"),
        *("server_arguments", "server_environment", "attention"),
    ):
        assert hasattr(cpu, name), name
        assert hasattr(cuda, name), name


TE, TE_TORCH = "transformer_engine/__init__.py", "transformer_engine_torch.cpython-312.so"


@pytest.mark.parametrize(
    ("files", "kernels", "line"),
    [
        ([TE, TE_TORCH, "apex.py", "amp_C.py"], "transformer_engine", "TE FusedAdam"),
        ([TE, f"transformer_engine/{TE_TORCH}"], "transformer_engine", "TE FusedAdam"),
        ([TE, f"transformer_engine/wheel_lib/{TE_TORCH}"], "transformer_engine", "TE FusedAdam"),
        ([TE, "apex.py", "amp_C.py"], "apex", "apex FusedAdam"),
        (["transformer_engine/common/__pycache__/left.pyc", TE_TORCH], "torch", "torch AdamW"),
        (["apex.py"], "torch", "torch AdamW"),  # PyPI's apex is not NVIDIA's
        ([], "torch", "torch AdamW"),
    ],
)
def test_cuda_takes_the_best_kernels_and_says_which(monkeypatch, tmp_path, files, kernels, line):
    for name in files:
        write_text(tmp_path / name, "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert cuda.describe().endswith(
        f"torch {torch.__version__}, CUDA None, cuDNN 9.10.2, NCCL 2.28.3"
    )
    assert cuda.kernels() == kernels
    assert line in cuda.describe()
    monkeypatch.setattr(doctor, "_version", lambda package: "2.11.0")
    (found, _) = doctor._accelerators()
    assert (found.meaning == "layers and FusedAdam") == (kernels == "transformer_engine")


SUMS = """
    import runpy, sys, torch
    from megatron_fp16rl import platform
    from megatron_fp16rl.platform import cuda
    platform.current = lambda: cuda
    torch.cuda.set_device = lambda device: None
    kind, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    if kind == "learner":
        cuda.prepare_learner()
    else:
        runpy.run_module("megatron_fp16rl.rollout.serve", run_name="__mp_main__")
    products = torch.backends.cuda.matmul
    print(products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction)
"""

PREPARED = """
    import os, torch
    from megatron_fp16rl.platform import cuda
    torch.cuda.set_device = lambda device: None
    torch.cuda.device_count = lambda: 2
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ.pop(name, None)
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == cache_dir()  # torch's own default
    cuda.prepare_learner()
    for environment in (os.environ, {**os.environ, **cuda.server_environment(1, 1)}):
        print(environment["PYTORCH_ALLOC_CONF"] or None)
        print(environment["TORCHINDUCTOR_CACHE_DIR"], environment["TRITON_CACHE_DIR"])
"""


@pytest.mark.parametrize("kind", ["learner", "server"])
def test_products_are_summed_in_fp32(kind, tmp_path):
    """A spawned process of a server runs the server's main module, serve.py, as __mp_main__."""
    write_text(tmp_path / "keys", "{}")
    assert run(SUMS, kind, tmp_path / "keys").stdout.split() == ["False", "False"]


def test_a_learner_has_its_allocator_and_caches_and_its_servers_the_caches_alone(tmp_path):
    environment = {"FP16RL_CACHE": str(tmp_path), "TRITON_CACHE_DIR": "/mine"}
    said = python("-c", textwrap.dedent(PREPARED), environment=environment).stdout.splitlines()
    caches = f"{tmp_path}/kernels/inductor /mine"
    assert said == ["expandable_segments:True", caches, "None", caches]


def _errors(computed, exact):
    """Of fp16 values, in units of the last place of what they should be."""
    spacing = 2.0 ** (exact.abs().clamp(min=2**-14).log2().floor() - 10)
    return ((computed.double() - exact).abs() / spacing).max().item()


def test_fused_kernels_round_once_and_what_they_stand_for_more_often(monkeypatch):
    """SGLang's kernels on a GPU compute in fp32 and round once (activation.cuh, rope.cuh); against fp64.

    The fused kernels that the CUDA platform asks Megatron for do the same: torch.compile keeps fp32
    between operations, Transformer Engine's rope has fp32 angles. Unfused, Megatron rounds each step.
    """
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    torch.manual_seed(0)
    gate, up = (4 * torch.randn(2, 4096, 8)).half()
    silu = torch.nn.functional.silu
    exact = silu(gate.double()) * up.double()
    assert _errors((silu(gate.float()) * up.float()).half(), exact) < 0.51
    assert _errors(silu(gate) * up, exact) > 0.9

    heads = torch.randn(4096, 1, 2, 128).half()
    frequencies = 1e6 ** (-torch.arange(0, 128, 2) / 128)
    angles = (torch.arange(4096.0)[:, None] * frequencies).repeat(1, 2)[:, None, None]
    exact = _apply_rotary_pos_emb_bshd(heads.double(), angles.double())
    sizes = heads.double().pow(2).mean(-1, keepdim=True).sqrt()

    def error(rotated):  # relative to the head: single elements cancel
        return ((rotated.double() - exact) / sizes).pow(2).mean().sqrt().item()

    once = error(_apply_rotary_pos_emb_bshd(heads.float(), angles).half())
    assert error(_apply_rotary_pos_emb_bshd(heads, angles)) > 1.5 * once

    monkeypatch.setattr(cuda, "kernels", lambda: "transformer_engine")
    options = cuda.transformer_options()
    assert options["bias_activation_fusion"]
    assert options["apply_rope_fusion"]
    assert options["moe_permute_fusion"]
    assert options["moe_grouped_gemm"]
    monkeypatch.setattr(cuda, "kernels", lambda: "torch")
    options = cuda.transformer_options()
    assert options["bias_activation_fusion"]
    assert not options["apply_rope_fusion"]
    assert not options["moe_permute_fusion"]


@pytest.fixture
def asked(monkeypatch):
    """Transformer Engine's choice of an attention kernel; returns what it was asked."""
    # Megatron before there seems to be a Transformer Engine.
    importlib.import_module("megatron_fp16rl.learner.attention")

    questions = []

    def choose(asked):
        questions.append(vars(asked))
        fused = asked.head_dim_qk <= 128 and asked.qkv_dtype is not torch.float32
        return False, None, fused, 1 if fused else None, True, [False, fused, True]

    package = "transformer_engine.pytorch.attention.dot_product_attention"
    for depth in range(1, 5):
        name = ".".join(package.split(".")[:depth])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    utils = SimpleNamespace(AttentionParams=SimpleNamespace, get_attention_backend=choose)
    sys.modules[package].utils = utils
    monkeypatch.setattr(cuda, "kernels", lambda: "transformer_engine")
    monkeypatch.setattr(cuda, "_versions", lambda: "cuDNN 9.10.1")
    monkeypatch.setattr(platform, "current", lambda: cuda)
    return questions


def _attends(dtype=torch.float16, **config):
    from megatron_fp16rl.learner.attention import Attention

    usual = {"tensor_model_parallel_size": 2, "num_attention_heads": 32, "num_query_groups": 8}
    usual |= {"kv_channels": 128, "multi_latent_attention": False}
    return Attention(SimpleNamespace(**usual | config), dtype)


def test_transformer_engine_is_asked_for_its_attention(asked):
    attention = _attends()
    assert attention.kernel(10_240) == "fused"
    assert attention.kernel(10_240) == "fused"
    (question,) = asked  # once for each length
    assert question["num_heads"] == 16
    assert question["num_gqa_groups"] == 4
    assert question["max_seqlen_q"] == question["max_seqlen_kv"] == 10_240
    assert (question["head_dim_qk"], question["head_dim_v"]) == (128, 128)
    widths = {"qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
    assert _attends(multi_latent_attention=True, **widths).kernel(2048) == "unfused"
    assert (asked[-1]["head_dim_qk"], asked[-1]["head_dim_v"]) == (192, 128)
    assert asked[-1]["num_gqa_groups"] == 16


def test_long_sequences_without_fused_attention_are_refused(asked, monkeypatch):
    with pytest.raises(
        RecipeError, match=r"2,304 x 2,304 scores .* cuDNN 9.10.1\. Remedy: .*NVTE_D"
    ):
        _attends(torch.float32).kernel(2304)
    monkeypatch.setattr(cuda, "kernels", lambda: "torch")  # Megatron's own layers
    assert _attends().kernel(2048) == "unfused"
    with pytest.raises(RecipeError, match="above 2,048 tokens"):
        _attends().kernel(2049)
    monkeypatch.setattr(platform, "current", lambda: cpu)
    assert _attends().kernel(1 << 20) is None


def test_a_learner_refuses_what_its_recipe_or_a_batch_is_too_long_for():
    assert run_ranks(1, "precision.too_long")[0] == ["learner", "batch"]


def test_cuda_rank_takes_its_own_device(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cuda.device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # its site shows each task one
    assert cuda.device() == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="rank 3 of this machine sees 2 GPUs"):
        cuda.device()


def test_cuda_servers_take_the_gpus_after_the_learner(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert cuda.server_environment(2, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    with pytest.raises(RuntimeError, match=r"needs 5 GPUs .* but 4 are visible"):
        cuda.server_environment(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert cuda.server_environment(0, 1) == {"CUDA_VISIBLE_DEVICES": "5"}
    with pytest.raises(RuntimeError, match=r"Slurm gives each task one of its own.*gpus_per_node"):
        cuda.server_environment(2, 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert cuda.server_environment(2, 1) == {"CUDA_VISIBLE_DEVICES": "2"}


def test_murmur3_is_the_published_hash():
    """Against a published test value, and byte by byte against a plain implementation."""

    def plain(data):
        state = 0
        for (block,) in struct.iter_unpack("<I", data):
            block = block * 0xCC9E2D51 & 0xFFFFFFFF
            block = (block << 15 | block >> 17) & 0xFFFFFFFF
            state ^= block * 0x1B873593 & 0xFFFFFFFF
            state = (state << 13 | state >> 19) & 0xFFFFFFFF
            state = (state * 5 + 0xE6546B64) & 0xFFFFFFFF
        state ^= len(data)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            state = (state ^ state >> shift) * factor & 0xFFFFFFFF
        return state ^ state >> 16

    assert plain(bytes.fromhex("21436587")) == 0xF55B516B
    seeds, positions, columns = [5, 2**62 - 3], [0, 70_000], [0, 1, 151_000]
    hashed = murmur3(torch.tensor(seeds), torch.tensor(positions), torch.tensor(columns))
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for column, number in enumerate(columns):
            data = struct.pack("<QII", seed, position, number)
            assert hashed[row, column].item() == plain(data)


def test_the_platform_says_the_same_before_and_after_it_is_prepared(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads() + 1))
    assert f", {torch.get_num_threads() + 1} thread(s)" in cpu.describe()


def test_only_learners_get_segments_that_grow_and_users_settings_stay(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
        assert cuda.allocator({name: "max_split_size_mb:512"}) == {}
    assert cuda.allocator({}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert "PYTORCH_ALLOC_CONF" not in cuda.server_environment(2, 2)
