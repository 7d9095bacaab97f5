"""A recipe: what to train, on what, how. YAML in, checked pydantic models out.

A file may name another as its `base:`; its own keys override the base's, and `--set a.b=value`
overrides both. Keys that do not exist are errors, named with their file and the nearest real key.
"""

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

Dtype = Literal["fp16", "bf16", "fp32"]
TORCH_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
Fraction = Annotated[float, Field(ge=0, le=1)]


class RecipeError(ValueError):
    """A recipe that cannot be used. The message names file, key, value and remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BuildModel(Section):
    """A random model made from a Hugging Face configuration, with a character-level tokenizer."""

    config: dict[str, object] = Field(
        description="Hugging Face config; model_type names the family"
    )
    alphabet: str = Field(min_length=1, description="characters the tokenizer knows, in id order")
    seed: int = 0


class Model(Section):
    path: str | None = Field(None, description="Hugging Face folder, or name in the local cache")
    shape: str | None = Field(
        None,
        description="a config.json of the model at path, to plan and rehearse with where that is not; "
        "seen from the file that names it",
    )
    build: BuildModel | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        if (self.path is None) == (self.build is None):
            raise ValueError("give either path or build")
        if self.shape is not None and self.path is None:
            raise ValueError("shape goes with path, not with build")
        return self


class AdditionTask(Section):
    """Sums of two numbers; the answer is written least significant digit first."""

    kind: Literal["addition"]
    digits: PositiveInt = 2
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    problems: str | None = Field(
        None, description="a file of sums, which are then all there is: trained on and evaluated on"
    )
    seed: int = 0


class Reward(Section):
    """How responses are graded; see rewards/."""

    max_error_fraction: Fraction = Field(
        0.1, description="of a step's graded responses; with more errors than this the run stops"
    )


class ExactReward(Reward):
    """1 for exactly the answer, white space around it apart."""

    kind: Literal["exact"]


class Workers(Reward):
    """Grading in processes that are killed when they hang."""

    workers: PositiveInt = Field(2, description="processes of each data-parallel rank")
    timeout_s: PositiveFloat = Field(10, description="a response that takes longer earns 0")
    memory_gib: PositiveFloat | None = Field(4, description="address space of a worker")


class MathVerifyReward(Workers):
    """1 if math-verify finds the response's answer equal to the problem's."""

    kind: Literal["math_verify"]


class RegexReward(Workers):
    """1 if the last match of `pattern`, or its first group if it has one, is the answer."""

    kind: Literal["regex"]
    pattern: str

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern


class FunctionReward(Workers):
    """Your own: `def score(prompt: str, response: str, answer: str) -> float`."""

    kind: Literal["function"]
    path: str = Field(
        pattern=r"^.+\.py:\w+$", description="file:function, e.g. my_rewards.py:score"
    )
    memory_gib: PositiveFloat | None = Field(None, description="address space of a worker")


class HttpReward(Reward):
    """A service: POST of [{"prompt", "response", "answer"}, ...], answered with a list of numbers."""

    kind: Literal["http"]
    url: str = Field(pattern=r"^https?://")
    timeout_s: PositiveFloat = Field(60, description="of one try")
    retries: Annotated[int, Field(ge=0)] = 4
    backoff_s: PositiveFloat = Field(0.5, description="before the first retry; then doubled")
    token_variable: str | None = Field(
        None, description="environment variable with a bearer token, which no recipe should hold"
    )


Template = Literal["chat", "r1_distill", "qwen_math", "none"]


class Problems(Section):
    """Problems with answers: how they are put to the model, and which are kept from it."""

    template: Template = Field("chat", description="see tasks/templates.py")
    instruction: str = Field(description="follows the problem; in qwen_math the system prompt")
    max_prompt_tokens: PositiveInt | None = Field(
        None, description="problems with longer prompts are left out"
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    seed: int = Field(0, description="of the split; the order is drawn with trainer.seed")


class DatasetTask(Problems):
    """Problems and answers from a file or a Hugging Face data set."""

    kind: Literal["dataset"]
    path: str | None = Field(None, description="a JSONL or Parquet file")
    name: str | None = Field(None, description="for datasets.load_dataset: owner/name, or a folder")
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    problem: str = Field(
        "problem", description="column; dots lead into nested ones: prompt.0.content"
    )
    answer: str = "answer"
    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    reward: Annotated[
        MathVerifyReward | ExactReward | RegexReward | FunctionReward | HttpReward,
        Field(discriminator="kind"),
    ] = MathVerifyReward(kind="math_verify")

    @model_validator(mode="after")
    def _one_source(self) -> "DatasetTask":
        if (self.path is None) == (self.name is None):
            raise ValueError("give either path or name")
        if self.path is not None and (self.config or self.revision):
            raise ValueError("config and revision go with name, not with path")
        return self


class ReasoningGymTask(Problems):
    """A generator of reasoning-gym, graded by its own verifier in [0, 1]."""

    kind: Literal["reasoning_gym"]
    name: str = Field(description="of the generator, e.g. leg_counting")
    options: dict[str, object] = Field(default_factory=dict, description="its configuration")
    size: PositiveInt = Field(1000, description="problems to generate")
    instruction: str = "Give your final answer between <answer> and </answer>."
    reward: Workers = Workers()


class Rollout(Section):
    prompts: PositiveInt = Field(description="prompts per step, over all data-parallel ranks")
    samples: PositiveInt = Field(description="samples per prompt")
    refill_rounds: Annotated[int, Field(ge=0)] = Field(
        0, description="rounds in which prompts whose samples all earn the same give way to others"
    )
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    stop: list[str] = Field([], description="a response ends with the first of these, and keeps it")
    servers: PositiveInt = 1
    tensor_parallel: PositiveInt = Field(1, description="ranks of one server")
    router_replay: bool = Field(
        False, description="mixtures of experts: the learner takes the experts that SGLang chose"
    )
    host: str = "127.0.0.1"
    deterministic: bool = Field(
        False, description="samples depend on seed, step and prompt alone; slower on a GPU"
    )
    record: bool = Field(False, description="keep every sample in rollouts/ of the run directory")
    replay: str | None = Field(
        None, description="a recorded rollouts/ folder to learn from, in place of servers"
    )
    start_timeout_s: PositiveFloat = 300
    request_timeout_s: PositiveFloat = 600
    health_timeout_s: PositiveFloat = Field(
        180, description="a server whose scheduler is silent for so long is started anew"
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(10, description="of one server, in a run")
    wait_for_servers_s: PositiveFloat = Field(
        900, description="for one to come back when all are gone; then the run stops"
    )
    sglang: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="passed on to sglang.launch_server, e.g. context_length"
    )


class Correction(Section):
    """Weights for samples of mu that pi learns from; see algorithms/corrections.py."""

    ratio: Literal["token", "sequence", "geometric", "k3"]
    action: Literal["truncate", "mask", "reject"]
    low: PositiveFloat | None = None
    high: PositiveFloat | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> "Correction":
        if self.ratio == "k3" and self.action != "reject":
            raise ValueError("ratio=k3 is no ratio to weigh with: use it with action: reject")
        if self.action == "reject" and self.low is None and self.high is None:
            raise ValueError("action=reject needs a bound: give low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self


class KL(Section):
    """A penalty for leaving the reference policy, which is that of the run's first weights."""

    coefficient: PositiveFloat
    estimator: Literal["k1", "k2", "k3"] = "k3"
    into: Literal["loss", "reward"] = "loss"


