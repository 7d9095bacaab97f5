"""The sequences on which the two engines disagree most, with their text, for people to look at."""

import json
from pathlib import Path

import torch.distributed as dist

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.parallel import World
from megatron_fp16rl.utils.files import Unreadable, read_json_lines, write_text

Row = dict[str, object]


def sequence_rows(batch: Batch) -> list[Row]:
    """Each sequence of a scored batch as plain values.

    log_ratio is the sum of log pi - log mu over its response tokens, logprob_abs_mean the mean
    magnitude of a term, both in nats; the log-probs are those of the response tokens.
    """
    rows = []
    for i, length in enumerate(batch.lengths.tolist()):
        mask = batch.mask[i]
        mu, pi = batch.mu_logprobs[i][mask].double(), batch.pi_logprobs[i][mask].double()
        tokens, response = batch.tokens[i, :length], mask[:length]
        rows.append(
            {
                "log_ratio": (pi - mu).sum().item(),
                "logprob_abs_mean": (pi - mu).abs().mean().item(),
                "prompt_ids": tokens[~response].tolist(),
                "response_ids": tokens[response].tolist(),
                "mu_logprobs": mu.tolist(),
                "pi_logprobs": pi.tolist(),
            }
        )
    return rows


def worst_first(rows: list[Row], count: int) -> list[Row]:
    """The `count` rows whose log ratio, the logarithm of a sequence's weight, is farthest from 0."""
    return sorted(rows, key=lambda row: -abs(row["log_ratio"]))[:count]


def with_text(row: Row, tokenizer: object) -> Row:
    """The same with prompt and response in words, special tokens included."""
    decode = tokenizer.decode
    return {**row, "prompt": decode(row["prompt_ids"]), "response": decode(row["response_ids"])}


class Worst:
    """The worst sequences of a run so far: mismatch/worst.jsonl of its directory, worst first.

    A few of the whole run, not of every step: a file that stays small, and is written again only
    when a step had a worse one.
    """

    FILE = Path("mismatch", "worst.jsonl")

    def __init__(
        self, folder: Path, world: World, tokenizer: object, first_step: int, count: int = 16
    ) -> None:
        """folder: the run directory. Of a resumed run, what was kept from later steps is dropped."""
        self.world, self.tokenizer, self.count = world, tokenizer, count
        self.file = folder / self.FILE
        self.rows: list[Row] = []
        if world.is_rank0 and self.file.exists():
            try:
                kept = read_json_lines(self.file)
                rows = [row for row in kept if row["step"] < first_step]
                self.rows = worst_first(rows, count)
            except (Unreadable, KeyError, TypeError) as damage:  # no reason to end a run
                print(f"{self.file} is begun anew: {damage}", flush=True)

    def keep(self, batch: Batch, step: int) -> None:
        """Looks through the scored batch of a step. Collective over the leaders."""
        if not self.world.is_leader:
            return
        ratios = ((batch.pi_logprobs - batch.mu_logprobs) * batch.mask).sum(1)
        mine = ratios.abs().topk(min(self.count, len(batch))).indices
        found = [None] * self.world.data.size if self.world.is_rank0 else None
        rows = sequence_rows(batch.replace(experts=None).rows(mine))
        dist.gather_object(rows, found, group=self.world.data.group, group_dst=0)
        if not self.world.is_rank0:
            return
        new = [{"step": step, **row} for rows in found for row in rows]
        worst = worst_first([*self.rows, *new], self.count)
        if worst != self.rows:
            self.rows = [r if "response" in r else with_text(r, self.tokenizer) for r in worst]
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))
