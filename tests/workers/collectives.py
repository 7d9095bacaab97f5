"""What the benchmark of collectives moves."""


def collective_payloads(size):
    """What each operation of `fp16rl bench collectives` brings; and what is said of one that lies."""
    import torch
    import torch.distributed as dist

    from megatron_fp16rl.parallel import Axis
    from megatron_fp16rl.tools.bench import collectives

    dist.init_process_group("gloo")
    axis = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)

    def transfer(operation, dtype):
        return collectives.transfer_of(operation, axis, size, dtype, torch.device("cpu"))

    results = {}
    for operation in collectives.OPERATIONS:
        for dtype in ("fp16", "bf16"):
            found = transfer(operation, dtype)
            case = collectives.Case("world", operation, dtype, axis.size, size)
            collectives.check(case, found)
            results[f"{operation} {dtype}"] = found.result.tolist()
    broken = transfer("all_reduce", "fp16")

    def lie():
        broken.result.copy_(broken.expected)
        broken.result[1] = 1

    try:
        wrong = collectives.Transfer(lie, broken.source, broken.result, broken.expected)
        collectives.check(case, wrong)
    except collectives.WrongPayload as error:
        return {"results": results, "complaint": str(error)}


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
