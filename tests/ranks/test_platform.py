"""Patches: together they work, and without each one the work fails. Choices of the CUDA platform."""

import importlib.util
import json
import struct
import textwrap

import pytest
import torch

from megatron_fp16rl import platform
from megatron_fp16rl.learner.workarounds import accumulate_in_fp32
from megatron_fp16rl.platform import cpu, cpu_sglang, cuda, patches
from megatron_fp16rl.utils.files import write_text
from tests import models
from tests.conftest import python, run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="patches are for CPUs")

PP2, EP2 = {"pipeline_parallel": 2}, {"expert_parallel": 2}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
EP2_ETP2 = {**EP2, **TP2, "expert_tensor_parallel": 2}
NO_CUDA = "Torch not compiled with CUDA enabled"


def run(code, *arguments, check=True, **environment):
    return python("-c", textwrap.dedent(code), *arguments, check=check, environment=environment)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    configs = {"dense": models.QWEN3, "experts": models.QWEN3_MOE, "latent": models.DEEPSEEK_V3}
    configs["delta"] = models.QWEN3_NEXT
    for name, config in configs.items():
        models.hf_model(config, root / name)
    return root


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def step(folder, patch, ranks=1, imported="unpatched", **layout):
    arguments = {"patch": patch, "folder": str(folder), "layout": layout}
    return run_ranks(ranks, "patches.without_patch", imported=imported, **arguments)[0]


def test_all_patches_together_make_a_step(folders, no_compiler):
    """Latent attention and experts, without a compiler. Other layouts: test_layouts.py."""
    result = step(folders / "latent", None, imported="nothing")
    assert "stepped=True" in result["outcome"]
    assert not result["compiler"], "importing torch's compiler takes seconds of a rank's start"


@pytest.mark.parametrize(
    ("patch", "complaint", "model", "ranks", "layout"),
    [
        ("current-device", NO_CUDA, "dense", 1, {}),
        ("cuda-literals", NO_CUDA, "dense", 1, {}),
        ("tensor-type", "Wrapped parameters must be one of", "dense", 1, {}),
        ("rng", NO_CUDA, "dense", 1, {}),
        ("synchronize", NO_CUDA, "dense", 2, PP2),
        ("tensor-cuda", NO_CUDA, "dense", 2, PP2),
        ("streams", "Stream requires CUDA support", "experts", 1, {}),
        ("all-to-all-splits", "incompatible function arguments", "experts", 2, EP2),
        ("latent-widths", "unexpected keyword argument 'k_channels'", "latent", 1, {}),
        ("delta-rule", "FLA is not installed", "delta", 1, {}),
        ("uneven-collectives", "invalid tensor size", "experts", 4, EP2_ETP2),
    ],
)
def test_a_step_fails_without_a_patch(folders, patch, complaint, model, ranks, layout):
    """But for the compiler's: without that one the step above fails."""
    with pytest.raises(AssertionError, match=complaint):
        step(folders / model, patch, ranks, **layout)


def test_stock_latent_attention_has_a_wrong_gradient_under_tensor_parallelism(folders):
    arguments = {"folder": str(folders / "latent"), "layout": TP2}
    latent, shared_key = run_ranks(2, "patches.stock_latent_attention", **arguments)[0]
    assert latent < 1e-5
    assert shared_key > 0.1  # when this fails, LatentSelfAttention can go


def test_a_model_of_transformer_engines_layers_is_corrected(folders):
    arguments = {"folder": str(folders / "latent"), "layout": TP2}
    result = run_ranks(2, "patches.as_transformer_engine", **arguments)[0]
    assert result["fused"] == [True, False]
    assert not result["rope"]
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    layers[0].fuse_wgrad_accumulation = False  # the attribute of Transformer Engine's
    accumulate_in_fp32(layers)
    assert layers[0].fuse_wgrad_accumulation
    assert not hasattr(layers[1], "fuse_wgrad_accumulation")


def test_queries_without_a_low_rank_get_no_norm_from_transformer_engine():
    (result,) = run_ranks(1, "patches.projections_of_transformer_engine")
    assert result["stock"]["linear_q_proj"] == "WithNorm"  # when this fails, the workaround can go
    assert result["ours"] == {**result["stock"], "linear_q_proj": "Plain"}
    assert result["ours"]["linear_kv_up_proj"] == "WithNorm"


def test_half_products_are_fp32_products_rounded_once():
    def right(installs, dtype):
        arguments = {"installs": installs, "dtype": dtype}
        return run_ranks(1, "patches.half_products", imported="unpatched", **arguments)[0]

    for dtype in ("float16", "bfloat16"):
        assert right(2, dtype) == [True] * 6  # a second time changes nothing
    # Without it scaled products are rounded on the way. (Some CPUs sum bf16 as fp32 anyway.)
    assert False in right(0, "float16")


