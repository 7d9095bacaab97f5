"""Supervised training before RL, for tiny random models: RL needs rewards that differ.

It takes the place of pre-training: all weights learn, and adapters start after it, so that runs with and
without LoRA start from the same model.
"""

import hashlib
import importlib.metadata
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_fp16rl.data.batch import Batch, Prompt, Sample
from megatron_fp16rl.data.tasks import Task
from megatron_fp16rl.learner.learner import Learner
from megatron_fp16rl.metrics.run import Run
from megatron_fp16rl.recipe import DatasetTask, EnvironmentTask, Recipe, RecipeError
from megatron_fp16rl.recipe import Task as TaskSettings
from megatron_fp16rl.rollout.turns import Turns
from megatron_fp16rl.utils import user_code
from megatron_fp16rl.utils.cache import cache_folder, sources


def folder_of(recipe: Recipe) -> Path:
    """The cache folder of a recipe's warm-started model; its name depends on everything that makes it."""
    recipe = _without_adapters(recipe)
    parts = ("model", "task", "learner", "precision", "warm_start")
    values = recipe.model_dump(mode="json")
    return cache_folder(
        "warm-start",
        {part: values[part] for part in parts},
        recipe.rollout.stop,  # how turns end
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in _files_of(recipe.task)],
        recipe.trainer.seed,
        sources("learner", "models", "data", "platform"),
        {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
    )


def _files_of(task: TaskSettings) -> list[Path]:
    """What a task's answers come from: its problems, or an environment with its expert and problems."""
    files = []
    if isinstance(task, EnvironmentTask):
        files = [user_code.file_of(task.path), Path(task.problems)]
    elif isinstance(task, DatasetTask) and task.path is not None:
        files = [Path(task.path)]
    return [file for file in files if file.is_file()]


def warm_start(
    recipe: Recipe,
    learner: Learner,
    task: Task,
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
        stop = recipe.rollout.stop
        held_out = answered(task, task.held_out_prompts(recipe.trainer.eval_prompts), stop)
        world = learner.world
        share = settings.global_batch_size // world.data.size
        accuracy = 0.0
        for update in range(settings.max_updates):
            beat(f"update {update + 1} of the warm start")
            # Steps below zero: the run's own steps begin with prompts of their own.
            prompts = task.training_prompts(-1 - update, settings.global_batch_size)
            local_prompts = prompts[world.data.rank * share : (world.data.rank + 1) * share]
            noise = random.Random(f"{recipe.trainer.seed}/{update}/{world.data.rank}")
            batch = answered(task, local_prompts, stop, settings.noise, noise)
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
    task: Task,
    prompts: list[Prompt],
    stop: Sequence[str] = (),
    noise: float = 0.0,
    rng: random.Random | None = None,
) -> Batch:
    """Prompts with their answers and the end of sequence, as a batch; in an environment, its expert's turns.

    stop: strings that end a turn. noise: the share of answer tokens replaced by one drawn from all answers
    of the batch.
    """
    answers = _answers(task, prompts, stop)
    if noise and rng is not None:
        # The last token of a piece ends a turn.
        pool = [
            token for pieces in answers for ids, learnt in pieces if learnt for token in ids[:-1]
        ]
        for ids in (ids for pieces in answers for ids, learnt in pieces if learnt):
            ids[:-1] = [rng.choice(pool) if rng.random() < noise else token for token in ids[:-1]]
    samples = []
    for group, (prompt, pieces) in enumerate(zip(prompts, answers, strict=True)):
        ids = [token for piece, _ in pieces for token in piece]
        mask = [learnt for piece, learnt in pieces for _ in piece]
        zeros = [0.0] * len(ids)
        samples.append(Sample(prompt, group, ids, zeros, prompt.answer, False, 0, 1.0, mask=mask))
    return Batch.from_samples(samples)


def _answers(
    task: Task, prompts: list[Prompt], stop: Sequence[str]
) -> list[list[tuple[list[int], bool]]]:
    """The pieces of each answer: their tokens, and whether the model is to write them."""
    tokenizer = task.tokenizer

    def turn(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids if stop and text.endswith(tuple(stop)) else [*ids, tokenizer.eos_token_id]

    if task.environment is None:
        return [[([*turn(prompt.answer)], True)] for prompt in prompts]
    turns = Turns(task, 0)
    played = [task.environment.expert(*task.as_problem(prompt)) for prompt in prompts]
    answers = []
    for transcript in [one.result() for one in played]:
        pieces: list[tuple[list[int], bool]] = []
        for i, text in enumerate(transcript.turns):
            pieces.append((turn(text), True))
            if i < len(transcript.said):
                pieces.append((turns.tokens(transcript.said[i], pieces[-1][0][-1]), False))
        answers.append(pieces)
    return answers
