"""Every equation of the training loops, a pure function each; it imports nothing but torch.

The loops import them, and so do the tests: nothing is tested as a copy. Tensors over responses are (B, R), with a mask
that is True where a token counts; what works token by token takes any shape.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# --- PPO --------------------------------------------------------------------------------------------------------------


def masked_mean(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, ""]:
    """Mean over the tokens that count."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_variance(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, ""]:
    """Mean squared distance from the mean, over the tokens that count."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def whiten(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Mean 0 and deviation 1 over the tokens that count; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def kl_terms(
    logprobs: Float[Tensor, "*n"], ref_logprobs: Float[Tensor, "*n"], exact: Float[Tensor, "*n"], estimator: str
) -> Float[Tensor, "*n"]:
    """KL(π‖π_ref) token by token, from tokens drawn from π; in nats.

        k1 = log π/π_ref                     unbiased, can be negative
        k2 = ½ (log π/π_ref)²                biased, low variance
        k3 = π_ref/π - 1 - log π_ref/π       unbiased, never negative
        exact = Σ_v π(v) log π(v)/π_ref(v)   the whole vocabulary: no sampling noise at all

    Source: Schulman 2020, "Approximating KL Divergence" (k1, k2, k3).
    """
    logratio = logprobs - ref_logprobs
    if estimator == "k1":
        return logratio
    if estimator == "k2":
        return 0.5 * logratio.square()
    if estimator == "k3":
        return torch.expm1(-logratio) + logratio
    return exact


def shape_rewards(
    scores: Float[Tensor, " B"], kl: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], kl_coef: float
) -> Float[Tensor, "B R"]:
    """Each token pays for its KL, and the last one receives the score.

        r_t = -β · KL_t + [t is the response's last token] · score

    Source: Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(-1, keepdim=True) - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None])


def gae(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Generalised advantage estimation, backwards over the response.

        δ_t = r_t + γ V_{t+1} - V_t,    A_t = δ_t + γ λ A_{t+1},    return_t = A_t + V_t

    Past the last token value and advantage are 0, for responses cut at the limit too: the score at the last token is
    all that will come.

    Source: Schulman et al. 2016, eq. 11, 12 and 16.

    Args:
        rewards: (B, R), in units of the score.
        values: (B, R), V(s_t) before token t is drawn.
        mask: (B, R), True where a token counts; responses start in the first column.
        gamma: discount per token.
        lam: λ.

    Returns:
        (advantages, returns), each (B, R), 0 where nothing counts.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(counts, delta + gamma * lam * next_advantage, 0.0)
        advantages[:, t] = advantage
        next_value, next_advantage = torch.where(counts, values[:, t], 0.0), advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(
    logprobs: Float[Tensor, "*n"], old_logprobs: Float[Tensor, "*n"], advantages: Float[Tensor, "*n"], clip: float
) -> Float[Tensor, "*n"]:
    """The clipped surrogate, token by token, to be minimised.

        L = -min(ρ A, clip(ρ, 1-ε, 1+ε) A),    ρ = π(y_t)/π_old(y_t)

    The minimum makes it a lower bound. Once the ratio has moved more than ε in the direction its advantage favours, the
    gradient is zero; a move the other way is still corrected.

    Source: Schulman et al. 2017, eq. 7.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped(ratio: Float[Tensor, "*n"], advantages: Float[Tensor, "*n"], clip: float) -> Bool[Tensor, "*n"]:
    """True where the clipped surrogate has no gradient: the ratio is beyond ε on the side its advantage pushes it to.

        ρ > 1+ε and A > 0,  or  ρ < 1-ε and A < 0

    The metric `clip_fraction` counts both sides, whatever the advantage.

    Source: Schulman et al. 2017, figure 1.
    """
    return ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))


def value_loss(
    values: Float[Tensor, "*n"], old_values: Float[Tensor, "*n"], returns: Float[Tensor, "*n"], clip: float
) -> Float[Tensor, "*n"]:
    """½ (V - return)², token by token; with a clip, the larger of the plain and the clipped error.

        L = ½ max( (V - G)², (V_old + clip(V - V_old, -ε, ε) - G)² )

    Source: OpenAI baselines' ppo2, as Ziegler et al. 2019 released it. Clip 0 turns it off.
    """
    error = (values - returns).square()
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error


def adapt_kl_coef(kl_coef: float, kl: float, target: float, batch_size: int, horizon: int) -> float:
    """Proportional controller of β on the KL summed over the response.

        e = clip(KL/target - 1, -0.2, 0.2),    β ← β · (1 + e · batch/horizon)

    Source: Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * batch_size / horizon)


