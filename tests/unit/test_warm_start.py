"""Which recipes share a warm-started model."""

import pytest

from megatron_fp16rl.recipe import load
from megatron_fp16rl.warm_start import folder_of
from tests import environment_page


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [("dice.py", "min(3,", "min(2,"), ("dice.jsonl", "5=", "6=")],
)
def test_what_an_environments_files_say_makes_the_model(tmp_path, file, before, after):
    """Another expert, or other problems, under the same names: another model."""
    recipe = load(environment_page.write(tmp_path))
    folder = folder_of(recipe)
    assert folder_of(recipe) == folder
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after))
    assert folder_of(recipe) != folder


def test_how_turns_end_makes_the_model_and_what_else_is_sampled_does_not(tmp_path):
    file = environment_page.write(tmp_path)
    folder = folder_of(load(file))
    assert folder_of(load(file, ['rollout.stop=["-"]'])) != folder
    assert folder_of(load(file, ["rollout.temperature=0.5"])) == folder
    assert folder_of(load(file, ["learner.lora.rank=2", "learner.lora.alpha=4"])) == folder
