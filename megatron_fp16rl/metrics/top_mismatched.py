"""The sequences with the largest training-inference mismatch, with their text, to be read by people."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_fp16rl.data.batch import ScoredBatch
from megatron_fp16rl.parallel import World
from megatron_fp16rl.utils.files import Unreadable, read_json_lines, write_text

if TYPE_CHECKING:  # a report reads this module too
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def sequence_rows(batch: ScoredBatch) -> list[Row]:
    """Each sequence as plain values.

    log_ratio is the sum of log pi - log mu over its response tokens, logprob_abs_mean the mean of
    |log pi - log mu|, both in nats; log-probs are those of the response tokens.
    """
    rows = []
    for i, length in enumerate(batch.lengths.tolist()):
        mask = batch.mask[i]
        mu, pi = batch.mu_logprobs[i][mask].double(), batch.pi_logprobs[i][mask].double()
        tokens, is_response = batch.tokens[i, :length], mask[:length]
        rows.append(
            {
                "log_ratio": (pi - mu).sum().item(),
                "logprob_abs_mean": (pi - mu).abs().mean().item(),
                "prompt_ids": tokens[~is_response].tolist(),
                "response_ids": tokens[is_response].tolist(),
                "mu_logprobs": mu.tolist(),
                "pi_logprobs": pi.tolist(),
            }
        )
    return rows


def top_rows(rows: list[Row], count: int) -> list[Row]:
    """The `count` rows whose log ratio is farthest from 0, the farthest first."""
    return sorted(rows, key=lambda row: -abs(row["log_ratio"]))[:count]


def with_text(row: Row, tokenizer: "PreTrainedTokenizerBase") -> Row:
    """The row with the text of prompt and response, special tokens included."""
    decode = tokenizer.decode
    return {**row, "prompt": decode(row["prompt_ids"]), "response": decode(row["response_ids"])}


class TopMismatched:
    """The top mismatched sequences of a run so far: mismatch/worst.jsonl in the run directory.

    A few of the whole run, not of every step: the file stays small, and is rewritten only when a step
    has a sequence that belongs into it.
    """

    FILE = Path("mismatch", "worst.jsonl")

    def __init__(
        self,
        folder: Path,
        world: World,
        tokenizer: "PreTrainedTokenizerBase",
        first_step: int,
        count: int = 16,
    ) -> None:
        """folder: the run directory. first_step: rows of this and later steps are dropped at a resume."""
        self.world, self.tokenizer, self.count = world, tokenizer, count
        self.file = folder / self.FILE
        self.rows: list[Row] = []
        if world.is_rank0 and self.file.exists():
            try:
                kept = [row for row in read_json_lines(self.file) if row["step"] < first_step]
                self.rows = top_rows(kept, count)
            except (Unreadable, KeyError, TypeError) as error:  # no reason to end a run
                print(f"{self.file} is started again: {error}", flush=True)

    def add(self, batch: ScoredBatch, step: int) -> None:
        """Looks through the batch of a step. Collective over the leaders of model replicas."""
        world = self.world
        if not world.is_leader:
            return
        log_ratios = ((batch.pi_logprobs - batch.mu_logprobs) * batch.mask).sum(1)
        local_top = log_ratios.abs().topk(min(self.count, len(batch))).indices
        rows = sequence_rows(batch.replace(experts=None).rows(local_top))
        gathered: list[Any] | None = [None] * world.data.size if world.is_rank0 else None
        dist.gather_object(rows, gathered, group=world.data.group, group_dst=0)
        if gathered is None:
            return
        new = [{"step": step, **row} for rows in gathered for row in rows]
        top = top_rows([*self.rows, *new], self.count)
        if top != self.rows:
            # Only rows that stay are decoded.
            self.rows = [r if "response" in r else with_text(r, self.tokenizer) for r in top]
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))
