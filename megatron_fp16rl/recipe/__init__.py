"""A recipe: what to train, on what, how. YAML in, checked pydantic models out.

A file may name another as its `base:`; its own keys override the base's, and `--set a.b=value`
overrides both. Keys that do not exist are errors, named with their file and the nearest real key.
"""

from megatron_fp16rl.recipe.algorithm import KL, Algorithm
from megatron_fp16rl.recipe.learner import Layout, Lora, LossScale, Optimizer, Precision
from megatron_fp16rl.recipe.loading import load
from megatron_fp16rl.recipe.rollout import Rollout, Sync
from megatron_fp16rl.recipe.run import Gate, Suite
from megatron_fp16rl.recipe.schema import BuildModel, Model, Recipe
from megatron_fp16rl.recipe.slurm import Gpu, Slurm
from megatron_fp16rl.recipe.tasks import (
    AdditionTask,
    DatasetTask,
    EnvironmentTask,
    ExactReward,
    FunctionReward,
    MathVerifyReward,
    Problems,
    Reward,
    Task,
    Template,
    Workers,
)
from megatron_fp16rl.recipe.values import HIDDEN, TORCH_DTYPES, Dtype, Head, RecipeError, Section
