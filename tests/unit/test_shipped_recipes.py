"""The recipes that ship are what they say, fit what they are for, and can be forked."""

import re

import pytest
import yaml

from megatron_fp16rl.models.build import character_tokenizer, model_config
from megatron_fp16rl.models.check import parameters
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.recipe import Model, RecipeError, load
from megatron_fp16rl.tools import recipes
from tests.runs import fp16rl

LARGE = [path for path in recipes.paths() if path.parent.name in ("dense", "moe")]
OF_PAPER = [
    path
    for path in recipes.paths()
    if (path.stem.startswith("qwen3-30b") and not re.search("dapo|dppo|ahead|long", path.stem))
    or (path.parent.name == "sanity" and path.stem != "tiny")
]
# Parameters in billions as the models' own pages and papers have them (GLM's without the layer for multi-token
# prediction, which is not trained; GLM-4.7-Flash's page says 30B with, this is counted by transformers).
PUBLISHED = {
    "qwen3-8b-base": 8.19,
    "qwen3-14b-base": 14.77,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b-base": 30.53,
    "qwen3-30b-a3b-thinking-2507": 30.53,
    "qwen3-235b-a22b": 235.09,
    "llama-3.1-8b-instruct": 8.03,
    "llama-3.1-70b-instruct": 70.55,
    "octothinker-3b-hybrid-base": 3.21,
    "r1-distill-qwen-1.5b": 1.78,
    "r1-distill-qwen-7b": 7.62,
    "qwen2.5-math-1.5b": 1.54,
    "glm-4.5-air": 106.85,
    "glm-4.7-flash": 29.94,
    "gpt-oss-20b": 20.91,
    "qwen3-next-80b-a3b-instruct": 79.67,  # its card rounds to 80
    "deepseek-v3": 671.03,
    "kimi-k2-instruct": 1026.41,  # its card rounds to 1,000; counted by transformers
}


def run(*arguments, code=0):
    return fp16rl("recipes", *arguments, code=code)


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_recipe_is_what_its_name_says(path):
    recipe = load(path)
    assert len(path.read_text().splitlines()) < 40
    assert recipe.name == path.stem
    precision, nodes, gpus = re.fullmatch(r".+-(fp16|bf16)-(\d+)n(\d+)g", path.stem).groups()
    assert recipe.precision.dtype == recipe.precision.served == precision
    assert recipe.slurm.nodes == int(nodes)
    assert recipe.slurm.gpus_per_node == int(gpus)
    assert recipe.provenance.run == "untested"  # until somebody has run it on GPUs
    describe(model_config(recipe.model), recipe.learner)
    twin = load(path, ["precision=bf16"])
    assert twin.precision.dtype == twin.precision.served == "bf16"
    assert set(recipe.difference(twin)) == {"precision.dtype"}


def test_recipes_agree_on_what_they_have_in_common():
    assert len(OF_PAPER) > 15
    sizes = {}
    for path in recipes.paths():
        recipe = load(path)
        assert recipe.provenance is not None, path
        if path in OF_PAPER:
            # github.com/sail-sg/Precision-RL: betas 0.9 and 0.95, eps 1e-15, no weight decay.
            adam = recipe.learner.optimizer
            values = (adam.beta1, adam.beta2, adam.eps, adam.weight_decay)
            assert values == (0.9, 0.95, 1e-15, 0.0), path
            assert recipe.precision.head is None, path
        elif path in LARGE:
            assert recipe.precision.head == "fp32", path
        if path in LARGE and "-long-" not in path.stem:  # which is the one recipe of its model
            sizes.setdefault(recipe.model.path, set()).add(recipe.slurm.nodes)
    assert len(sizes) == 15
    assert all(len(clusters) >= 2 for clusters in sizes.values())


def test_shapes_have_as_many_parameters_as_the_models():
    shapes = list((recipes.RECIPES / "models").glob("*.json"))
    assert {path.stem for path in shapes} == set(PUBLISHED)
    for path in shapes:
        tensors = parameters(model_config(Model(path="a/b", shape=str(path)))).values()
        billions = sum(shape.numel() for shape in tensors) / 1e9
        assert billions == pytest.approx(PUBLISHED[path.stem], abs=0.006), path


def test_the_list_names_all(tmp_path):
    listed = run("list").output
    for path in recipes.paths():
        assert path.stem in listed
    rows = {row["path"]: row for row in yaml.safe_load(run("list", "--json").output)["recipes"]}
    row = rows["moe/qwen3-30b-a3b-seq-mis-fp16-8n8g.yaml"]
    assert (row["nodes"], row["gpus_per_node"]) == (8, 8)
    assert row["layout"] == "TP2 PP2 EP8 DP8"
    assert row["algorithm"] == "dr_grpo + sequence mask"
    assert row["parameters_b"] == pytest.approx(30.53, abs=0.01)
    assert row["provenance"]["run"] == "untested"


def test_every_name_of_the_list_finds_its_recipe():
    for path in recipes.paths():
        listed = str(path.relative_to(recipes.RECIPES))
        for name in (listed, listed.removesuffix(".yaml"), path.stem, f"recipes/{listed}"):
            assert recipes.find(name).resolve() == path
    of_runs = recipes.find("sanity-grpo-token-tis-fp16")
    assert of_runs == recipes.RECIPES / "sanity" / "grpo-token-tis-fp16.yaml"