class Overlong(Section):
    """DAPO's soft punishment: the reward falls over the last `buffer` tokens before the limit."""

    buffer: PositiveInt
    penalty: PositiveFloat = 1.0


class Algorithm(Section):
    advantage: Literal[
        "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline"
    ] = "grpo"
    loss: Literal["ppo_clip", "gspo", "cispo", "policy_gradient"] = "ppo_clip"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    aggregation: Literal["token_mean", "sequence_mean", "max_length"] = Field(
        "token_mean", description="max_length: summed, over sequences x rollout.max_new_tokens"
    )
    old_policy: Literal["learner", "rollout"] = Field(
        "learner", description="whose log-probs the loss takes for those before the update"
    )
    correction: Correction | None = None
    kl: KL | None = None
    overlong: Overlong | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "Algorithm":
        if self.dual_clip is not None and self.loss != "ppo_clip":
            raise ValueError(f"dual_clip goes with loss=ppo_clip, not with {self.loss}")
        if self.loss == "policy_gradient" and self.old_policy == "rollout":
            raise ValueError("loss=policy_gradient has no old policy: remove old_policy")
        if self.old_policy == "rollout" and self.correction and self.correction.action != "reject":
            raise ValueError(
                "old_policy=rollout has the ratio to mu in the loss already; a correction that "
                "weighs with it again would count it twice: use action: reject, or remove one"
            )
        return self


