"""Supervised training before RL, for tiny random models: RL needs rewards that differ.

It takes the place of pre-training: all weights learn, and adapters start after it, so that runs with and
without LoRA start from the same model.
"""

import importlib.metadata
import random
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_fp16rl.data.batch import Batch, Prompt, Sample
from megatron_fp16rl.data.tasks import Task
from megatron_fp16rl.learner.learner import Learner
from megatron_fp16rl.metrics.run import Run
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.utils.cache import cache_folder, sources


def folder_of(recipe: Recipe) -> Path:
    """The cache folder of a recipe's warm-started model; its name depends on everything that makes it."""
    recipe = _without_adapters(recipe)
    parts = ("model", "task", "learner", "precision", "warm_start")
    values = recipe.model_dump(mode="json")
    return cache_folder(
        "warm-start",
        {part: values[part] for part in parts},
        recipe.trainer.seed,
        sources("learner", "models", "data", "platform"),
        {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
    )


def warm_start(
    recipe: Recipe,
    learner: Learner,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    hf_dir: Path,
    run: Run,
    beat: Callable[[str], None],
) -> None:
    """Loads warm-started weights into the learner, from the cache; trains them first if they are not there.

    hf_dir: configuration and tokenizer. beat: resets the watchdog, with what comes next. Raises
    RecipeError if the accuracy is not reached.
    """
    settings, folder = recipe.warm_start, folder_of(recipe)
    assert settings is not None
    if not learner.world.broadcast_from_rank0(folder.exists()):
        # Adapters are left out: see above.
        starter = learner
        if recipe.learner.lora is not None:
            starter = Learner.from_recipe(_without_adapters(recipe), hf_dir, learner.world)
        starter.reset_optimizer(settings.optimizer, settings.max_updates)
        # The answers are those of the data: no server samples anything here.
        held_out = answered(task.held_out_prompts(recipe.trainer.eval_prompts), tokenizer)
        world = learner.world
        share = settings.global_batch_size // world.data.size
        accuracy = 0.0
        for update in range(settings.max_updates):
            beat(f"update {update + 1} of the warm start")
            # Steps below zero: the run's own steps begin with prompts of their own.
            prompts = task.training_prompts(-1 - update, settings.global_batch_size)
            local_prompts = prompts[world.data.rank * share : (world.data.rank + 1) * share]
            noise = random.Random(f"{recipe.trainer.seed}/{update}/{world.data.rank}")
            batch = answered(local_prompts, tokenizer, settings.noise, noise)
            _, loss = starter.supervised_update(batch.to(world.device))
            if (update + 1) % settings.check_every == 0:
                # The mean probability of the right answer: what sampling at T=1 would score on average.
                # Exact, because these tasks have one right answer, character for character.
                scored = starter.score(held_out.to(world.device))
                accuracy = scored.pi.sum(1).exp().mean().item()
                run.say(f"warm start {update + 1} | loss {loss:.3f} | held out {accuracy:.3f}")
                if accuracy >= settings.accuracy:
                    break
        else:
            raise RecipeError(
                f"warm start reached {accuracy:.3f} in {settings.max_updates} updates, not "
                f"{settings.accuracy} (warm_start.accuracy); raise warm_start.max_updates or .optimizer.lr"
            )
        starter.save(folder, hf_dir)
    # Also by the run that trained them: every run starts from the same weights, rounded to its dtype.
    beat("the end of the warm start")
    learner.load(folder)


def _without_adapters(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"learner": recipe.learner.model_copy(update={"lora": None})})


def answered(
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    noise: float = 0.0,
    rng: random.Random | None = None,
) -> Batch:
    """Prompts with their answers and the end of sequence, as a batch.

    noise: the share of answer tokens replaced by one drawn from all answers of the batch.
    """
    answers = [tokenizer.encode(prompt.answer, add_special_tokens=False) for prompt in prompts]
    if noise and rng is not None:
        pool = [token for answer in answers for token in answer]
        answers = [
            [rng.choice(pool) if rng.random() < noise else token for token in answer]
            for answer in answers
        ]
    samples = []
    for group, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*answer, tokenizer.eos_token_id]
        samples.append(Sample(prompt, group, ids, [0.0] * len(ids), prompt.answer, False, 0, 1.0))
    return Batch.from_samples(samples)
