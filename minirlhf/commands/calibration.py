"""What can be said of scores beside what people preferred: calibration, correlation, agreement, and their uncertainty.

Plain functions of scores and pairs; `reward_report.py` puts them together. P pairs of responses, N responses in all, Q
prompts: whatever has an interval here has it over prompts, since the pairs of one prompt share its responses.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from minirlhf.seeds import seeded

BINS = 10  # of probability, each 0.1 wide
Estimate = dict[str, float]  # value, low, high: a number and its 95% interval over prompts

# --- pairs ------------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """P pairs of responses to the same prompt: where they stand among all N responses, and in which ranking."""

    first: Int[Tensor, " P"]
    second: Int[Tensor, " P"]
    ranking: Int[Tensor, " P"]


def all_pairs(sizes: Sequence[int]) -> Pairs:
    """Every pair within each ranking, once; the responses of all rankings are numbered through."""
    rows, start = [], 0
    for q, size in enumerate(sizes):
        rows += [(a, b, q) for a, b in itertools.combinations(range(start, start + size), 2)]
        start += size
    return Pairs(*torch.tensor(rows, dtype=torch.long).reshape(-1, 3).T)


def ordered(pairs: Pairs, scores: Float[Tensor, " N"]) -> Pairs:
    """The pairs that the scores tell apart, the better response first."""
    lead = differences(scores, pairs)
    first, second = torch.where(lead > 0, pairs.first, pairs.second), torch.where(lead > 0, pairs.second, pairs.first)
    return Pairs(*(part[lead != 0] for part in (first, second, pairs.ranking)))


def differences(scores: Float[Tensor, " N"], pairs: Pairs) -> Float[Tensor, " P"]:
    """r_first - r_second."""
    return scores[pairs.first] - scores[pairs.second]


def quantile_bins(values: Float[Tensor, " P"], bins: int) -> Int[Tensor, " P"]:
    """Which of `bins` bins each value falls into, about as many in each, from the lowest: ⌊bins · (rank - 1) / P⌋.

    Equal values have the lowest of their ranks and so share a bin; a bin that this leaves empty is not numbered.
    """
    _, which, count = values.unique(return_inverse=True, return_counts=True)  # sorted
    below = (count.cumsum(0) - count)[which]
    return (below * bins // max(len(values), 1)).unique(return_inverse=True)[1]


# --- how far chance reaches -------------------------------------------------------------------------------------------


def ratio_interval(
    totals: Float[Tensor, " Q"], counts: Float[Tensor, " Q"], seed: int, resamples: int = 2000
) -> tuple[float, float]:
    """95% interval of Σ totals / Σ counts: draw Q of the Q prompts with replacement, again and again.

    The pairs of one prompt share its responses and its annotator, so prompts are drawn, not pairs: drawn one by one,
    pairs would seem to say more than they do.
    Source: Efron & Tibshirani 1993, chapter 13 (the percentile interval); Davison & Hinkley 1997, section 3.8
    (resampling whole clusters).

    Args:
        totals: (Q,) sums over the pairs of each prompt.
        counts: (Q,) pairs of each prompt; may be 0.
        seed: the same seed draws the same prompts.
        resamples: ratios to draw.

    Returns:
        The 2.5th and the 97.5th percentile; NaN where no prompt has a pair.
    """
    generator, n, ratios = seeded(seed), len(totals), []
    block = max(1, (1 << 21) // n)  # draws in memory at a time
    for start in range(0, resamples, block):
        rows = torch.randint(n, (min(block, resamples - start), n), generator=generator)
        ratios.append(totals[rows].sum(-1) / counts[rows].sum(-1))
    low, high = torch.cat(ratios).nanquantile(torch.tensor([0.025, 0.975], dtype=totals.dtype)).tolist()
    return low, high


def mean_with_interval(values: Float[Tensor, " P"], group: Int[Tensor, " P"], groups: int, seed: int) -> Estimate:
    """The mean of values and its `ratio_interval` over the groups (prompts) that they belong to."""
    totals = torch.zeros(groups, dtype=torch.double).index_add_(0, group, values.double())
    counts = group.bincount(minlength=groups).double()
    low, high = ratio_interval(totals, counts, seed)
    return {"value": float(totals.sum() / counts.sum()), "low": low, "high": high}


def bootstrap(
    statistic: Callable[[Int[Tensor, " rows"]], Sequence[float]],
    group: Int[Tensor, " N"],
    groups: int,
    seed: int,
    resamples: int = 400,
) -> list[Estimate]:
    """Statistics of all rows, and the 95% interval of each when whole groups are drawn with replacement.

    For what is no ratio of sums: correlations, a fitted temperature. Source: as `ratio_interval`.

    Args:
        statistic: numbers of some of the N rows, which may come more than once.
        group: (N,) which of the groups (prompts) a row belongs to.
        groups: how many there are.
        seed: the same seed draws the same groups.
        resamples: draws; a draw where a statistic is NaN does not count for it.
    """
    generator, drawn = seeded(seed), []
    everything = torch.arange(len(group))
    for _ in range(resamples):
        times = torch.randint(groups, (groups,), generator=generator).bincount(minlength=groups)
        drawn.append(statistic(everything.repeat_interleave(times[group])))
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.double)
    bounds = torch.tensor(drawn, dtype=torch.double).nanquantile(quantiles, dim=0).T.tolist()
    return [{"value": v, "low": low, "high": high} for v, (low, high) in zip(statistic(everything), bounds)]


def clustered_error(values: Float[Tensor, " P"], group: Int[Tensor, " P"]) -> float:
    """Standard error of a mean of values that come in groups.

        se = √(G / (G - 1) · Σ_g (Σ_{i∈g} (x_i - x̄))²) / P        G groups with values in them

    Source: Cochran 1977, "Sampling Techniques", section 9A.2 (the mean of clusters of unequal size, as a ratio).

    Returns:
        The error; NaN with fewer than two groups.
    """
    which = group.unique(return_inverse=True)[1]
    groups = int(which.max()) + 1 if len(which) else 0
    if groups < 2:
        return math.nan
    sums = torch.zeros(groups, dtype=torch.double).index_add_(0, which, (values - values.mean()).double())
    return math.sqrt(groups / (groups - 1) * float(sums.square().sum())) / len(values)


# --- calibration ------------------------------------------------------------------------------------------------------


def preference_probability(lead: Float[Tensor, " P"], temperature: float = 1.0) -> Float[Tensor, " P"]:
    """P(a ≻ b) = σ((r_a - r_b) / T).

    Source: Bradley & Terry 1952, section 2, with π = e^{r/T}.
    """
    return torch.sigmoid(lead / temperature)


class Reliability(NamedTuple):
    """What was claimed and what happened, by bins of equal width; NaN in an empty bin."""

    count: Int[Tensor, " bins"]
    claimed: Float[Tensor, " bins"]  # mean probability
    happened: Float[Tensor, " bins"]  # share of outcomes that are 1


def reliability_bins(probabilities: Float[Tensor, " P"], bins: int = BINS) -> Int[Tensor, " P"]:
    """Which bin [i/bins, (i+1)/bins) a probability falls into; 1 belongs to the last."""
    return (probabilities * bins).long().clamp(max=bins - 1)


def reliability(probabilities: Float[Tensor, " P"], outcomes: Float[Tensor, " P"], bins: int = BINS) -> Reliability:
    """Mean probability and share of ones in each bin: equal, up to chance, if the probabilities are calibrated.

    Source: Murphy & Winkler 1977, section 2; Guo et al. 2017, eqs. 1 and 2.
    Differs: their bins hold their upper edge, ours the lower; and a probability of one of two outcomes is binned over
    all of [0, 1], not the larger of the two over [½, 1].

    Args:
        probabilities: (P,) of the outcome 1.
        outcomes: (P,) 0 or 1.
        bins: of equal width.
    """
    which = reliability_bins(probabilities, bins)
    count = which.bincount(minlength=bins)
    claimed, happened = (which.bincount(x.double(), minlength=bins) / count for x in (probabilities, outcomes))
    return Reliability(count, claimed, happened)


def ece(probabilities: Float[Tensor, " P"], outcomes: Float[Tensor, " P"], bins: int = BINS) -> float:
    """Expected calibration error: the gap between what was claimed and what happened, a pair.

        ECE = Σ_b (n_b / P) |happened_b - claimed_b|

    Of few pairs it is above 0 even where the probabilities are true, see `chance_ece`.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3; Naeini et al. 2015, section 2.

    Args:
        probabilities: (P,) of the outcome 1.
        outcomes: (P,) 0 or 1.
        bins: of equal width.
    """
    count, claimed, happened = reliability(probabilities, outcomes, bins)
    full = count > 0
    return float((count * (happened - claimed).abs())[full].sum() / count.sum())


def chance_ece(probabilities: Float[Tensor, " P"], seed: int, draws: int = 400) -> tuple[float, float]:
    """Mean and 95th percentile of the `ece` when the probabilities are the truth, by drawing outcomes from them.

    Source: Bröcker & Smith 2007, "Increasing the Reliability of Reliability Diagrams", section 3 (consistency
    resampling). Differs: outcomes are drawn one by one, so pairs of one ranking are taken as independent.
    """
    generator = seeded(seed)
    by_chance = []
    for _ in range(draws):
        uniform = torch.rand(len(probabilities), generator=generator, dtype=probabilities.dtype)
        by_chance.append(ece(probabilities, (uniform < probabilities).to(probabilities.dtype)))
    drawn = torch.tensor(by_chance)
    return float(drawn.mean()), float(drawn.quantile(0.95))


def squared_errors(probabilities: Float[Tensor, " P"], outcomes: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """(p - y)² of each forecast; their mean is the Brier score, which only the true probability minimises.

    0.25 is the score of who always says ½.
    Source: Brier 1950, eq. 2. Differs: he sums over both outcomes, which is twice this.
    """
    return (probabilities - outcomes).square()


def log_losses(lead: Float[Tensor, " P"], temperature: float = 1.0) -> Float[Tensor, " P"]:
    """-log σ((r_chosen - r_rejected) / T) of each pair, in nats; ln 2 is that of who always says ½.

    Source: Ouyang et al. 2022, eq. 1 (T = 1).
    """
    return softplus(-lead / temperature)


def best_temperature(lead: Float[Tensor, " P"]) -> float:
    """The temperature at which σ(lead / T) explains the choices best: above 1, the model is too sure; below, too shy.

        T* = argmin_{T > 0} Σ_i log(1 + e^{-d_i / T})        d = r_chosen - r_rejected

    In 1/T this is convex, with the slope -Σ d_i σ(-d_i / T), so the root of the slope is found by halving.
    Source: Guo et al. 2017, section 4.2 (temperature scaling).

    Args:
        lead: (P,) r_chosen - r_rejected.

    Returns:
        T*; infinite where the mean of the differences is not above 0 (the higher, the better); NaN where none of them
        is negative (the lower, the better) or where there are none.
    """
    lead = lead.double()
    if not len(lead) or lead.min() >= 0:
        return math.nan
    if lead.mean() <= 0:
        return math.inf

    low, high = 0.0, 1.0 / float(lead.abs().mean())
    while float((lead * torch.sigmoid(-lead * high)).sum()) >= 0:  # it still falls there
        low, high = high, 2 * high
    for _ in range(45):  # halvings: more than double the digits of a float32 score
        middle = (low + high) / 2
        falls = float((lead * torch.sigmoid(-lead * middle)).sum()) >= 0
        low, high = (middle, high) if falls else (low, middle)
    return 2 / (low + high)


# --- correlation ------------------------------------------------------------------------------------------------------


def pearson(x: Float[Tensor, " N"], y: Float[Tensor, " N"]) -> float:
    """Σ (x - x̄)(y - ȳ) / √(Σ (x - x̄)² Σ (y - ȳ)²); NaN if one of them does not vary.

    Source: Pearson 1896, "Regression, Heredity, and Panmixia".
    """
    x, y = x.double(), y.double()
    dx, dy = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(dx.square().sum())) * math.sqrt(float(dy.square().sum()))
    varies = not (bool((x == x[0]).all()) or bool((y == y[0]).all()))  # rounding leaves a constant its residue
    return float((dx * dy).sum()) / norm if varies and norm else math.nan


def mean_ranks(x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Ranks from 1 for the lowest; equal values share the mean of theirs."""
    _, which, count = x.unique(return_inverse=True, return_counts=True)  # sorted
    return (count.cumsum(0) - (count - 1) / 2)[which].double()