class Optimizer(Section):
    lr: PositiveFloat = 1e-6
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: PositiveFloat = 1.0


class Layout(Section):
    """How the learner's ranks share the model and the batch; the words are Megatron's."""

    ranks: PositiveInt = Field(1, description="learner processes in all")
    tensor_parallel: PositiveInt = 1
    sequence_parallel: bool = Field(
        False,
        description="norms and dropout cut along the sequence, over the tensor-parallel ranks",
    )
    pipeline_parallel: PositiveInt = 1
    model_chunks: PositiveInt = Field(
        1, description="stages of each pipeline rank; more than 1 is the interleaved schedule"
    )
    first_stage_layers: PositiveInt | None = Field(
        None,
        description="of the first pipeline rank, where the others share the rest of the layers",
    )
    last_stage_layers: PositiveInt | None = Field(
        None, description="the same of the last pipeline rank"
    )
    context_parallel: PositiveInt = 1
    expert_parallel: PositiveInt = 1
    expert_tensor_parallel: PositiveInt = Field(
        1, description="ranks that share one expert; expert_parallel x this divides the ranks"
    )

    @property
    def data_parallel(self) -> int:
        return self.ranks // (self.tensor_parallel * self.pipeline_parallel)

    @property
    def uneven_stages(self) -> dict[str, int]:
        """Layers of the first and the last pipeline rank, by the names of their keys, where given."""
        given = {name: getattr(self, name) for name in ("first_stage_layers", "last_stage_layers")}
        return {name: layers for name, layers in given.items() if layers is not None}

    @model_validator(mode="after")
    def _divides(self) -> "Layout":
        for names in (
            ("tensor_parallel", "pipeline_parallel"),
            ("expert_tensor_parallel", "expert_parallel", "pipeline_parallel"),
        ):
            product = math.prod(getattr(self, name) for name in names)
            if self.ranks % product:
                said = " x ".join(f"{n}={getattr(self, n)}" for n in names if getattr(self, n) > 1)
                raise ValueError(
                    f"ranks={self.ranks} is not a multiple of {said}"
                    f"; nearest: {_multiples(self.ranks, product)}"
                )
        if self.context_parallel > 1:
            raise ValueError(
                "context_parallel > 1 is not supported: Megatron-core's own attention refuses it (only "
                "Transformer Engine's has it); use tensor_parallel with sequence_parallel: true"
            )
        if self.model_chunks > 1 and self.pipeline_parallel == 1:
            raise ValueError("model_chunks > 1 needs pipeline_parallel > 1")
        for name, layers in self.uneven_stages.items():
            if self.pipeline_parallel == 1:
                raise ValueError(f"{name}={layers} needs pipeline_parallel > 1")
            if layers % self.model_chunks:
                raise ValueError(
                    f"{name}={layers} is not a multiple of model_chunks={self.model_chunks}; nearest: "
                    f"{_multiples(layers, self.model_chunks)}"
                )
        if self.model_chunks > 1 and len(self.uneven_stages) == self.pipeline_parallel:
            raise ValueError(  # Megatron-core 0.16.1 would divide by the ranks between, which are none
                "model_chunks > 1 and pipeline_parallel=2: one rank has what the other leaves; set "
                "last_stage_layers to null"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel needs tensor_parallel > 1")
        return self


class Lora(Section):
    """Low-rank adapters, trained in place of the weights: W + alpha / rank * B A."""

    rank: PositiveInt
    alpha: PositiveFloat
    targets: list[
        Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="linear layers that have adapters, in Hugging Face's words",
    )
    seed: int = Field(0, description="of the matrices A; B begins at zero")


class Learner(Layout):
    distributed_optimizer: bool = False
    global_batch_size: PositiveInt = Field(description="sequences per optimizer update")
    micro_batch_tokens: PositiveInt = Field(8192, description="padded tokens a rank runs at once")
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = Field(None, description="None: all weights are trained")
    megatron: dict[str, object] = Field(
        default_factory=dict, description="passed on to Megatron's TransformerConfig"
    )


class LossScale(Section):
    initial: PositiveFloat = 2.0**15
    minimum: PositiveFloat = 1.0
    window: PositiveInt = Field(400, description="good updates before the scale doubles")
    hysteresis: PositiveInt = Field(1, description="overflows before the scale halves")
    max_skips: PositiveInt = Field(8, description="skipped updates in a row that stop the run")

    @model_validator(mode="after")
    def _begins_in_range(self) -> "LossScale":
        if self.initial < self.minimum:
            raise ValueError(
                f"initial={self.initial:g} is below minimum={self.minimum:g}: "
                "raise initial, or lower minimum"
            )
        return self


class Precision(Section):
    dtype: Dtype = "fp16"
    rollout: Dtype | None = Field(None, description="only to mix on purpose; None means dtype")
    loss_scale: LossScale = LossScale()

    @property
    def served(self) -> Dtype:
        return self.rollout or self.dtype


class Sync(Section):
    transport: Literal["distributed", "disk"] = "distributed"
    bucket_mib: PositiveInt = Field(
        1024, description="memory for weights on their way; a larger tensor goes alone"
    )
    timeout_s: PositiveFloat = 120
    verify: Literal["never", "first", "always"] = Field(
        "first",
        description="after which syncs the servers' log-probs are held against the learner's",
    )


class Checkpoint(Section):
    """When the learner's whole state is saved, and which checkpoints are kept. The last step's is."""

    every: PositiveInt = Field(50, description="steps")
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = Field(
        None, description="checkpoints at multiples of this many steps are kept for good"
    )


class WarmStart(Section):
    """Supervised steps before RL, until the expected sampled accuracy on held-out prompts."""

    accuracy: Fraction = 0.3
    noise: Fraction = Field(
        0.0, description="share of the answers' tokens replaced by another answer's, at random"
    )
    max_updates: PositiveInt = 1000
    check_every: PositiveInt = 10
    global_batch_size: PositiveInt = 128
    optimizer: Optimizer = Optimizer(lr=1e-3)


class Gate(Section):
    """An alarm on a metric: when its mean over the last `window` steps that have it is out of bounds."""

    metric: str = Field(description="as in metrics.jsonl, e.g. mismatch/kl_k3")
    above: float | None = None
    below: float | None = None
    window: PositiveInt = 1
    action: Literal["warn", "stop"] = "warn"
    at_end: bool = Field(False, description="judged once, after the last step: a mark to reach")

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Gate":
        if self.at_end and self.action == "stop":
            raise ValueError("at_end: there is nothing left to stop; remove action")
        if self.above is None and self.below is None:
            raise ValueError("give above, below or both")
        return self


class Suite(Section):
    """Problems that are asked now and then in training, on the rollout servers."""

    suite: str = Field(description="FILE:METRIC as for fp16rl eval, e.g. aime.jsonl:avg@4")
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Fraction = 1.0
    max_new_tokens: PositiveInt | None = Field(None, description="default: the rollouts'")
    problems: PositiveInt | None = Field(None, description="at most so many")


class Container(Section):
    """Where the nodes' own Python will not do. The image holds this repository's environment."""

    image: str
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[str] = Field([], description="SOURCE:TARGET; the run directory is mounted anyway")


Gpu = Literal["h100-80gb", "h200", "b200", "a100-80gb", "mi300x"]


class Slurm(Section):
    """What a job asks of Slurm. Words that Slurm has are Slurm's."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    comment: str | None = None
    mail_user: str | None = None
    time: str = Field(
        "24:00:00",
        pattern=r"^(\d+-)?\d+(:\d\d){0,2}$",
        coerce_numbers_to_str=True,
        description="as Slurm has it: minutes, hours:minutes:seconds, days-hours",
    )
    learner_nodes: PositiveInt = 1
    rollout_nodes: Annotated[int, Field(ge=0)] = Field(
        0, description="0: servers run on the learner's nodes, on the devices that its ranks leave"
    )
    rollout_partition: str | None = Field(
        None, description="of the rollout nodes, where it is another; makes a heterogeneous job"
    )
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    gpu: Gpu = Field("h100-80gb", description="that the nodes have: what fp16rl plan reckons with")
    gres: str | None = Field(
        None, description="asked for in place of --gpus-per-node, e.g. gpu:h100:8"
    )
    mpi: Literal["none", "pmi2", "pmix"] = Field(
        "none", description="how mpi4py's ranks of the preflight find each other"
    )
    interface: str | None = Field(
        None, description="network interface of the nodes, e.g. ib0; default: that of their names"
    )
    warn_s: PositiveInt = Field(
        300, description="seconds before the time limit at which a run saves and requeues itself"
    )
    container: Container | None = None
    modules: list[str] = []
    environment: dict[str, str] = {}
    setup: list[str] = Field([], description="lines of bash before anything starts")
    options: dict[str, str | int | bool] = Field(
        {}, description="passed on to sbatch, e.g. {switches: 1}"
    )


Origin = Annotated[
    str,
    Field(
        pattern=r"^(paper|public run|planner|ours|untested|run here)\b",
        description="paper, public run, planner, ours, untested or run here; then which, or what of it",
    ),
]


class Provenance(Section):
    """Where a recipe's numbers come from. `run here` is said of nothing that was not run."""

    algorithm: Origin = Field(description="algorithm, batch sizes, lengths, learning rate")
    layout: Origin = Field(description="nodes, parallelism, recomputation, micro-batches")
    run: Origin = "untested"


class Trainer(Section):
    steps: Annotated[int, Field(ge=0)]
    seed: int = 0
    eval_every: PositiveInt = 25
    eval_prompts: PositiveInt = 512
    suites: list[Suite] = Field([], description="asked whenever the held-out prompts are")
    run_root: str = "runs"
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        3,
        description="times that ranks that died or hang go on from the last checkpoint, in one job; "
        "fewer if twice in a row they made no step that was not made before",
    )
    step_timeout_s: PositiveFloat | None = Field(
        3600,
        description="a step that takes longer is a hang: stacks, then the end; null: none is. The "
        "start has rollout.start_timeout_s more",
    )


