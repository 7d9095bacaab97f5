"""How long rollouts take: a server's batch over time, as sequences end and others begin."""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from megatron_fp16rl.tools.plan.arithmetic import Costs, causal_pairs
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.rates import Efficiencies
from megatron_fp16rl.tools.plan.servers import bytes_read, layer_weights, output_weights

# Assumed: an all-reduce that is too small for bandwidth to matter, among GPUs of one node and over
# several; and what a decode step has besides (scheduler, sampling, launch of the graph).
_ALL_REDUCE_S = (10e-6, 75e-6)
_STEP_S = 1.5e-3
_MANY = 32  # sequences
_SIMULATED = 512  # sequences of a server that are followed one by one; more go in bundles


@dataclass(frozen=True)
class Servers:
    """count servers of `parts` GPUs each.

    kv_tokens, max_running   what a server's cache holds, and how many sequences it runs at most
    token_bytes   of the cache of one GPU, for one token
    job           sequences that a server is given, and is done with, together; 0: all of its share
    under_way     jobs that it has at once; the rest follows job by job, as jobs are done
                  (rollout/pool.py)
    """

    count: int
    parts: int
    kv_tokens: int
    max_running: int
    token_bytes: int
    job: int = 0
    under_way: int = 1


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts, and of the responses' mean and maximum."""

    prompt: int
    mean: float
    most: int


def response_lengths(mean: float, most: int, count: int) -> list[int]:
    """`count` lengths of that mean: an exponential distribution that is cut off at `most`.

    They are its quantiles, in order. The part beyond the limit is cut to it, as responses are: it is
    exp(-most / scale), a fifth of all where the mean is half the maximum. Of many, the longest
    always runs to the limit, as some do that go round in circles.
    """
    if mean >= 0.98 * most:
        return [most] * count
    low, high = mean / 10, 1000.0 * most
    for _ in range(80):  # the mean of the cut distribution grows with the scale
        scale = math.sqrt(low * high)
        if scale * -math.expm1(-most / scale) < mean:
            low = scale
        else:
            high = scale
    quantiles = ((i + 0.5) / count for i in range(count))
    lengths = [max(1, min(most, round(-scale * math.log1p(-q)))) for q in quantiles]
    return [*lengths[:-1], most] if count >= _MANY else lengths


@dataclass(frozen=True)
class Rollout:
    """Seconds of the slowest server, and what they are made of.

    tail_s      after half of the sequences have ended
    batch       sequences that run at once, a mean over time
    queued      whether some had to wait for room in the cache
    """

    seconds: float
    prefill_s: float
    decode_s: float
    tail_s: float
    batch: float
    queued: bool


