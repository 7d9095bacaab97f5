"""Grading: right, and whatever responses and users' functions do to it."""

import json
import os
import subprocess
import sys
import uuid

import numpy as np
import psutil
import pytest

from megatron_fp16rl.data.rewards import (
    GradingStats,
    RewardError,
    Row,
    as_reward,
    open_grader,
)
from megatron_fp16rl.recipe import (
    ExactReward,
    FunctionReward,
    MathVerifyReward,
)
from tests.conftest import ROOT
from tests.unit.test_processes import MARK, is_alive, marked, nothing_is_left, wait_for
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
    "factorial": r"\boxed{(10^{9})!}",
    "parentheses": r"\boxed{" + "(" * 2000 + "x" + ")" * 2000 + "}",
}


def test_hostile_latex_costs_its_own_reward_only(math_verify):
    good = Row("", "\\boxed{5}", "5")
    rows = [row for text in HOSTILE.values() for row in (Row("", text, "5"), good)]
    grades = math_verify(rows)
    assert [g.reward for g in grades] == [0, 1] * 3
    assert [g.timed_out for g in grades] == [True, False] * 3
    assert GradingStats.of(grades) == GradingStats(graded=6, timeouts=3, errors=0)


def test_an_answer_that_cannot_be_read_is_an_error_not_a_zero(math_verify):
    (grade,) = math_verify([Row("", "\\boxed{5}", "")])
    assert "math-verify cannot read the problem's answer ''" in grade.error


FUNCTION = """
import os, signal, stat, subprocess, sys, time
import helper

class Mute(Exception):
    def __str__(self):
        raise ValueError("I say nothing")

def sockets():
    # It has the number that it had in the process that started this one, which may be large.
    numbers = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if descriptor > 2 and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                numbers.append(descriptor)
        except OSError:  # that of the listing itself
            pass
    return numbers

def score(prompt, response, answer):
    if response == "sys.exit":
        sys.exit(3)
    if response == "interrupt":
        raise KeyboardInterrupt
    if response == "mute":
        raise Mute
    if response == "surrogate":
        raise ValueError("half a character: " + chr(0xd83d))
    if response == "wordy":
        raise ValueError("x" * 10**8)
    if response == "closes":
        for descriptor in sockets():
            os.close(descriptor)
        time.sleep(600)
    if response == "forks and dies":
        if os.fork() == 0:
            time.sleep(600)
        os._exit(4)
    if response == "forks and goes on":
        os.fork()
    if response == "writes":
        os.write(sockets()[0], b"hello")
    if response == "answers":  # once more than it was asked
        os.write(sockets()[0], b'{"reward": 1}\\n{"reward": 2}\\n')
    if response == "answers amiss":
        os.write(sockets()[0], b'{}\\n')
        time.sleep(600)
    if response == "trickles":
        while True:
            os.write(sockets()[0], b"0")
            time.sleep(0.01)
    if response == "floods":
        while True:
            os.write(sockets()[0], bytes(10**6))
    if response == "prints":
        for _ in range(100):
            print("*" * 10**5)
    if response == "hang":
        while True:
            pass
    if response == "hang with a child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        time.sleep(600)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "exit":
        os._exit(0)
    if response == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "memory":
        return len(bytes(8 << 30)) * 0.0
    if response == "pid":
        return os.getpid()
    print("a user may print")
    special = {"nan": float("nan"), "none": None, "text": "1", "long": "x" * 10**6}
    return special.get(response, helper.BONUS + len(response) * (prompt == "p") * (answer == "a"))
"""


