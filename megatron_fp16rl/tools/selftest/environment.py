"""Row environment: what `fp16rl doctor` and the preflight of a job look at."""

from launch import preflight
from megatron_fp16rl.tools.doctor import examine
from megatron_fp16rl.tools.selftest.result import Check, Setting


def environment(_: Setting) -> list[Check]:
    """A check for each finding of doctor; a complaint of it fails."""
    checks = [
        Check(
            name=finding.name,
            value=finding.found or "-",
            bound=finding.meaning,
            holds=not finding.needed,
        )
        for finding in examine()
    ]
    wrong = preflight.examine()["wrong"]
    locked = Check(
        name="lockable memory",
        value="enough" if not wrong else "too little",
        bound="; ".join(wrong) or "InfiniBand may register what NCCL sends",
        holds=not wrong,
    )
    return [*checks, locked]