def running_moments(count: float, mean: float, m2: float, values: Float[Tensor, " B"]) -> tuple[float, float, float]:
    """Count, mean and sum of squared deviations of two samples joined: one known by these, and B new values.

    Source: Chan et al. 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", eq. 1.5.
    """
    new, delta = len(values), float(values.mean()) - mean
    joined = m2 + float((values - values.mean()).square().sum()) + delta**2 * count * new / (count + new)
    return count + new, mean + delta * new / (count + new), joined


def explained_variance(
    values: Float[Tensor, "B R"], returns: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
) -> Float[Tensor, ""]:
    """1 - Var(return - V)/Var(return) over the tokens that count; NaN where these are fewer than two.

    1 = the critic knows; 0 = it may as well be constant.
    """
    share = masked_variance(returns - values, mask) / masked_variance(returns, mask).clamp(min=1e-8)
    return torch.where(mask.sum() > 1, 1 - share, math.nan)


# --- preferences ------------------------------------------------------------------------------------------------------


Loss = Literal["sigmoid", "ipo", "hinge"]


def preference_loss(
    chosen_logps: Float[Tensor, " B"],
    rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    beta: float,
    loss: Loss = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """How far the policy's log-ratios are from ordering each pair as people did.

        h = [log π(y_w) - log π_ref(y_w)] - [log π(y_l) - log π_ref(y_l)]

        sigmoid   -(1-ε) log σ(β h) - ε log σ(-β h)    a share ε of the labels is taken to be flipped
        ipo       (h - 1/(2β))²                        a bounded aim: it does not push certain pairs to infinity
        hinge     max(0, 1 - β h)

    At π = π_ref, h = 0 and the sigmoid loss is ln 2.

    Source: Rafailov et al. 2023, eq. 7; Mitchell 2023, "A note on DPO with noisy preferences" (cDPO, ε); Azar et al.
    2023, eq. 17 (IPO); Zhao et al. 2023, SLiC-HF (hinge).

    Args:
        chosen_logps, rejected_logps: (B,) policy's log-probs summed over the response, in nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the reference's.
        beta: price of a nat of KL.
        loss: which.
        label_smoothing: ε, for the sigmoid loss.

    Returns:
        (B,)
    """
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    if loss == "sigmoid":
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    if loss == "ipo":
        return (h - 1 / (2 * beta)).square()
    return torch.relu(1 - beta * h)


def chosen_nll(chosen_logps: Float[Tensor, " B"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """-log π(y_w|x) / |y_w|: the chosen response's cross-entropy, in nats per token.

    Source: Pang et al. 2024, section 2 (the second term of their loss).

    Args:
        chosen_logps: (B,) summed over the response, in nats.
        lengths: (B,) tokens of the response.
    """
    return -chosen_logps / lengths


# --- rankings ---------------------------------------------------------------------------------------------------------


MAX_TIED = 10  # the likelihood of m tied responses sums over 2^m subsets


def ranking_loss(scores: Float[Tensor, "B K"], ranks: Sequence[int], margin: float = 0.0) -> Float[Tensor, " B"]:
    """Negative log-likelihood of rankings that share one pattern of ranks, under Plackett–Luce.

        P(y_1 > y_2 > … > y_K) = Π_k e^{r_k} / (e^{r_k} + Σ_{j ranked below k} e^{r_j})

    For a pair this is Bradley–Terry, -log σ(r_chosen - r_rejected). Tied responses mean that their order is not known:
    their probability is the sum over all their orders, found by going through the subsets S of tied responses that are
    yet to be placed, F(S) = Σ_{i∈S} e^{r_i} / (Σ_{j∈S} e^{r_j} + Σ_{j below} e^{r_j}) · F(S∖i). A margin m adds to the
    score of every response ranked below.

    Source: Plackett 1975, eq. 5; Ouyang et al. 2022, eq. 1 (K = 2); Touvron et al. 2023, eq. 2 (the margin).

    Args:
        scores: (B, K), one row a ranking.
        ranks: K ranks, 1 = best, equal = tied; the same for all rows.
        margin: in units of the score.

    Returns:
        (B,) in nats; 0 where all are tied, since that says nothing.

    Raises:
        ValueError: ranks that do not fit the scores, or more than `MAX_TIED` responses tied.
    """
    if len(ranks) != scores.shape[1]:
        raise ValueError(f"{scores.shape[1]} scores a row but {len(ranks)} ranks")
    loss = scores.new_zeros(len(scores))
    for rank in sorted(set(ranks))[:-1]:  # the last to be placed has no rival left
        tied = [k for k, other in enumerate(ranks) if other == rank]
        if len(tied) > MAX_TIED:
            raise ValueError(f"{len(tied)} responses are tied; at most {MAX_TIED} can be")
        below = [k for k, other in enumerate(ranks) if other > rank]
        rivals = torch.logsumexp(columns(scores, below) + margin, dim=-1)  # (B,)
        log_f = {(): scores.new_zeros(len(scores))}
        for size in range(1, len(tied) + 1):
            for left in combinations(tied, size):  # the tied responses yet to be placed
                total = torch.logaddexp(torch.logsumexp(columns(scores, left), dim=-1), rivals)
                orders = [scores[:, i] - total + log_f[tuple(j for j in left if j != i)] for i in left]
                log_f[left] = torch.logsumexp(torch.stack(orders), dim=0)
        loss = loss - log_f[tuple(tied)]
    return loss


def columns(x: Shaped[Tensor, "B K"], which: Sequence[int]) -> Shaped[Tensor, "B k"]:
    """Some columns. The index is made on the device, since copying it there would have a GPU waited for."""
    return x.index_select(1, torch.stack([torch.full((), k, device=x.device) for k in which]))


def centring_loss(scores: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """(Σ_k r_k)²: pulls the scores of a prompt's responses towards mean 0.

    Comparisons leave a constant per prompt free; a policy trained on the scores would see it as noise.
    Source: Eisenstein et al. 2023, "Helping or Herding?", section 2 (K = 2).
    """
    return scores.sum(-1).square()


def best_nll(logps: Float[Tensor, "B K"], lengths: Int[Tensor, "B K"], ranks: Sequence[int]) -> Float[Tensor, " B"]:
    """-log π(y|x) / |y| of the best response, in nats per token: the mean over those that share rank 1, 0 if all do.

    A trunk that only has to sort responses forgets what it knew of language, and what it knew helps to sort them. This
    term beside the ranking's keeps it able to write the best response itself.

    Source: Yang et al. 2024, "Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs", section
    3.2 (their SFT regularisation). Differs: the plain mean over its tokens; their code wraps the sum in -log σ(β ·).

    Args:
        logps: (B, K) log-probs of whole responses, in nats, read for the best only.
        lengths: (B, K) their tokens.
        ranks: K ranks, 1 = best.
    """
    best = best_of(ranks)
    return -(columns(logps, best) / columns(lengths, best)).mean(-1) if best else logps.new_zeros(len(logps))


def best_of(ranks: Sequence[int]) -> list[int]:
    """Places of the responses that share rank 1; none if all do, for then nothing is known to be good."""
    return [k for k, rank in enumerate(ranks) if rank == min(ranks)] if len(set(ranks)) > 1 else []
