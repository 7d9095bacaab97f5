"""Sequences with both engines' log-probs and their text, to be read by people."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.data.batch import ScoredBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def sequence_rows(batch: ScoredBatch, tokenizer: "PreTrainedTokenizerBase") -> list[Row]:
    """Each sequence as plain values, and with the text of prompt and response, special tokens included.

    log_ratio is the sum of log pi - log mu over its response tokens, logprob_abs_mean the mean of
    |log pi - log mu|, both in nats; log-probs are those of the response tokens.
    """
    rows = []
    for i, length in enumerate(batch.lengths.tolist()):
        mask = batch.mask[i]
        mu, pi = batch.mu_logprobs[i][mask].double(), batch.pi[i][mask].double()
        tokens, is_response = batch.tokens[i, :length], mask[:length]
        prompt, response = tokens[~is_response].tolist(), tokens[is_response].tolist()
        rows.append(
            {
                "log_ratio": (pi - mu).sum().item(),
                "logprob_abs_mean": (pi - mu).abs().mean().item(),
                "prompt_ids": prompt,
                "response_ids": response,
                "mu_logprobs": mu.tolist(),
                "pi_logprobs": pi.tolist(),
                "prompt": tokenizer.decode(prompt),
                "response": tokenizer.decode(response),
            }
        )
    return rows