class Recipe(Section):
    base: str | None = None
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    provenance: Provenance | None = None
    model: Model
    task: Annotated[AdditionTask | DatasetTask | ReasoningGymTask, Field(discriminator="kind")]
    rollout: Rollout
    algorithm: Algorithm = Algorithm()
    learner: Learner
    precision: Precision = Precision()
    sync: Sync = Sync()
    checkpoint: Checkpoint = Checkpoint()
    warm_start: WarmStart | None = None
    trainer: Trainer
    gates: list[Gate] = []
    slurm: Slurm | None = None

    @model_validator(mode="after")
    def _nodes_hold_everything(self) -> "Recipe":
        if self.slurm is not None:
            _check_nodes(self.slurm, self.learner.ranks, self.rollout)
        return self

    @model_validator(mode="after")
    def _patience_outlasts_a_sync(self) -> "Recipe":
        if self.rollout.health_timeout_s < self.sync.timeout_s:
            raise ValueError(
                f"rollout.health_timeout_s={self.rollout.health_timeout_s:g} is below "
                f"sync.timeout_s={self.sync.timeout_s:g}: a server does not answer while it takes "
                "weights, and would be killed for it; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _batches_agree(self) -> "Recipe":
        ranks, rollout = self.learner.data_parallel, self.rollout
        sequences = rollout.prompts * rollout.samples
        compares = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
        if self.algorithm.advantage in compares and rollout.samples < 2:
            raise ValueError(
                f"rollout.samples must be at least 2: {self.algorithm.advantage} compares the "
                "samples of a prompt"
            )
        overlong = self.algorithm.overlong
        if overlong is not None and overlong.buffer > rollout.max_new_tokens:
            raise ValueError(
                f"algorithm.overlong.buffer={overlong.buffer} is more than "
                f"rollout.max_new_tokens={rollout.max_new_tokens}"
            )
        if rollout.prompts % ranks:
            raise ValueError(
                f"rollout.prompts={rollout.prompts} is not a multiple of the {ranks} data-parallel "
                f"ranks; nearest: {_multiples(rollout.prompts, ranks)}"
            )
        batch = self.learner.global_batch_size
        if sequences % batch or batch % ranks:
            good = [n for n in range(ranks, sequences + 1, ranks) if sequences % n == 0]
            nearest = sorted(sorted(good, key=lambda n: abs(n - batch))[:3])
            raise ValueError(
                f"learner.global_batch_size={batch} must divide the {sequences} sequences of a step "
                f"(rollout.prompts x rollout.samples) and be a multiple of the {ranks} "
                f"data-parallel ranks; nearest: {', '.join(map(str, nearest))}"
            )
        return self

    @model_validator(mode="after")
    def _replay_reaches_the_router(self) -> "Recipe":
        options = self.learner.megatron
        if self.rollout.router_replay and (
            options.get("moe_router_fusion")
            or options.get("moe_router_load_balancing_type") == "sinkhorn"
        ):
            raise ValueError(
                "rollout.router_replay: Megatron's fused router and its sinkhorn router choose for "
                "themselves; remove moe_router_fusion and moe_router_load_balancing_type from "
                "learner.megatron"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; `load` reads it back unchanged."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json", exclude={"base"})))


