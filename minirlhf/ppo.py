"""PPO: improve the policy on a reward while a KL penalty holds it to the reference.

    maximise  E_{y~π} [ r(x, y) ] - β · KL(π‖π_ref)

The KL term is what keeps the text human: without it the policy finds whatever the reward model overrates. One step of
the loop draws responses (1), scores them (2), turns scores and KL into a reward a token (3), estimates advantages (4)
and takes several clipped gradient steps on them (5).

Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; Ziegler et al. 2019, "Fine-Tuning Language
Models from Human Preferences" (the KL reward and its controller); Stiennon et al. 2020; Ouyang et al. 2022.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.data import upload
from minirlhf.explain import Explained, show_explained, token_text
from minirlhf.generate import Sampling, generate
from minirlhf.model import GPT, ScalarModel, adamw, places, response_stats
from minirlhf.rewards import Reward, TokenText, score
from minirlhf.runs import (
    Run,
    autocast,
    check_at_least,
    check_positive,
    check_share,
    console,
    cosine_lr,
    mix,
    products,
    read,
    seeded,
    set_lr,
    side_by_side,
)
from minirlhf.token_stats import TokenStats, linear_token_stats
from minirlhf.tokenizer import Tokenizer

# Nats a token that sampling and training may differ by through rounding; tf32 has three bits more than bf16.
NOISE_FLOOR = {"fp32": 1e-3, "tf32": 0.03, "bf16": 0.25}


@dataclass(frozen=True)
class PPOConfig:
    """How to run PPO."""

    steps: int = 24
    """Rollouts, each followed by its updates."""
    batch_size: int = 128
    """Responses a rollout."""
    responses_per_prompt: int = 1
    """Responses drawn to each prompt."""
    epochs: int = 2
    """Passes over a rollout."""
    minibatches: int = 4
    """Optimiser steps in a pass."""
    microbatch_size: int | None = None
    """Responses in memory at a time, those of like length together; gradients accumulate to those of the minibatch.
    0 = the whole minibatch. By default 16, or on a GPU the whole minibatch where it fits."""
    response_tokens: str = "48"
    """Response limit in tokens: a number, or LOW:HIGH to draw one for each response."""
    temperature: float = 1.0
    """Of the sampling, and of every log-prob."""
    lr: float = 4e-4
    """Peak learning rate of the policy; falls along half a cosine to a tenth."""
    critic_lr: float = 1e-3
    """Peak learning rate of a separate critic."""
    warmup_steps: int = 2
    """Rollouts until the peak."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    clip: float = 0.2
    """ε: how far the ratio π/π_old is followed."""
    value_clip: float = 0.2
    """How far values may move from those of the rollout; 0 = no limit."""
    value_coef: float = 0.5
    """Weight of the value loss beside the policy loss (it matters for a shared critic)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE's λ: 1 trusts the rewards seen, 0 the critic."""
    whiten: bool = True
    """Advantages to mean 0 and deviation 1 over the rollout."""
    kl_coef: float = 0.07
    """β, the price of a nat of KL(π‖π_ref), in units of the score."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """Of the KL that is paid for; all of them are logged."""
    kl_in: Literal["reward", "loss", "both"] = "reward"
    """Where it is paid: in each token's reward, in the loss, or in both. The true gradient of KL(π‖π_ref) is that of k1
    in the reward, and of k1, k3 or exact in both. In the loss alone, k2 and exact have the right gradient a token,
    without its effect on the tokens after it; k3 has that of the other direction, KL(π_ref‖π). Whitening rescales what
    is paid in the reward, and not what is paid in the loss."""
    kl_target: float = 0.0
    """Adaptive β: the KL a response to steer to, in nats; 0 = β stays fixed."""
    kl_horizon: int = 2000
    """Adaptive β: responses over which it adapts."""
    reward_clip: float = 0.0
    """Scores are cut to ±this; 0 = not."""
    normalise_reward: bool = False
    """Scores to mean 0 and deviation 1 over all rollouts so far."""
    missing_eot_penalty: float = 1.0
    """Taken from the score of a response that was cut at the limit."""
    stop_kl: float = 0.0
    """End a rollout's updates once KL(π_old‖π) a token exceeds this, before a further step; 0 = never."""
    critic: Literal["separate", "shared"] = "separate"
    """A network of its own, or a second head on the policy."""
    sample_every: int = 20
    """Rollouts between sample tables."""

    def __post_init__(self):
        check_at_least(1, steps=self.steps, batch_size=self.batch_size, epochs=self.epochs)
        check_at_least(1, responses_per_prompt=self.responses_per_prompt, minibatches=self.minibatches)
        check_at_least(1, sample_every=self.sample_every, kl_horizon=self.kl_horizon)
        check_positive(temperature=self.temperature, lr=self.lr, critic_lr=self.critic_lr, clip=self.clip)
        check_positive(max_grad_norm=self.max_grad_norm)
        check_at_least(0, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, value_clip=self.value_clip)
        check_at_least(0, value_coef=self.value_coef, kl_coef=self.kl_coef, kl_target=self.kl_target)
        check_at_least(0, reward_clip=self.reward_clip, stop_kl=self.stop_kl, microbatch_size=self.at_a_time)
        check_at_least(0, entropy_coef=self.entropy_coef, missing_eot_penalty=self.missing_eot_penalty)
        check_share(gamma=self.gamma, lam=self.lam)
        parse_range("--response-tokens", self.response_tokens)
        if self.batch_size % self.responses_per_prompt or self.batch_size % self.minibatches:
            raise InputError(
                f"--batch-size {self.batch_size} must be a multiple of --responses-per-prompt "
                f"{self.responses_per_prompt} and of --minibatches {self.minibatches}"
            )
        if (self.kl_in, self.kl_estimator) == ("loss", "k1"):
            raise InputError(
                "--kl-in loss holds nothing with --kl-estimator k1, whose expected gradient is zero; "
                "use k2 or exact in the loss, or k1 in the reward"
            )
        if (self.kl_in, self.kl_estimator) == ("reward", "exact"):
            raise InputError(
                "--kl-in reward with --kl-estimator exact lacks the gradient of each token's own KL, which does not "
                "depend on the token drawn; use --kl-in both, or k1 in the reward"
            )

    @property
    def at_a_time(self) -> int:
        """Responses in memory at a time, 0 = the whole minibatch."""
        return 16 if self.microbatch_size is None else self.microbatch_size

    @property
    def response_range(self) -> tuple[int, int]:
        """Lowest and highest response limit in tokens."""
        return parse_range("--response-tokens", self.response_tokens)


