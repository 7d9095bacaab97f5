"""Samples of several turns: which tokens are asked for, kept and learnt, and environments that fail.

The sampler here says what a script has; environments run in real worker processes.
"""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.data.tasks import make, templates
from megatron_fp16rl.recipe import EnvironmentTask, Rollout
from megatron_fp16rl.rollout.client import Generation, Sampling, ServerError
from megatron_fp16rl.rollout.collector import Collector
from megatron_fp16rl.rollout.pool import Pool
from megatron_fp16rl.rollout.recording import read_samples, write_samples
from megatron_fp16rl.rollout.responses import Response
from megatron_fp16rl.rollout.stream import Stream, stopped
from megatron_fp16rl.rollout.turns import Turns, play
from megatron_fp16rl.utils.files import write_json_lines

END, TWELVE = 1, 1000  # the latter is one token for 12, which nothing is encoded to
ENVIRONMENT = '''
import os, time

class Env:
    """Counts turns: each answers with its number and what it heard, the third ends."""

    def reset(self, problem, answer):
        self.problem, self.answer, self.heard = problem, answer, []

    def step(self, turn):
        self.heard.append(turn)
        if turn == "slow?":
            time.sleep(60)
        if turn == "raise?":
            raise KeyError("no such tool")
        if turn == "die?":
            os._exit(3)
        if turn == "number?":
            return 7
        if turn == "pid?":
            return f" {os.getpid()}>"
        if turn == "paid?":
            return "yes>", 0.25
        if len(self.heard) == 3:
            return None
        return f"<{len(self.heard)}:{turn}>"

    def reward(self):
        return float(self.heard[-1] == self.answer)
'''


class Characters:
    """One token a character, but for TWELVE."""

    chat_template, eos_token_id, eos_token = None, END, "$"

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join("12" if i == TWELVE else chr(i) for i in ids if i != END)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment")
    (folder / "env.py").write_text(ENVIRONMENT)
    rows = [{"problem": f"{i}:", "answer": "ok"} for i in range(8)]
    write_json_lines(folder / "problems.jsonl", rows)
    settings = EnvironmentTask(
        kind="environment",
        path=f"{folder}/env.py:Env",
        problems=f"{folder}/problems.jsonl",
        template="none",
        max_turns=4,
        timeout_s=2,
        held_out=0.25,
    )
    task = make(settings, Characters(), seed=0)
    yield task
    task.environment.close()


def tokens(text):
    """~ for TWELVE, $ for the end."""
    return [{"~": TWELVE, "$": END}.get(c, ord(c)) for c in text]


def generation(line, version=0, aborted=False):
    ids = tokens(line)
    return Generation(ids, [-1.0] * len(ids), "", False, str(version), aborted=aborted)


class Scripted:
    """A server that says its lines: of each sample the turn that comes next, by how often it asked."""

    url = "http://nowhere"

    def __init__(self, *lines, version=0):
        self.lines, self.version = [tokens(line) for line in lines], version
        self.prompts, self.samplings = [], []

    def said(self, prompt, sampling):
        """The rest of the line that the prompt's own tokens leave."""
        self.prompts.append(list(prompt))
        self.samplings.append(sampling)
        turn = self.turn_of(prompt)
        line = self.lines[min(turn, len(self.lines) - 1)]
        done = next(n for n in range(len(line), -1, -1) if n == 0 or prompt[-n:] == line[:n])
        rest = line[done:][: sampling.max_new_tokens]
        experts = torch.arange(len(prompt) + len(rest) - 1, dtype=torch.int16)[:, None, None]
        return Generation(
            rest,
            [-0.5] * len(rest),
            "",
            len(rest) == sampling.max_new_tokens and rest[-1:] != [END],
            str(self.version),
            experts if isinstance(self.version, str) else experts + 1000 * self.version,
            cached=len(prompt) - 1,
        )

    @staticmethod
    def turn_of(prompt):
        return prompt.count(ord(">"))

    def generate(self, prompts, samplings, seeds=None, routing=None):
        return [self.said(*one) for one in zip(prompts, samplings, strict=True)]

    async def generate_each(self, http, names, prompts, samplings, seeds=None, routing=None):
        await asyncio.sleep(0)
        return self.generate(prompts, samplings)

    async def abort(self, http, name):
        """It says its line all the same."""


def played(task, *lines, tokens=60):
    """One sample of a training prompt."""
    server, sampling = Scripted(*lines, version="default"), Sampling(tokens, stop=("?",))
    (prompt,) = task.training_prompts(0, 1)
    (response,), stats = play(Turns(task, tokens), server, [prompt], sampling, None)
    return response, stats, server, prompt


