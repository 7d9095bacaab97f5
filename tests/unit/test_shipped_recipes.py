"""The recipes that ship are what they say, fit what they are for, and can be forked."""

import re

import pytest
import yaml
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.models.build import character_tokenizer, model_config
from megatron_fp16rl.models.families import describe
from megatron_fp16rl.recipe import RecipeError, load
from megatron_fp16rl.tools import recipes
from tests.conftest import run_ranks

LARGE = [path for path in recipes.paths() if path.parent.name in ("dense", "moe")]
# Parameters in billions as the models' own pages and papers have them (GLM-4.5-Air without the layer for
# multi-token prediction, which is not trained).
PUBLISHED = {
    "qwen3-8b-base": 8.19,
    "qwen3-14b-base": 14.77,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b-base": 30.53,
    "qwen3-235b-a22b": 235.09,
    "llama-3.1-8b-instruct": 8.03,
    "llama-3.1-70b-instruct": 70.55,
    "octothinker-3b-hybrid-base": 3.21,
    "r1-distill-qwen-1.5b": 1.78,
    "r1-distill-qwen-7b": 7.62,
    "qwen2.5-math-1.5b": 1.54,
    "glm-4.5-air": 106.85,
    "deepseek-v3": 671.03,
}


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["recipes", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("path", recipes.paths(), ids=lambda path: path.stem)
def test_a_recipe_is_what_its_name_says(path):
    recipe = load(path)
    assert recipe.provenance is not None
    assert len(path.read_text().splitlines()) < 40 or path.parent.name in ("tiny", "sanity")
    if path not in LARGE:
        return
    assert recipe.name == path.stem
    precision, nodes, gpus = re.fullmatch(r".+-(fp16|bf16)-(\d+)n(\d+)g", path.stem).groups()
    assert recipe.precision.dtype == recipe.precision.served == precision
    assert recipes.nodes(recipe) == int(nodes)
    assert recipe.slurm.gpus_per_node == int(gpus)
    assert recipe.provenance.run == "untested"  # until somebody has run it on GPUs
    describe(model_config(recipe.model), recipe.learner)
    twin = load(path, ["precision=bf16"])
    assert twin.precision.dtype == twin.precision.served == "bf16"
    assert set(recipes.difference(recipe, twin)) == {"precision.dtype"}


def test_recipes_of_the_paper_have_its_authors_adam():
    """github.com/sail-sg/Precision-RL: betas 0.9 and 0.95, eps 1e-15, no weight decay."""
    of_paper = [
        path for path in LARGE if path.stem.startswith("qwen3-30b") and "dapo" not in path.stem
    ]
    of_paper += [p for p in recipes.paths() if p.parent.name == "sanity" and p.stem != "tiny"]
    assert len(of_paper) > 15
    for path in of_paper:
        adam = load(path).learner.optimizer
        values = (adam.beta1, adam.beta2, adam.eps, adam.weight_decay)
        assert values == (0.9, 0.95, 1e-15, 0.0), path


def test_every_large_model_has_two_sizes_of_cluster():
    sizes = {}
    for path in LARGE:
        recipe = load(path)
        sizes.setdefault(recipe.model.path, set()).add(recipes.nodes(recipe))
    assert len(sizes) == 11
    assert all(len(found) >= 2 for found in sizes.values())


@pytest.mark.parametrize(
    "path", sorted((recipes.RECIPES / "models").glob("*.json")), ids=lambda p: p.stem
)
def test_shapes_have_as_many_parameters_as_the_models(path):
    assert run_counts()[path.stem] == pytest.approx(PUBLISHED[path.stem], abs=0.006)


_counts: dict[str, float] = {}


def run_counts():
    """By transformers' own models, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_fp16rl.recipe import Model

    if not _counts:
        for path in (recipes.RECIPES / "models").glob("*.json"):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    model_config(Model(path="a/b", shape=str(path)))
                )
            _counts[path.stem] = sum(p.numel() for p in model.parameters()) / 1e9
    return _counts


@pytest.mark.timeout(900)
def test_all_recipes_fit_and_export_their_models_whole():
    """At their true sizes, every stage of every layout built by Megatron."""
    found = run_ranks(1, "planning.catalogue", timeout=800, paths=[str(p) for p in LARGE])[0]
    assert set(found) == {path.stem for path in LARGE}
    for name, plan in found.items():
        assert plan["reasons"] == [], name
        assert plan["margin_gib"] > 0, name
        assert plan["tensors"] == plan["of_transformers"], name
        assert plan["parameters_b"] == pytest.approx(plan["of_transformers_b"], rel=1e-9), name


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


def test_a_fork_inherits_and_scales(tmp_path):
    mine = tmp_path / "far" / "mine.yaml"
    mine.parent.mkdir()
    run("new", mine, "--from", "qwen3-30b-a3b-dapo-fp16-4n8g", "--nodes", 6, "--model", "a/b")
    forked, base = load(mine), load(recipes.find("qwen3-30b-a3b-dapo-fp16-4n8g"))
    assert forked.name == "mine"
    assert recipes.nodes(forked) == 6
    assert forked.learner.ranks == 8 * forked.slurm.learner_nodes
    assert forked.rollout.servers * forked.rollout.tensor_parallel == 8 * forked.slurm.rollout_nodes
    changed = recipes.difference(base, forked)
    assert changed["model.path"] == ("Qwen/Qwen3-30B-A3B-Base", "a/b")
    assert "learner.tensor_parallel" not in changed
    assert "#" in mine.read_text()
    before = mine.read_text()
    assert "is there already" in run("new", mine, "--from", "grpo-fp16", code=2).stderr
    assert mine.read_text() == before
    shown = run("diff", "qwen3-30b-a3b-dapo-fp16-4n8g", mine).output
    assert "slurm.learner_nodes" in shown
    assert "rollout.prompts" not in shown
    assert "no difference" in run("diff", mine, mine).output


def test_what_a_fork_has_as_comments_is_what_it_inherits(tmp_path):
    """Uncommented, every key is a key, in its place, with the value that it had anyway."""
    for name in ("qwen3-30b-a3b-dapo-fp16-4n8g", "tiny/dense-grpo-fp16.yaml", "smollm2-math-fp16"):
        mine = tmp_path / f"{name.replace('/', '-').removesuffix('.yaml')}.yaml"
        more = ["--nodes", 6] if "30b" in name else []
        run("new", mine, "--from", name, *more)
        forked, lines = load(mine), mine.read_text().splitlines()
        begin = next(i for i, line in enumerate(lines) if line.startswith("base:"))
        bare = [re.sub(r"^( *)# ", r"\1", line) for line in lines[begin:]]
        assert bare != lines[begin:]
        mine.write_text("\n".join(bare) + "\n")
        assert recipes.difference(forked, load(mine)) == {}


def test_nodes_are_shared_out_as_the_recipe_does():
    """All of them, in a like proportion, and as full as they were; nothing else changes."""
    put = 0
    for path in LARGE:
        recipe = load(path)
        for wanted in (3, 8, 12, 48):
            try:
                now = recipes.on_nodes(recipe, wanted)
            except RecipeError as error:
                near = re.search(r"that can: ([\d, ]+)$", str(error))[1].split(", ")
                assert str(wanted) not in near
                assert recipes.nodes(recipes.on_nodes(recipe, int(near[0]))) == int(near[0])
                continue
            put += 1
            assert recipes.nodes(now) == wanted
            a, b = recipe.slurm, now.slurm
            assert b.learner_nodes * recipe.learner.ranks == a.learner_nodes * now.learner.ranks
            sampling, before = (s.rollout_nodes or s.learner_nodes for s in (b, a))
            assert sampling * recipe.rollout.servers == before * now.rollout.servers
            changed = {key.split(".")[-1] for key in recipes.difference(recipe, now)}
            assert changed <= {"learner_nodes", "rollout_nodes", "ranks", "servers"}
    assert put > 40


def test_neither_learning_nor_sampling_has_half_its_share_or_less_or_twice_that():
    ways = 0
    for path in LARGE:
        recipe = load(path)
        for wanted in range(1, 101):
            for changes in recipes._ways(
                recipe, wanted
            ):  # of which the first that is valid is taken
                ways += 1
                for kind in ("learner_nodes", "rollout_nodes"):
                    share = getattr(recipe.slurm, kind) * wanted / recipes.nodes(recipe)
                    given = changes[f"slurm.{kind}"]
                    assert share == given == 0 or share < 2 * given < 4 * share, (path.stem, wanted)
    assert ways > 10_000


@pytest.mark.parametrize("name", ["2026", "on", "1e5", "null"])
def test_a_name_that_yaml_takes_for_something_else_is_a_name(name, tmp_path):
    mine = tmp_path / "a: b #c" / f"{name}.yaml"
    run("new", mine, "--from", "tiny/dense-grpo-fp16")
    assert load(mine).name == name
    child = tmp_path / "child.yaml"
    run("new", child, "--from", mine)
    assert load(child).name == "child"
    assert set(recipes.difference(load(mine), load(child))) <= {
        *("name", "provenance.algorithm", "provenance.layout")
    }


def test_the_head_of_a_fork_has_a_command_that_works_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    only_a_base = recipes.RECIPES / "sanity" / "base.yaml"
    sources = {"a/one.yaml": "grpo-fp16", "two.yaml": "a/one.yaml", "three.yaml": only_a_base}
    for mine, source in sources.items():
        run("new", mine, "--from", source)
        command = re.search(r"fp16rl recipes (diff .+) THIS_FILE", (tmp_path / mine).read_text())[1]
        assert "provenance.algorithm" in run(*command.split(), mine).output


def test_where_nothing_can_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    mine = tmp_path / "file" / "mine.yaml"
    assert "mine.yaml cannot be written" in run("new", mine, "--from", "grpo-fp16", code=2).stderr


def test_a_folder_tells_its_own_shape(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    base = ("--from", "qwen3-8b-dapo-fp16-2n8g")
    assert (
        "is not here" not in run("new", tmp_path / "mine.yaml", *base, "--model", tmp_path).output
    )
    model = load(tmp_path / "mine.yaml").model
    assert (model.path, model.shape) == (str(tmp_path), None)
    said = run("new", tmp_path / "far.yaml", *base, "--model", "/far/away").output
    assert re.search(r"/far/away is not here: .* take \S+qwen3-8b-base.json", said)


def test_a_template_for_another_model_is_said_before_anything_is_queued(tmp_path):
    """Of a tokenizer that is here: at the fork, at the plan and at the submission."""
    character_tokenizer(["_", "$", "1"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    mine = tmp_path / "mine.yaml"
    said = "task.template=r1_distill: <.+> is no token"
    base = ("--from", "r1-distill-qwen-7b-grpo-fp16-2n8g")
    assert re.search(f"changed in .*: {said}", run("new", mine, *base, "--model", tmp_path).output)
    for command in ("plan", "submit"):
        refused = CliRunner().invoke(app, [command, str(mine)])
        assert refused.exit_code == 2, refused.output
        assert re.search(f"error: {said}", refused.stderr)
    assert "to be changed" not in run("new", tmp_path / "far.yaml", *base).output


@pytest.mark.parametrize(
    ("source", "more", "complaint"),
    [
        ("qwen3-99b", [], "there is no recipe qwen3-99b"),
        ("qwen3-8b-dapo-fp16-2n9g", [], "did you mean 'qwen3-8b-dapo-fp16-2n8g'"),
        ("qwen3-8b-dapo-fp16-2n8g", ["--nodes", 5000], "can: 29, 30, 31"),
        ("qwen3-30b-a3b-dapo-fp16-4n8g", ["--nodes", 2], "Nearest numbers that can: 3, 4, 5"),
        ("qwen3-8b-dapo-fp16-2n8g", ["--nodes", 64], "prompts=32 .* 128 data.* can: 29, 30, 31"),
        ("tiny/dense-grpo-fp16.yaml", ["--nodes", 2], "has no slurm: section"),
        ("tiny/dense-grpo-fp16.yaml", ["--model", "x"], "its model is built on the spot"),
    ],
)
def test_forks_that_cannot_be_leave_nothing_behind(tmp_path, source, more, complaint):
    mine = tmp_path / "mine.yaml"
    assert re.search(complaint, run("new", mine, "--from", source, *more, code=2).stderr)
    assert not mine.exists()


def test_a_shape_is_found_from_the_file_that_names_it(tmp_path):
    shape = recipes.RECIPES / "models" / "qwen3-8b-base.json"
    (tmp_path / "shape.json").write_text(shape.read_text())
    mine = tmp_path / "mine.yaml"
    base = recipes.find("qwen3-8b-dapo-fp16-2n8g")
    mine.write_text(f"base: {base}\nname: mine\nmodel: {{shape: shape.json}}\n")
    assert load(mine).model.shape == str(tmp_path / "shape.json")
    assert model_config(load(mine).model).hidden_size == 4096
    mine.write_text(f"base: {base}\nname: mine\nmodel: {{shape: none.json}}\n")
    with pytest.raises(RecipeError, match=r"none.json'?: there is no such file"):
        model_config(load(mine).model)
