"""Recipes: inheritance, overrides, and errors that say what to do."""

import textwrap

import pytest

from megatron_fp16rl.recipe import RecipeError, load
from tests.conftest import ROOT

BASE = """
    name: parent
    model: {path: /models/base}
    task: {kind: addition}
    rollout: {prompts: 8, samples: 4, max_new_tokens: 5}
    learner: {ranks: 4, tensor_parallel: 2, global_batch_size: 16}
    precision: {dtype: fp16, loss_scale: {initial: 4096}}
    trainer: {steps: 10}
"""


def write(folder, name, text):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def base(tmp_path):
    return write(tmp_path, "parent.yaml", BASE)


def test_a_child_overrides_its_base_and_set_overrides_both(base, tmp_path):
    child = write(tmp_path, "child.yaml", "base: parent.yaml\nrollout: {samples: 8}\n")
    recipe = load(child, ["trainer.steps=3", "rollout.sglang.context_length=512"])
    assert recipe.name == "parent"
    assert (recipe.rollout.prompts, recipe.rollout.samples) == (8, 8)
    assert recipe.trainer.steps == 3
    assert recipe.rollout.sglang == {"context_length": 512}
    assert recipe.learner.data_parallel == 2


def test_precision_is_switched_by_one_word_and_keeps_its_loss_scale(base):
    assert load(base).precision.served == "fp16"
    recipe = load(base, ["precision=bf16"])
    assert (recipe.precision.dtype, recipe.precision.served) == ("bf16", "bf16")
    assert recipe.precision.loss_scale.initial == 4096
    assert load(base, ["precision.head=fp32", "precision=bf16"]).precision.head == "fp32"
    mixed = load(base, ["precision.rollout=bf16"])
    assert (mixed.precision.dtype, mixed.precision.served) == ("fp16", "bf16")