# Tags of the discriminated unions. No key has such a name.
_KINDS: dict[object, type[Section]] = {
    "addition": AdditionTask,
    "dataset": DatasetTask,
    "reasoning_gym": ReasoningGymTask,
    "math_verify": MathVerifyReward,
    "exact": ExactReward,
    "regex": RegexReward,
    "function": FunctionReward,
    "http": HttpReward,
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, inherits, overrides and checks a recipe.

    overrides: "a.b=value", the value in YAML. Raises RecipeError.
    """
    layers = _layers(Path(path))
    for override in overrides:
        layers.append((f"--set {override}", _parse_override(override)))
    merged = OmegaConf.create({})
    for _, layer in layers:
        merged = OmegaConf.merge(merged, layer)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {error}") from error
    values.setdefault("name", Path(path).stem)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, layers)) from None


def _layers(path: Path, children: tuple[Path, ...] = ()) -> list[tuple[str, DictConfig]]:
    """(where it is written, values) of a recipe and of its bases, the oldest ancestor first."""
    if path.resolve() in children:
        raise RecipeError(f"{path}: base: leads back to this file")
    try:
        values = _read_yaml(path.read_text())
        if not isinstance(values, dict):
            raise RecipeError(f"{path} must hold a mapping of recipe sections")
        layer = OmegaConf.create(values)
    except FileNotFoundError:
        origin = f"{children[-1]}: base: " if children else ""
        raise RecipeError(f"{origin}there is no recipe {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if OmegaConf.select(layer, "model.shape"):
        layer.model.shape = str((path.parent / layer.model.shape).resolve())
    base = layer.get("base")
    ancestors = _layers(path.parent / base, (*children, path.resolve())) if base else []
    return [*ancestors, (str(path), _normalise(layer))]


_CLOCK = ("tag:yaml.org,2002:str", re.compile(r"\d+(:\d+)+$"))


class _Loader(get_yaml_loader()):
    """OmegaConf's YAML, in which 12:00:00 is text: YAML 1.1 takes it for a number in base 60."""


_Loader.yaml_implicit_resolvers = {
    first: [_CLOCK, *rules] for first, rules in _Loader.yaml_implicit_resolvers.items()
}


def _read_yaml(text: str) -> object:
    return yaml.load(text, Loader=_Loader)


def _parse_override(override: str) -> DictConfig:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override}: write it as key=value, e.g. --set trainer.steps=3")
    layer = OmegaConf.create()
    try:
        OmegaConf.update(layer, key, _read_yaml(value))
        return _normalise(layer)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"--set {override}: {error}") from None


