"""Large recipes that ship fit the GPUs that they are for, and export their models whole."""

import pytest

from megatron_fp16rl.tools import recipes
from tests.conftest import run_ranks


@pytest.mark.timeout(900)
def test_all_recipes_fit_and_export_their_models_whole():
    """At their models' true sizes, every stage of every layout built by Megatron."""
    files = [path for path in recipes.paths() if path.parent.name in ("dense", "moe")]
    paths = [str(path) for path in files]
    plans = run_ranks(1, "planning.catalogue", timeout=800, paths=paths)[0]
    assert set(plans) == {path.stem for path in files}
    for name, plan in plans.items():
        assert plan["reasons"] == [], name
        assert plan["margin_gib"] > 0, name
        assert plan["tensors"] == plan["of_transformers"], name
        assert plan["parameters_b"] == pytest.approx(plan["of_transformers_b"], rel=1e-9), name