DATASET = "task={kind: dataset, path: a.jsonl"


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        (["gates=[{metrik: x}]"], "unknown key 'gates.0.metrik'; did you mean 'metric'"),
        (["precision.loss_scale.initial=0.25"], r"loss_scale\b.*initial=0.25 is below minimum=1: raise initial, or lower"),
        (["rollout.sampels=3"], r"--set: unknown key 'rollout.sampels'; did you mean 'samples'"),
        (["task.digits=9"], "task: digits=9: all sums are held in memory; take at most 3, or a file"),
        ([DATASET + ", answr: b}"], r"unknown key 'task.answr'; did you mean 'answer'"),
        ([DATASET + ", reward: {kind: math_verify, timeout: 1}}"], r"unknown key 'task.reward.timeout'; did you mean 'timeout_s'"),
        ([DATASET + ", reward: {kind: function, path: mine.py}}"], r"task.reward.path = 'mine.py'"),
        (["task={kind: dataset}"], r"task: path=None and name=None: give either"),
        ([DATASET + "}", "task.name=b"], r"task: path=a.jsonl and name=b: give either path.* and null for the other"),
        ([DATASET + ", config: main}"], r"task: config=main and revision=None go with name, .* path=a.jsonl: set them to null"),
        (["task={kind: math, path: a.jsonl}"], r"task: .*'addition', 'dataset'"),
        (["zzz=3"], r"unknown key 'zzz'; known keys: .*trainer"),
        (["precision=fp17"], r"precision.dtype = 'fp17': .*'fp16', 'bf16' or 'fp32'"),
        (["rollout.temperature=0"], r"rollout.temperature = 0: .*greater than 0"),
        (["trainer.steps=many"], r"trainer.steps = 'many': .*integer"),
        (["learner.ranks=3"], r"learner: ranks=3 is not a multiple of tensor_parallel=2"),
        (["rollout.prompts=7"], r"rollout.prompts=7 .* 2 data-parallel ranks; nearest: 6, 8"),
        (["learner.global_batch_size=12"], r"global_batch_size=12 must divide the 32 .*nearest: 4, 8, 16"),
        (["rollout.samples=1"], r"rollout.samples must be at least 2"),
        (["rollout.router_replay=true", "learner.megatron.moe_router_fusion=true"], r"remove moe_router_fusion .* from learner.megatron"),
        (["learner.ddp.overlap_grad_reduces=true"], r"learner: ddp.overlap_grad_reduces=True is no option .*; did you mean overlap_grad_reduce\?"),
        (["learner.ddp.grad_reduce_in_fp32=false"], r"learner: ddp.grad_reduce_in_fp32=False is not supported: gradients are always summed in fp32; remove it"),
        (["learner.ddp.overlap_grad_reduce=1"], r"learner: ddp.overlap_grad_reduce=1: write true or false"),
        (["learner.ddp={overlap_grad_reduce: true, bucket_size: 0}"], r"ddp.bucket_size=0: write an integer above 0"),
        (["learner.ddp.bucket_size=9"], r"ddp.bucket_size=9 needs overlap_grad_reduce; set it, or remove bucket_size"),
        (["learner.ddp={overlap_grad_reduce: true, overlap_param_gather: true}"], r"ddp.overlap_param_gather needs distributed_optimizer: true"),
        (["learner.optimizer.megatron.adam_eps=1e-15"], r"learner.optimizer: megatron.adam_eps=1e-15 is not supported: set learner.optimizer.eps"),
        (["learner.optimizer.megatron.optimizer_cpu_offload=true"], r"megatron.optimizer_cpu_offload=True is not supported: Adam's states"),
        (["rollout.sglang={dp-size: 2}"], r"rollout.sglang.dp_size: .*cannot take weights in slices; set sync.transport: distributed"),
        (["rollout.sglang={enable-fp32-lm-head: true}"], r"rollout.sglang.enable_fp32_lm_head=True, but precision.head=None: .*remove the first"),
        (["rollout.sglang.enable_fp32_lm_head=false", "precision.head=fp32"], r"enable_fp32_lm_head=False, but precision.head='fp32'"),
        (["learner.megatron.defer_embedding_wgrad_compute=true", "precision.head=fp32"], r"precision.head='fp32': learner.megatron.defer_emb"),
        (["model.build.alphabet=abc"], r"model.build.config' is required"),
        (["sync.verify=0"], r"^--set: sync.verify = 0: .*'first' or 'always'; or .*greater than 0$"),
        (["slurm.options={mem: [1]}"], r"^--set: slurm.options.mem = \[1\]: .*string.*; or .*integer"),
        (["rollout.stop=['']"], r"^--set: rollout.stop.0 = ''"),
        (["rollout.temperature=1e-9"], r"temperature = 1e-09: SGLang .* takes the likeliest"),
        (["rollout.refill_rounds=2", "rollout.samples=1", "algorithm.advantage=reinforce", "learner.global_batch_size=8"],
         r"refill_rounds=2 replaces prompts .* rollout.samples=1; remove it"),
        (["gates=[{metric: x, above: 0, below: 1}]"], r"gates.0: above=0 and below=1: .* so every value would; swap them"),
        (["warm_start={check_every: 9, max_updates: 8}"], r"warm_start: check_every=9 is above max_updates=8"),
        (["warm_start={global_batch_size: 7}"], r"warm_start.global_batch_size=7 .* of 2, .*; nearest: 6, 8"),
        (["algorithm={loss: dppo_tv, old_policy: rollout, delta: 12.5}"], r"delta=12.5 bounds .* below 1; its authors' is 0.15"),
        (["trainer.suites=[{suite: 'a/x.jsonl:avg@2'}, {suite: 'b/x.jsonl:avg@2'}]"], r"two are logged as eval/x/avg@2"),
        (["trainer.suites=[{suite: 'x.jsonl:avg@2', top_p: 0}]"], r"trainer.suites.0.top_p = 0: .*greater than 0"),
        (["base=other.yaml"], r"^--set base=other.yaml: base: stands in a file"),
        (["learner.optimizer={decay: linear, min_lr: 1}"], r"optimizer: decay=linear: min_lr=1 is above lr=1e-06"),
        (["learner.megatron.bf16=true"], r"learner: megatron.bf16=True: set precision.dtype; remove it"),
        (["learner.megatron.num_layers=3"], r"megatron.num_layers=3: config.json of the model says it; remove it"),
        (["rollout.sglang.dtype=bfloat16"], r"sglang: dtype: fp16rl sets that itself; remove it \(precision.dtype or"),
        (["rollout.sglang={tp-size: 2}"], r"tp-size: fp16rl sets that itself; remove it \(rollout.tensor_parallel"),
        (["rollout.sglang={--tp: 2}"], r"'--tp' is no option of sglang.launch_server"),
        (["rollout.sglang={a-b: 2, a_b: 3}"], r"a-b is there with dashes and with underscores"),
        (["rollout.sglang.context-length=abc"], r"context-length='abc': write a whole number above 0"),
        (["rollout.sglang.mem_fraction_static=85"], r"mem_fraction_static=85: write a number between 0 and 1"),
        (["trainer.run_root="], r"trainer.run_root = ''"),
    ],
)  # fmt: skip
def test_errors_name_the_key_and_the_remedy(base, overrides, pattern):
    with pytest.raises(RecipeError, match=pattern):
        load(base, overrides)


