"""The example of docs/environments.md: played, evaluated, and refused where it cannot be."""

from types import SimpleNamespace

import pytest

from megatron_fp16rl.checks import check
from megatron_fp16rl.data.tasks import make
from megatron_fp16rl.models.build import built_tokenizer
from megatron_fp16rl.recipe import AdditionTask, RecipeError, Rollout, Suite, load
from megatron_fp16rl.rollout.client import Generation
from megatron_fp16rl.rollout.collector import Collector
from megatron_fp16rl.rollout.evaluation import Questions
from megatron_fp16rl.warm_start import answered
from tests import environment_page
from tests.unit.test_tasks import Characters


def test_the_example_of_the_page_is_a_recipe_whose_expert_wins(tmp_path):
    recipe = load(environment_page.write(tmp_path))
    check(recipe)
    tokenizer = built_tokenizer(recipe.model.build)
    game = make(recipe.task, tokenizer, seed=0)
    prompts = game.training_prompts(0, 4)
    batch = answered(game, prompts, recipe.rollout.stop)
    for row, prompt in enumerate(prompts):
        whole, target = batch.tokens[row], int(prompt.answer)
        whole = tokenizer.decode(whole[: batch.lengths[row]])
        rolls = [f"{min(3, target - sum_)}+" for sum_ in range(0, target, 3)]
        sums = [f"{sum_}=" for sum_ in range(3, target, 3)] + [""]
        said = "".join(a + b for a, b in zip(rolls, sums, strict=True))
        assert whole == prompt.text + said
        assert tokenizer.decode(batch.tokens[row][batch.mask[row]]) == "".join(rolls)
    turns = [game.environment.expert(*game.as_problem(prompt)).result() for prompt in prompts]
    for transcript in turns:
        last = game.environment.step(transcript).result()
        assert last.grade.reward == 1.0
    game.environment.close()


def test_the_rollout_of_the_page_samples_in_two_turns(tmp_path):
    environment_page.write(tmp_path)
    function = f"{tmp_path}/my_rollout.py:rollout"
    settings = Rollout(prompts=2, samples=2, max_new_tokens=5, function=function)
    addition = make(AdditionTask(kind="addition"), Characters(), seed=0)
    answer = Generation([55, 56], [-1.0] * 2, "", False, "0")
    pool = SimpleNamespace(generate=lambda prompts, *_: [answer] * len(prompts))
    samples = Collector(settings, addition, pool, 0).collect(0, {0}).samples
    assert [sample.text for sample in samples] == ["78=78"] * 4
    assert samples[0].mask == [True, True, False, True, True]


def test_a_suite_of_a_file_is_played_in_the_recipes_environment(tmp_path):
    recipe = load(environment_page.write(tmp_path))
    (tmp_path / "hard.jsonl").write_text('{"problem": "9=", "answer": "9"}\n')
    questions = Questions.of(
        Suite(suite=f"{tmp_path}/hard.jsonl:avg@2"), recipe, built_tokenizer(recipe.model.build), 0
    )
    assert [prompt.text for prompt in questions.prompts] == ["9="]
    assert questions.task.environment.settings.path == recipe.task.path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.path={}/dice.py:Cards", r"task\.path=.*dice\.py:Cards: .*it has: Dice"),
        ("task.path={}/my_rollout.py:rollout", r"task\.path=.*has no method reset and no step"),
        ("task.path={}/none.py:Dice", r"task\.path=.*there is no file .*none\.py"),
        ("task.problems={}/none.jsonl", r"task\.problems: there is no file .*none\.jsonl"),
        ("task.template=r1", r"template=r1 is for one question"),
    ],
)
def test_an_environment_that_cannot_be_played_is_refused_before_anything_starts(
    tmp_path, change, message
):
    file = environment_page.write(tmp_path)
    with pytest.raises(RecipeError, match=message):
        check(load(file, [change.format(tmp_path)]))
