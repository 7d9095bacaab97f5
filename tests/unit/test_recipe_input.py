"""Any input for a recipe is read as it was meant, or refused in a sentence; never with a traceback."""

import json
import math
import os
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_fp16rl.recipe import Recipe, RecipeError, load, notation
from megatron_fp16rl.tools import recipes
from tests.runs import fp16rl
from tests.unit.test_recipe import BASE, write

SHIPPED = recipes.paths()  # those that are recipes by themselves
steady = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
)

# Values and bits of text that some reader of YAML, some check of ours or some file system trips over.
# fmt: off
VALUES = [
    None, True, False, 0, -1, 1, 3, 2**62, -(2**62), 10**30, 0.5, -0.0, 1e-300, 1e300, math.inf, -math.inf, math.nan,
    "", " ", "null", "yes", "012", "1e3", "1:30", "2026-01-01", "~", "fp16", "addition", "dataset", "http", "grpo",
    "${x}", "${task}", "${name}", "\\${x}", "\\\\${name}", "${", "${rollout}", "${a.${b}}", "${.x}", "a\0b", "\ud800", "/", "..",
    "/dev/null", "a" * 5000, "é", "\U0001f600", "\u2028", "\x85", "\ufeff", "a\nb\n", "\t", "token", "[red]",
    "\x1b[2J", "<<", "=", "- a", "a: b", [], [None], ["a"], [1, [2]], {}, {"a": 1}, {"kind": "dataset"},
    {"metric": "x"}, [{"metric": "x"}],
]
SNIPPETS = [
    "base: true\n", "base: [a]\n", "base: {a: 1}\n", "base: ${x}\n", "base: .\n", 'base: "a\\0b"\n', "model: [a]\n",
    "model: ${task}\n", "model: {shape: '${x}'}\n", "name: 5\n", "name: a\nname: b\n", "&a ", "*a", "<<: *a\n",
    "<<: {a: 1}\n", "!!python/object:os.system ", "!!int ", "!!str ", "---\n", "[" * 60, "{a: " * 60, "[" * 3000,
    "9" * 5000, "\t", "\r", "\0", "\x1b", "\ufeff", "'", '"', "|\n", "? ", ": ", ", ", "}", "]", "#", "%", "@", "`",
    "${", "\\${", "012", "yes", ".inf", "1_000", "~",
]
ODD_KEYS = ["", ".", "a..b", "a[0]", "gates.0.above", "a b", "${x}", "\ud800", "task", "a\0", "name.x", "base"]
# fmt: on


@pytest.fixture
def base(tmp_path):
    return write(tmp_path, "parent.yaml", BASE)


def outcome(path: Path, overrides: list[str]) -> None:
    """Loads a recipe, or is told why not; what was loaded is written and read again."""
    try:
        recipe = load(path, overrides)
    except RecipeError as refusal:
        message = str(refusal)
        assert 0 < len(message) < 20_000
    else:
        assert_reads_back(recipe)


def assert_reads_back(recipe: Recipe) -> None:
    plain = recipe.model_copy(update={"base": None})
    assert_plain(recipe.model_dump())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_bytes(recipe.to_yaml().encode())
        assert load(file) == plain


def assert_plain(value: object) -> None:
    """Nothing of how a number was spelled is left."""
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            assert_plain(inner)
    else:
        assert type(value) in (type(None), bool, int, float, str), value
        assert not isinstance(value, float) or math.isfinite(value)


def test_no_text_in_a_file_ends_in_a_traceback(base, tmp_path):
    child = tmp_path / "child.yaml"
    for snippet in SNIPPETS:
        for text in (
            f"{snippet}name: x\nbase: parent.yaml\n",
            f"base: parent.yaml\ndescription: {snippet}\n",
            f"base: parent.yaml\nlearner: {{megatron: {{{snippet}: {snippet}}}}}\n",
        ):
            child.write_bytes(text.encode())
            outcome(child, [])