def test_null_takes_back_what_a_base_passes_on(base, tmp_path):
    passed = "rollout: {sglang: {a: 1, b: 2}}\nslurm: {options: {account: me, qos: low}, environment: {X: 1, Y: 2}}\n"
    write(tmp_path, "middle.yaml", f"base: parent.yaml\n{passed}")
    keys = ("rollout.sglang.a", "slurm.options.account", "slurm.environment.X")
    recipe = load(tmp_path / "middle.yaml", [f"{key}=null" for key in keys])
    assert recipe.rollout.sglang == {"b": 2}
    assert (recipe.slurm.options, recipe.slurm.environment) == ({"qos": "low"}, {"Y": "2"})


def test_home_is_where_a_shell_would_find_it(base, tmp_path, monkeypatch):
    """In --set KEY=~/x no shell expands it, nor in a file; a folder called ~ is nobody's wish."""
    monkeypatch.setenv("HOME", str(tmp_path))
    task = "task={kind: dataset, path: ~/a.jsonl, reward: {kind: function, path: '~/r.py:f'}}"
    settings = [
        "trainer.run_root=~/runs",
        task,
        "rollout.function=~/f.py:f",
        "model.shape=~/c.json",
    ]
    recipe = load(write(tmp_path, "child.yaml", "base: ~/parent.yaml\n"), settings)
    task, model = recipe.task, recipe.model
    found = [recipe.trainer.run_root, task.path, task.reward.path, recipe.rollout.function]
    names = ("runs", "a.jsonl", "r.py:f", "f.py:f", "c.json")
    assert [*found, model.shape] == [f"{tmp_path}/{name}" for name in names]


def test_an_error_names_the_file_that_holds_the_key(tmp_path, base):
    """About several keys, or about none, the file that was asked for."""
    write(tmp_path, "middle.yaml", "base: parent.yaml\ntrainer: {stepz: 3}\n")
    child = write(tmp_path, "child.yaml", "base: middle.yaml\nname: child\n")
    write(tmp_path, "nothing.yaml", "name: x\n")
    empty = write(tmp_path, "empty.yaml", "base: nothing.yaml\n")
    for path, overrides, message in (
        (child, [], r"middle.yaml: unknown key 'trainer.stepz'; .*'steps'"),
        (base, ["rollout.prompts=7", "name=x"], r"^\S+parent.yaml: rollout.prompts=7 .*: 6, 8"),
        (empty, [], r"^\S+empty.yaml: 'model' is required"),
    ):
        with pytest.raises(RecipeError, match=message):
            load(path, overrides)


HUB = """
    base: parent.yaml
    task: {kind: dataset, name: owner/set, config: en, revision: abc, split: all, problem: prompt,
           answer: solution, held_out: 0.3, instruction: Box it., reward: {kind: exact}}
"""


def test_data_of_ones_own_takes_the_place_of_the_bases(base, tmp_path):
    """In a file and with --set, in whatever order, and back again; how it is asked and graded stays.

    A task of another kind keeps what all kinds have.
    """
    hub = write(tmp_path, "hub.yaml", HUB)
    mine = write(tmp_path, "mine.yaml", "base: hub.yaml\ntask: {path: a.jsonl}\n")
    for task in (load(mine).task, load(hub, ["task.path=a.jsonl"]).task):
        assert (task.path, task.name, task.config, task.revision) == ("a.jsonl", None, None, None)
        assert (task.split, task.problem, task.answer) == ("train", "problem", "answer")
        assert (task.held_out, task.instruction, task.reward.kind) == (0.3, "Box it.", "exact")
    columns = ["task.problem=q", "task.path=a.jsonl", "task.answer=a"]
    assert load(hub, columns).task == load(hub, columns[::-1]).task
    assert (load(hub, columns).task.problem, load(hub, columns).task.answer) == ("q", "a")
    other = load(mine, ["task.path=b.jsonl"]).task
    assert (other.path, other.problem) == ("b.jsonl", "problem")
    back = load(mine, ["task.name=owner/other"]).task
    assert (back.path, back.name, back.config) == (None, "owner/other", None)
    again = load(hub, ["task.path=null", "task.name=owner/set"]).task
    assert again == load(hub).task
    write(tmp_path, "columns.yaml", "base: mine.yaml\ntask: {problem: q}\n")
    assert load(tmp_path / "columns.yaml", ["task.path=c.jsonl"]).task.problem == "q"
    assert load(hub, ["task.kind=addition"]).task.held_out == 0.3
    assert load(hub, ["task.kind=dataset"]).task == load(hub).task


def test_an_item_of_a_list_cannot_be_set_and_the_message_says_what_can(base):
    for setting in ("gates.0.above=1", "gates={above: 1}"):
        with pytest.raises(RecipeError, match=r"--set 'gates=\[\{metric"):
            load(ROOT / "recipes/tiny/dense-grpo-fp16.yaml", [setting])
    (gate,) = load(base, ["gates=[{metric: grad/norm, above: 10}]"]).gates  # as the message has it
    assert (gate.metric, gate.above) == ("grad/norm", 10)