def parse_range(flag: str, text: str) -> tuple[int, int]:
    """'8' → (8, 8), '2:8' → (2, 8)."""
    low, _, high = text.partition(":")
    try:
        limits = int(low), int(high or low)
    except ValueError as error:
        raise InputError(f"{flag} must be a number or LOW:HIGH, got {text!r}") from error
    if not 1 <= limits[0] <= limits[1]:
        raise InputError(f"{flag} must hold 1 <= LOW <= HIGH, got {text!r}")
    return limits


# --- equations --------------------------------------------------------------------------------------------------------
# All of them on (B, R) tensors over the response, with a mask that is True where a token counts.


def masked_mean(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, ""]:
    """Mean over the tokens that count."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


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
        gamma: discount a token.
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

    The minimum makes it a lower bound: a ratio beyond ε stops earning, but is always pulled back.

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


def masked_variance(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, ""]:
    """Mean squared distance from the mean, over the tokens that count."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def explained_variance(
    values: Float[Tensor, "B R"], returns: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
) -> Float[Tensor, ""]:
    """1 - Var(return - V)/Var(return) over the tokens that count; NaN where these are fewer than two.

    1 = the critic knows; 0 = it may as well be constant.
    """
    share = masked_variance(returns - values, mask) / masked_variance(returns, mask).clamp(min=1e-8)
    return torch.where(mask.sum() > 1, 1 - share, math.nan)


