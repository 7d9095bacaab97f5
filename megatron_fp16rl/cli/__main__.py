"""python -m megatron_fp16rl.cli"""

from megatron_fp16rl.cli import main

main()