def test_a_fork_has_its_overrides_and_inherits_the_rest(tmp_path):
    fork = tmp_path / "far" / "fork.yaml"
    fork.parent.mkdir()
    base = "qwen3-30b-a3b-dapo-fp16-4n8g"
    run("new", fork, "--from", base, "--nodes", 8, "--set", "precision=bf16")
    changed = load(recipes.find(base)).difference(load(fork))
    changed = {key: new for key, (_, new) in changed.items() if not key.startswith("provenance.")}
    nodes = {"slurm.learner_nodes": 4, "slurm.rollout_nodes": 4}
    sizes = {"learner.ranks": 32, "rollout.servers": 8}
    assert changed == {"name": "fork", "precision.dtype": "bf16", **nodes, **sizes}
    before = fork.read_text()
    assert "is there already" in run("new", fork, "--from", "grpo-fp16", code=2).stderr
    assert fork.read_text() == before
    nowhere = fork / "fork.yaml"
    refused = run("new", nowhere, "--from", "grpo-fp16", code=2).stderr
    assert "fork.yaml cannot be written" in refused
    shown = run("diff", base, fork).output
    assert "slurm.learner_nodes" in shown
    assert "rollout.prompts" not in shown
    assert "no difference" in run("diff", fork, fork).output


@pytest.mark.parametrize("name", ["2026", "on", "1e5"])
def test_a_name_that_yaml_takes_for_something_else_is_a_name(name, tmp_path):
    fork = tmp_path / "a: b #c" / f"{name}.yaml"
    run("new", fork, "--from", "tiny/dense-grpo-fp16")
    assert load(fork).name == name
    child = tmp_path / "child.yaml"
    run("new", child, "--from", fork)
    assert load(child).name == "child"


def test_a_folder_tells_its_own_shape(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    base = ("--from", "qwen3-8b-dapo-fp16-2n8g", "--model")
    run("new", tmp_path / "fork.yaml", *base, tmp_path)
    model = load(tmp_path / "fork.yaml").model
    assert (model.path, model.shape) == (str(tmp_path), None)
    run("new", tmp_path / "larger.yaml", *base, "Qwen/Qwen3-32B")
    assert load(tmp_path / "larger.yaml").model.shape == str(
        recipes.RECIPES / "models/qwen3-32b.json"
    )


def test_a_template_for_another_model_is_refused_before_anything_is_queued(tmp_path):
    """Of a tokenizer that is here: at the fork and at the plan."""
    character_tokenizer(["_", "$", "1"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    fork = tmp_path / "fork.yaml"
    complaint = "task.template=r1_distill: <.+> is no token"
    sets = ["--from", "r1-distill-qwen-7b-grpo-fp16-2n8g", "--set", f"model.path={tmp_path}"]
    assert re.search(f"changed in .*: {complaint}", run("new", fork, *sets).output)
    assert re.search(f"error: {complaint}", fp16rl("plan", fork, code=2).stderr)
    assert "to be changed" not in run("new", tmp_path / "far.yaml", *sets[:2]).output


LARGE_8B = "qwen3-8b-dapo-fp16-2n8g"


@pytest.mark.parametrize(
    ("source", "option", "complaint"),
    [
        ("qwen3-99b", "--set=name=x", "there is no recipe qwen3-99b"),
        ("qwen3-8b-dapo-fp16-2n9g", "--set=name=x", f"did you mean '{LARGE_8B}'"),
        (LARGE_8B, "--set=learner.rank=8", "did you mean 'ranks'"),
        (LARGE_8B, "--set=learner.ranks=3", "ranks"),
        (LARGE_8B, "--set=slurm.account=${oc.env:HOME}", "by hand"),
        (LARGE_8B, "--nodes=5", "nearest numbers that do: 2, 4, 8"),
        ("tiny/dense-grpo-fp16", "--nodes=2", "has no slurm: section"),
    ],
)
def test_forks_that_cannot_be_leave_nothing_behind(tmp_path, source, option, complaint):
    fork = tmp_path / "fork.yaml"
    refused = run("new", fork, "--from", source, option, code=2)
    assert re.search(complaint, refused.stderr)
    assert not fork.exists()


def test_a_shape_is_found_from_the_file_that_names_it(tmp_path):
    shape = recipes.RECIPES / "models" / "qwen3-8b-base.json"
    (tmp_path / "shape.json").write_text(shape.read_text())
    fork = tmp_path / "fork.yaml"
    base = recipes.find("qwen3-8b-dapo-fp16-2n8g")
    fork.write_text(f"base: {base}\nname: mine\nmodel: {{shape: shape.json}}\n")
    assert load(fork).model.shape == str(tmp_path / "shape.json")
    assert model_config(load(fork).model).hidden_size == 4096
    fork.write_text(f"base: {base}\nname: mine\nmodel: {{shape: none.json}}\n")
    with pytest.raises(RecipeError, match=r"none.json'?: there is no such file"):
        model_config(load(fork).model)
