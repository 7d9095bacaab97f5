"""A residual stream that fp16 does not hold: refused with a reason, and trained in fp32."""

import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_fp16rl.models.families import FAMILIES
from megatron_fp16rl.platform import local_layers
from tests import models
from tests.conftest import run_ranks

LARGEST = 65_504
BRANCH = 50_000  # the most that a layer adds
CONFIGS = {
    "dense": models.FAMILIES["qwen3"],
    "experts": models.MOE_FAMILIES["qwen3-moe"],
    "latent": models.DEEPSEEK_V3,
}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
PP2, EP2 = {"pipeline_parallel": 2}, {"expert_parallel": 2}
CASES = [("dense", TP2), ("dense", PP2), ("experts", EP2), ("latent", TP2)]


@pytest.fixture(scope="module")
def steep(tmp_path_factory):
    """By kind: folder, and loss and gradient norm of transformers in fp32, of a stream beyond fp16."""
    root = tmp_path_factory.mktemp("steep")
    return {kind: made(root / kind, config) for kind, config in CONFIGS.items()}


def made(folder, config):
    # Weights that fp16 holds when the branches are scaled.
    model = models.hf_model({**config, "num_hidden_layers": 4, "initializer_range": 0.05}, folder)
    sequences = models.random_tokens()
    branch, stream = [], []

    def attach(layer):
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_hook(lambda _, __, out: branch.append(largest(out)))
        layer.register_forward_hook(lambda _, __, out: stream.append(largest(out)))

    for layer in model.model.layers:
        attach(layer)
    # What a layer adds does not depend on how large the stream is, once it is large.
    for _ in range(3):
        branch.clear()
        with torch.no_grad():
            for ids in sequences:
                model(torch.tensor([ids]))
            for name, parameter in model.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.mul_(BRANCH / max(branch))
    branch.clear()
    stream.clear()
    logits = [model(torch.tensor([ids])).logits[0, :-1] for ids in sequences]
    picked = [
        of.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        for of, ids in zip(logits, sequences, strict=True)
    ]
    loss = -torch.cat(picked).mean()
    loss.backward()
    assert max(branch) < LARGEST < max(stream)
    model.save_pretrained(folder)
    squares = [p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None]
    return folder, loss.item(), sum(squares).sqrt().item(), max(stream)


def largest(output):
    output = output[0] if isinstance(output, tuple) else output
    return output.detach().abs().max().item()


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_stream_beyond_fp16_is_refused_with_a_reason_and_trained_in_fp32(steep, kind, layout):
    folder, loss, norm, stream = steep[kind]
    results = run_ranks(2, "forensics.stream", folder=str(folder), layout=layout)
    for result in results:
        half, full = result["half"], result["full"]
        assert half["said"].startswith("NonFiniteForward: a logit is not finite")
        assert "began in the forward pass, in decoder.layers." in half["said"]
        assert "learner.megatron.fp32_residual_connection: true" in half["said"]
        assert full["said"] == "nothing"
        assert full["stepped"]
        assert full["loss"] == pytest.approx(loss, rel=2e-3)
        assert full["grad_norm"] == pytest.approx(norm, rel=2e-2)
        assert full["stream"] == ["torch.float32"]
    seen = max(result["full"]["largest"] for result in results)
    assert seen == pytest.approx(stream, rel=1e-2)
    assert seen > LARGEST


def test_layers_of_transformer_engine_norm_the_stream_by_themselves():
    (replaced,) = run_ranks(1, "forensics.normed_apart")
    name = f"{local_layers.__name__}.RMSNorm"
    assert replaced["norms"] == [name] * len(replaced["norms"])
    assert replaced["projections"] == ["Apart"] * 3  # attention's of both layers, a dense MLP's


def test_every_family_learns_at_the_initial_loss_scale(tmp_path):
    found = ranges(tmp_path, 15)
    assert not [name for name, row in found.items() if "scale" in row]
    assert all(0 < row["stream"] < LARGEST for row in found.values())


def ranges(root, highest, more=()):
    """By family: what fp16 has to hold of its tiny model, and the first loss scale at which an update overflows."""
    folders = {name: root / name for name in models.tiny.EVERY}
    for name, folder in folders.items():
        models.hf_model(models.tiny.EVERY[name], folder)
    folders |= {folder.name: folder for folder in more}
    asked = {"folders": [*map(str, folders.values())], "highest": highest}
    (found,) = run_ranks(1, "forensics.ranges", timeout=900, **asked)
    return dict(zip(folders, found, strict=True))


def published():
    """What families' files say that others published: a table."""
    rows = [
        f"| `{name}` | {family.fp16_range[1] if family.fp16_range else 'nothing'} |"
        for name, family in FAMILIES.items()
    ]
    return "\n".join(["| `model_type` | published |", "|---|---|", *rows, ""])


def table():
    """docs/range.md: `python -m tests.ranks.test_range [FOLDER ...] > docs/range.md`."""
    print(
        "# What fp16 has to hold\n\n"
        "fp16 ends at 65,504. Largest magnitudes of a forward pass, of the residual stream and of its gradient at a loss\n"
        "scale of 2^15, and the first scale at which an update overflows, where that shows first. Tiny random models\n"
        "with lively norms, and folders that were given; made by `python -m tests.ranks.test_range FOLDER`.\n"
        "SmolLM2's stream takes 40 % of the range. What to set: [precision](precision.md#when-fp16-is-not-for-you).\n\n"
        "| model | weight | activation | stream | stream's gradient | overflows at | in |"
    )
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as root:
        for name, row in ranges(Path(root), 40, [Path(folder) for folder in sys.argv[1:]]).items():
            sizes = (row[key] for key in ("weight", "activation", "stream", "gradient"))
            numbers = " | ".join(f"{size:.2g}" for size in sizes)
            source = row["source"].partition(": ")[2].split(" and ")[0].split()[-1]
            print(f"| {name} | {numbers} | 2^{row['scale']} | `{source}` |", flush=True)
    print(
        f"\n## Published\n\nOf real weights in fp16, by others. The paper is arXiv 2510.26788.\n\n{published()}",
        end="",
    )


if __name__ == "__main__":
    table()
