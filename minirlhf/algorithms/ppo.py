"""PPO: improve the policy on a reward while a KL penalty holds it to the reference.

    maximise  E_{y~π} [ r(x, y) ] - β · KL(π‖π_ref)

The KL term is what keeps the text human: without it the policy finds whatever the reward model overrates.

Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; Ziegler et al. 2019, "Fine-Tuning Language
Models from Human Preferences" (the KL reward and its controller); Stiennon et al. 2020; Ouyang et al. 2022.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.algorithms import losses
from minirlhf.algorithms.experience import Experience, Step, describe
from minirlhf.algorithms.logprobs import Outputs, ask, ask_all, check_ratio
from minirlhf.algorithms.rewards import Reward, score, shape_scores
from minirlhf.algorithms.rollout import Rollout, microbatches, minibatches, response_limits, rollout
from minirlhf.algorithms.training import adamw, clip_and_read, schedule
from minirlhf.checks import check_at_least, check_multiple, check_positive, check_share, parse_range
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.devices import upload
from minirlhf.model.gpt import GPT, ScalarModel
from minirlhf.run.folder import Run
from minirlhf.seeds import mix


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
    """ε: the ratio π/π_old is clipped to [1-ε, 1+ε]."""
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
    """Estimator of the penalised KL; k1, k3 and exact are always logged."""
    kl_in: Literal["reward", "loss", "both"] = "reward"
    """Where it is paid: in each token's reward, in the loss, or in both. docs/options.md says which gradient each has;
    k1 in the reward has the true one."""
    kl_target: float = 0.0
    """Adaptive β: the KL per response to steer to, in nats; 0 = β stays fixed."""
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
        check_multiple(self.batch_size, responses_per_prompt=self.responses_per_prompt, minibatches=self.minibatches)
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


class Networks(NamedTuple):
    """What PPO trains, and what it holds to."""

    policy: GPT  # starts as the reference
    ref: GPT  # frozen
    critic: ScalarModel  # a network of its own, or one whose trunk is the policy (a shared critic)


def train(
    networks: Networks,
    reward: Reward,
    prompts_at: Callable[[int], list[list[int]]],
    tokenizer: Tokenizer,
    config: PPOConfig,
    run: Run,
    seed: int,
    watch: Callable[[Step], dict[str, float | None]] | None = None,
) -> dict[str, float]:
    """Train policy and critic in place; return the last step's metrics.

    Args:
        networks: policy, reference and critic; each runs with its own kernel and dtype.
        reward: scores responses; what is optimised.
        prompts_at: batch_size/responses_per_prompt prompts of a step as token ids, a pure function of the step.
        tokenizer: turns responses into text, for people and for rewards that read text.
        config: see `PPOConfig`.
        run: where metrics and checkpoints go.
        seed: of the sampling.
        watch: sees each step after its updates, and may return metrics to log; changes no weight.
    """
    policy, ref, critic = networks
    # A shared critic is the policy with a second head, and they learn as one network.
    trained = {"policy": critic} if critic.trunk is policy else {"policy": policy, "critic": critic}
    optimizer = adamw(config.weight_decay, *zip(trained.values(), (config.lr, config.critic_lr)))
    numbers = {"kl_coef": config.kl_coef, "score_count": 0.0, "score_mean": 0.0, "score_m2": 0.0}
    state = {"numbers": numbers, "optimizer": optimizer, **trained}  # what a resumed run needs
    start = run.restore(**state)
    metrics: dict[str, float] = {}

    for step in run.range(start):
        began = time.perf_counter()
        lr = schedule(optimizer, step, config.steps, config.warmup_steps)

        # 1. Sample responses, keeping the log-probs that their tokens were sampled with.
        prompts = [p for p in prompts_at(step) for _ in range(config.responses_per_prompt)]
        limits = response_limits(*config.response_range, len(prompts), seed, step)
        episodes = rollout(policy, prompts, limits, tokenizer.eot, config.temperature, mix(seed, step, 2))

        # 2. Score whole responses: the reward reads the tokens that were sampled, or their text.
        asked, answered = episodes.texts(tokenizer)
        scores = score(reward, asked, answered)  # (B,), on the CPU
        shaped = shape_scores(
            scores, episodes.truncated, numbers, config.normalise_reward, config.reward_clip, config.missing_eot_penalty
        )  # (B,)

        # 3. Ask the networks before anything moves: π is π_old.
        old = ask_all(policy, critic, ref, episodes, config.temperature, config.at_a_time)  # each (B, R)
        if step == start:
            check_ratio(old, episodes, policy)

        # 4. From a score per response to an advantage per token.
        experience = estimate_advantages(old, episodes, shaped, numbers["kl_coef"], config)  # each (B, R)
        sampled = time.perf_counter()

        # 5. A few clipped steps over shuffled minibatches.
        taken: list[dict[str, float]] = []
        for rows in minibatches(len(prompts), config.epochs, config.minibatches, seed, step):
            sums = add_gradients(networks, episodes, experience, rows, numbers["kl_coef"], config)
            taken.append(clip_and_read(run, step, list(trained.values()), config.max_grad_norm, sums))
            if stopped := 0 < config.stop_kl < taken[-1]["old_kl"]:
                optimizer.zero_grad()
                break  # far enough already: this step is not taken
            optimizer.step()
            optimizer.zero_grad()

        # 6. Log, then steer β.
        metrics = describe(episodes, experience, scores, taken) | {
            "updates": len(taken) - stopped, "kl_coef": numbers["kl_coef"], "lr": lr,
            "rollout_seconds": sampled - began, "update_seconds": time.perf_counter() - sampled,
        }  # fmt: skip
        metrics["objective"] = metrics["reward"] - numbers["kl_coef"] * metrics["kl_exact"]
        if watch is not None:
            seen = Step(step, episodes, asked, answered, scores, shaped, experience, numbers["kl_coef"])
            metrics |= watch(seen)
        run.log(step, metrics, show=("reward", "gold", "kl_exact"))
        if config.kl_target > 0:
            numbers["kl_coef"] = losses.adapt_kl_coef(
                numbers["kl_coef"], metrics["kl_exact"], config.kl_target, len(prompts), config.kl_horizon
            )
        run.checkpoint(step + 1, **state)
    return metrics


def estimate_advantages(
    old: Outputs, episodes: Rollout, scores: Float[Tensor, " B"], kl_coef: float, config: PPOConfig
) -> Experience:
    """From one score per response, as `shape_scores` leaves it, to a reward and an advantage per token.

    `old` is what the networks that sampled the responses say of them.
    """
    mask = episodes.mask  # (B, R)
    kl = losses.kl_terms(episodes.old_logprobs, old.ref_logprobs, old.kl, config.kl_estimator)
    scores = upload(scores, mask.device).to(kl.dtype)
    rewards = losses.shape_rewards(scores, kl, mask, kl_coef if config.kl_in != "loss" else 0.0)
    advantages, returns = losses.gae(rewards, old.values, mask, config.gamma, config.lam)
    if config.whiten:
        advantages = losses.whiten(advantages, mask)
    return Experience(old, rewards, advantages, returns)


class Losses(NamedTuple):
    """What is minimised, two of its terms, and how far the policy has moved; each (b, R), 0 past the end."""

    total: Float[Tensor, "b R"]
    policy: Float[Tensor, "b R"]
    value: Float[Tensor, "b R"]
    logratio: Float[Tensor, "b R"]  # log π/π_old


def token_losses(
    networks: Networks, episodes: Rollout, experience: Experience, rows: Int[Tensor, " b"], kl_coef: float,
    config: PPOConfig,
) -> Losses:  # fmt: skip
    """L_policy + c_V L_value - c_H entropy (+ β KL), per token of some rows, with the networks as they are now.

    Source: Schulman et al. 2017, eq. 9. Differs: minimised, so signs are turned around; the KL beside it, as in their
    eq. 5, where it stands in the loss.
    """
    policy, ref, critic = networks
    now = ask(policy, critic, ref if config.kl_in != "reward" else None, episodes, rows, config.temperature)
    old_logprobs, advantages, old_values, returns = (
        table.index_select(0, upload(rows, table.device))
        for table in (episodes.old_logprobs, experience.advantages, experience.old.values, experience.returns)
    )  # each (b, R)

    of_policy = losses.policy_loss(now.logprobs, old_logprobs, advantages, config.clip)
    of_values = losses.value_loss(now.values, old_values, returns, config.value_clip)
    total = of_policy + config.value_coef * of_values - config.entropy_coef * now.entropy
    if config.kl_in != "reward":
        total = total + kl_coef * losses.kl_terms(now.logprobs, now.ref_logprobs, now.kl, config.kl_estimator)
    return Losses(total, of_policy, of_values, now.logprobs - old_logprobs)


def add_gradients(
    networks: Networks, episodes: Rollout, experience: Experience, rows: Int[Tensor, " b"], kl_coef: float,
    config: PPOConfig,
) -> dict[str, Tensor]:  # fmt: skip
    """Add a minibatch's gradients, a microbatch at a time; return means over its tokens, and the largest ratio."""
    n = int(episodes.counted[rows].sum())
    sums = episodes.old_logprobs.new_zeros(4)  # on the device until the step
    largest = sums.new_zeros(())
    for part in microbatches(episodes.counted, rows, config.at_a_time):
        terms = token_losses(networks, episodes, experience, part, kl_coef, config)
        (terms.total.sum() / n).backward()
        with torch.no_grad():
            ratio = terms.logratio.exp()  # (b, R), 1 past the end
            outside = (ratio - 1).abs() > config.clip
            old_kl = ratio - 1 - terms.logratio  # k3 of KL(π_old‖π)
            sums += torch.stack([x.sum() for x in (terms.policy, terms.value, outside, old_kl)]) / n
            largest = torch.maximum(largest, ratio.max())
    return dict(zip(("policy_loss", "value_loss", "clip_fraction", "old_kl"), sums), ratio_max=largest)