def test_what_the_model_wrote_is_never_tokenised_again(task, tmp_path):
    """12 is one token of the model's: it stays one in the next prompt, though its text has two others."""
    response, stats, server, prompt = played(task, "~?", "a$", "ok$")
    said = [tokens("~?"), tokens("<1:12?>"), tokens("a$"), tokens("<2:a>"), tokens("ok$")]
    assert response.ids == [token for piece in said for token in piece]
    assert server.prompts == [
        prompt.ids,
        prompt.ids + said[0] + said[1],
        prompt.ids + said[0] + said[1] + said[2] + said[3],
    ]
    assert response.mask == [i % 2 == 0 for i, piece in enumerate(said) for _ in piece]
    assert [lp != 0 for lp in response.logprobs] == response.mask
    assert (response.reward, response.truncated, stats.graded) == (1.0, False, 1)
    assert response.turns == ["12?", "a", "ok"]
    # The limit is of all that follows the prompt.
    spent = [60 - one.max_new_tokens for one in server.samplings]
    assert spent == [0, len(said[0] + said[1]), sum(map(len, said[:4]))]
    # A batch has the model's tokens alone as response.
    sample = response.sample(prompt, 0)
    write_samples(tmp_path, 0, 0, [sample])
    (again,) = read_samples(tmp_path, 0)
    assert again.mask == sample.mask
    batch = Batch.from_samples([again])
    learnt = batch.tokens[batch.mask].tolist()
    assert learnt == tokens("~?a$ok$")
    assert len(again.experts) == len(prompt.ids) + len(response.ids) - 1
    # The servers score the same sequence again: of their log-probs of the environment's tokens none counts.
    score = [([-9.0] * (int(batch.lengths[0]) - 1), None)]
    collector = SimpleNamespace(routing=None, pool=SimpleNamespace(score=lambda *_: score))
    rescored = Collector.rescore(collector, batch)
    assert torch.equal(rescored.mask, batch.mask)
    assert rescored.mu_logprobs[~batch.mask].abs().max() == 0
    assert (rescored.mu_logprobs[batch.mask] == -9).all()


@pytest.mark.parametrize(
    ("lines", "limit", "reward", "truncated", "turns"),
    [
        (["a$"], 60, 0.0, False, 3),  # the third turn ends it
        (["pid?", "ok$"], 60, 1.0, False, 3),
        (["paid?", "paid?", "paid?", "paid?"], 60, 1.0, False, 4),  # max_turns; 0.25 a turn
        (["abcdef$"], 4, 0.0, True, 0),  # in a turn
        (["ab$"], 8, 0.0, True, 1),  # no room for what the environment says
    ],
)
def test_turns_and_tokens_have_limits(task, lines, limit, reward, truncated, turns):
    response, _, _, _ = played(task, *lines, tokens=limit)
    assert (response.reward, response.truncated) == (reward, truncated)
    assert len(response.turns) == turns
    assert len(response.ids) <= limit
    assert response.mask[-1]


def test_an_environment_that_fails_costs_its_sample(task):
    must = "step must return text, None at the end, or a pair of that and a reward, not 7"
    for turn, message in (
        ("raise?", "KeyError: 'no such tool'"),
        ("die?", "the worker of an environment ended with exit code 3"),
        ("number?", must),
        ("slow?", None),
    ):
        response, stats, _, _ = played(task, turn)
        assert response.reward == 0.0
        assert (stats.graded, stats.timeouts) == (1, message is None)
        assert message is None or message in stats.first_error
        # Another sample is played by a new worker.
        assert played(task, "~?", "a$", "ok$")[0].reward == 1.0


def test_a_sample_whose_worker_is_lost_is_played_again(task):
    """By another worker, to the same state; if what it says is not the same, that is an error."""
    (prompt,) = task.training_prompts(0, 1)
    turns = Turns(task, 60)

    def go_on(response, line):
        response.add(generation(line), ("?",), turns.decode)
        return turns.take(response, prompt, turns.step(response, prompt).result(60))

    same, other = Response(), Response()
    assert go_on(same, "a?") is go_on(other, "pid?") is None
    assert go_on(same, "b?") is None
    for worker in task.environment._workers:
        if worker is not None:
            worker.kill()
    same = Response.from_json(json.loads(json.dumps(same.to_json())))  # of a checkpoint
    assert go_on(same, "ok$").reward == 1.0
    failed = go_on(other, "b?")
    assert "an environment must answer the same turns equally" in failed.error


