"""Prompts without signal give way to others, as often as the recipe allows."""

from megatron_fp16rl.data.batch import Batch, Prompt, Sample, statistics
from megatron_fp16rl.rollout.collector import dynamic_sampling

SAMPLES = 3


def attempts(rounds, count):
    """Prompts by attempt: "0/0", "0/1", ..., "1/0", ..."""
    return [
        [Prompt(f"{attempt}/{i}", [attempt, i], "") for i in range(count)]
        for attempt in range(rounds)
    ]


def drawing(signal, calls):
    """Draws samples whose rewards differ where `signal` has the prompt's text."""

    def draw(asked, attempt):
        calls.append((attempt, [group for group, _ in asked]))
        return [
            Sample(prompt, group, [1], [-1.0], "", False, 0, reward)
            for group, prompt in asked
            for reward in (0.0, float(prompt.text in signal), 0.0)
        ]

    return draw


def test_only_groups_without_signal_are_drawn_again():
    calls = []
    draw = drawing({"0/2", "1/4", "2/3"}, calls)
    samples, replaced = dynamic_sampling(attempts(3, 6), range(2, 5), draw)
    assert calls == [(0, [2, 3, 4]), (1, [3, 4]), (2, [3])]
    assert replaced == 3
    assert [s.prompt.text for s in samples[::SAMPLES]] == ["0/2", "2/3", "1/4"]
    assert [s.group for s in samples] == [2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_the_last_attempt_stands_and_one_attempt_is_no_refilling():
    calls = []
    samples, replaced = dynamic_sampling(attempts(2, 2), range(2), drawing({"0/0"}, calls))
    assert [s.prompt.text for s in samples[::SAMPLES]] == ["0/0", "1/1"]
    assert (len(calls), replaced) == (2, 1)
    samples, replaced = dynamic_sampling(attempts(1, 2), range(2), drawing(set(), calls))
    assert (len(samples), replaced, len(calls)) == (6, 0, 3)
    found = statistics(Batch.from_samples(samples))
    assert found["reward/without_signal_fraction"] == 1


def test_what_stands_in_for_a_group_does_not_depend_on_how_groups_are_shared_out():
    signal = {"0/0", "1/2", "2/1", "2/3"}
    whole, _ = dynamic_sampling(attempts(3, 4), range(4), drawing(signal, []))
    halves = [
        dynamic_sampling(attempts(3, 4), share, drawing(signal, []))[0]
        for share in (range(2), range(2, 4))
    ]
    assert whole == halves[0] + halves[1]
    found = statistics(Batch.from_samples(whole))
    assert found["reward/without_signal_fraction"] == 0
    assert found["reward/mean"] == 4 / 12