def spearman(x: Float[Tensor, " N"], y: Float[Tensor, " N"]) -> float:
    """Pearson's correlation of the ranks: 1 for any rising curve. NaN if one of them does not vary.

    Source: Spearman 1904, "The Proof and Measurement of Association between Two Things"; ties by `mean_ranks`.
    """
    return pearson(mean_ranks(x), mean_ranks(y))


def partial_correlation(xy: float, xz: float, yz: float) -> float:
    """Correlation of what z leaves unexplained in x and in y.

        ρ_{xy·z} = (ρ_xy - ρ_xz ρ_yz) / √((1 - ρ_xz²)(1 - ρ_yz²))

    Source: Yule 1907, "On the Theory of Correlation for any Number of Variables", section 12.

    Args:
        xy: correlation of x and y; all three Pearson's, or all three Spearman's.
        xz: of x and z.
        yz: of y and z.

    Returns:
        The correlation; NaN where z explains all of x or of y.
    """
    left = (1 - xz * xz) * (1 - yz * yz)
    return (xy - xz * yz) / math.sqrt(left) if left > 1e-12 else math.nan


# --- agreement --------------------------------------------------------------------------------------------------------


def agreement(x: Float[Tensor, " P"], y: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """1 where two raters order a pair alike, 0 where they differ, ½ where either of them (or both) sees a tie.

        a = (1 + s_x s_y) / 2        s = sign(r_first - r_second), in {-1, 0, 1}

    So a rater agrees with itself on 1 less half of its ties, and with a coin on ½. Without ties, the mean over the
    pairs of one ranking is (1 + τ) / 2 of Kendall's τ.
    """
    return (1 + torch.sign(x) * torch.sign(y)) / 2


def kendall_tau_b(
    x: Float[Tensor, " P"], y: Float[Tensor, " P"], ranking: Int[Tensor, " P"], rankings: int
) -> Float[Tensor, " Q"]:
    """Kendall's τ_b of each ranking, over its pairs.

        τ_b = Σ s_x s_y / √(Σ s_x² · Σ s_y²)        s = sign(r_first - r_second)

    Source: Kendall 1945, "The Treatment of Ties in Ranking Problems", section 3 (his τ_b).

    Args:
        x: (P,) r_first - r_second of one rater.
        y: (P,) of the other.
        ranking: (P,) which ranking a pair is of.
        rankings: how many there are.

    Returns:
        (Q,); NaN where a rater ties all responses.
    """
    x, y = torch.sign(x).double(), torch.sign(y).double()
    both, xx, yy = (ranking.bincount(w, minlength=rankings) for w in (x * y, x * x, y * y))
    return both / (xx * yy).sqrt()
