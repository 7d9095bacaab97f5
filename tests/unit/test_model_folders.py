"""Model folders written by others: read as intended, or refused by file, key or tensor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from launch.rank import _is_final
from megatron_fp16rl import checks as whole_checks
from megatron_fp16rl.checks import check_model
from megatron_fp16rl.cli import app, bench
from megatron_fp16rl.data.tasks import templates
from megatron_fp16rl.models.check import check_folder, check_served_folder
from megatron_fp16rl.models.source import WeightsError, local_folder, whole_folder
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import DatasetTask, Model, RecipeError, load
from megatron_fp16rl.tools.study.run import Study
from megatron_fp16rl.tools.study.run import run as run_study
from tests import models
from tests.conftest import run_ranks

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TINY = "recipes/tiny/dense-grpo-fp16.yaml"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return models.whole_folder(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def put(name, tensor):
    return lambda folder: models.edit_tensors(folder, lambda t: t.update({name: tensor}))


def drop(name):
    return lambda folder: models.edit_tensors(folder, lambda t: t.pop(name))


def say(**changes):
    return lambda folder: models.edit_json(folder / "config.json", **changes)


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def without_prefix(folder):
    tensors = {k.removeprefix("model."): v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)


def as_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def shards(folder, change=lambda index: None, twice=(), left_out=()):
    """In two files and an index, in which `change` changes the map of tensors to files."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    index = {name: file for file, part in parts.items() for name in part}
    change(index)
    for file, part in parts.items():
        wanted = [*(n for n in part if n not in left_out), *(n for n in twice if n not in part)]
        save_file({name: tensors[name] for name in wanted}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


BROKEN = {
    "pointer": (write(WEIGHTS, POINTER), "model.safetensors is a Git LFS pointer.* git lfs pull"),
    "cut": (cut, "model.safetensors is cut short or"),
    "gone": (lambda folder: (folder / WEIGHTS).unlink(), "lacks weights: model.safetensors"),
    "pickle": (
        as_pickle,
        "neither .* not a Hugging Face folder with safetensors, and pytorch_model.bin",
    ),
    "stale index": (
        lambda folder: shards(folder, left_out=[NORM]),
        "index.json has model.norm.weight in b.safetensors, but it is in no file",
    ),
    "in two files": (
        lambda folder: shards(folder, twice=[NORM]),
        "model.norm.weight is in a.safetensors and in b.safetensors",
    ),
    "index leads out": (
        lambda folder: shards(folder, lambda index: index.update({NORM: "../b.safetensors"})),
        r"index.json: model.norm.weight is in '../b.safetensors', which is no file of this folder",
    ),
    "index is cut": (write(INDEX, '{"weight_map"'), "index.json cannot be read"),
    "index and one file": (
        lambda folder: (
            shutil.copy(folder / WEIGHTS, folder / "x")
            and (shards(folder), (folder / "x").rename(folder / WEIGHTS))
        ),
        "holds model.safetensors beside model.safetensors.index.json",
    ),
    "two models": (
        lambda folder: shutil.copy(folder / WEIGHTS, folder / "old.safetensors"),
        "holds old.safetensors beside model.safetensors",
    ),
    "missing": (drop(NORM), "no tensor model.norm.weight that its config.json describes"),
    "left over": (
        put("model.layers.0.self_attn.q_proj.bias", torch.ones(64)),
        "safetensors: model.layers.0.self_attn.q_proj.bias: no parameter of this qwen3 model",
    ),
    "without prefix": (without_prefix, "model.embed_tokens.weight and .*AutoModelForCausalLM"),
    "rows to spare": (
        put(EMBEDDING, torch.zeros(64, 64)),
        r"embed_tokens.weight is \[64, 64\], but .*\[14, 64\].* set vocab_size to 64",
    ),
    "fp8": (put(NORM, torch.ones(64).to(torch.float8_e4m3fn)), "norm.weight is F8_E4M3: quantised"),
    "tied, another head": (
        put(OUTPUT, torch.ones(14, 64)),
        "lm_head.weight is not the embedding.*false",
    ),
    "untied, no head": (
        say(tie_word_embeddings=False),
        "lm_head.weight .*tie_word_embeddings to true",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_would_be_misread_are_refused_by_name(kind, folder):
    check_folder(folder)
    change, message = BROKEN[kind]
    change(folder)
    with pytest.raises(WeightsError, match=message) as error:
        check_folder(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert _is_final(error.value)


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.MOE_FAMILIES])
def test_weights_of_every_family_are_whole(name, tmp_path):
    models.hf_model({**models.FAMILIES, **models.MOE_FAMILIES}[name], tmp_path)
    check_folder(tmp_path)


def test_folders_may_hold_more_than_the_model(folder):
    """The embedding once more, what follows from the configuration, other dtypes, other files."""

    def change(tensors):
        tensors[OUTPUT] = tensors[EMBEDDING].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.layers.2.mtp.weight"] = torch.ones(1)
        tensors[NORM] = tensors[NORM].bfloat16()

    models.edit_tensors(folder, change)
    models.edit_json(folder / "config.json", num_nextn_predict_layers=1)
    shutil.copy(folder / WEIGHTS, folder / "consolidated.safetensors")
    check_folder(folder)
    (folder / "consolidated.safetensors").unlink()
    shards(folder, lambda index: index.pop("model.layers.0.self_attn.rotary_emb.inv_freq"))
    check_folder(folder)


def test_a_model_that_is_only_served_may_be_of_any_family(folder):
    models.edit_json(folder / "config.json", model_type="gemma3")
    check_served_folder(folder)
    models.edit_json(folder / "config.json", model_type="qwen3", quantization_config={"bits": 8})
    check_served_folder(folder)
    with pytest.raises(RecipeError, match=r"config.json: quantization_config is not supported"):
        check_folder(folder)
    cut(folder)
    with pytest.raises(WeightsError, match=r"model.safetensors is cut short"):
        check_served_folder(folder)


def test_a_model_that_sglang_would_serve_wrongly_can_be_learnt_and_not_served(tmp_path):
    """Every command that starts servers refuses it first."""
    folder = models.whole_folder(tmp_path / "model", **models.QWEN3_MOE)
    check_folder(folder)
    check_model(recipe_of(folder, "rollout.replay=recorded"))
    built = {"config": models.QWEN3_MOE, "alphabet": models.ALPHABET}
    builds = models.recipe(model={"build": built})
    on_path = ["model.build=null", f"model.path={folder}"]
    study = Study(folder, ("fp16",), tmp_path / "prompts", samples=1, max_tokens=1)
    for refusing in (
        lambda: check_model(recipe_of(folder)),
        lambda: check_model(builds, partial=True),
        lambda: check_served_folder(folder),
        lambda: run_study(study, tmp_path, print),
        lambda: bench._load(Path(TINY), on_path, None, servers=True),
    ):
        with pytest.raises(RecipeError, match=r"tie_word_embeddings=true: SGLang leaves .*; untie"):
            refusing()


def added(*tokens):
    def change(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        tokenizer.save_pretrained(folder)

    return change


def gone(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


TOKENIZERS = {
    "added": (added("<user>", "<end>"), "'<user>' with id 14 and 1 more, .* vocab_size is 14"),
    "special": (write("special_tokens_map.json", '{"eos_token": "<e>"}'), "'<e>' with id 14"),
    "no file": (gone("tokenizer.json"), "has no tokenizer"),
    "pointer": (write("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
    "cut": (write("tokenizer.json", '{"version"'), "tokenizer.json cannot be read"),
    "not of tokenizers": (write("tokenizer.json", "{}"), "its tokenizer cannot be read"),
    "list": (write("tokenizer_config.json", "[]"), "tokenizer_config.json cannot be read: .* an object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_damaged_tokenizers_are_refused(kind, folder):
    load_tokenizer(folder)
    change, message = TOKENIZERS[kind]
    change(folder)
    with pytest.raises(RecipeError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)


def test_a_model_may_have_more_tokens_than_its_tokenizer(tmp_path, folder):
    models.edit_json(folder / "config.json", vocab_size=64)
    added("<user>", "<end>")(folder)
    assert len(load_tokenizer(folder)) == 16


def test_no_code_of_a_folder_is_run(folder):
    # transformers would run a copy of it, elsewhere.
    evil = f"open({str(folder / 'evil.ran')!r}, 'w')\nclass Evil: pass\n"
    (folder / "evil.py").write_text(evil)
    auto = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    models.edit_json(folder / "config.json", auto_map=auto)
    models.edit_json(folder / "tokenizer_config.json", auto_map=auto)
    check_folder(folder)
    load_tokenizer(folder)
    models.edit_json(folder / "config.json", model_type="evil")
    with pytest.raises(RecipeError, match=r'config.json: model_type="evil" is not supported'):
        check_folder(folder)
    models.edit_json(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    with pytest.raises(RecipeError, match=r"needs code of the folder .* none is ever run"):
        load_tokenizer(folder)
    assert not (folder / "evil.ran").exists()


TEMPLATES = {
    "raises": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message must come "
        "first') }}{% endif %}{{ messages[0]['content'] }}",
        "TemplateError: a system message must come first",
    ),
    "is no Jinja": ("{% for m in messages %}{{ m['content'] }}", "TemplateSyntaxError: .*endfor"),
    "runs on": (
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "it has not ended after 1,000,000 lines",
    ),
    "leaves out the problem": (
        "{% for m in messages %}{% for part in m['content'] %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}{% endfor %}=",
        "leaves out what the user says",
    ),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_chat_templates_that_would_fail_are_refused(kind, folder):
    task = DatasetTask(kind="dataset", path="x.jsonl", template="chat")
    templates.check(task, load_tokenizer(folder), "1+1")
    text, message = TEMPLATES[kind]
    (folder / "chat_template.jinja").write_text(text)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(RecipeError, match=f"task.template=chat: .*{message}") as error:
        templates.check(task, tokenizer, "1+1")
    assert str(folder) in str(error.value)
    assert _is_final(error.value)


def test_a_template_is_held_against_a_problem_of_the_task(folder, tmp_path):
    """Before any is rendered without a limit: this one runs on for what stands in the data alone."""
    loop = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
    text = f"{{% if '§' in messages[0]['content'] %}}{loop}{{% endif %}}"
    (folder / "chat_template.jinja").write_text(text + "{{ messages[0]['content'] }}")
    (tmp_path / "data.jsonl").write_text('{"problem": "7§", "answer": "7"}\n')
    task = {"kind": "dataset", "path": str(tmp_path / "data.jsonl"), "template": "chat"}
    recipe = models.recipe(task={**task, "held_out": 0, "reward": {"kind": "exact"}})
    recipe = recipe.model_copy(update={"model": Model(path=str(folder))})
    check_model(recipe)
    with pytest.raises(RecipeError, match=r"fails for '7§.*not ended after 1,000,000 lines"):
        whole_checks.check(recipe)


def recipe_of(folder, *overrides):
    return load(TINY, ["model.build=null", f"model.path={folder}", *overrides])


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (say(eos_token_id=14), [], r"config.json: eos_token_id=14 is no token .* vocab_size is 14"),
        (say(eos_token_id=[1, -1]), [], "config.json: eos_token_id="),
        (say(pad_token_id=99), [], "config.json: pad_token_id=99"),
        (write("generation_config.json", '{"eos_token_id": [1, 99]}'), [], "generation_config.json: eos_to"),
        (write("generation_config.json", "[]"), [], "generation_config.json cannot be read"),
        (lambda folder: None, ["rollout.stop=['']"], "rollout.stop.0 = '': .* at least 1 character"),
        (
            lambda folder: models.edit_json(folder / "tokenizer_config.json", eos_token=None),
            [],
            "warm_start: the model's tokenizer has no eos_token",
        ),
    ],
)  # fmt: skip
def test_impossible_end_tokens_are_refused(change, overrides, message, folder):
    check_model(recipe_of(folder))
    change(folder)
    with pytest.raises(RecipeError, match=message):
        check_model(recipe_of(folder, *overrides))


def test_a_model_without_padding_or_beginning_may_say_so(folder):
    models.edit_json(folder / "config.json", pad_token_id=-1, bos_token_id=-1)
    check_model(recipe_of(folder))


@pytest.mark.parametrize(
    "command",
    [
        ["train", TINY],
        ["submit", TINY, "--dry-run"],
        ["plan", TINY],
        ["rehearse", TINY],
        ["mismatch"],
        ["eval"],
        ["bench", "rollout", "--recipe", TINY],
        ["bench", "sync", "--recipe", TINY],
        ["doctor", "--warm", TINY],
    ],
    ids=lambda command: command[0],
)
def test_every_command_refuses_before_it_begins(command, folder, tmp_path, monkeypatch):
    cut(folder)
    name, *more = command
    if more:
        more += ["--set", "model.build=null", "--set", f"model.path={folder}"]
        more += ["--set", "slurm={gpus_per_node: 0}", "--set", f"trainer.run_root={tmp_path}/runs"]
    elif name == "mismatch":
        more = [str(folder), "--root", str(tmp_path / "runs")]
    else:
        (tmp_path / "suite.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
        more = [str(folder), "--suite", f"{tmp_path}/suite.jsonl:greedy"]
    done = CliRunner().invoke(app, [name, *more])
    assert done.exit_code == 2, (done.output, done.exception)
    assert "error: " in done.stderr
    assert f"{WEIGHTS} is cut short" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_path_that_is_no_model_folder_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path, reason in (
        (tmp_path / "file", "is a file: it is no Hugging Face folder"),
        (tmp_path, "has no config.json"),
        (tmp_path / ("x" * 300), "cannot be read: .*too long"),
        (tmp_path / "loop", "there is no Hugging Face folder"),
        ("nobody/nothing", "nor a model of that name in the hub's cache"),
    ):
        with pytest.raises(RecipeError, match=rf"model.path = .*{reason}"):
            whole_folder(str(path))
    assert local_folder("nobody/nothing") is None


def test_a_warm_start_that_misses_its_accuracy_is_final():
    """It would do the same again: the ranks are not started for it."""
    assert run_ranks(1, "parity.warm_start_that_fails") == [[True, True]]