@lru_cache(maxsize=512)  # layouts of the learner that are compared have the same rollouts
def rollout(
    model: Costs,
    servers: Servers,
    lengths: Lengths,
    sequences: int,
    prompts: int,
    width: int,
    gpu: Gpu,
    rates: Efficiencies,
) -> Rollout:
    """A step's rollouts.

    sequences: of all servers together; prompts: different ones among them, each of which is prefilled
    once (SGLang's radix cache). width: bytes of a weight.
    """
    share = max(1, -(-sequences // servers.count))
    prefill = _prefill(model, servers, lengths.prompt, -(-prompts // servers.count), gpu, rates)
    bundle = -(-share // _SIMULATED)
    count = -(-share // bundle)
    room = int(servers.kv_tokens / (lengths.prompt + lengths.mean))
    room = max(1, min(room, servers.max_running) // bundle)

    def step_s(running: int, tokens: int) -> float:
        return decode_step(model, servers, running * bundle, tokens * bundle, width, gpu, rates)

    ends = response_lengths(lengths.mean, lengths.most, count)
    random.Random(0).shuffle(ends)
    job = -(-servers.job // bundle) or count
    under_way = max(1, servers.under_way * servers.job // (job * bundle))
    decode, tail, busy, queued = _follow(ends, lengths.prompt, room, job, under_way, step_s)
    return Rollout(
        seconds=prefill + decode,
        prefill_s=prefill,
        decode_s=decode,
        tail_s=tail,
        batch=busy * bundle / decode,
        queued=queued,
    )


def _follow(
    ends: list[int],
    prompt: int,
    room: int,
    job_size: int,
    under_way: int,
    step_s: Callable[[int, int], float],
) -> tuple[float, float, float, bool]:
    """One server from the first decode step to the last.

    ends: lengths of its sequences, in the order in which they come. room: sequences at once. step_s:
    seconds of a step, from the running sequences and the tokens that they attend to. Returns seconds,
    those after half the sequences have ended, sequence-seconds, and whether any waited for room.
    """
    jobs = [ends[i : i + job_size] for i in range(0, len(ends), job_size)]
    waiting = deque((job, end) for job, piece in enumerate(jobs[:under_way]) for end in piece)
    left, coming = [len(job) for job in jobs], deque(range(under_way, len(jobs)))
    running: list[tuple[int, int, int]] = []  # (clock at the end, clock at the start, job)
    clock, seconds, busy, done, half = 0, 0.0, 0.0, 0, 0.0
    begun, queued = 0, False  # begun: the sum of prompt - start over the running
    while waiting or running:
        while waiting and len(running) < room:
            job, end = waiting.popleft()
            heapq.heappush(running, (clock + end, clock, job))
            begun += prompt - clock
        queued = queued or bool(waiting)
        steps = running[0][0] - clock
        tokens = begun + len(running) * (clock + steps // 2)
        took = steps * step_s(len(running), tokens)
        clock, seconds, busy = clock + steps, seconds + took, busy + took * len(running)
        while running and running[0][0] == clock:
            _, start, job = heapq.heappop(running)
            begun -= prompt - start
            left[job] -= 1
            done += 1
            if not left[job] and coming:
                following = coming.popleft()
                waiting.extend((following, end) for end in jobs[following])
        if 2 * done <= len(ends):
            half = seconds
    return seconds, seconds - half, busy, queued


def decode_step(
    model: Costs,
    servers: Servers,
    running: float,
    tokens: float,
    width: int,
    gpu: Gpu,
    rates: Efficiencies,
) -> float:
    """Seconds in which `running` sequences, which attend to `tokens` in all, get one token each.

    Weights and cache are read from memory, or the tensor cores are the bound; then the all-reduces,
    two a layer. What each rank has whole, each reads, and multiplies with.
    """
    parts = servers.parts
    read = bytes_read(model, parts, width, running) + tokens * servers.token_bytes
    attention = model.attention.latent_pair_flops or model.attention.pair_flops
    met = layer_weights(model, parts, model.top_k) + output_weights(model, parts)
    flops = running * 2 * met + model.layers * attention * tokens / parts
    bound = max(
        read / (gpu.hbm_gbps * 1e9 * rates.memory),
        flops / (gpu.flops * rates.gemm),
    )
    return bound + _reduces(model, parts, running, width, gpu, rates) + _STEP_S


def _reduces(
    model: Costs, parts: int, tokens: float, width: int, gpu: Gpu, rates: Efficiencies
) -> float:
    """Two all-reduces of hidden states in every layer."""
    if parts == 1:
        return 0.0
    several = parts > gpu.per_node
    speed = min(gpu.link_gbps, gpu.network_gbps * gpu.per_node) if several else gpu.link_gbps
    moved = 2 * (parts - 1) / parts * tokens * model.hidden * width
    return 2 * model.layers * (_ALL_REDUCE_S[several] + moved / (speed * 1e9 * rates.network))


def _prefill(
    model: Costs, servers: Servers, prompt: int, prompts: int, gpu: Gpu, rates: Efficiencies
) -> float:
    """Prompts, whose last tokens alone have logits."""
    parts = servers.parts
    one = 2 * (prompt * layer_weights(model, parts, model.top_k) + output_weights(model, parts))
    flops = prompts * (one + model.attention_flops(causal_pairs(prompt)) / parts)
    compute = flops / (gpu.flops * rates.gemm)
    return compute + _reduces(model, parts, prompts * prompt, 2, gpu, rates)
