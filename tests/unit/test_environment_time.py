"""How long a worker of an environment has for an answer."""

import json

from megatron_fp16rl.data.environments import Environments, Transcript
from megatron_fp16rl.recipe import EnvironmentTask

ENVIRONMENT = '''
class Env:
    """Says the number of each turn; ends after the third."""

    def reset(self, problem, answer):
        self.turns = 0

    def step(self, turn):
        self.turns += 1
        return str(self.turns) if self.turns < 3 else None

    def reward(self):
        return 1.0

    def expert(self):
        return "a"
'''


def test_a_turn_that_is_played_again_has_its_time_too(tmp_path, monkeypatch):
    """Or one environment that hangs would cost all samples of its worker whose turns together take longer."""
    (tmp_path / "env.py").write_text(ENVIRONMENT)
    limits = []

    class Here:
        """A worker that is no process."""

        is_idle = True

        def __init__(self, name, memory_gib, prepare, arguments):
            self.answer = prepare(*arguments)

        def ask(self, question, timeout_s):
            limits.append(timeout_s)
            return self.answer(*json.loads(json.dumps(question)))

        def kill(self):
            pass

    monkeypatch.setattr("megatron_fp16rl.data.rewards.workers.Worker", Here)
    settings = EnvironmentTask(
        kind="environment",
        path=f"{tmp_path}/env.py:Env",
        problems="none",
        workers=1,
        timeout_s=2,
        max_turns=4,
    )
    environments = Environments(settings)

    def step(turns, name="one"):
        said = [str(i + 1) for i in range(len(turns) - 1)]
        return environments.step(Transcript("", "", list(turns), said, name)).result()

    assert step("a").text == "1"
    assert step("x", "another").text == "1"
    assert step("ab").text == step("ab").text == "2"  # the second time as if nobody had waited
    environments._workers[0].is_idle = False  # it is lost
    assert step("abc").grade.reward == 1.0
    assert step("xy", "another").text == "2"
    assert step("xyz", "another").grade.reward == 1.0
    assert limits == [2, 2, 2, 4, 6, 4, 2]
    assert environments.expert("", "").result().turns == ["a"] * 3
    assert limits[-1] == 2 * settings.max_turns
    environments.close()