# --- the loop ---------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """Responses and everything that is known of them before the first update."""

    tokens: Int[Tensor, "B T"]  # prompt and response, right-padded
    counted: Bool[Tensor, "B T"]  # True at the response's tokens in `tokens`; on the CPU, which knows the lengths
    responses: Int[Tensor, "B R"]
    mask: Bool[Tensor, "B R"]
    old_logprobs: Float[Tensor, "B R"]  # the log-probs the tokens were drawn with
    truncated: Bool[Tensor, " B"]  # on the CPU

    def drawn(self) -> list[list[int]]:
        """The token ids of each response."""
        rows = zip(self.tokens.tolist(), self.counted)
        return [[token for token, counts in zip(row, own.tolist()) if counts] for row, own in rows]

    def places(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " N"]:
        """Where the counted tokens of some rows stand in a flattened (B·R) table, row after row.

        Found on the CPU, since a GPU would have to be waited for.
        """
        columns = torch.arange(self.mask.shape[1])
        inside = columns < self.counted[rows].sum(-1, keepdim=True)  # (b, R); responses begin in the first column
        return upload((rows[:, None] * len(columns) + columns)[inside], self.mask.device)


def rollout(
    policy: GPT,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    eot: int,
    temperature: float,
    seed: int | Sequence[int],
    kernel: str = "auto",
    dtype: str = "fp32",
    compile: bool = False,
) -> Rollout:
    """Draw responses and lay them out for training: token in, token out, nothing is tokenised again."""
    sampling = Sampling(temperature)
    drawn = generate(policy, prompts, eot, limits, seed, sampling, kernel, dtype=dtype, compile=compile)
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]  # (B, 1)
    ends = starts + torch.tensor([len(row) for row in drawn.rows])[:, None]
    T = int(ends.max())
    position = torch.arange(T)
    counted = (position >= starts) & (position < ends)  # (B, T)
    episodes = [[*prompt, *row] for prompt, row in zip(prompts, drawn.rows)]
    tokens = upload(torch.tensor([[*row, *[eot] * (T - len(row))] for row in episodes]), drawn.mask.device)
    truncated = torch.tensor([row[-1] != eot for row in drawn.rows])
    return Rollout(tokens, counted, drawn.responses, drawn.mask, drawn.logprobs, truncated)


def microbatches(counted: Bool[Tensor, "B T"], rows: Int[Tensor, " b"], size: int) -> Sequence[Int[Tensor, " ..."]]:
    """Some rows of a rollout in pieces of at most `size` (0 = all in one), short ones together."""
    ends = (counted[rows] * torch.arange(1, counted.shape[1] + 1)).amax(-1)  # (b,)
    return rows[ends.argsort(stable=True)].split(size or len(rows))


def cut_to(episodes: Rollout, rows: Int[Tensor, " b"]) -> tuple[Int[Tensor, "b T"], Bool[Tensor, "b T"]]:
    """Tokens of some rows, and which of them count (on the CPU), without the padding that all of them share."""
    counted = episodes.counted[rows]
    width = int(counted.any(0).nonzero().max()) + 1
    return episodes.tokens.index_select(0, upload(rows, episodes.tokens.device))[:, :width], counted[:, :width]


def token_values(critic: ScalarModel, tokens: Int[Tensor, "B T"], counted: Bool[Tensor, "B T"]) -> Float[Tensor, " N"]:
    """V(s_t) for each counted token t: the critic's output one position before it, where t is yet to be drawn."""
    return critic(tokens[:, :-1], at=places(counted[:, 1:]))


