"""Grading: right, and whatever responses and users' functions do to it."""

import json
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest

from megatron_fp16rl.data.rewards import GradingStats, RewardError, Row, as_reward, open_grader
from megatron_fp16rl.recipe import ExactReward, FunctionReward, MathVerifyReward
from megatron_fp16rl.tools.rehearse.run import started_with
from tests.conftest import ROOT
from tests.runs import wait_for
from tests.unit.test_processes import is_alive, nothing_is_left
from tests.unit.test_tasks import MATH


@pytest.fixture(scope="module")
def math_verify():
    with open_grader(MathVerifyReward(kind="math_verify", timeout_s=3)) as grade:
        yield grade


def test_the_shipped_problems_grade_their_own_answers(math_verify):
    answers = [json.loads(line)["answer"] for line in MATH.read_text().splitlines()]
    texts = (
        "So the answer is $\\boxed{%s}$.",
        "So the answer is $\\boxed{123456}$.%.0s",
        "No.%.0s",
    )
    rows = [Row("", text % answer, answer) for answer in answers for text in texts]
    assert [g.reward for g in math_verify(rows)] == [1, 0, 0] * len(answers)


def test_equal_forms_of_an_answer_count_where_it_is_not_exactly_that(math_verify):
    rows = [
        Row("", *texts) for texts in (("\\boxed{0.5}", "\\frac{1}{2}"), ("$x=3$", "3"), ("4", "3"))
    ]
    assert [g.reward for g in math_verify(rows)] == [1, 1, 0]
    with open_grader(ExactReward(kind="exact")) as exact:
        assert [g.reward for g in exact([*rows, Row("", " 42\n", "42")])] == [0, 0, 0, 1]


# Measured: math-verify works on each for over 8 s without a time limit, on some for ever.
HOSTILE = {
    "tower": r"\boxed{9^{9^{9^9}}}",
    "parentheses": r"\boxed{" + "(" * 2000 + "x" + ")" * 2000 + "}",
}


def test_hostile_latex_costs_its_own_reward_only(math_verify):
    good = Row("", "\\boxed{5}", "5")
    rows = [row for text in HOSTILE.values() for row in (Row("", text, "5"), good)]
    grades = math_verify(rows)
    assert [g.reward for g in grades] == [0, 1] * 2
    assert [g.timed_out for g in grades] == [True, False] * 2
    assert GradingStats.of(grades) == GradingStats(graded=4, timeouts=2, errors=0)


def test_an_answer_that_cannot_be_read_is_an_error_not_a_zero(math_verify):
    (grade,) = math_verify([Row("", "\\boxed{5}", "")])
    assert "math-verify cannot read the problem's answer ''" in grade.error


# A user's function that does what its prompt says, in Python.
FUNCTION = """
import contextlib, os, signal, stat, subprocess, sys, time
import helper

class Mute(Exception):
    def __str__(self):
        raise ValueError("I say nothing")

def channel():
    # It has the number that it had in the process that started this one, which may be large.
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the listing itself
            if descriptor > 2 and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                return descriptor

def score(prompt, response, answer):
    print("a user may print")
    scope = {**globals(), "reward": helper.BONUS + len(response) * (answer == "a")}
    exec(compile(prompt, __file__, "exec"), scope)
    return scope["reward"]
"""
RIGHT = 3.5  # of a prompt that says nothing


@pytest.fixture(scope="module")
def function(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "helper.py").write_text("BONUS = 0.5\n")
    (folder / "mine.py").write_text(FUNCTION)
    path = f"{folder}/mine.py:score"
    return FunctionReward(kind="function", path=path, timeout_s=2, workers=2, memory_gib=4)


def told(grade, *prompts):
    return grade([Row(prompt, "abc", "a") for prompt in prompts])


@pytest.fixture(scope="module")
def users(function):
    with open_grader(function) as grade:
        yield grade


def test_a_users_function_is_given_prompt_response_and_answer(users):
    texts = ["a" * n for n in range(40)] + ["\U0001f914\u2028\n\0"]
    rows = [Row("reward += 100", text, "a") for text in texts]
    assert [g.reward for g in users(rows)] == [100.5 + len(text) for text in texts]
    assert users([Row("", "abc", "b")])[0].reward == 0.5


def test_a_function_that_hangs_costs_one_reward(users):
    trickles = "while True: os.write(channel(), b'0'); time.sleep(0.01)"
    grades = told(users, "while True: pass", "", trickles, "")
    assert [(g.reward, g.timed_out, g.error) for g in grades] == [
        *((0, True, None), (RIGHT, False, None)) * 2
    ]