def _normalise(layer: DictConfig) -> DictConfig:
    """`precision: bf16` is short for `precision: {dtype: bf16}`, in every layer."""
    if isinstance(layer.get("precision"), str):
        layer.precision = {"dtype": layer.precision}
    return layer


def _check_nodes(slurm: Slurm, ranks: int, rollout: Rollout) -> None:
    """Raises ValueError unless the nodes divide the ranks and have devices for all."""
    nodes, gpus = slurm.learner_nodes, slurm.gpus_per_node
    if ranks % nodes:
        raise ValueError(
            f"slurm.learner_nodes={nodes} does not divide learner.ranks={ranks}; "
            f"nearest: {', '.join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)}"
        )
    if slurm.rollout_partition and not slurm.rollout_nodes:
        raise ValueError("slurm.rollout_partition needs slurm.rollout_nodes")
    if not gpus:
        return
    wanted = rollout.servers * rollout.tensor_parallel
    if slurm.rollout_nodes:
        needs = {"learner": (ranks, nodes), "rollout": (wanted, slurm.rollout_nodes)}
    else:
        needs = {"learner": (ranks + wanted, nodes)}
    for name, (devices, count) in needs.items():
        if devices > count * gpus:
            raise ValueError(
                f"slurm.{name}_nodes={count} x gpus_per_node={gpus} are {count * gpus} GPUs, but "
                f"{devices} are needed (learner.ranks={ranks}, rollout.servers x tensor_parallel="
                f"{wanted}); {-(-devices // gpus)} nodes would do"
            )