def test_no_value_of_any_key_ends_in_a_traceback(base):
    keys = sorted({key for path in SHIPPED for key in load(path).flat()})
    keys.remove("model.shape")  # a path as seen from the file that names it
    texts = [value if isinstance(value, str) else json.dumps(value) for value in VALUES]
    for i in range(2 * len(keys)):  # the values in another order the second time
        outcome(base, [f"{keys[i % len(keys)]}={texts[(i + i // len(keys)) % len(texts)]}"])
    for key in ODD_KEYS:
        outcome(base, [f"{key}=1"])
        outcome(base, [key])


# What YAML, ${...} or bash would read as something else; lines and characters that YAML writes in a special way.
TRICKY = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    st.text(st.sampled_from("${}\\a.'\"\n #:-&*!|>%@`,[]? "), max_size=12),
    st.sampled_from([v for v in VALUES if isinstance(v, str) and "\0" not in v and v != "\ud800"]),
    st.sampled_from(["\\${HOME}", "a${X}\\\\${Y}", "1.10", "+5", "0x1F", "0o17", ".5"]),
)


@steady
@given(st.lists(TRICKY, min_size=9, max_size=9), st.lists(TRICKY, max_size=3))
@example([*["${HOME}"] * 8, "x"], ["echo ${HOME}"])  # an environment may hold no such text
@example([*["\\${HOME}"] * 8, "x"], ["echo \\${HOME}"])
def test_a_resolved_recipe_reads_back_unchanged_whatever_its_text(texts, setup):
    """What `train` writes is what its ranks read. Other readers of YAML, too, see text where it is text."""
    values = yaml.safe_load(BASE)
    values["description"] = texts[0]
    values["model"]["path"] = texts[1]
    values["rollout"]["stop"] = [texts[2], texts[3]]
    values["trainer"]["run_root"] = texts[4]
    values["learner"]["megatron"] = {texts[5]: texts[6], "nested": [{"x": texts[7]}]}
    values["slurm"] = {"environment": {"TOKEN": texts[8]}, "setup": setup}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError:
        assume(False)
    assert_reads_back(recipe)
    read = yaml.safe_load(recipe.to_yaml())
    assert read == recipe.model_dump(mode="json", exclude={"base"})


@steady
@given(TRICKY, TRICKY)
@example("a: b", "${HOME}")
@example("a #b", "null")
@example(" 1_000", "null")
def test_a_setting_of_any_text_is_that_text(text, other):
    """As `--name` and paths reach `load`, and as it is typed after --set."""
    settings = [("description", text), ("learner.megatron", {"a": text, "b": [other, 1.5, None]})]
    recipe = load(SHIPPED[0], [notation.setting(*setting) for setting in settings])
    assert (recipe.description, recipe.learner.megatron["a"]) == (text, text)
    assert recipe.learner.megatron["b"] == [other, 1.5, None]
    if not text.startswith(("'", '"')):
        assert load(SHIPPED[0], [f"description={text}"]).description == text


