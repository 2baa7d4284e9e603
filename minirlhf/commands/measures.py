"""What can be said of a policy's responses: wins and their uncertainty, divergence from the reference, variety.

All of them are plain functions of scores, tokens or texts; `evaluate` puts them side by side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minirlhf.algorithms.logprobs import response_stats, scatter_counted
from minirlhf.commands.calibration import ratio_interval
from minirlhf.data.batches import Example, collate
from minirlhf.model.gpt import GPT

# --- wins -------------------------------------------------------------------------------------------------------------


def wins(scores: Float[Tensor, " B"], baseline_scores: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1 where the response beats the baseline's to the same prompt, 0 where it loses, 1/2 where they tie."""
    return (torch.sign(scores - baseline_scores) + 1) / 2


def win_rate(scores: Float[Tensor, " B"], baseline_scores: Float[Tensor, " B"]) -> float:
    """Share of prompts on which the run beats the baseline; ties count half."""
    return float(wins(scores, baseline_scores).mean())


def bootstrap_interval(values: Float[Tensor, " B"], seed: int, resamples: int = 2000) -> tuple[float, float]:
    """95% interval of a mean: draw B of the B values with replacement, again and again; keep the middle of the means.

    Values that are all equal give an interval of no width: where nothing was seen to vary, nothing is resampled.
    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (the percentile interval).

    Args:
        values: (B,), one for each prompt: prompts are what another evaluation would draw anew.
        seed: the same seed gives the same interval.
        resamples: means to draw.

    Returns:
        The 2.5th and the 97.5th percentile.
    """
    values = values.cpu().double()
    return ratio_interval(values, torch.ones_like(values), seed, resamples)


def sign_test(values: Float[Tensor, " B"]) -> float:
    """How likely wins and losses would be at least this uneven if either were as likely: two-sided and exact.

        p = min(1, 2 Σ_{k ≤ min(w, l)} C(w + l, k) / 2^(w + l))

    Paired: each value is one prompt, answered by both. Ties say nothing and are left out.
    Source: Dixon & Mood 1946, "The statistical sign test".

    Args:
        values: (B,), what `wins` gives.
    """
    won, lost = int((values > 0.5).sum()), int((values < 0.5).sum())
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def standard_error(values: Float[Tensor, " B"]) -> float:
    """Of the mean: s/√B."""
    return float(values.double().std()) / math.sqrt(len(values))


# --- variety ----------------------------------------------------------------------------------------------------------


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all n-grams of the texts: low when a policy says the same thing to everyone.

    It falls with the number of texts, so compare it only at the same number.
    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.
    Differs: divided by the n-grams, not the words.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """How much a response repeats itself: 1 - distinct/all of its own word n-grams, mean over the responses.

    One that is too short to have an n-gram repeats nothing.
    Source: Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", section 5 (seq-rep-n). Differs:
    of words, not tokens.
    """
    shares = []
    for text in texts:
        ngrams = _ngrams(text, n)
        shares.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


# --- divergence -------------------------------------------------------------------------------------------------------


class SequenceStats(NamedTuple):
    """Of each response, summed over its tokens, in nats."""

    kl: Float[Tensor, " B"]  # Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)), over the whole vocabulary at each state visited
    k1: Float[Tensor, " B"]  # Σ_t log π(a_t|s_t) - log π_ref(a_t|s_t), of the tokens drawn
    entropy: Float[Tensor, " B"]  # Σ_t H(π(·|s_t))


@torch.no_grad()
def sequence_stats(
    model: GPT,
    ref_model: GPT,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float = 1.0,
    batch_size: int = 16,
) -> SequenceStats:
    """KL(policy‖reference) along each response: exact at every state, and as sampled; and the policy's entropy.

        KL(π‖π_ref) = E_{y ~ π} Σ_t KL(π(·|y_<t) ‖ π_ref(·|y_<t)) = E_{y ~ π} Σ_t log π(y_t|y_<t)/π_ref(y_t|y_<t)

    When the responses are the policy's own samples, the mean over them estimates the same KL both ways; the first
    leaves less to chance, since only the states are sampled and not the token drawn at each.

    Args:
        model: the policy that drew the responses.
        ref_model: the reference, with the same vocabulary.
        prompts: B lists of token ids.
        responses: B lists of token ids, each with its end-of-text where one was drawn.
        temperature: the one the responses were drawn at.
        batch_size: sequences at a time; logits of all their response tokens are held at once.

    Returns:
        `SequenceStats` of tensors (B,), on the CPU.
    """
    device = model.wte.weight.device
    found = torch.zeros(3, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        batch = collate([Example([*prompts[i], *responses[i]], len(prompts[i])) for i in rows], fill=0)
        tokens, counted = batch.tokens.to(device), batch.response_mask.to(device)  # (b, T)
        stats = response_stats(model, tokens, counted, ref_model, temperature=temperature)
        for column, values in zip(found, (stats.kl, stats.logprobs - stats.ref_logprobs, stats.entropy)):
            column[rows] = scatter_counted(values, counted).sum(-1).cpu()
    return SequenceStats(*found)
