"""DAPO's dynamic sampling: prompts from which there is nothing to learn give way to others."""

from collections.abc import Callable, Iterable

from megatron_fp16rl.data.batch import Prompt, Sample

# samples of (group, prompt) pairs in an attempt, counted from 0
Draw = Callable[[list[tuple[int, Prompt]], int], list[Sample]]


def collect_with_signal(
    attempts: list[list[Prompt]], groups: Iterable[int], draw: Draw
) -> tuple[list[Sample], int]:
    """Samples of each group, in order, and how many prompts took another's place.

    attempts: for each, the prompts of all groups of the step. A group whose samples all earn the same
    is drawn again from its prompt in the next attempt; what the last one gives stands. Which prompts stand in for which depends neither on other groups nor on earlier
    steps, nor on the number of ranks. Source: DAPO, arXiv 2503.14476, equation 11 and section 3.2.
    """
    groups = list(groups)
    found: dict[int, list[Sample]] = {}
    lacking, replaced = groups, 0
    for attempt, offered in enumerate(attempts):
        samples = draw([(group, offered[group]) for group in lacking], attempt)
        for group in lacking:
            found[group] = [sample for sample in samples if sample.group == group]
        replaced += len(lacking) if attempt else 0
        lacking = [g for g in lacking if len({sample.reward for sample in found[g]}) == 1]
        if not lacking:
            break
    return [sample for group in groups for sample in found[group]], replaced
