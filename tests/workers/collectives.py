"""How long collectives wait."""


def patience(timeout_s):
    """Minutes that Megatron's groups wait, of some."""
    import torch

    from megatron_fp16rl.parallel import initialize
    from megatron_fp16rl.recipe import Layout

    world = initialize(Layout(), 0, timeout_s)
    groups = {name: getattr(world, name).group for name in ("tensor", "data", "expert", "replica")}
    return {
        name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60
        for name, group in groups.items()
    }
