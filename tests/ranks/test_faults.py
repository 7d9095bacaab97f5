"""Non-finite values: the origin that is reported, and the files that are kept."""

import json
import re

import pytest
import torch

from tests import models
from tests.conftest import run_ranks

FC1 = "decoder.layers.0.mlp.linear_fc1"
EXPERT = "decoder.layers.0.mlp.experts.local_experts.5.linear_fc1"
QKV = "decoder.layers.1.self_attention.linear_qkv"
PROJ = "decoder.layers.0.self_attention.linear_proj.weight"
LAYOUTS = {
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "ep2-overlap": {  # and data parallel
        "expert_parallel": 2,
        "distributed_optimizer": True,
        "ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000},
    },
}
# Weights that fp16 can hold, with products that it cannot.
HUGE = {f"{FC1}.weight": 5e5, f"{EXPERT}.weight": 5e5}
# The forward pass as before; what backward gives to the norm is a thousand times larger.
STEEP = {f"{QKV}.weight": 1024.0, "decoder.layers.1.input_layernorm.weight": 1 / 1024}
CASES = {
    "forward": {"do": "update", "multiply": HUGE},
    "score": {"do": "score", "multiply": HUGE},
    "parameter": {"do": "update", "poison": [PROJ, 0]},
    "loss forward": {"do": "update", "loss": [9, "inf"]},
    "reward": {"do": "prepare", "reward": [[9, "nan"]]},
    "mu log-prob": {"do": "prepare", "mu": [[9, "-inf"]]},
    "advantage": {"do": "prepare", "reward": [[9, 3e38], [10, 3e38]]},  # their sum is infinite
    "backward": {"do": "update", "multiply": STEEP, "scale": 2.0**20},
    "loss backward": {"do": "update", "loss": [9, 900]},
    "minimum": {"do": "update", "loss": [9, 1e15], "scale": 1.0},
    "healthy": {"do": "update"},
    "reduction": {"do": "update", "reduction": True},
}
NO_OVERFLOWS = (
    "forward",
    "score",
    "parameter",
    "loss forward",
    "reward",
    "mu log-prob",
    "advantage",
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_non_finite_values_are_traced_to_their_origin(name):
    layout = LAYOUTS[name]
    family = "qwen3-moe" if name.startswith("ep2") else "qwen3"
    ranks = run_ranks(2, "forensics.faults", layout=layout, family=family, cases=CASES)
    said = {case: result["said"] for case, result in ranks[0].items()}
    for rank in ranks:
        assert {case: result["said"] for case, result in rank.items()} == said
        assert all(result["hooks"] == 0 for result in rank.values())
        for case in (*NO_OVERFLOWS, "healthy"):
            assert rank[case]["scales"] == [2**15, 2**15], case
            assert rank[case]["skipped"] == 0, case
    assert not any(result.get("files") for rank in ranks[1:] for result in rank.values())
    assert said["healthy"] == "nothing"
    files = {case: read(result) for case, result in ranks[0].items()}
    last = 1 if name == "pp2" else 0
    divided = name.startswith("ep2")  # sample 9 is then the second of rank 1

    for case in ("forward", "score"):
        origin = files[case]["overflow.json"]["origin"]
        module, rank = (EXPERT, 1) if divided else (FC1, 0)
        expected = {"kind": "forward", "module": module, "layer": 0, "rank": rank, "stage": 0}
        expected |= {"micro_batch": 0, "expert": 5 if divided else None}
        assert {key: origin[key] for key in expected} == expected
        assert f"began in the forward pass, in {module} (rank {rank}" in said[case]
        assert said[case].startswith("NonFiniteForward: a logit is not finite")

    origin = files["parameter"]["overflow.json"]["origin"]
    assert (origin["kind"], origin["module"], origin["rank"]) == ("parameter", PROJ, 0)

    origin = files["loss forward"]["overflow.json"]["origin"]
    assert (origin["kind"], origin["module"]) == ("forward", "the loss")
    assert origin["rank"] == (1 if divided else last)

    check_samples(files, said, divided, last)
    assert said["backward"].startswith("TooManySkips: 2 updates in a row")
    assert files["backward"]["overflow.json"]["loss_scale"] == 2**19
    origin = files["backward"]["overflow.json"]["origin"]
    assert (origin["kind"], origin["module"], origin["stage"]) == ("backward", QKV, last)
    assert origin["value"] == "the gradient of its input"

    for case in ("loss backward", "minimum"):
        origin = files[case]["overflow.json"]["origin"]
        where = (1, 0) if divided else (last, 2)  # four sequences a micro-batch
        assert (origin["kind"], origin["module"]) == ("backward", "the loss")
        assert (origin["rank"], origin["micro_batch"]) == where
    assert said["minimum"].startswith("TooManySkips: an update overflowed at the minimum")
    assert files["minimum"]["overflow.json"]["loss_scale"] == 1
    assert ranks[0]["minimum"]["skipped"] == 1
    # In the loss backward, a scale of half would not have overflowed.
    assert files["loss backward"]["overflow.json"]["loss_scale"] == 2**14

    assert files["reduction"]["overflow.json"]["origin"]["kind"] == "reduction"
    assert "finite on each rank before it" in said["reduction"]


def check_samples(files, said, divided, last):
    """The sample that had the value is kept, and named. divided: between two data-parallel ranks."""
    owner = 1 if divided else 0
    tokens = models.random_tokens(14, (10,) * 16)
    for case, row, key, value in (
        ("loss forward", 9, "group", 9),
        ("reward", 9, "reward", "nan"),
        ("mu log-prob", 9, "mu_logprobs", [0.0] * 4 + ["-inf"] + [0.0] * 4),
        ("advantage", 8, "advantages", ["nan"] * 9),
    ):
        file = f"faults/step_00007.rank_{last if case.startswith('loss') and last else owner}.json"
        assert f"{file} in the run directory" in said[case]
        sample = files[case][file]
        assert sample[key] == value
        assert sample["quantity"] == case.split()[0] if "loss" in case else case
        assert sample["step"] == 7
        assert sample["prompt_ids"] + sample["response_ids"] == tokens[row]


def read(result):
    """The files of a result. JSON knows no NaN."""
    return {
        name: json.loads(text, parse_constant=pytest.fail)
        for name, text in result.get("files", {}).items()
    }


def test_magnitudes_equal_hugging_face(tmp_path):
    """Largest activation and scaled gradient of each layer, against transformers in fp32."""
    scale, sequences = 2.0**10, models.random_tokens(lengths=(24, 24, 24, 24))
    model = models.hf_model(models.FAMILIES["qwen3"], tmp_path)
    arguments = {"folder": str(tmp_path), "scale": scale, "sequences": sequences}
    (result,) = run_ranks(1, "forensics.magnitudes", **arguments)
    assert "did not happen again" in result["said"]
    expected = {}

    def note(name, what, tensors):
        layer = re.match(r"model\.layers\.\d+|.*", name)[0]
        sizes = [t.abs().max().item() for t in tensors if torch.is_tensor(t)]
        row = expected.setdefault(layer, {"activation": 0, "gradient": 0})
        row[what] = max([row[what], *sizes])

    for name, module in model.named_modules():
        if name in ("", "model"):
            continue
        module.register_forward_hook(lambda _, i, out, name=name: note(name, "activation", [out]))
        module.register_full_backward_hook(
            lambda _, i, out, name=name: note(name, "gradient", [*i, *out])
        )
    tokens = torch.tensor(sequences)
    logprobs = model(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])
    (-scale * logprobs.mean()).backward()
    for name, parameter in model.named_parameters():
        note(name.rsplit(".", 1)[0], "gradient", [parameter.grad])
    names = ["embed_tokens", "layers.0", "layers.1", "norm"]
    for row, name in zip(
        result["layers"], [*(f"model.{n}" for n in names), "lm_head"], strict=True
    ):
        for what in ("activation", "gradient"):
            assert row[what] == pytest.approx(expected[name][what], rel=5e-3), (name, what)