@pytest.mark.parametrize(
    ("patch", "missing", "module"),
    [
        ("torchvision", "torchvision", "sglang.srt.configs"),
        ("sgl-kernel", "sgl_kernel", "sglang.kernels.ops.kvcache.cache_move"),
    ],
)
def test_sglang_does_not_import_without_a_patch(patch, missing, module):
    if importlib.util.find_spec(missing):
        pytest.skip(f"{missing} is installed")
    with pytest.raises(AssertionError, match=f"No module named '{missing}"):
        run_ranks(1, "patches.import_sglang", imported="unpatched", without=patch, module=module)


SERVER = """
    import json, sys, torch, types
    from megatron_fp16rl.platform import cpu_sglang
    cpu_sglang.prepare_sglang()
    import sglang.launch_server
    import sglang.srt.layers.attention.torch_native_backend as backend
    from sglang.srt.state_capturer.base import BaseHostCache

    result = {"compiler": "torch._inductor.compile_fx" in sys.modules}
    try:
        BaseHostCache(7, 3, 2, "routed_experts", "cpu")
    except AssertionError as error:
        result["pinned"] = str(error)
    cpu_sglang._pinned_memory()
    result["record"] = list(BaseHostCache(7, 3, 2, "routed_experts", "cpu").buffer.shape)

    calls = []
    for module in (backend, cpu_sglang):
        def counted(*args, sdpa=module.scaled_dot_product_attention, **options):
            calls.append(1)
            return sdpa(*args, **options)
        module.scaled_dot_product_attention = counted
    torch.manual_seed(0)
    prefix, new = torch.tensor([0, 3, 17, 0, 5, 1]), torch.tensor([4, 1, 9, 30, 5, 1])
    heads, groups, dim = 6, 2, 16
    total = prefix + new
    slots = torch.randperm(200)
    table = torch.zeros(8, 64, dtype=torch.int32)
    rows = torch.tensor([5, 2, 7, 0, 1, 6])
    for row, n, at in zip(rows, total, torch.cumsum(total, 0) - total):
        table[row, :n] = slots[at : at + n]
    k, v = torch.randn(2, 200, groups, dim)
    queries = torch.randn(int(new.sum()), heads, dim)
    options = {"scaling": 0.3, "enable_gqa": True, "is_cross_attn": False, "sliding_window_size": None}

    without_sinks = types.SimpleNamespace(sinks=None)

    def attended(kind, tokens, *lengths):
        q, method = queries[:tokens], getattr(backend.TorchNativeAttnBackend, f"_run_sdpa_forward_{kind}")
        where = (without_sinks, q, torch.empty_like(q), k, v, table, rows, total, *lengths, None)
        calls.clear()
        output = method(*where, causal=kind == "extend", **options)
        return len(calls), output

    def both():
        return attended("extend", len(queries), prefix, new), attended("decode", len(rows))

    loops = both()
    cpu_sglang._batched_attention()
    batched = both()
    cpu_sglang._SCORES_PER_GROUP = 6 * 9 * 26  # the long sequences no longer fit one group
    grouped = both()
    for name, way in {"loop": loops, "batched": batched, "grouped": grouped}.items():
        apart = [(output - loop).abs().max().item() for (_, output), (_, loop) in zip(way, loops)]
        result[name] = [[count for count, _ in way], max(apart)]
    print(json.dumps(result))
"""


def test_a_server_keeps_experts_unpinned_and_attends_in_few_calls(no_compiler):
    """Batched attention equals SGLang's loop over sequences. Nothing imports torch's compiler."""
    result = json.loads(run(SERVER).stdout.splitlines()[-1])
    assert not result["compiler"]
    assert result["pinned"] == NO_CUDA
    assert result["record"] == [7, 3, 2]
    assert result["loop"][0] == [6, 6]
    assert result["batched"][0] == [1, 1]
    assert 1 < result["grouped"][0][0] < 6
    assert max(result["batched"][1], result["grouped"][1]) < 1e-6


def test_patches_refuse_another_version():
    with pytest.raises(RuntimeError, match=r"numpy .* is installed, .* written for numpy 0.0.1"):
        patches.apply_all("numpy", "0.0.1", [])


def test_the_platform_follows_the_device(monkeypatch):
    for available, expected in ((False, cpu), (True, cuda)):
        platform.current.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert platform.current() is expected
    platform.current.cache_clear()
    names = [line.split()[0] for line in platform.__doc__.splitlines() if line.startswith("    ")]
    for name in [name.split("(")[0].rstrip(",") for name in names]:
        assert hasattr(cpu, name), name
        assert hasattr(cuda, name), name
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads() + 1))
    assert f", {torch.get_num_threads() + 1} thread(s)" in cpu.describe()  # before it is prepared