@pytest.fixture(scope="module")
def function(tmp_path_factory):
    """Settings of a user's function that misbehaves when it is told to."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "helper.py").write_text("BONUS = 0.5\n")
    (folder / "mine.py").write_text(FUNCTION)
    path = f"{folder}/mine.py:score"
    return FunctionReward(kind="function", path=path, timeout_s=2, workers=2, memory_gib=4)


@pytest.fixture(scope="module")
def users(function):
    with open_grader(function) as grade:
        yield lambda *responses: grade([Row("p", response, "a") for response in responses])


def test_a_users_function_is_given_prompt_response_and_answer(users):
    texts = ["a" * n for n in range(40)] + ["\U0001f914\u2028\n\0"]
    assert [g.reward for g in users(*texts)] == [0.5 + len(t) for t in texts]


def test_a_function_that_hangs_costs_one_reward(users):
    grades = users("hang", "abc", "trickles", "abc")
    assert [(g.reward, g.timed_out, g.error) for g in grades] == [
        *((0, True, None), (3.5, False, None)) * 2
    ]


# What it does, and what is said of it: an error, of which a few stop a run.
FATAL = {
    "exit": "ended with exit code 0",
    "killed": "killed by SIGKILL",
    "sys.exit": "SystemExit: 3 (",
    "interrupt": "KeyboardInterrupt: ",
    "mute": "ended with exit code 1",
    "surrogate": "ValueError: half a character: ",
    "wordy": "ValueError: xxxxxxxx",
    "closes": "closed the socket that its answers come by",
    "forks and dies": "ended with exit code 4",
    "writes": "gave no valid answer",
    "floods": "gave no valid answer",
    "answers": "gave no valid answer",
    "answers amiss": "must be a finite number, not 'None'",
}


def test_a_function_that_ends_its_process_or_meddles_with_it_is_an_error(users):
    grades = users(*(text for word in FATAL for text in (word, "abc")))
    assert [g.reward for g in grades] == [0, 3.5] * len(FATAL)
    assert not any(g.timed_out for g in grades)
    for (word, message), grade in zip(FATAL.items(), grades[::2], strict=True):
        assert message in grade.error, word
        assert len(grade.error.encode()) < 3000
    assert all(g.error is None for g in grades[1::2])
    with pytest.raises(RewardError, match=r"13 of 26 .*ended with exit code 0"):
        GradingStats.of(grades).check(0.1)


def test_a_fork_of_a_function_answers_nothing(users):
    assert [g.reward for g in users(*["forks and goes on", "abc"] * 4)] == [17.5, 3.5] * 4


def test_what_a_function_prints_goes_to_stderr_up_to_a_size(function, capfd):
    with open_grader(function.model_copy(update={"workers": 1})) as grade:
        rows = [Row("p", text, "a") for text in ("prints", "abc", "prints")]
        assert [g.reward for g in grade(rows)] == [6.5, 3.5, 6.5]
    assert capfd.readouterr().err.count("*") == 2 * 2**16


def test_a_file_that_ends_the_process_is_no_reward(tmp_path):
    (tmp_path / "ends.py").write_text("import sys; sys.exit('no GPU here')")
    settings = FunctionReward(kind="function", path=f"{tmp_path}/ends.py:score", workers=1)
    with (
        open_grader(settings) as grade,
        pytest.raises(RewardError, match="SystemExit: no GPU here"),
    ):
        grade([Row("p", "r", "a")])


def test_what_a_function_raises_or_returns_amiss_is_an_error(users):
    grades = users("raise", "nan", "none", "text", "long", "memory", "abc")
    assert [g.reward for g in grades] == [0] * 6 + [3.5]
    assert not any(g.timed_out for g in grades)
    messages = [g.error for g in grades]
    assert "KeyError: 'no such thing'" in messages[0]
    assert "mine.py:" in messages[0]
    assert "must be a finite number, not 'nan'" in messages[1]
    assert "not 'None'" in messages[2]
    assert "not '1'" in messages[3]
    assert len(messages[4]) < 500
    assert "MemoryError" in messages[5]
    assert messages[6] is None


def test_a_worker_that_dies_while_it_is_idle_costs_nothing(users):
    pids = {int(g.reward) for g in users(*["pid"] * 20)}
    workers = [psutil.Process(pid) for pid in pids]
    for worker in workers:
        worker.kill()
    wait_for(lambda: not any(map(is_alive, workers)), 60, "their death")
    grades = users(*["pid"] * 20)
    assert not any(g.timed_out or g.error for g in grades)
    assert not pids & {int(g.reward) for g in grades}


def command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def test_a_late_worker_is_killed_with_its_children(function, monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    with open_grader(function.model_copy(update={"workers": 1})) as grade:
        assert grade([Row("p", "hang with a child", "a")])[0].timed_out
        family = [p for p in marked(mark) if "time.sleep(600)" in command(p)]
        nothing_is_left(family, "no such mark", 10)
        assert grade([Row("p", "abc", "a")])[0].reward == 3.5


def test_no_worker_outlives_a_rank_that_is_killed(function):
    """Not even those that are busy, and look at nothing but their work."""
    mark = uuid.uuid4().hex
    code = (
        "from megatron_fp16rl import recipe; from megatron_fp16rl.data import rewards\n"
        "if __name__ == '__main__':\n"
        f"    settings = recipe.FunctionReward(kind='function', path={function.path!r}, timeout_s=600)\n"
        "    grade = rewards.make_grader(settings)\n"
        "    grade([rewards.Row('p', 'abc', 'a')] * 8)\n"
        "    print('ready', flush=True)\n"
        "    grade([rewards.Row('p', 'hang', 'a')] * 3)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
    ) as rank:
        while b"ready" not in rank.stdout.readline():
            assert rank.poll() is None
        wait_for(lambda: len(marked(mark)) >= 3, 60, "the start of the workers")
        family = marked(mark)
        wait_for(lambda: sum(p.cpu_times().user > 0.5 for p in family) >= 2, 60, "the hanging")
        rank.kill()
    nothing_is_left(family, mark)


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