def stats_and_values(
    policy: GPT | None,
    critic: ScalarModel | None,
    tokens: Tensor,
    counted: Tensor,
    ref: GPT | None,
    temperature: float,
    kernel: str,
) -> tuple[TokenStats | None, Float[Tensor, " N"] | None]:
    """The policy's statistics and the critic's values at the counted tokens; a shared trunk runs once.

    None of the one that is None.
    """
    if policy is None or critic is None or critic.trunk is not policy:
        stats = policy and response_stats(policy, tokens, counted, ref, temperature=temperature, kernel=kernel)
        return stats, critic and token_values(critic, tokens, counted)
    at = upload(places(counted[:, 1:]), tokens.device)
    hidden = policy(tokens[:, :-1], at=at)  # (N, D)
    reference = (None, None)
    if ref is not None:
        with torch.no_grad():
            reference = ref(tokens[:, :-1], at=at), ref.wte.weight.detach()
    targets = tokens[:, 1:].flatten().index_select(0, at)
    stats = linear_token_stats(
        hidden, policy.wte.weight, targets, *reference,
        vocab_size=policy.config.vocab_size, temperature=temperature, kernel=kernel,
    )  # fmt: skip
    return stats, critic.head(hidden)


class Experience(NamedTuple):
    """What is known of a rollout before its first update, token by token; 0 where nothing counts."""

    logprobs: Float[Tensor, "B R"]  # read again: those the tokens were drawn with, but for rounding
    ref_logprobs: Float[Tensor, "B R"]
    kl: Float[Tensor, "B R"]  # KL(π‖π_ref), exact, over the whole vocabulary
    entropy: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"]
    rewards: Float[Tensor, "B R"]
    advantages: Float[Tensor, "B R"]  # whitened if asked for
    returns: Float[Tensor, "B R"]


def appraise(
    policy: GPT,
    critic: ScalarModel,
    ref: GPT,
    episodes: Rollout,
    scores: Float[Tensor, " B"],
    kl_coef: float,
    config: PPOConfig,
    dtype: str = "fp32",
    kernel: str = "auto",
) -> Experience:
    """From one score a response to a reward and an advantage a token.

    Args:
        policy: still the one that drew the responses.
        critic: V(s_t), in units of the score.
        ref: π_ref.
        episodes: the rollout.
        scores: (B,), as `shape_scores` leaves them.
        kl_coef: β, in units of the score a nat.
        config: estimator and place of the KL, γ, λ, whitening.
        dtype, kernel: as for `train`.
    """
    mask, device = episodes.mask, episodes.mask.device
    known = episodes.old_logprobs.new_zeros(5, *mask.shape)
    for piece in microbatches(episodes.counted, torch.arange(len(mask)), config.at_a_time):
        with torch.no_grad(), autocast(device, dtype):
            stats, values = stats_and_values(policy, critic, *cut_to(episodes, piece), ref, config.temperature, kernel)
        for table, column in zip(known, (stats.logprobs, stats.ref_logprobs, stats.kl, stats.entropy, values)):
            table.view(-1).index_copy_(0, episodes.places(piece), column.to(table.dtype))
    logprobs, ref_logprobs, exact_kl, entropy, values = known  # each (B, R)

    # 3. Rewards: KL(π‖π_ref) a token, the score at the last one.
    kl = kl_terms(episodes.old_logprobs, ref_logprobs, exact_kl, config.kl_estimator)
    rewards = shape_rewards(scores.to(kl.dtype), kl, mask, kl_coef if config.kl_in != "loss" else 0.0)

    # 4. Advantages.
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    if config.whiten:
        advantages = whiten(advantages, mask)
    return Experience(logprobs, ref_logprobs, exact_kl, entropy, values, rewards, advantages, returns)


class Losses(NamedTuple):
    """The terms of the loss, one number a counted token (N,), or sums of them; and how far the policy has moved."""

    policy: Float[Tensor, "*n"]
    value: Float[Tensor, "*n"]
    entropy: Float[Tensor, "*n"]
    kl: Float[Tensor, "*n"]  # 0 unless the KL is paid for in the loss
    logratio: Float[Tensor, "*n"]  # log π/π_old; no part of the loss


