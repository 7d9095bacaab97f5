"""`fp16rl doctor --warm`: a real server starts, and answers."""

import json

from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.utils import cache

runner = CliRunner()


def test_doctor_warms_a_real_server():
    tiny = "recipes/tiny/dense-grpo-fp16.yaml"
    result = runner.invoke(app, ["doctor", "--warm", tiny, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["ready"]
    assert answer["warm"]["start_s"] > 0
    assert answer["warm"]["kernels"] == str(cache.kernels())
    refused = runner.invoke(app, ["doctor", "--warm", tiny, "--set", "rollout.replay=rollouts"])
    assert refused.exit_code == 2
    assert "there are no servers to start" in refused.stderr
