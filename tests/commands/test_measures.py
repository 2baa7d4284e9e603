"""measures: the interval covers the truth, the paired test is exact, repetition and entropy are what they say."""

import itertools
import math

import pytest
import torch

from minirlhf.commands.measures import (
    bootstrap_interval,
    distinct_n,
    repetition,
    sequence_stats,
    sign_test,
    standard_error,
    win_rate,
    wins,
)
from minirlhf.run.folder import load_run
from minirlhf.seeds import seeded


@pytest.mark.parametrize(
    ("won", "tied", "prompts"), [(0.84, 0.03, 300), (0.5, 0.1, 300), (0.6, 0.0, 100), (0.3, 0.4, 150)]
)
def test_the_interval_of_a_win_rate_covers_the_truth(won, tied, prompts):
    """Evaluations whose truth is known, again and again: 95% intervals hold it 93 to 97% of the time."""
    generator, simulations, covered = seeded(17, prompts), 1000, 0
    truth = won + tied / 2
    for i in range(simulations):
        drawn = torch.rand(prompts, generator=generator)
        scores = torch.where(drawn < won, 1.0, torch.where(drawn < won + tied, 0.0, -1.0))
        low, high = bootstrap_interval(wins(scores, torch.zeros(prompts)), seed=i)
        covered += low <= truth <= high
    assert 0.93 <= covered / simulations <= 0.97


def test_the_interval_narrows_with_the_root_of_the_prompts():
    values = (torch.rand(1600, generator=seeded(3)) < 0.7).float()
    widths = [high - low for low, high in (bootstrap_interval(values[:n], 0) for n in (100, 1600))]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_the_sign_test_counts_every_way_to_toss():
    for won, lost in itertools.product(range(5), range(5)):
        tosses = list(itertools.product((0, 1), repeat=won + lost))
        uneven = abs(won - lost)
        p = sum(abs(2 * sum(toss) - won - lost) >= uneven for toss in tosses) / len(tosses)
        values = torch.tensor([1.0] * won + [0.0] * lost + [0.5] * 3)
        assert sign_test(values) == pytest.approx(p)


def test_the_sign_test_is_right_as_often_as_it_says():
    """Of fair comparisons, at most one in twenty has p <= 0.05; of uneven ones, nearly all have."""
    generator = seeded(5)
    fair = [sign_test((torch.rand(200, generator=generator) < 0.5).float()) for _ in range(1000)]
    assert 0.02 < sum(p <= 0.05 for p in fair) / 1000 <= 0.06
    uneven = [sign_test((torch.rand(200, generator=generator) < 0.65).float()) for _ in range(200)]
    assert sum(p <= 0.05 for p in uneven) / 200 > 0.95


def test_ties_count_half_and_say_nothing_to_the_test():
    scores, other = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert win_rate(scores, other) == (0.5 + 1 + 1 + 0) / 4
    assert sign_test(wins(scores, other)) == 1.0  # 2 of 3
    assert sign_test(torch.full((9,), 0.5)) == 1.0


def test_standard_error_is_that_of_the_mean():
    values = torch.randn(40, 500, generator=seeded(1))
    predicted = sum(standard_error(row) for row in values) / 40
    assert float(values.mean(-1).std()) == pytest.approx(predicted, rel=0.3)
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_repetition_is_within_a_response_and_distinct_n_between_them():
    once, twice = "a b c d e", "a b c d a b c d"
    assert repetition([once, once]) == 0 and distinct_n([once, once], 2) == 0.5
    assert repetition([twice]) == pytest.approx(1 - 4 / 5)
    assert repetition([once, twice]) == pytest.approx(0.1)
    assert repetition(["a b", ""]) == 0 and repetition([]) == 0
    assert repetition(["a a a"], n=1) == pytest.approx(2 / 3)


def test_entropy_is_that_of_the_next_token_summed(tiny_run):
    model, tokenizer = load_run(tiny_run)
    prompt, response = [1, 2, 3], [4, 5, tokenizer.eot]
    stats = sequence_stats(model, model, [prompt], [response], temperature=0.7)
    expected = 0.0
    for t in range(3):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt + response[:t]]))[0, -1]).double() / 0.7
        p = torch.softmax(logits, -1)
        expected -= float((p * p.log()).sum())
    assert float(stats.entropy[0]) == pytest.approx(expected, rel=1e-4)