def token_losses(
    policy: GPT | None,
    critic: ScalarModel | None,
    ref: GPT,
    episodes: Rollout,
    experience: Experience,
    rows: Int[Tensor, " b"],
    config: PPOConfig,
    dtype: str = "fp32",
    kernel: str = "auto",
) -> Losses:
    """The terms of the loss at the counted tokens of some rows of a rollout.

    Args:
        policy, critic: as they are now; gradients go into these. Where one is None, its terms are 0.
        ref: π_ref, read only where the KL is paid for in the loss.
        episodes: the rollout.
        experience: what `appraise` made of it, before the first update.
        rows: (b,), which responses; on the CPU.
        config: clips, estimator and place of the KL.
        dtype, kernel: as for `train`.

    Returns:
        `Losses` of (N,), N = counted tokens, row after row.
    """
    at = episodes.places(rows)  # (N,): the flat tensors below list the counted tokens row by row
    old_logprobs, advantages, old_values, returns = (
        table.flatten().index_select(0, at)
        for table in (episodes.old_logprobs, experience.advantages, experience.values, experience.returns)
    )
    reference = ref if config.kl_in != "reward" else None
    with autocast(at.device, dtype):
        now, values = stats_and_values(policy, critic, *cut_to(episodes, rows), reference, config.temperature, kernel)
    terms = Losses(*[torch.zeros_like(old_logprobs)] * len(Losses._fields))
    if values is not None:
        terms = terms._replace(value=value_loss(values.to(returns.dtype), old_values, returns, config.value_clip))
    if now is not None:
        terms = terms._replace(
            policy=policy_loss(now.logprobs, old_logprobs, advantages, config.clip),
            entropy=now.entropy,
            logratio=now.logprobs - old_logprobs,
        )
        if reference is not None:
            terms = terms._replace(kl=kl_terms(now.logprobs, now.ref_logprobs, now.kl, config.kl_estimator))
    return terms


def total_loss(terms: Losses, kl_coef: float, config: PPOConfig) -> Float[Tensor, "*n"]:
    """What is minimised, a token or of sums over tokens: L_policy + c_V L_value - c_H entropy (+ β KL).

    Source: Schulman et al. 2017, eq. 9. Differs: minimised, so signs are turned around; the KL beside it, as in their
    eq. 5, where it stands in the loss.
    """
    loss = terms.policy + config.value_coef * terms.value - config.entropy_coef * terms.entropy
    return loss + kl_coef * terms.kl if config.kl_in != "reward" else loss


def add_gradients(
    policy: GPT | None,
    critic: ScalarModel | None,
    ref: GPT,
    episodes: Rollout,
    experience: Experience,
    rows: Int[Tensor, " b"],
    kl_coef: float,
    config: PPOConfig,
    dtype: str = "fp32",
    kernel: str = "auto",
) -> tuple[Float[Tensor, " 4"], Float[Tensor, ""]]:
    """Add a minibatch's gradients to those of policy and critic, a microbatch at a time; all as for `token_losses`.

    Returns:
        Means over the tokens of policy loss, value loss, ratios beyond ε and KL(π_old‖π); and the largest ratio.
    """
    n = int(episodes.counted[rows].sum())
    found = episodes.old_logprobs.new_zeros(4)  # sums stay on the device until the step
    largest = found.new_zeros(())
    for piece in microbatches(episodes.counted, rows, config.at_a_time):
        terms = token_losses(policy, critic, ref, episodes, experience, piece, config, dtype, kernel)
        totals = Losses(*(term.sum() for term in terms))
        (total_loss(totals, kl_coef, config) / n).backward()

        with torch.no_grad():
            ratio = terms.logratio.exp()
            outside = ((ratio - 1).abs() > config.clip).sum()
            old_kl = (ratio - 1 - terms.logratio).sum()  # k3 of KL(π_old‖π)
            found += torch.stack([totals.policy, totals.value, outside, old_kl]) / n
            largest = torch.maximum(largest, ratio.max())
    return found, largest


