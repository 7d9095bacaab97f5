"""What is sampled in a step, the servers that sample it, and how weights reach them."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_fp16rl.recipe.values import (
    NonEmpty,
    NonNegativeInt,
    Place,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)

# Options of sglang.launch_server 0.5.23 that we pass ourselves, and what to set instead. The last one counts there.
_DEVICES = "each server is told which devices are its own"
_PARALLEL = "rollout.tensor_parallel, and slurm for nodes"
_EACH_START = "each start of a server has its own"
_SET_ELSEWHERE = {
    **dict.fromkeys(("model", "model_path", "tokenizer_path"), "model.path"),
    **dict.fromkeys(("tp", "tp_size", "tensor_parallel_size"), _PARALLEL),
    **dict.fromkeys(("nnodes", "node_rank", "dist_init_addr", "nccl_init_addr"), _PARALLEL),
    **dict.fromkeys(("port", "api_key", "admin_api_key"), _EACH_START),
    **dict.fromkeys(("base_gpu_id", "gpu_id_step"), _DEVICES),
    "host": "rollout.host",
    "dtype": "precision.dtype or precision.rollout",
    "random_seed": "trainer.seed",
    "enable_deterministic_inference": "rollout.deterministic",
    "enable_return_routed_experts": "rollout.router_replay",
    "custom_weight_loader": "sync.transport",
    "json_model_override_args": "config.json of model.path, which both engines read",
    "config": "write its keys here",
}
# Those that our checks and plans read.
_COUNTS = ("context_length", "max_running_requests", "max_total_tokens")


class Rollout(Section):
    """What is sampled in a step, and the servers that sample it."""

    prompts: PositiveInt  # per step, over all data-parallel ranks
    samples: PositiveInt  # per prompt
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    # a response ends with the first of these, and keeps it
    stop: list[NonEmpty] = Field([], max_length=32)
    # 1: the next step is sampled while this one is learnt; more: responses go on over so many updates at most
    ahead: NonNegativeInt = 0
    refill_rounds: NonNegativeInt = 0  # of replacing prompts whose samples all earn the same
    record: bool = False  # keep every sample in rollouts/ of the run directory
    replay: Place | None = None  # a recorded rollouts/ folder, in place of servers
    router_replay: bool = False  # the learner takes the experts that SGLang chose
    # your own, in place of sampling: my_rollout.py:rollout, docs/environments.md
    function: Place | None = Field(None, pattern=r"^.+\.py:\w+$")
    servers: PositiveInt = 1
    tensor_parallel: PositiveInt = 1  # ranks of one server
    host: str = "127.0.0.1"
    deterministic: bool = False  # samples depend on seed, step and prompt alone; slower on a GPU
    start_timeout_s: Seconds = 1800  # the first start on a GPU compiles kernels
    request_timeout_s: Seconds = 600
    health_timeout_s: Seconds = 180  # a server that is silent for so long is restarted
    max_restarts: NonNegativeInt = 10  # of one server, in a run
    wait_for_servers_s: Seconds = 900  # for one to come back when all are gone
    # passed on to sglang.launch_server; null takes back a base's
    sglang: dict[str, str | int | float | bool | None] = Field({})

    @field_validator("sglang")
    @classmethod
    def _are_the_users(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options by their names with underscores, as all who read them know them."""
        options = {key: value for key, value in options.items() if value is not None}
        names = [key.replace("-", "_") for key in options]
        for name, (key, value) in zip(names, options.items(), strict=True):
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(
                    f"{key!r} is no option of sglang.launch_server, such as context_length"
                )
            if owner := _SET_ELSEWHERE.get(name):
                raise ValueError(f"{key}: fp16rl sets that itself; remove it ({owner})")
            if names.count(name) > 1:
                raise ValueError(f"{key} is there with dashes and with underscores; remove one")
            if name in _COUNTS and not (type(value) is int and value > 0):
                raise ValueError(f"{key}={value!r}: write a whole number above 0")
            is_number = type(value) in (int, float)
            if name == "mem_fraction_static" and not (is_number and 0 < value < 1):
                raise ValueError(f"{key}={value!r}: write a number between 0 and 1")
        return dict(zip(names, options.values(), strict=True))

    @field_validator("temperature")
    @classmethod
    def _samples(cls, temperature: float) -> float:
        if temperature < 1e-6:
            raise ValueError(
                "SGLang 0.5.23 samples at 1e-6 and above, and takes the likeliest below"
            )
        return temperature


NOT_SLICED = (  # options of servers of several models, replicas or stages
    "speculative_algorithm",
    "data_parallel_size",
    "dp_size",
    "dp",
    "pipeline_parallel_size",
    "pp_size",
    "pp",
)


class Sync(Section):
    # sliced: each server rank gets what it keeps; distributed: whole tensors from rank 0; disk: a shared folder
    transport: Literal["sliced", "distributed", "disk"] = "sliced"
    bucket_mib: PositiveInt = 1024  # memory for weights on their way
    timeout_s: Seconds = 120
    # syncs after which log-probs are compared; a number: the first and every N-th
    verify: Literal["never", "first", "always"] | PositiveInt = "first"
    # log the share of numbers that a sync changed; a copy of the weights stays in host memory
    count_changes: bool = False

    @property
    def message_bytes(self) -> int:
        """Of a message of `sliced`, at most; two are held. Larger ones would be no faster."""
        return min((self.bucket_mib << 20) // 2, 64 << 20)