HOSTILE = {
    "laughs": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "large": "description: " + "a" * 10_000_000,
    "many values": "x: [" + "1," * 15_000 + "]",
    "many keys": "\n".join(f"k{i}: 1" for i in range(3000)),
    "long key": "a" * 900 + ": 1\n" * 2,
    "deep list": "a: " + "[" * 30_000,
    "deep mapping": "a: " + "{a: " * 8000,
    "deep block": "\n".join(f"{' ' * i}a:" for i in range(240)),
    "dashes": "- " * 16_000,
    "keys of keys": "? " * 16_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(tmp_path, name):
    file = write(tmp_path, "child.yaml", HOSTILE[name])
    began = time.process_time()
    message = refusal(file)
    assert time.process_time() - began < 3
    assert len(message) < 10_000


def test_a_chain_of_bases_has_an_end(tmp_path):
    for i in range(30):
        write(tmp_path, f"{i}.yaml", f"base: {i + 1}.yaml\n")
    assert "more than 20 recipes inherit from each other" in refusal(tmp_path / "0.yaml")


def refusal(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as refused:
        load(path, overrides)
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml", "child.yaml: base: there is no recipe"),
        ("base: child.yaml", "leads back to this file"),
        ("a: [1, 2", "not valid YAML"),
        ("- a\n- b", "must hold a mapping"),
        ("base: [a]", "child.yaml: base = ['a']: the path of a file is wanted"),
        ("base: '${oc.env:NO_SUCH}/a.yaml'", "'${oc.env:' looks like one: write the value, or --set KEY="),
        ('base: "a\\0b"', "line 1, column 7: text with a NUL character"),
        ("base: .", "is no file: a recipe is a YAML file"),
        (f"base: {'a' * 5000}", "cannot be read: [Errno 36] File name too long"),
        ("base: parent.yaml\nmodel: [a]", "child.yaml: model is given both as a list and by keys"),
        ("base: parent.yaml\nmodel: {shape: [a]}", "model.shape = ['a']: the path of a file is wanted"),
        (f"base: parent.yaml\ndescription: {'[' * 3000}", "more than 50 levels"),
        ("base: parent.yaml\ntrainer: {steps: 9999999999999999999}", "does not fit into 64 bits"),
        ("base: parent.yaml\ntrainer: {steps: 5, steps: 6}", "line 2, column 21: the key 'steps' is there twice"),
        ("base: parent.yaml\ntrainer:\n\tsteps: 5", "indent with spaces, not with tabs"),
        ("base: parent.yaml\n? [a]\n: 1", "a key must be text"),
        ("base: parent.yaml\nlearner: {megatron: {1: 2}}", "a key must be text: write a number or flag in quotes"),
        ("name: &a [*a]", "no anchors, aliases or tags"),
        ("a: {<<: {x: 1}}", "a recipe has no merge key <<: inherit with base:"),
        ("name: !!python/name:os.system x", "no anchors, aliases or tags"),
        ("name: a\n---\nname: b", "single document"),
        ("base: parent.yaml\ntrainer: {seed: true}", "trainer.seed = True: a number is wanted, not true or false"),
        ("base: parent.yaml\ndescription: 1.10", "description = 1.1: Input should be a valid string; write it in quotes"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused_with_the_place(base, tmp_path, text, message):
    refused = refusal(write(tmp_path, "child.yaml", text))
    assert message in refused
    assert "child.yaml" in refused


def test_files_that_are_no_text_are_refused(base, tmp_path):
    child = tmp_path / "child.yaml"
    for data, message in (
        (
            "name: é\n".encode("latin-1"),
            "can't decode byte 0xe9 in position 6: invalid continuation byte): save it as UTF-8",
        ),
        ("name: a\n".encode("utf-16"), "is not UTF-8"),
        (b"name: a\0\n", "special characters"),
        (b"", "must hold a mapping"),
        (b"# nothing\n", "must hold a mapping"),
    ):
        child.write_bytes(data)
        assert message in refusal(child)
    child.write_bytes(
        "\ufeffbase: parent.yaml\nname: é\n".replace("é", "e").encode()
    )  # Windows' editors
    assert load(child).name == "e"
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    assert "is no file" in refusal(fifo)  # and does not wait for who may write into it
    assert "is no file" in refusal(tmp_path)
    assert "base: " in refusal(write(tmp_path, "child.yaml", "base: fifo.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("description=a ${trainer.steps}", "a recipe has no references"),
        ("rollout..samples=3", "write it as key=value"),
        ("gates[0]=3", "write it as key=value"),
        ("trainer.steps=\ud800", "special characters"),
        ('description="\\ud800"', "half a surrogate pair"),
        ('description="\\UFFFFFFFF"', "is not valid YAML"),
        ("task.kind=[a]", "does not match any of the expected tags: 'addition', 'dataset'"),
        ("trainer.steps=" + "9" * 5000, "does not fit into 64 bits"),
        ("tr\ud800=3", "write it as key=value"),
        ("trainer.steps=[", "--set trainer.steps=[ is not valid YAML"),
        ("trainer=3", "trainer = 3"),
        ("name=a/b", "name = 'a/b'"),
        ("name=" + "a" * 300, "name = 'aaa"),
        ("learner.megatron.a=.nan", "'.nan' in quotes"),
        ("learner.optimizer.lr=1e999", "'1e999': a finite number is wanted"),
        ("rollout.health_timeout_s=1e12", "less than or equal to 1000000"),
        ("learner.megatron.a=yes", "write true or false, plain finite digits, or 'yes' in quotes"),
        ("trainer.steps=012", "'012' in quotes"),  # ten in YAML 1.1
        ("trainer.steps=0x1F", "'0x1F' in quotes"),
        ("rollout.sglang.mem=1_000", "'1_000' in quotes"),
        ("rollout.sglang.revision=1.10", "write 1.1, or '1.10' in quotes"),
        ("slurm.options={comment: 2.0}", "write '2.0' in quotes"),
        ("slurm.environment={CUDA: 12.10}", "slurm.environment.CUDA: Input should be a valid string; write it"),
        ("description='1.10", "is not valid YAML"),
        ("learner.ranks=4611686018427387904", "not a multiple"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_with_a_remedy(base, override, message):
    assert message in refusal(base, [override])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("learner.optimizer.lr=1e-6", "learner.optimizer.lr", 1e-6),  # text in YAML 1.1
        ("trainer.steps=1e3", "trainer.steps", 1000),
        ("description=\\${HOME} ${name", "description", "\\${HOME} ${name"),
        ("name=1e10", "name", "1e10"),
        ("name='1.10'", "name", "1.10"),
        ("slurm.options.account=1e10", "slurm.options.account", "1e10"),
        ("slurm.options.comment=2.0", "slurm.options.comment", "2.0"),
        ("slurm.options.nice=5", "slurm.options.nice", 5),
        ("slurm.options.exclusive=true", "slurm.options.exclusive", True),
        ("rollout.sglang.mem_fraction_static=0.85", "rollout.sglang.mem_fraction_static", 0.85),
        ("slurm.environment.CUDA=12.10", "slurm.environment.CUDA", "12.10"),
        ("slurm.interface=null", "slurm.interface", None),
        ("slurm.interface=012", "slurm.interface", "012"),
        ("learner.megatron.x='yes'", "learner.megatron.x", "yes"),
        ("slurm.environment.A=1", "slurm.environment.A", "1"),
        ("slurm.time=90", "slurm.time", "90"),
        ("slurm.time=12:00:00", "slurm.time", "12:00:00"),
        ("slurm.time=1-12:00:00", "slurm.time", "1-12:00:00"),
        ("slurm.setup=['echo ${HOME} \\${X} ${X:-${Y}}']", "slurm.setup", ["echo ${HOME} \\${X} ${X:-${Y}}"]),
    ],
)  # fmt: skip
def test_values_are_what_their_authors_meant(base, override, key, value):
    recipe = load(base, ["learner.optimizer={lr: 0.5}", override])
    loaded = recipe.model_dump()
    for name in key.split("."):
        loaded = loaded[name]
    assert loaded == value
    assert type(loaded) is type(value)
    assert_reads_back(recipe)


def test_the_command_line_says_what_was_wrong_in_a_line_and_exits_with_2(base, tmp_path):
    """Every command that takes a recipe finds it with the same words."""
    child = str(write(tmp_path, "child.yaml", "base: [a]\n"))
    new = str(tmp_path / "new.yaml")
    for command, message in (
        (["train", child], "base = ['a']"),
        (["plan", child], "base = ['a']"),
        (["rehearse", child], "base = ['a']"),
        (["submit", child], "base = ['a']"),
        (["recipes", "diff", child, child], "base = ['a']"),
        (["recipes", "new", new, "--from", child], "base = ['a']"),
        (["train", "a" * 5000], "there is no recipe"),
        (["plan", str(tmp_path)], "there is no recipe"),
    ):
        result = fp16rl(*command, code=2)
        assert result.stdout == "", command
        assert message in result.stderr, command
        assert len(result.stderr) < 600
    assert not Path(new).exists()