TE, TE_TORCH = "transformer_engine/__init__.py", "transformer_engine_torch.cpython-312.so"


@pytest.mark.parametrize(
    ("files", "kernels", "line"),
    [
        ([TE, TE_TORCH, "apex.py", "amp_C.py"], "transformer_engine", "TE FusedAdam"),
        ([TE, "apex.py", "amp_C.py"], "apex", "apex FusedAdam"),
        (["transformer_engine/common/__pycache__/left.pyc", TE_TORCH], "torch", "torch AdamW"),
        (["apex.py"], "torch", "torch AdamW"),  # PyPI's apex is not NVIDIA's
    ],
)
def test_cuda_takes_the_best_kernels_and_names_them(monkeypatch, tmp_path, files, kernels, line):
    for name in files:
        write_text(tmp_path / name, "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    versions = f"torch {torch.__version__}, CUDA None, cuDNN 9.10.2, NCCL 2.28.3"
    assert cuda.describe().endswith(versions)
    assert cuda.kernels() == kernels
    assert line in cuda.describe()
    # Fusions that round as SGLang's kernels do: once. Those of Transformer Engine where it is.
    options = cuda.transformer_options()
    assert options["bias_activation_fusion"]
    for name in ("apply_rope_fusion", "moe_permute_fusion", "moe_grouped_gemm"):
        assert options[name] == (kernels == "transformer_engine"), name


PREPARED = """
    import os, runpy, sys, torch
    from megatron_fp16rl import platform
    from megatron_fp16rl.platform import cuda
    platform.current = lambda: cuda
    torch.cuda.set_device = lambda device: None
    torch.cuda.device_count = lambda: 2
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ.pop(name, None)
    kind, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    if kind == "server":  # a spawned process runs the server's main module
        runpy.run_module("megatron_fp16rl.rollout.serve", run_name="__mp_main__")
    else:
        cuda.prepare_learner()
        for environment in (os.environ, {**os.environ, **cuda.server_environment(1, 1)}):
            print(environment["PYTORCH_ALLOC_CONF"] or None)
            print(environment["TORCHINDUCTOR_CACHE_DIR"], environment["TRITON_CACHE_DIR"])
    products = torch.backends.cuda.matmul
    print(products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction)
"""


def test_cuda_processes_sum_products_in_fp32_and_only_learners_get_our_allocator(tmp_path):
    write_text(tmp_path / "keys", "{}")
    assert run(PREPARED, "server", tmp_path / "keys").stdout.split() == ["False", "False"]
    environment = {"FP16RL_CACHE": str(tmp_path), "TRITON_CACHE_DIR": "/mine"}
    caches = f"{tmp_path}/kernels/inductor /mine"
    lines = run(PREPARED, "learner", **environment).stdout.splitlines()
    assert lines == ["expandable_segments:True", caches, "None", caches, "False False"]
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # a user's own stays
        assert cuda.allocator({name: "max_split_size_mb:512"}) == {}


def test_cuda_ranks_and_servers_take_their_own_devices(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cuda.device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the site shows each task one
    assert cuda.device() == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="rank 3 of this machine sees 2 GPUs"):
        cuda.device()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert cuda.server_environment(2, 1) == {"CUDA_VISIBLE_DEVICES": "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert cuda.server_environment(2, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    with pytest.raises(RuntimeError, match=r"needs 5 GPUs .* but 4 are visible"):
        cuda.server_environment(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert cuda.server_environment(0, 1) == {"CUDA_VISIBLE_DEVICES": "5"}
    with pytest.raises(RuntimeError, match=r"Slurm gives each task one of its own.*gpus_per_node"):
        cuda.server_environment(2, 1)


def murmur3(data):
    """MurmurHash3 (32 bits, seed 0), word by word as published."""
    state, low = 0, 0xFFFFFFFF
    for (block,) in struct.iter_unpack("<I", data):
        block = block * 0xCC9E2D51 & low
        state ^= (block << 15 | block >> 17) * 0x1B873593 & low
        state = ((state << 13 | state >> 19) * 5 + 0xE6546B64) & low
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> shift) * factor & low
    return state ^ state >> 16


def test_deterministic_sampling_hashes_as_sglang_does():
    assert murmur3(bytes.fromhex("21436587")) == 0xF55B516B  # a published value
    seeds, positions, columns = [5, 2**62 - 3], [0, 70_000], [0, 1, 151_000]
    hashed = cpu_sglang.murmur3(*map(torch.tensor, (seeds, positions, columns)))
    expected = [
        [murmur3(struct.pack("<QII", seed, position, column)) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert hashed.tolist() == expected
