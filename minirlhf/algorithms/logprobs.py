"""Responses -> log-probs, entropy, KL and values, one number per response token.

The head of a network is the largest matrix product there is, so it runs on the positions that predict a response token
and on no others: flat (N,) tensors, N = response tokens. They stay inside this file; `ask` and `ask_all` give tables
(B, R), 0 past the end of a response.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf.algorithms.rollout import Rollout, microbatches
from minirlhf.devices import products, upload
from minirlhf.model.gpt import GPT, ScalarModel, places
from minirlhf.model.token_stats import TokenStats
from minirlhf.run.terminal import console
from minirlhf.run.threads import beside

# Nats per token by which sampling and training may differ through rounding; tf32 has three bits more than bf16.
NOISE_FLOOR = {"fp32": 1e-3, "tf32": 0.03, "bf16": 0.25}


class Outputs(NamedTuple):
    """What the networks say of each response token, each (B, R), 0 past the end; the KL is None without a reference."""

    logprobs: Float[Tensor, "B R"]  # log π of the token, nats
    entropy: Float[Tensor, "B R"]  # of the distribution it was chosen from
    values: Float[Tensor, "B R"]  # V(s_t), before token t is chosen
    ref_logprobs: Float[Tensor, "B R"] | None = None
    kl: Float[Tensor, "B R"] | None = None  # KL(π‖π_ref), exact, over the whole vocabulary


def ask(
    policy: GPT, critic: ScalarModel, ref: GPT | None, rollout: Rollout, rows: Int[Tensor, " b"], temperature: float
) -> Outputs:
    """What policy, critic and reference say of the responses in some rows of a rollout, each (b, R).

    Args:
        policy: differentiated, and so is the critic.
        critic: a network of its own, or a second head on the policy, whose trunk then runs once.
        ref: read without gradient; None = no KL is wanted.
        rollout: the responses.
        rows: (b,), which; on the CPU.
        temperature: divides the logits of policy and reference: the one the tokens were sampled with.
    """
    tokens, counted = rollout.cut(rows)  # (b, T)
    before, at = tokens[:, :-1], predictors(counted, tokens.device)  # the token at t is predicted at t - 1
    targets = tokens[:, 1:].flatten().index_select(0, at)  # (N,)

    def statistics(hidden: Float[Tensor, "N D"]) -> TokenStats:
        if ref is None:
            return policy.token_stats(hidden, targets, temperature=temperature)
        with torch.no_grad():
            ref_hidden = ref(before, at=at)  # (N, D)
        return policy.token_stats(hidden, targets, ref_hidden, ref.wte.weight.detach(), temperature)

    if critic.trunk is policy:
        hidden = policy(before, at=at)  # (N, D)
        stats, values = statistics(hidden), critic.head(hidden)  # (N,)
    else:
        stats, (values,) = beside(
            lambda: statistics(policy(before, at=at)), lambda: (critic(before, at=at),), at.device.type == "cpu"
        )
        stats = TokenStats(*stats)

    shape = len(rows), rollout.mask.shape[1]
    inside = torch.arange(shape[1]) < counted.sum(-1, keepdim=True)  # (b, R), True at the response's tokens
    where = upload(places(inside), tokens.device)  # (N,): row after row, as `at` is

    def table(column: Float[Tensor, " N"] | None) -> Float[Tensor, "b R"] | None:
        return None if column is None else column.new_zeros(inside.numel()).index_copy(0, where, column).view(shape)

    return Outputs(*map(table, (stats.logprobs, stats.entropy, values, stats.ref_logprobs, stats.kl)))


@torch.no_grad()
def ask_all(
    policy: GPT, critic: ScalarModel, ref: GPT, rollout: Rollout, temperature: float, at_a_time: int
) -> Outputs:
    """`ask` of a whole rollout, without gradient, `at_a_time` rows in memory: each (B, R)."""
    tables = rollout.old_logprobs.new_zeros(len(Outputs._fields), *rollout.mask.shape)
    for rows in microbatches(rollout.counted, torch.arange(len(rollout.mask)), at_a_time):
        for table, part in zip(tables, ask(policy, critic, ref, rollout, rows, temperature)):
            table.index_copy_(0, upload(rows, table.device), part.to(table.dtype))
    return Outputs(*tables)


def check_ratio(old: Outputs, rollout: Rollout, policy: GPT) -> None:
    """Before the first update π = π_old, so that every ratio is 1 but for rounding: anything else is a bug."""
    drift = float((old.logprobs - rollout.old_logprobs).abs().max())
    floor = NOISE_FLOOR[products(rollout.mask.device, policy.dtype)]
    if not drift <= floor:
        raise RuntimeError(
            f"before the first update, log-probs differ from those the tokens were sampled with by {drift:.2e} nats "
            f"(allowed: {floor:.0e}): sampling and training do not agree on the policy"
        )
    console.print(f"  first ratio: π/π_old is 1 within {math.expm1(drift):.1e} (allowed: {floor:.0e})")


def predictors(counted: Bool[Tensor, "B T"], device: torch.device) -> Int[Tensor, " N"]:
    """Where the counted tokens' predecessors, which predict them, stand in the flattened (B·(T-1)), row after row."""
    return upload(places(counted[:, 1:]), device)


def response_stats(
    model: GPT,
    tokens: Int[Tensor, "B T"],
    counted: Bool[Tensor, "B T"],
    ref_model: GPT | None = None,
    *,
    mask: Bool[Tensor, "B T"] | None = None,
    temperature: float = 1.0,
) -> TokenStats:
    """Log-prob, entropy and (given a reference) exact KL of the counted tokens, each given all tokens before it.

    Args:
        model: the policy.
        tokens: (B, T) prompts with their responses.
        counted: (B, T), True where the token's own statistics are wanted; the first token of a row never counts,
            since nothing predicts it. Best on the CPU, where it is made: a GPU would be waited for to find its places.
        ref_model: the reference, read without gradient.
        mask: (B, T), True = a real token; None when padding stands on the right only.
        temperature: divides the logits of both.

    Returns:
        `TokenStats` of shape (N,), N = counted tokens, row after row; `scatter_counted` puts them back in place.
    """
    before, at = tokens[:, :-1], predictors(counted, tokens.device)
    targets = tokens[:, 1:].flatten().index_select(0, at)  # (N,)
    real = None if mask is None else mask[:, :-1]
    ref = (None, None)
    if ref_model is not None:
        with torch.no_grad():
            ref = ref_model(before, real, at=at), ref_model.wte.weight.detach()  # (N, D), (V', D)
    hidden = model(before, real, at=at)  # (N, D)
    return model.token_stats(hidden, targets, *ref, temperature)


def scatter_counted(values: Float[Tensor, " N"], counted: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(N,) values of the counted tokens back into (B, T), 0 elsewhere."""
    return values.new_zeros(counted.shape).masked_scatter(upload(counted, values.device), values)