def test_a_turn_that_an_update_cuts_goes_on_alone(task):
    """Its stop string may lie across the cut, never across the turns."""
    (prompt,) = task.training_prompts(0, 1)
    turns, response, stop = Turns(task, 60), Response(), ("#?", "?a")

    def add(line, version, aborted=False):
        response.add(generation(line, version, aborted), stop, turns.decode)

    add("x#?", 4)
    turns.take(response, prompt, turns.step(response, prompt).result(60))
    add("ab#.", 4, aborted=True)
    assert not response.is_done
    add("?cde", 6, aborted=True)
    assert response.is_done
    assert response.is_cut
    assert turns.decode(response.ids) == "x#?<1:x#?>ab#?"
    assert response.versions == [4] * 13 + [6]
    assert turns.take(response, prompt, turns.step(response, prompt).result(60)) is None
    assert response.turns == ["x#?", "ab#?"]


@pytest.mark.parametrize(("ended", "text"), [(True, "\nU:seen$\nA:"), (False, "$\nU:seen$\nA:")])
def test_with_a_chat_template_an_environment_speaks_as_the_user(ended, text):
    def apply_chat_template(messages, tokenize, add_generation_prompt):
        assert not tokenize
        turns = [f"{m['role'][0].upper()}:{m['content']}$\n" for m in messages]
        return "".join(turns) + "A:" * add_generation_prompt

    tokenizer = SimpleNamespace(apply_chat_template=apply_chat_template, eos_token="$")
    settings = SimpleNamespace(template="chat", template_options=None)
    assert templates.reply(settings, "seen", ended, tokenizer) == text


def stream(task, server, **settings):
    settings = {"prompts": 2, "samples": 2, "max_new_tokens": 60, "stop": ["?"], **settings}
    pool = Pool(60)
    pool.clients = [server]
    return Stream(Collector(Rollout(**settings), task, pool, 0), steps=4)


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_stream_plays_samples_to_their_ends(task, ahead):
    server = Scripted("~?", "a$", "ok$", version=5)
    of, graded = stream(task, server, ahead=ahead), 0
    for step in range(3):
        collected = of.collect(step, 5, 5, stopped())
        of.adapt(of.ready)
        assert [sample.reward for sample in collected.samples] == [1.0] * 4
        assert [sample.group for sample in collected.samples] == [0, 0, 1, 1]
        graded += collected.tally.graded
        assert collected.counts["rollout/turns"] == 12
        if sent := collected.counts["rollout/turn_tokens"]:
            assert 0.9 < collected.counts["rollout/cached_tokens"] / sent < 1
    assert graded >= 12


class Held(Scripted):
    """Answers its first request when it has got one for a second turn; or refuses that one, and never answers."""

    refuses = False

    async def generate_each(self, http, names, prompts, samplings, seeds=None, routing=None):
        if not self.prompts:
            self.later = asyncio.Event()
            self.said(prompts[0], samplings[0])
            await asyncio.wait_for(self.later.wait(), 20)
        elif self.turn_of(prompts[0]) == 1:
            if self.refuses:
                raise ServerError("no")
            self.later.set()
        return self.generate(prompts, samplings)


def test_no_sample_waits_for_the_turns_of_others(task):
    """Nor is a refusal waited out by other samples of its prompt."""
    server = Held("~?", "a$", "ok$", version=5)
    collected = stream(task, server, prompts=1).collect(0, 5, 5, stopped())
    assert [sample.reward for sample in collected.samples] == [1.0, 1.0]
    refusing = Held("~?", "a$", "ok$", version=5)
    refusing.refuses = True
    with pytest.raises(ServerError, match="no"):
        stream(task, refusing, prompts=1).collect(0, 5, 5, stopped())


def test_the_experts_of_every_token_are_those_of_its_pass(task):
    """Of what the environment said, and of a turn's last token, those of the request that ran them."""
    server = Scripted("~?", "a$", "ok$")
    of = stream(task, server)
    sampled, server.version = server.said, 3

    def later(prompt, sampling):
        server.version = 3 + server.turn_of(prompt)
        piece = sampled(prompt, sampling)
        server.version = 3
        return Generation(**{**vars(piece), "version": "3"})

    server.said = later
    sample = of.collect(0, 3, 3, stopped()).samples[0]
    start = len(sample.prompt.ids)
    runs = [value // 1000 for value in sample.experts.flatten().tolist()]
    first = start + 2 - 1  # all but the last token of the first turn
    assert runs[:first] == [3] * first
    second = first + 1 + len("<1:12?>") + 1
    assert runs[first:second] == [4] * (second - first)
    assert set(runs[second:]) == {5}
