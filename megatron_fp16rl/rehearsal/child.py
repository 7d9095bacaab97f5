"""`python -m megatron_fp16rl.rehearsal.child train ...` is `fp16rl train ...`, and ends with who started it."""

from megatron_fp16rl.cli import main
from megatron_fp16rl.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    main()