def _multiples(value: int, of: int) -> str:
    below = value // of * of
    return ", ".join(str(n) for n in (below, below + of) if n > 0)


def _explain(error: ValidationError, layers: list[tuple[str, DictConfig]]) -> str:
    return "\n".join(_explain_one(problem, layers) for problem in error.errors())


def _explain_one(problem: dict, layers: list[tuple[str, DictConfig]]) -> str:
    # A discriminated union puts its tag ("addition") into the location; the file does not have it.
    keys = [str(part) for part in problem["loc"] if part not in _KINDS]
    where = next((name for name, layer in reversed(layers) if _has(layer, keys)), layers[-1][0])
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {key!r} is required; add it to the recipe or to its base"
    message = problem["msg"].removeprefix("Value error, ")
    if not keys:
        return f"{where}: {message}"
    given = problem["input"]
    value = "" if isinstance(given, dict) else f" = {given!r}"
    return f"{where}: {key}{value}: {message}"


def _has(layer: DictConfig, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(layer, DictConfig) or key not in layer:
            return False
        layer = layer[key]
    return bool(keys)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that exist at a location of the recipe."""
    section: type[BaseModel] = Recipe
    for part in location:
        if part in _KINDS:
            section = _KINDS[part]
        elif not isinstance(part, int):  # an item of a list
            section = _section_of(section.model_fields[str(part)].annotation)
    return list(section.model_fields)


def _section_of(annotation: object) -> type[BaseModel]:
    """The Section inside an annotation such as `WarmStart | None`."""
    if isinstance(annotation, type):
        return annotation
    return next(a for a in annotation.__args__ if isinstance(a, type) and issubclass(a, BaseModel))