@torch.no_grad()
def take_apart(
    step: int,
    rows: Sequence[int],
    policy: GPT,
    critic: ScalarModel,
    ref: GPT,
    episodes: Rollout,
    scores: Float[Tensor, " B"],
    shaped_scores: Float[Tensor, " B"],
    experience: Experience,
    kl_coef: float,
    tokenizer: Tokenizer,
    config: PPOConfig,
    dtype: str = "fp32",
    kernel: str = "auto",
) -> list[Explained]:
    """Some responses of a rollout, token by token, with the columns of `explain.COLUMNS`; padding is left out.

    `policy` is the one after the rollout's updates: ratio and clipped are of it, all else is what `appraise` found. The
    prompt's tokens come first; they do not count and have no numbers.
    """
    mask, ratio = episodes.mask, torch.ones_like(episodes.old_logprobs)
    for piece in microbatches(episodes.counted, torch.tensor(rows), config.at_a_time):
        terms = token_losses(policy, critic, ref, episodes, experience, piece, config, dtype, kernel)
        ratio.view(-1).index_copy_(0, episodes.places(piece), terms.logratio.exp())
    known = {
        "logprob": episodes.old_logprobs, "ref_logprob": experience.ref_logprobs, "kl": experience.kl,
        "reward": experience.rewards, "value": experience.values, "advantage": experience.advantages,
        "return": experience.returns, "ratio": ratio, "clipped": clipped(ratio, experience.advantages, config.clip),
    }  # each (B, R)  # fmt: skip
    kl_paid = kl_terms(episodes.old_logprobs, experience.ref_logprobs, experience.kl, config.kl_estimator)  # (B, R)

    responses = []
    for row in rows:
        prompt = episodes.tokens[row, : int(episodes.counted[row].long().argmax())].tolist()
        tokens = [{"text": token_text(tokenizer, t), "mask": False} | dict.fromkeys(known) for t in prompt]
        columns = (table[row][mask[row]].tolist() for table in (episodes.responses, *known.values()))
        for token, *numbers in zip(*columns):
            finite = (x if math.isfinite(x) else None for x in numbers)  # JSON knows no others
            tokens.append({"text": token_text(tokenizer, token), "mask": True} | dict(zip(known, finite)))
        responses.append(
            Explained(
                step, row, bool(episodes.truncated[row]), float(scores[row]), float(shaped_scores[row]), kl_coef,
                config.kl_estimator, config.kl_in, float(kl_paid[row].sum()), config.clip, config.whiten, tokens,
            )
        )  # fmt: skip
    return responses


