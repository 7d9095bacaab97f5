"""Row parity: the learner in fp32 against transformers."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.tools.selftest import models
from megatron_fp16rl.tools.selftest.result import Check, Setting, at_most

if TYPE_CHECKING:  # importing it imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

BOUND = 1e-5  # nats; of the gradient norm, relative
TEMPERATURE = 0.7


def parity(setting: Setting) -> list[Check]:
    """Logits, log-probs, loss and gradient norm of tiny models: of all families, or a dense one and experts."""
    world, checks = models.world(), []
    sequences = models.random_tokens()
    for name, config in (models.TINY if setting.quick else models.EVERY).items():
        hf = models.hf_model(config, setting.folder / name)
        learner = models.learner(setting.folder / name, world, "fp32", TEMPERATURE)
        theirs, ours = of_transformers(hf, sequences), _of_learner(learner, sequences)
        apart = {
            "logits": _largest(theirs.logits, ours.logits),
            "log-probs": _largest(theirs.logprobs, ours.logprobs),
            "loss": abs(theirs.loss - ours.loss),
            "gradient norm": abs(ours.grad_norm / theirs.grad_norm - 1),
        }
        checks += [at_most(f"{name}: {what}", value, BOUND) for what, value in apart.items()]
    return checks


class Numbers(NamedTuple):
    """logits [tokens - 1, vocabulary] and logprobs [tokens - 1] of each sequence; mean loss; its gradient's norm."""

    logits: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    loss: float
    grad_norm: float


def of_transformers(model: Any, sequences: list[list[int]]) -> Numbers:
    """Of a transformers model; the loss is the mean over all tokens."""
    logits = [model(torch.tensor([ids])).logits[0, :-1] for ids in sequences]
    logprobs = [
        (of_one / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        for of_one, ids in zip(logits, sequences, strict=True)
    ]
    loss = -torch.cat(logprobs).mean()
    loss.backward()
    squares = [p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(squares).sum().sqrt().item()
    detached = [[t.detach() for t in tensors] for tensors in (logits, logprobs)]
    return Numbers(detached[0], detached[1], loss.item(), norm)


def _of_learner(learner: "Learner", sequences: list[list[int]]) -> Numbers:
    batch = learner.share(Batch.from_token_ids(sequences))
    logits = _packed_logits(learner, batch)
    scored = learner.score(batch).pi.cpu()
    logprobs = [scored[row, 1 : len(ids)] for row, ids in enumerate(sequences)]
    outcome, loss = learner.supervised_update(batch)
    assert outcome.grad_norm is not None, "in fp32 no update is skipped"
    return Numbers(logits, logprobs, loss, outcome.grad_norm)


@torch.no_grad()
def _packed_logits(learner: "Learner", batch: Batch) -> list[torch.Tensor]:
    """Of each sequence, the logits of its tokens but the last; several are packed into one row."""
    from megatron_fp16rl.learner.arrangement import arrange

    forward, (chunk,) = learner.forward, learner.model.chunks
    chunk.train(False)
    vocabulary = learner.model.spec.shapes.vocabulary
    logits: dict[int, torch.Tensor] = {}
    for micro_batch in forward.micro_batches(batch):
        rows = batch.rows(micro_batch.sequences, max(micro_batch.lengths))
        arrangement = arrange(micro_batch, learner.world.context)
        at = arrangement.predictors(rows.mask)
        of_all = forward.logits(rows, arrangement, at.place, chunk)[0, :, :vocabulary].cpu()
        for row, sequence in enumerate(micro_batch.sequences):
            logits[sequence] = of_all[at.sequence.cpu() == row]
    return [logits[sequence] for sequence in sorted(logits)]


def _largest(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(these, those, strict=True))
