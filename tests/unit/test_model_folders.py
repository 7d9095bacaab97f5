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
from megatron_fp16rl.models.check import check_folder, check_served_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder, write_folder
from megatron_fp16rl.models.source import WeightsError, local_folder, whole_folder
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import Model, RecipeError, load
from megatron_fp16rl.tools.study.run import Study
from megatron_fp16rl.tools.study.run import run as run_study
from tests import models
from tests.conftest import run_ranks

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
TINY = "recipes/tiny/dense-grpo-fp16.yaml"
LOOP = "{% for number in range(9000) %}"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return models.whole_folder(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def say(file="config.json", **changes):
    return lambda folder: models.edit_json(folder / file, **changes)


def put(name, tensor):
    return lambda folder: models.edit_tensors(folder, lambda t: t.update({name: tensor}))


def drop(name):
    return lambda folder: models.edit_tensors(folder, lambda t: t.pop(name))


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def without_prefix(folder):
    tensors = {k.removeprefix("model."): v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)


def as_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def also_as(name):
    return lambda folder: shutil.copy(folder / WEIGHTS, folder / name)


def in_shards(index=None, also_in_a=(), left_out=(), keep_whole=False):
    """Weights in two files and an index. index: changes of its map of tensors to files; ... removes one."""

    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        names = sorted(tensors)
        parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
        files = {name: file for file, part in parts.items() for name in part} | (index or {})
        parts["a.safetensors"] += also_in_a
        for file, part in parts.items():
            wanted = {name: tensors[name] for name in part if name not in left_out}
            save_file(wanted, folder / file)
        if not keep_whole:
            (folder / WEIGHTS).unlink()
        files = {name: file for name, file in files.items() if file is not ...}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))

    return change


def with_tokens(*tokens):
    def change(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        tokenizer.save_pretrained(folder)

    return change


def recipe_of(folder, *overrides):
    return load(TINY, ["model.build=null", f"model.path={folder}", *overrides])


# What a refusal says, and how a folder comes to it: of its weights, its tokens, its chat template.
WRONG = {
    "safetensors is a Git LFS pointer.* git lfs pull": write(WEIGHTS, POINTER),
    "model.safetensors is cut short or": cut,
    "lacks weights: model.safetensors": remove(WEIGHTS),
    "not a Hugging Face folder with safetensors, and pytorch_model.bin": as_pickle,
    "index.json has model.norm.weight in b.*, but it is in no file": in_shards(left_out=[NORM]),
    "norm.weight is in a.safetensors and in b.safetensors": in_shards(also_in_a=[NORM]),
    "norm.weight is in '../b', which is no file of this": in_shards(index={NORM: "../b"}),
    "index.json cannot be read": write(INDEX, '{"weight_map"'),
    "holds model.safetensors beside model.safetensors.index.json": in_shards(keep_whole=True),
    "holds old.safetensors beside model.safetensors": also_as("old.safetensors"),
    "no tensor model.norm.weight that its config.json describes": drop(NORM),
    "safetensors: .*q_proj.bias: no parameter of this qwen3 model": put(BIAS, torch.ones(64)),
    "model.embed_tokens.weight and .*AutoModelForCausalLM": without_prefix,
    "asks for \\[14, 64\\].* set vocab_size to 64": put(EMBEDDING, torch.zeros(64, 64)),
    "norm.weight is F8_E4M3: quantised": put(NORM, torch.ones(64).to(torch.float8_e4m3fn)),
    "lm_head.weight is not the embedding.*false": put(OUTPUT, torch.ones(14, 64)),
    "lm_head.weight .*tie_word_embeddings to true": say(tie_word_embeddings=False),
    "'<user>' with id 14 and 1 more, .*vocab_size is 14": with_tokens("<user>", "<end>"),
    "'<e>' with id 14": say("special_tokens_map.json", eos_token="<e>"),
    "has no tokenizer": remove("tokenizer.json"),
    "tokenizer.json is a Git LFS pointer": write("tokenizer.json", POINTER),
    "tokenizer.json cannot be read": write("tokenizer.json", '{"version"'),
    "its tokenizer cannot be read": write("tokenizer.json", "{}"),
    "tokenizer_config.json cannot be read: .* an object": write("tokenizer_config.json", "[]"),
    "no eos_token to end answers with": say("tokenizer_config.json", eos_token=None),
    "config.json: eos_token_id=14 is no token .*vocab_size is 14": say(eos_token_id=14),
    "config.json: eos_token_id=.*-1": say(eos_token_id=[1, -1]),
    "config.json: pad_token_id=99": say(pad_token_id=99),
    "generation_config.json: eos_to": say("generation_config.json", eos_token_id=[1, 99]),
    "generation_config.json cannot be read": write("generation_config.json", "[]"),
}
WRONG_TEMPLATES = {
    "TemplateError: system comes first": "{{ raise_exception('system comes first') }}",
    "TemplateSyntaxError: .*endfor": "{% for m in messages %}{{ m['content'] }}",
    "it has not ended after 1,000,000 lines": f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}",
    "leaves out what the user says": "{{ messages[0]['content'].text }}=",
}
CHAT = "task={kind: dataset, path: x, template: chat, reward: {kind: exact}}"


