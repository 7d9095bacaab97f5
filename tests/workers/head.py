"""What the ranks of tests/ranks/test_output_layer.py run: logits in fp32, and their gradients."""

from pathlib import Path

import torch

from megatron_fp16rl.data.batch import Batch
from tests import models
from tests.workers.common import family_recipe, join_world, make_learner, my_share


def products(family: str, layout: dict, dtype: str, head: str | None, lora: dict | None) -> dict:
    """How far an output layer is from hidden @ weight.T of upcast operands, in an update of one micro-batch.

    By what is compared: the largest difference, relative to the largest number. Gradients are the loss-scaled
    ones that leave the layer, given that of the logits.
    """
    rest = {key: layout[key] for key in layout if key != "packing"}
    world = join_world(**rest)
    recipe = family_recipe(
        *(family, rest, lora),
        learner={"micro_batch_tokens": 256, "packing": layout.get("packing", True)},
        precision={"dtype": dtype, "head": head, "loss_scale": {"initial": 2.0**10}},
    )
    learner = make_learner(recipe, world)
    (gpt,) = learner.model.gpt_models
    layer, seen = gpt.output_layer, {}
    weight = layer.weight if layer.weight is not None else gpt.shared_embedding_or_output_weight()

    def watch(_: object, inputs: tuple, output: tuple) -> None:
        seen["hidden"], seen["logits"] = inputs[0].detach(), output[0].detach().clone()
        inputs[0].register_hook(lambda gradient: seen.update(of_hidden=gradient.clone()))
        output[0].register_hook(lambda gradient: seen.update(of_logits=gradient.clone()))

    layer.register_forward_hook(watch)
    if weight.requires_grad:
        weight.register_hook(lambda gradient: seen.update(of_weight=gradient.clone()))
    exact = weight.detach().double()
    _, loss = learner.supervised_update(
        my_share(Batch.from_token_ids(models.random_tokens(14, (10,) * 16)), world)
    )
    hidden, of_logits = (seen[name].double().flatten(0, 1) for name in ("hidden", "of_logits"))
    of_hidden = of_logits @ exact
    torch.distributed.all_reduce(of_hidden, group=world.tensor.group)
    ours = seen["of_hidden"].float().flatten(0, 1)
    if rest.get("sequence_parallel"):  # before they are summed and cut
        torch.distributed.all_reduce(ours, group=world.tensor.group)
    pairs = {
        "logits": (seen["logits"].flatten(0, 1), hidden @ exact.T),
        "of hidden": (ours, of_hidden),
    }
    if "of_weight" in seen and family == "qwen3":  # of a tied one, the embedding's is added
        pairs["of weight"] = seen["of_weight"], of_logits.T @ hidden
    return {
        "dtypes": [str(seen[name].dtype) for name in ("logits", "of_logits", "of_hidden")],
        "loss": loss,
        "apart": {
            name: ((got - right).abs().max() / right.abs().max()).item()
            for name, (got, right) in pairs.items()
        },
    }


def last_token(layout: dict, head: str | None) -> dict:
    """An update by the last tokens alone, which one context-parallel rank has; its rows, loss and norm."""
    world = join_world(**layout)
    recipe = family_recipe("qwen3", layout, precision={"head": head})
    learner = make_learner(recipe, world)
    whole = Batch.from_token_ids(models.random_tokens(14, (16,) * 16))
    batch = whole.replace(mask=whole.mask & (torch.arange(16) == 15))
    rows = []
    (gpt,) = learner.model.gpt_models
    gpt.output_layer.register_forward_hook(lambda *args: rows.append(args[2][0].shape[0]))
    outcome, loss = learner.supervised_update(batch)
    return {"rows": sum(rows), "loss": loss, "norm": outcome.grad_norm}


def memory(rows: int, vocabulary: int, hidden: int) -> dict:
    """Bytes of an fp32 output layer and its log-probs at their peak, both ways, in tiny chunks and blocks."""
    from megatron_fp16rl.learner import logprobs, output_layer
    from megatron_fp16rl.tools.plan.live_bytes import LiveBytes

    world = join_world()
    logprobs._CHUNK_ELEMENTS = output_layer._BLOCK_ELEMENTS = 4 * vocabulary
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator).half().requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator).half().requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    with LiveBytes("cpu") as live:
        logits = output_layer._Product.apply(states, weight)
        values = logprobs.token_logprobs(logits, targets, vocabulary, world.tensor.group)
        del logits
        values.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    right = (exact[0] @ exact[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    right.sum().backward()
    return {
        "peak": live.peak,
        "apart": [(values - right).abs().max().item()]
        + [
            ((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()).item()
            for ours, theirs in zip((states, weight), exact, strict=True)
        ],
    }


def serve(endpoint: dict, folder: str, sequences: list[list[int]]) -> dict:
    """Sends a folder's weights to a server; returns the learner's log-probs with either head."""
    from megatron_fp16rl.recipe import Sync
    from megatron_fp16rl.rollout.client import Client
    from megatron_fp16rl.rollout.discovery import Endpoint
    from megatron_fp16rl.rollout.weight_sync import connect

    world, here, scores = join_world(), Path(folder), {}
    for head in ("null", "fp32"):
        recipe = models.recipe(precision={"head": None if head == "null" else head})
        learner = make_learner(recipe, world, folder)
        rows = learner.score(Batch.from_token_ids(sequences)).pi_logprobs
        scores[head] = [r[1 : len(ids)].tolist() for r, ids in zip(rows, sequences, strict=True)]
    transport = connect(Sync(timeout_s=60), 1, "127.0.0.1", here, here, "fp16", world)
    transport.send(learner.exported, "31", [Client(Endpoint(**endpoint), 60)])
    transport.close()
    return scores
