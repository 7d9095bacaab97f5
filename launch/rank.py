"""The entry point of a learner rank: `python -m launch.rank RUN_DIR` under any launcher.

The launcher gives RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment, as
torchrun does.
"""

import os
import sys
import traceback
from pathlib import Path

from megatron_fp16rl.processes import die_with_parent

RECIPE_FILE = "recipe.yaml"
ENDPOINTS_FILE = "private/endpoints.json"


def main() -> None:
    """Runs this rank to the end of the run."""
    die_with_parent()
    folder = Path(sys.argv[1])
    from megatron_fp16rl.learner.faults import NonFinite
    from megatron_fp16rl.recipe import load
    from megatron_fp16rl.train import train

    try:
        try:
            train(load(folder / RECIPE_FILE), folder, folder / ENDPOINTS_FILE)
        except NonFinite as fault:
            fault.save(folder)
            raise
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Leave at once: a collective that other ranks will never join cannot be aborted (gloo), and
        # an orderly exit would wait for its timeout.
        os._exit(1)


if __name__ == "__main__":
    main()