@pytest.mark.parametrize("message", [*WRONG, *WRONG_TEMPLATES])
def test_what_would_be_misread_is_refused_by_name(message, folder):
    recipe = recipe_of(folder, *(["warm_start=null", CHAT] if message in WRONG_TEMPLATES else []))
    check_model(recipe)
    if message in WRONG:
        WRONG[message](folder)
    else:
        (folder / "chat_template.jinja").write_text(WRONG_TEMPLATES[message])
    with pytest.raises(RecipeError, match=message) as error:
        check_model(recipe)
    assert str(folder) in str(error.value) or message.startswith("no eos_token")
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
    # Without padding or beginning.
    say(num_nextn_predict_layers=1, pad_token_id=-1, bos_token_id=-1)(folder)
    also_as("consolidated.safetensors")(folder)
    check_folder(folder)
    (folder / "consolidated.safetensors").unlink()
    in_shards(index={"model.layers.0.self_attn.rotary_emb.inv_freq": ...})(folder)
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


def test_a_model_may_have_more_tokens_than_its_tokenizer(tmp_path, folder):
    models.edit_json(folder / "config.json", vocab_size=64)
    with_tokens("<user>", "<end>")(folder)
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


def test_kimi_k2_is_read_as_deepseek_v3_and_exported_under_its_own_name(tmp_path):
    """With DeepSeek-V3's class, an alias, and code that is never run, as Moonshot names its models."""
    kimi = models.whole_folder(tmp_path / "kimi", **models.KIMI_K2, tie_word_embeddings=False)
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    say(model_type="kimi_k2", auto_map=code)(kimi)
    check_served_folder(kimi)
    assert load_config(kimi).model_type == "deepseek_v3"
    assert load_tokenizer(kimi).encode("1+1=")
    source = HFFolder(kimi)
    tensors = ((name, source.read(name).half()) for name in source.names())
    write_folder(tmp_path / "export", kimi, "float16", tensors)
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    assert exported["model_type"] == "kimi_k2"
    check_folder(tmp_path / "export")
    for architectures in (["KimiK2ForCausalLM"], ..., []):
        say(architectures=architectures)(kimi)
        with pytest.raises(RecipeError, match=r'"kimi_k2" is not .*; .*kimi_k2 of DeepseekV3For'):
            load_config(kimi)


def test_a_template_is_held_against_a_problem_of_the_task(folder, tmp_path):
    """Before any is rendered without a limit: this one runs on for what stands in the data alone."""
    runs_on = f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}"
    text = f"{{% if '§' in messages[0]['content'] %}}{runs_on}{{% endif %}}"
    (folder / "chat_template.jinja").write_text(text + "{{ messages[0]['content'] }}")
    (tmp_path / "data.jsonl").write_text('{"problem": "7§", "answer": "7"}\n')
    task = {"kind": "dataset", "path": str(tmp_path / "data.jsonl"), "template": "chat"}
    recipe = models.recipe(task={**task, "held_out": 0, "reward": {"kind": "exact"}})
    recipe = recipe.model_copy(update={"model": Model(path=str(folder))})
    check_model(recipe)
    with pytest.raises(RecipeError, match=r"fails for '7§.*not ended after 1,000,000 lines"):
        whole_checks.check(recipe)


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