def train(
    policy: GPT,
    ref: GPT,
    critic: ScalarModel,
    reward: Reward,
    prompts_at: Callable[[int], list[list[int]]],
    tokenizer: Tokenizer,
    config: PPOConfig,
    run: Run,
    *,
    seed: int,
    gold: Reward | None = None,
    dtype: str = "fp32",
    kernel: str = "auto",
    compile: bool = False,
    explain: int = 0,
) -> dict[str, float]:
    """Train `policy` and `critic` in place.

    Args:
        policy: starts as the reference.
        ref: frozen.
        critic: a `ScalarModel` of its own, or one whose trunk is `policy` (a shared critic).
        reward: scores responses; what is optimised.
        prompts_at: batch_size/responses_per_prompt prompts of a step as token ids, a pure function of the step.
        tokenizer: turns responses into text, for people and for rewards that read text.
        config: see `PPOConfig`.
        run: where metrics, samples and checkpoints go.
        seed: of the sampling.
        gold: a judge that is logged and never optimised.
        dtype: fp32 or bf16 matrix products.
        kernel: which `token_stats`.
        compile: sample through torch.compile.
        explain: responses to take apart at the first rollout and wherever samples are shown; changes no weight.

    Returns:
        The last step's metrics.
    """
    device = policy.wte.weight.device
    shared = critic.trunk is policy
    optimizer = adamw(policy, config.lr, config.weight_decay)
    if shared:
        optimizer.add_param_group({"params": list(critic.score.parameters()), "weight_decay": 0.0})
        critic_optimizer = optimizer
    else:
        critic_optimizer = adamw(critic, config.critic_lr, config.weight_decay)
    state = {"kl_coef": config.kl_coef, "score_count": 0.0, "score_mean": 0.0, "score_m2": 0.0}
    parts = {"critic": critic, "optimizer": optimizer} | (
        {} if shared else {"policy": policy, "critic_optimizer": critic_optimizer}
    )
    start = run.restore(numbers=state, **parts)
    metrics: dict[str, float] = {}

    for step in run.range(start):
        began = time.perf_counter()
        lr_share = cosine_lr(step, config.steps, 1.0, config.warmup_steps)
        set_lr(optimizer, lr_share * config.lr)
        if not shared:
            set_lr(critic_optimizer, lr_share * config.critic_lr)

        # 1. Rollout: responses from the policy as it is.
        prompts = [p for p in prompts_at(step) for _ in range(config.responses_per_prompt)]
        low, high = config.response_range
        limits = torch.randint(low, high + 1, (len(prompts),), generator=seeded(seed, step, 1)).tolist()
        seeds, eot = mix(seed, step, 2), tokenizer.eot
        episodes = rollout(policy, prompts, limits, eot, config.temperature, seeds, kernel, dtype, compile)
        mask = episodes.mask  # (B, R)

        # 2. Score: the reward reads the tokens that were drawn, or their text.
        asked = [TokenText(tokenizer.decode(p), p) for p in prompts]
        answered = [TokenText(tokenizer.decode(row), row) for row in episodes.drawn()]
        scores = score(reward, asked, answered)  # (B,), on the CPU
        shaped_scores = upload(shape_scores(scores, episodes.truncated, state, config), device)

        # 3. and 4. Rewards and advantages, token by token.
        experience = appraise(policy, critic, ref, episodes, shaped_scores, state["kl_coef"], config, dtype, kernel)
        drift = (experience.logprobs - episodes.old_logprobs).abs().max()
        if step == start:
            check_ratio(float(drift), NOISE_FLOOR[products(device, dtype)])
        rollout_seconds = time.perf_counter() - began

        # 5. Updates: several passes over the rollout in minibatches.
        began = time.perf_counter()
        sums = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "old_kl", "grad_norm"), 0.0)
        ratio_max = 0.0
        updates, looks, stopped = 0, 0, False
        with side_by_side(device.type == "cpu" and not shared) as both:
            for epoch in range(config.epochs):
                order = torch.randperm(len(prompts), generator=seeded(seed, step, 3, epoch))
                for rows_now in order.chunk(config.minibatches):
                    given = (ref, episodes, experience, rows_now, state["kl_coef"], config, dtype, kernel)
                    if both is None:
                        found, largest = add_gradients(policy, critic, *given)
                    else:
                        (found, largest), (of_critic, _) = both(
                            partial(add_gradients, policy, None, *given), partial(add_gradients, None, critic, *given)
                        )
                        found += of_critic
                    trained = [policy, critic.score] if shared else [policy]
                    grad_norm = torch.nn.utils.clip_grad_norm_(
                        [p for module in trained for p in module.parameters()], config.max_grad_norm
                    )
                    names = ("policy_loss", "value_loss", "clip_fraction", "old_kl")
                    seen = read({**dict(zip(names, found)), "grad_norm": grad_norm, "ratio_max": largest})
                    run.require_finite(step, policy_loss=seen["policy_loss"], value_loss=seen["value_loss"])
                    run.require_finite(step, gradient=seen["grad_norm"])
                    looks += 1
                    ratio_max = max(ratio_max, seen.pop("ratio_max"))
                    for name, value in seen.items():
                        sums[name] += value
                    if 0 < config.stop_kl < seen["old_kl"]:  # far enough already: this step is not taken
                        stopped = True
                        optimizer.zero_grad()
                        critic_optimizer.zero_grad()
                        break
                    if not shared:
                        torch.nn.utils.clip_grad_norm_(critic.parameters(), config.max_grad_norm)
                        critic_optimizer.step()
                        critic_optimizer.zero_grad()
                    optimizer.step()
                    optimizer.zero_grad()
                    updates += 1
                if stopped:
                    break

        # 6. Log: sums over a response, means over responses or over the tokens that count.
        old_logprobs, ref_logprobs, exact_kl = episodes.old_logprobs, experience.ref_logprobs, experience.kl  # (B, R)
        k1 = (old_logprobs - ref_logprobs).sum(-1)  # (B,)
        kl_coef = state["kl_coef"]
        metrics = read(
            {
                "reward": scores.mean(),
                "reward_std": scores.std(correction=0),
                "gold": score(gold, asked, answered).mean() if gold is not None else None,
                "kl_k1": k1.mean(),
                "kl_k1_se": k1.std().double() / math.sqrt(len(k1)) if len(k1) > 1 else None,
                "kl_k3": kl_terms(old_logprobs, ref_logprobs, exact_kl, "k3").sum(-1).mean(),
                "kl_exact": exact_kl.sum(-1).mean(),
                "entropy": masked_mean(experience.entropy, mask),
                "length": episodes.counted.sum(-1).float().mean(),
                "eot_rate": (~episodes.truncated).float().mean(),
                "explained_variance": explained_variance(experience.values, experience.returns, mask),
                "advantage_std": masked_variance(experience.advantages, mask).sqrt(),
                **{name: value / looks for name, value in sums.items()},
                "ratio_max": ratio_max,
                "updates": updates,
                "ratio_drift": drift,
                "kl_coef": kl_coef,
                "lr": lr_share * config.lr,
                "rollout_seconds": rollout_seconds,
                "update_seconds": time.perf_counter() - began,
            }
        )
        metrics["objective"] = metrics["reward"] - kl_coef * metrics["kl_exact"]
        if config.kl_target > 0:
            state["kl_coef"] = adapt_kl_coef(
                kl_coef, metrics["kl_exact"], config.kl_target, len(prompts), config.kl_horizon
            )
        run.log(step, metrics, show=("reward", "gold", "kl_exact"))
        shows = (step + 1) % config.sample_every == 0 or step + 1 == config.steps
        if shows:
            shown = spread(len(prompts), 3)
            run.samples(
                step, [{"prompt": asked[i], "response": answered[i], "reward": float(scores[i])} for i in shown]
            )

        # If asked to, take a few responses apart, with the policy as the updates left it.
        if explain and (shows or step == 0):
            look = take_apart(
                step, spread(len(prompts), explain), policy, critic, ref, episodes, scores, shaped_scores, experience,
                kl_coef, tokenizer, config, dtype, kernel,
            )  # fmt: skip
            show_explained(run, look)
        run.checkpoint(step + 1, numbers=state, **parts)
    return metrics


