"""Large recipes that ship fit the GPUs that they are for, and export their models whole."""

import pytest

from megatron_fp16rl.tools import recipes
from tests.conftest import run_ranks


@pytest.mark.timeout(900)
def test_all_recipes_fit_and_export_their_models_whole():
    """At their models' true sizes, every stage of every layout built by Megatron."""
    files = [path for path in recipes.paths() if path.parent.name in ("dense", "moe")]
    paths = [str(path) for path in files]
    (reasons,) = run_ranks(1, "planning.catalogue", timeout=800, paths=paths)
    assert reasons == {path.stem: [] for path in files}
