"""What is known of a rollout before its first update, what a step was, and the metrics that are logged of it."""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from minirlhf.algorithms.logprobs import Outputs
from minirlhf.algorithms.losses import explained_variance, kl_terms, masked_mean, masked_variance
from minirlhf.algorithms.rollout import Rollout
from minirlhf.data.tokenizer import TokenText
from minirlhf.devices import read


class Experience(NamedTuple):
    """What is known of a rollout before its first update, each (B, R), 0 past the end."""

    old: Outputs  # of the networks as they were when the responses were sampled
    rewards: Float[Tensor, "B R"]
    advantages: Float[Tensor, "B R"]  # whitened if asked for
    returns: Float[Tensor, "B R"]


class Step(NamedTuple):
    """A rollout and what became of it: what `train` shows to whoever watches."""

    step: int
    rollout: Rollout
    prompts: list[TokenText]
    responses: list[TokenText]
    scores: Float[Tensor, " B"]  # as the reward gave them
    shaped_scores: Float[Tensor, " B"]  # as PPO sees them
    experience: Experience
    kl_coef: float


def describe(
    episodes: Rollout, experience: Experience, scores: Float[Tensor, " B"], taken: list[dict[str, float]]
) -> dict[str, float]:
    """A step's metrics: sums over a response, means over responses or over the tokens that count (docs/metrics.md)."""
    old, mask = experience.old, episodes.mask
    k1 = (episodes.old_logprobs - old.ref_logprobs).sum(-1)  # (B,)
    k3 = kl_terms(episodes.old_logprobs, old.ref_logprobs, old.kl, "k3").sum(-1)
    metrics = {
        "reward": scores.mean(),
        "reward_std": scores.std(correction=0),
        "kl_k1": k1.mean(),
        "kl_k1_se": k1.std().double() / math.sqrt(len(k1)) if len(k1) > 1 else None,
        "kl_k3": k3.mean(),
        "kl_exact": old.kl.sum(-1).mean(),
        "entropy": masked_mean(old.entropy, mask),
        "length": episodes.counted.sum(-1).float().mean(),
        "eot_rate": (~episodes.truncated).float().mean(),
        "explained_variance": explained_variance(old.values, experience.returns, mask),
        "advantage_std": masked_variance(experience.advantages, mask).sqrt(),
        "ratio_drift": (old.logprobs - episodes.old_logprobs).abs().max(),
    }
    mean_of = {name: sum(one[name] for one in taken) / len(taken) for name in taken[0]}
    return read(metrics) | mean_of | {"ratio_max": max(one["ratio_max"] for one in taken)}