def spread(n: int, count: int) -> list[int]:
    """At most `count` of n rows, evenly spread."""
    return [i * n // min(n, count) for i in range(min(n, count))]


def shape_scores(
    scores: Float[Tensor, " B"], truncated: Bool[Tensor, " B"], state: dict[str, float], config: PPOConfig
) -> Float[Tensor, " B"]:
    """Scores as PPO sees them: normalised over all rollouts so far, clipped, less the penalty for never ending."""
    if config.normalise_reward:  # Chan et al. 1979: means and squared deviations of two samples, joined
        n, mean, m2 = state["score_count"], state["score_mean"], state["score_m2"]
        new, delta = len(scores), float(scores.mean()) - mean
        state["score_count"] = n + new
        state["score_mean"] = mean + delta * new / (n + new)
        state["score_m2"] = m2 + float((scores - scores.mean()).square().sum()) + delta**2 * n * new / (n + new)
        deviation = math.sqrt(state["score_m2"] / state["score_count"]) + 1e-8
        scores = (scores - state["score_mean"]) / deviation
    if config.reward_clip:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    return scores - config.missing_eot_penalty * truncated.float()


def check_ratio(drift: float, floor: float) -> None:
    """Before the first update π = π_old, so that every ratio is 1 but for rounding: anything else is a bug."""
    if not drift <= floor:
        raise RuntimeError(
            f"before the first update, log-probs differ from those the tokens were drawn with by {drift:.2e} nats "
            f"(allowed: {floor:.0e}): sampling and training do not agree on the policy"
        )
    console.print(f"  first ratio: π/π_old is 1 within {math.expm1(drift):.1e} (allowed: {floor:.0e})")
