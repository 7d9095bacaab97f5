"""`fp16rl doctor --warm`: a real server starts, and answers."""

import json

from megatron_fp16rl.utils import cache
from tests.runs import TINY, fp16rl, replay


def test_doctor_warms_a_real_server(tmp_path):
    answer = json.loads(fp16rl("doctor", "--warm", TINY, "--json").output)
    assert answer["ready"]
    assert answer["warm"]["start_s"] > 0
    assert answer["warm"]["kernels"] == str(cache.kernels())
    recorded = [f"--set={setting}" for setting in replay(tmp_path, 1)]
    refused = fp16rl("doctor", "--warm", TINY, *recorded, code=2)
    assert "there are no servers to start" in refused.stderr
