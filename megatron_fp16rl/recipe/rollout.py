"""How responses are sampled, and how the servers get their weights."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_fp16rl.recipe.section import AsMeant, Seconds, Section


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
    start_timeout_s: Seconds = Field(
        1800,
        description="for a server to come up; the first start on a GPU compiles kernels",
    )
    request_timeout_s: Seconds = 600
    health_timeout_s: Seconds = Field(
        180, description="a server whose scheduler is silent for so long is started anew"
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(10, description="of one server, in a run")
    wait_for_servers_s: Seconds = Field(
        900, description="for one to come back when all are gone; then the run stops"
    )
    sglang: Annotated[dict[str, str | int | float | bool], AsMeant] = Field(
        default_factory=dict, description="passed on to sglang.launch_server, e.g. context_length"
    )


class Sync(Section):
    transport: Literal["distributed", "disk"] = "distributed"
    bucket_mib: PositiveInt = Field(
        1024, description="memory for weights on their way; a larger tensor goes alone"
    )
    timeout_s: Seconds = 120
    verify: Literal["never", "first", "always"] = Field(
        "first",
        description="after which syncs the servers' log-probs are held against the learner's",
    )