# What it does, and what is said of it.
FAULTS = {
    "raise KeyError('no such thing')": "KeyError: 'no such thing' (",
    "reward = float('nan')": "must be a finite number, not 'nan'",
    "reward = None": "not 'None'",
    "reward = '1'": "not '1'",
    "reward = 'x' * 10**6": "not 'xxx",
    "reward = len(bytes(8 << 30)) * 0.0": "MemoryError",
    "os._exit(0)": "ended with exit code 0",
    "os.kill(os.getpid(), signal.SIGKILL)": "killed by SIGKILL",
    "sys.exit(3)": "SystemExit: 3 (",
    "raise KeyboardInterrupt": "KeyboardInterrupt: ",
    "raise Mute": "ended with exit code 1",
    "raise ValueError('half a character: ' + chr(0xD83D))": "ValueError: half a character: ",
    "raise ValueError('x' * 10**8)": "ValueError: xxxxxxxx",
    "os.close(channel()); time.sleep(600)": "closed the socket that its answers come by",
    "os.fork() or time.sleep(600); os._exit(4)": "ended with exit code 4",
    "os.write(channel(), b'hello')": "gave no valid answer",
    "while True: os.write(channel(), bytes(10**6))": "gave no valid answer",
    # Once more than it was asked.
    r"""os.write(channel(), b'{"reward": 1}\n{"reward": 2}\n')""": "gave no valid answer",
    r"os.write(channel(), b'{}\n'); time.sleep(600)": "must be a finite number, not 'None'",
}


def test_whatever_a_function_does_is_an_error_of_its_own(users):
    grades = told(users, *(text for fault in FAULTS for text in (fault, "")))
    assert [g.reward for g in grades] == [0, RIGHT] * len(FAULTS)
    assert not any(g.timed_out for g in grades)
    for (fault, message), grade in zip(FAULTS.items(), grades[::2], strict=True):
        assert message in grade.error, fault
        assert len(grade.error.encode()) < 3000
    assert "mine.py:1)" in grades[0].error
    assert all(g.error is None for g in grades[1::2])
    # A few such errors stop a run.
    with pytest.raises(RewardError, match=r"19 of 38 .*KeyError: 'no such thing'"):
        GradingStats.of(grades).check(0.1)


def test_a_fork_of_a_function_answers_nothing(users):
    grades = told(users, *["os.fork(); reward = 17", ""] * 4)
    assert [g.reward for g in grades] == [17, RIGHT] * 4


def test_what_a_function_prints_goes_to_stderr_up_to_a_size(function, capfd):
    much = "for _ in range(100): print('*' * 10**5)"
    with open_grader(function.model_copy(update={"workers": 1})) as grade:
        assert [g.reward for g in told(grade, much, "", much)] == [RIGHT] * 3
    size = 2**16 - len("a user may print\n")
    assert capfd.readouterr().err.count("*") == 2 * size


def test_a_file_that_ends_the_process_is_no_reward(tmp_path):
    (tmp_path / "ends.py").write_text("import sys; sys.exit('no GPU here')")
    settings = FunctionReward(kind="function", path=f"{tmp_path}/ends.py:score", workers=1)
    with (
        open_grader(settings) as grade,
        pytest.raises(RewardError, match="SystemExit: no GPU here"),
    ):
        told(grade, "")


def test_a_worker_that_dies_while_it_is_idle_costs_nothing(users):
    ask = ["reward = os.getpid()"] * 20
    pids = {int(g.reward) for g in told(users, *ask)}
    workers = [psutil.Process(pid) for pid in pids]
    for worker in workers:
        worker.kill()
    wait_for(lambda: not any(map(is_alive, workers)), 60, "their death")
    grades = told(users, *ask)
    assert not any(g.timed_out or g.error for g in grades)
    assert not pids & {int(g.reward) for g in grades}


def test_a_late_worker_is_killed_with_its_children(function, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with open_grader(function.model_copy(update={"workers": 1})) as grade:
        assert told(grade, "subprocess.run(['sleep', '600'])")[0].timed_out
        wait_for(
            lambda: not [p for p in started_with(str(tmp_path)) if p.name() == "sleep"],
            10,
            "the end of the child",
        )
        assert told(grade, "")[0].reward == RIGHT


def test_no_worker_outlives_a_rank_that_is_killed(function, tmp_path):
    """Not even those that are busy, and look at nothing but their work."""
    code = (
        "from megatron_fp16rl import recipe; from megatron_fp16rl.data import rewards\n"
        "if __name__ == '__main__':\n"
        f"    settings = recipe.FunctionReward(kind='function', path={function.path!r}, timeout_s=600)\n"
        "    grade = rewards.make_grader(settings)\n"
        "    grade([rewards.Row('', 'abc', 'a')] * 8)\n"
        "    print('ready', flush=True)\n"
        "    grade([rewards.Row('while True: pass', 'abc', 'a')] * 3)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    ) as rank:
        while b"ready" not in rank.stdout.readline():
            assert rank.poll() is None
        family = started_with(str(tmp_path))
        assert len(family) >= 3
        wait_for(lambda: sum(p.cpu_times().user > 0.5 for p in family) >= 2, 60, "the hanging")
        rank.kill()
    nothing_is_left(family, tmp_path)


def test_rewards_are_finite_numbers():
    for good in (1, 0.5, True, np.float32(0.5), np.int64(3), -2):
        assert as_reward(good) == float(good)
    for bad in (None, "1", [1.0], float("inf"), np.nan, 1j, 10**400):
        with pytest.raises(ValueError, match="must be a finite number"):
            as_reward(bad)


def test_errors_up_to_a_fraction_are_borne():
    tally = (
        GradingStats(8, 3, 0) + GradingStats(12, 1, 2, "first") + GradingStats(20, 0, 2, "second")
    )
    assert tally == GradingStats(40, 4, 4, "first")
    tally.check(0.1)
    with pytest.raises(RewardError, match=r"4 of 40 .*=0.09 of the task\). The first error: first"):
        tally.check(0.09)
    GradingStats().check(0.0)
