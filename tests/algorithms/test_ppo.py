"""ppo: every equation against its definition, the rollout's layout, one whole step by hand, and runs that learn."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Killed, Share, descent, rows, run_in, tiny_network, weights

from minirlhf import InputError
from minirlhf.algorithms import logprobs, losses, ppo
from minirlhf.algorithms.logprobs import Outputs, ask, ask_all, check_ratio
from minirlhf.algorithms.losses import (
    adapt_kl_coef,
    explained_variance,
    gae,
    kl_terms,
    masked_mean,
    policy_loss,
    shape_rewards,
    value_loss,
    whiten,
)  # fmt: skip
from minirlhf.algorithms.ppo import Networks, PPOConfig, estimate_advantages, token_losses, train
from minirlhf.algorithms.rewards import shape_scores
from minirlhf.algorithms.rollout import rollout
from minirlhf.algorithms.training import adamw, cosine_lr
from minirlhf.checks import parse_range
from minirlhf.commands.watch import Watch
from minirlhf.model import gpt as gpt_module
from minirlhf.model.gpt import GPT, ScalarModel, clone
from minirlhf.run import threads

CONTEXT = 32
PROMPTS = [[5, 6], [7], [8, 9, 10, 11, 12], [13, 14, 15]]


@pytest.fixture
def tiny(tiny_tokenizer):
    return lambda seed=0, ends=6.0: tiny_network(tiny_tokenizer, CONTEXT, seed, ends=ends)


def separate_critic(policy: GPT, seed: int = 1) -> ScalarModel:
    """A critic of its own, with a head that is not zero."""
    critic = ScalarModel(policy.config, trunk=clone(policy))
    critic.score.weight.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(seed))
    return critic.requires_grad_(True)


def shared_critic(policy: GPT, seed: int = 1) -> ScalarModel:
    """A second head on the policy."""
    critic = ScalarModel(policy.config, trunk=policy)
    critic.score.weight.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(seed))
    return critic


def lengths_mask(lengths, width=None) -> torch.Tensor:
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


# --- KL ---------------------------------------------------------------------------------------------------------------


def two_policies(seed: int, spread: float = 1.0):
    """Log-probs (V,) of two distributions over eight tokens, in float64."""
    logits = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.log_softmax(spread * logits, -1)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(0.1, 4))
def test_k1_and_k3_are_right_on_average_and_k3_never_negative(seed, spread):
    logp, logq = two_policies(seed, spread)
    p = logp.exp()
    exact = (p * (logp - logq)).sum()  # KL(π‖π_ref), not the other way round
    k1, k2, k3 = (kl_terms(logp, logq, logp, name) for name in ("k1", "k2", "k3"))
    torch.testing.assert_close((p * k1).sum(), exact)
    torch.testing.assert_close((p * k3).sum(), exact)
    assert (k3 >= 0).all() and (k2 >= 0).all()
    torch.testing.assert_close(k1, logp - logq)
    torch.testing.assert_close(k2, (logp - logq) ** 2 / 2)
    torch.testing.assert_close(k3, logq.exp() / logp.exp() - 1 - (logq - logp))
    assert torch.equal(kl_terms(logp, logq, exact.expand(8), "exact"), exact.expand(8))


def test_the_direction_of_the_kl_shows():
    # π surely draws 0 while the reference is undecided: log 2. The other way round, it would be infinite (here: large).
    logp, logq = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64).log(), torch.tensor([0.5, 0.5]).double().log()
    for name in ("k1", "k3"):
        assert (logp.exp() * kl_terms(logp, logq, logp, name)).sum().item() == pytest.approx(math.log(2), rel=1e-6)
        assert (logq.exp() * kl_terms(logq, logp, logp, name)).sum().item() > 9


def test_k3_varies_less_than_k1_near_the_reference():
    logp, logq = two_policies(0, 0.1)
    p = logp.exp()

    def variance(x):
        return (p * x**2).sum() - (p * x).sum() ** 2

    assert variance(kl_terms(logp, logq, logp, "k3")) < 0.1 * variance(kl_terms(logp, logq, logp, "k1"))


def test_in_the_loss_k2_and_exact_have_the_gradient_of_the_kl_and_k1_has_none():
    # Tokens are drawn once, so that the gradient goes through the estimator and not through what is drawn.
    x, y = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x.requires_grad_(True)
    logp, logq = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    exact = (logp.exp() * (logp - logq)).sum()
    (expected,) = torch.autograd.grad(exact, x, retain_graph=True)

    def average(name):
        loss = (logp.exp().detach() * kl_terms(logp, logq, exact.expand(8), name)).sum()
        return torch.autograd.grad(loss, x, retain_graph=True)[0]

    torch.testing.assert_close(average("k2"), expected)
    torch.testing.assert_close(average("exact"), expected)
    torch.testing.assert_close(average("k1"), torch.zeros(8, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(average("k3"), logp.exp() - logq.exp())  # the gradient of KL(π_ref‖π)


def test_which_places_and_estimators_have_the_true_gradient_of_the_kl():
    # Every response of two tokens out of three, so that the expected gradient is a sum and not a sample. The second
    # token's distribution depends on the first, whose choice therefore has an effect on the KL to come.
    x0, x1, y0, y1 = (randn(seed, *shape) for seed, shape in enumerate([(3,), (3, 3), (3,), (3, 3)]))
    first, second = (torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3))
    parameters = [x0.requires_grad_(True), x1.requires_grad_(True)]

    def distributions(a, b):  # of either token, in all nine responses: (9, 2, 3)
        return torch.stack([torch.log_softmax(a, -1).expand(9, 3), torch.log_softmax(b, -1)[first]], dim=1)

    everything, ref_everything = distributions(x0, x1), distributions(y0, y1)
    drawn = torch.stack([first, second], dim=1)[..., None]
    logp, logq = (d.gather(-1, drawn).squeeze(-1) for d in (everything, ref_everything))  # (9, 2)
    exact = (everything.exp() * (everything - ref_everything)).sum(-1)
    other_way = (ref_everything.exp() * (ref_everything - everything)).sum(-1)
    p = logp.sum(-1).exp()

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])

    def expected(kl_in, estimator):
        terms = kl_terms(logp, logq, exact, estimator)
        mask = torch.ones(9, 2, dtype=torch.bool)
        rewards = shape_rewards(torch.zeros(9).double(), terms.detach(), mask, 1.0 if kl_in != "loss" else 0.0)
        advantages, _ = gae(rewards, torch.zeros(9, 2).double(), mask, 1.0, 1.0)
        loss = policy_loss(logp, logp.detach(), advantages, 0.2) + (terms if kl_in != "reward" else 0.0)
        return gradient((p.detach() * loss.sum(-1)).sum())

    true = gradient((p * (logp - logq).sum(-1)).sum())
    a_token = gradient((p.detach() * exact.sum(-1)).sum())
    turned_around = gradient((p.detach() * other_way.sum(-1)).sum())
    assert min((true - a_token).abs().max(), (a_token - turned_around).abs().max(), a_token.abs().max()) > 0.01
    for kl_in, estimator, want in (
        ("reward", "k1", true),
        ("both", "k1", true),
        ("both", "exact", true),
        ("loss", "k2", a_token),
        ("loss", "exact", a_token),
        ("loss", "k3", turned_around),
        ("loss", "k1", torch.zeros(12).double()),  # refused
        ("reward", "exact", true - a_token),  # refused
    ):
        torch.testing.assert_close(expected(kl_in, estimator), want, msg=lambda m, n=(kl_in, estimator): f"{n}: {m}")


@pytest.mark.parametrize(
    ("kl_in", "estimator", "why"),
    [
        ("loss", "k1", "whose expected gradient is zero; use k2 or exact in the loss, or k1 in the reward"),
        ("reward", "exact", "lacks the gradient of each token's own KL"),
    ],
)
def test_a_kl_without_its_gradient_is_refused(kl_in, estimator, why):
    with pytest.raises(InputError) as caught:
        PPOConfig(kl_in=kl_in, kl_estimator=estimator)
    message = str(caught.value)
    assert f"--kl-in {kl_in} " in message and f"--kl-estimator {estimator}" in message and why in message
    assert "; use " in message and "\n" not in message


# --- rewards, advantages ----------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def randn(seed: int, *shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 10**6))
def test_the_score_stands_at_the_last_token_and_every_token_pays_its_kl(lengths, seed):
    mask = lengths_mask(lengths, 7)
    scores, kl = randn(seed, len(lengths)), randn(seed + 1, *mask.shape)
    rewards = shape_rewards(scores, kl, mask, 0.3)
    for row, length in enumerate(lengths):
        for t in range(7):
            expected = -0.3 * kl[row, t] if t < length else torch.zeros(()).double()
            expected = expected + scores[row] if t == length - 1 else expected
            torch.testing.assert_close(rewards[row, t], expected)


def test_shaped_rewards_by_hand():
    kl = torch.tensor([[0.5, -1.0, 2.0], [1.0, 9.0, 9.0]])
    rewards = shape_rewards(torch.tensor([10.0, 20.0]), kl, lengths_mask([3, 1]), 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 9.8], [19.9, 0.0, 0.0]]))


def slow_gae(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} for one response, straight from the definition (Schulman et al. 2016, eq. 16)."""
    n = len(rewards)
    deltas = [rewards[t] + (gamma * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]


def test_advantages_by_hand():
    # δ = (0 + ½·2 - 1, 0 + ½·4 - 2, 8 - 4) = (0, 0, 4): nothing comes after the last token.
    rewards, values = torch.tensor([[0.0, 0.0, 8.0], [3.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 4.0], [1.0, 0.0, 0.0]])
    advantages, returns = gae(rewards, values, lengths_mask([3, 1]), 0.5, 0.5)
    assert advantages.tolist() == [[0.25, 1.0, 4.0], [2.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.25, 3.0, 8.0], [3.0, 0.0, 0.0]]


@settings(max_examples=60)
@given(LENGTHS, st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_their_definition(lengths, seed, gamma, lam):
    mask = lengths_mask(lengths)
    rewards, values = randn(seed, *mask.shape), randn(seed + 1, *mask.shape)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        slow = slow_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(slow, abs=1e-9)
        assert returns[row, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(slow, values[row].tolist())], abs=1e-9
        )
        assert not advantages[row, length:].any() and not returns[row, length:].any()


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 10**6), st.floats(0, 1))
def test_with_lambda_1_returns_are_the_rewards_to_go(lengths, seed, gamma):
    mask = lengths_mask(lengths)
    rewards, values = randn(seed, *mask.shape), randn(seed + 1, *mask.shape)
    _, returns = gae(rewards, values, mask, gamma, 1.0)
    for row, length in enumerate(lengths):
        for t in range(length):
            to_go = sum(gamma ** (s - t) * rewards[row, s].item() for s in range(t, length))
            assert returns[row, t].item() == pytest.approx(to_go, abs=1e-9)


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 10**6))
def test_what_stands_past_the_end_never_leaks(lengths, seed):
    mask = lengths_mask(lengths, 7)
    x, values = randn(seed, *mask.shape), randn(seed + 1, *mask.shape)
    returns = randn(seed + 2, *mask.shape)
    rubbish = torch.where(mask, 0.0, 1e6)

    def everything(x, values, returns):
        return (
            *gae(x, values, mask, 0.9, 0.8),
            whiten(x, mask),
            masked_mean(x, mask),
            shape_rewards(torch.ones(len(lengths)).double(), x, mask, 0.5),
            explained_variance(values, returns, mask),
        )

    clean = everything(x, values, returns)
    for a, b in zip(clean, everything(x + rubbish, values + rubbish, returns - rubbish)):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@settings(max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 10**6))
def test_whitened_advantages_have_mean_0_and_deviation_1(lengths, seed):
    mask = lengths_mask(lengths, 7)
    x = 3.0 + 5.0 * randn(seed, *mask.shape)
    white = whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-9)
    assert white[mask].std(correction=0).item() == pytest.approx(1.0, rel=1e-3)
    assert not white[~mask].any()
    order = x[mask].argsort()
    assert torch.equal(white[mask].argsort(), order)  # not turned around
    assert torch.equal(whiten(torch.full_like(x, 2.0), mask), torch.zeros_like(x))


def test_whitening_by_hand():
    white = whiten(torch.tensor([[1.0, 3.0, 100.0], [5.0, -50.0, 100.0]]), lengths_mask([2, 1], 3))
    deviation = math.sqrt(8 / 3)  # of 1, 3 and 5
    torch.testing.assert_close(white, torch.tensor([[-2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]) / deviation)


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    assert masked_mean(x, lengths_mask([2, 1], 3)).item() == 3.0


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: -ρA, with gradient -ρA in log π
        (1.1, -2.0, 2.2, 2.2),
        (1.5, 2.0, -2.4, 0.0),  # good and already likelier: earns no more
        (0.5, 2.0, -1.0, -1.0),  # good and less likely than it was: pulled back
        (1.5, -2.0, 3.0, 3.0),  # bad and likelier than it was: pulled back
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, loss, slope):
    old = torch.tensor([-1.0], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_(True)
    value = policy_loss(new, old, torch.tensor([advantage], dtype=torch.float64), 0.2)
    assert value.item() == pytest.approx(loss)
    assert torch.autograd.grad(value.sum(), new)[0].item() == pytest.approx(slope)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.05, 0.5))
def test_the_clipped_surrogate_is_the_pessimistic_one(logratio, advantage, clip):
    new, old, a = (torch.tensor([x], dtype=torch.float64) for x in (logratio, 0.0, advantage))
    loss = policy_loss(new, old, a, clip).item()
    plain = -math.exp(logratio) * advantage
    clipped = -min(max(math.exp(logratio), 1 - clip), 1 + clip) * advantage
    assert loss == pytest.approx(max(plain, clipped))
    assert loss >= plain - 1e-12


def test_at_the_old_policy_the_gradient_is_that_of_the_policy_gradient():
    old, advantages = randn(0, 5), randn(1, 5)
    new = old.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(policy_loss(new, old, advantages, 0.2).sum(), new)
    torch.testing.assert_close(gradient, -advantages)


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "slope"),
    [
        (1.0, 0.0, 3.0, 0.0, 2.0, -2.0),  # no clip: ½ (V - G)²
        (0.1, 0.0, 3.0, 0.2, 4.205, -2.9),  # inside the clip
        (1.0, 0.0, 3.0, 0.2, 3.92, 0.0),  # further than the clip towards the target: ½ (0.2 - 3)², content
        (-1.0, 0.0, 3.0, 0.2, 8.0, -4.0),  # moved away: the plain error is larger, and pulls back
        (4.0, 3.9, 0.0, 0.2, 8.0, 4.0),  # the clip is centred on the old value, not on 0
        (4.0, 5.0, 0.0, 0.2, 11.52, 0.0),
    ],
)
def test_the_value_loss_by_hand(value, old, target, clip, loss, slope):
    new = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    others = (torch.tensor([x], dtype=torch.float64) for x in (old, target))
    got = value_loss(new, *others, clip)
    assert got.item() == pytest.approx(loss)
    assert torch.autograd.grad(got.sum(), new)[0].item() == pytest.approx(slope)


def test_the_kl_controller():
    assert adapt_kl_coef(0.1, 6.0, 6.0, 64, 2000) == 0.1
    assert adapt_kl_coef(0.1, 6.6, 6.0, 64, 2000) == pytest.approx(0.1 * (1 + 0.1 * 64 / 2000))
    assert adapt_kl_coef(0.1, 5.4, 6.0, 64, 2000) == pytest.approx(0.1 * (1 - 0.1 * 64 / 2000))
    for kl in (8.0, 100.0, math.inf):  # never more than a fifth
        assert adapt_kl_coef(0.1, kl, 6.0, 64, 2000) == pytest.approx(0.1 * (1 + 0.2 * 64 / 2000))
    for kl in (4.0, 0.0, -1.0):
        assert adapt_kl_coef(0.1, kl, 6.0, 64, 2000) == pytest.approx(0.1 * (1 - 0.2 * 64 / 2000))


def test_explained_variance():
    mask = lengths_mask([4, 3, 2])
    returns = randn(0, *mask.shape)
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(returns + 5.0, returns, mask) == pytest.approx(1.0)  # a constant is no variance
    assert explained_variance(torch.full_like(returns, 0.3), returns, mask) == pytest.approx(0.0, abs=1e-9)
    assert explained_variance(returns / 2, returns, mask) == pytest.approx(0.75)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)))


# --- scores -----------------------------------------------------------------------------------------------------------

FRESH = {"score_count": 0.0, "score_mean": 0.0, "score_m2": 0.0}


@settings(max_examples=30)
@given(st.lists(st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=5), min_size=1, max_size=6))
def test_normalised_scores_use_all_scores_so_far(rollouts):
    state = dict(FRESH)
    seen = []
    for scores in rollouts:
        shaped = shape_scores(torch.tensor(scores), torch.zeros(len(scores), dtype=torch.bool), state, normalise=True)
        seen += scores
        assert state["score_count"] == len(seen)
        assert state["score_mean"] == pytest.approx(np.mean(seen), abs=1e-4)
        assert state["score_m2"] / len(seen) == pytest.approx(np.var(seen), abs=1e-3)
        if np.std(seen) > 0.1:
            expected = (np.array(scores) - np.mean(seen)) / np.std(seen)
            assert shaped.tolist() == pytest.approx(expected.tolist(), abs=1e-2)


def test_scores_are_clipped_and_the_unfinished_pay():
    scores, truncated = torch.tensor([5.0, -5.0, 0.5, 0.5]), torch.tensor([True, False, True, False])
    state = dict(FRESH)
    plain = shape_scores(scores, truncated, state, missing_eot_penalty=2.0)
    assert plain.tolist() == [3.0, -5.0, -1.5, 0.5]
    assert state == FRESH  # nothing is counted unless asked
    clipped = shape_scores(scores, truncated, state, clip=1.0, missing_eot_penalty=2.0)
    assert clipped.tolist() == [-1.0, -1.0, -1.5, 0.5]  # the penalty is not clipped away
    assert shape_scores(scores, truncated, state).tolist() == scores.tolist()


# --- rollout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_a_rollout_is_laid_out_as_it_was_drawn(tiny, tiny_tokenizer, temperature):
    policy, eot = tiny(), tiny_tokenizer.eot
    prompts, limits = PROMPTS * 4, [3, 8, 8, 5] * 4
    drawn = rollout(policy, prompts, limits, eot, temperature, 0)
    assert drawn.truncated.any() and not drawn.truncated.all()
    assert len(set(drawn.mask.sum(-1).tolist())) > 3
    retokenised = 0
    for row, (prompt, limit) in enumerate(zip(prompts, limits)):
        response = drawn.responses[row][drawn.mask[row]].tolist()
        n = len(response)
        assert drawn.mask[row].tolist() == [t < n for t in range(drawn.mask.shape[1])]
        assert drawn.tokens[row, : len(prompt) + n].tolist() == prompt + response
        where = drawn.counted[row].nonzero().flatten().tolist()
        assert where == list(range(len(prompt), len(prompt) + n))
        assert (eot in response) == (response[-1] == eot) == (not drawn.truncated[row].item())
        assert n == limit or not drawn.truncated[row]
        retokenised += tiny_tokenizer.encode(tiny_tokenizer.decode(response)) != [t for t in response if t != eot]
        with torch.no_grad():
            logits = policy.logits(policy(torch.tensor([prompt + response])))[0] / temperature
        logp = torch.log_softmax(logits, -1)
        expected = [logp[len(prompt) + t - 1, response[t]].item() for t in range(n)]
        assert drawn.old_logprobs[row, :n].tolist() == pytest.approx(expected, abs=1e-4)
        assert not drawn.old_logprobs[row, n:].any()
    assert retokenised > 8  # text would have lost what was drawn


EVERYTHING = torch.arange(4)  # the rows of a rollout of PROMPTS


def test_a_shared_trunk_gives_what_two_networks_give(tiny, tiny_tokenizer):
    policy, ref = tiny(), tiny(3)
    shared, apart = shared_critic(policy), separate_critic(policy)
    drawn = rollout(policy, PROMPTS, [6] * 4, tiny_tokenizer.eot, 1.0, 0)
    for reference in (ref, None):
        one, two = (ask(policy, critic, reference, drawn, EVERYTHING, 0.8) for critic in (shared, apart))
        for a, b in zip(one, two):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    assert one.values.shape == drawn.mask.shape


def test_values_are_read_before_the_token_is_drawn(tiny, tiny_tokenizer):
    policy = tiny()
    critic = separate_critic(policy)
    drawn = rollout(policy, PROMPTS, [6] * 4, tiny_tokenizer.eot, 1.0, 0)
    values = ask(policy, critic, None, drawn, EVERYTHING, 1.0).values[drawn.mask].tolist()
    expected = [
        critic(tokens[None, :t])[0, -1].item()
        for tokens, counted in zip(drawn.tokens, drawn.counted)
        for t in counted.nonzero().flatten().tolist()
    ]
    assert values == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_what_is_asked_of_rows_is_what_is_asked_of_all_of_them(tiny, tiny_tokenizer, shared):
    policy, ref = tiny(), tiny(3)
    critic = (shared_critic if shared else separate_critic)(policy)
    drawn = rollout(policy, PROMPTS, [3, 8, 8, 5], tiny_tokenizer.eot, 0.9, 0)
    assert not drawn.mask.all()
    whole = ask_all(policy, critic, ref, drawn, 0.9, 0)
    rows = torch.tensor([2, 0])
    for table, pieces, some in zip(
        whole, ask_all(policy, critic, ref, drawn, 0.9, 3), ask(policy, critic, ref, drawn, rows, 0.9)
    ):
        torch.testing.assert_close(pieces, table)
        torch.testing.assert_close(some.detach(), table[rows])
        assert table.shape == drawn.mask.shape
        assert not table[~drawn.mask].any() and not some[~drawn.mask[rows]].any()  # 0 past the end
        assert table[drawn.mask].abs().min() > 0
    torch.testing.assert_close(whole.logprobs, drawn.old_logprobs, rtol=0, atol=1e-4)


def outputs(drift: float) -> Outputs:
    zero = torch.zeros(1, 1)
    return Outputs(zero + drift, zero, zero, zero, zero)


def test_the_first_ratio_must_be_one(tiny, tiny_tokenizer, capsys):
    policy = tiny()
    drawn = rollout(policy, PROMPTS[:1], [1], tiny_tokenizer.eot, 1.0, 0)
    drawn = drawn._replace(old_logprobs=torch.zeros(1, 1))
    check_ratio(outputs(5e-4), drawn, policy)
    assert "first ratio" in capsys.readouterr().out
    for drift in (2e-3, math.inf, math.nan):
        with pytest.raises(RuntimeError, match="do not agree on the policy"):
            check_ratio(outputs(drift), drawn, policy)
    policy.run_with(dtype="bf16")
    check_ratio(outputs(0.2), drawn, policy)
    with pytest.raises(RuntimeError, match="do not agree on the policy"):
        check_ratio(outputs(0.3), drawn, policy)


# --- one step by hand -------------------------------------------------------------------------------------------------

ONE = PPOConfig(
    steps=1, batch_size=8, responses_per_prompt=2, epochs=1, minibatches=1, response_tokens="2:7", temperature=0.9,
    lr=1.0, critic_lr=1.0, warmup_steps=0, max_grad_norm=1e6, kl_coef=0.3, gamma=0.97, lam=0.9, value_coef=0.7,
    entropy_coef=0.05, missing_eot_penalty=0.5,
)  # fmt: skip


def train_tiny(folder, policy, ref, critic, tokenizer, config, *, reward=None, seed=3, gold=None, **kwargs):
    def prompts_at(step):
        chosen = [PROMPTS[(step + i) % 4] for i in range(config.batch_size)]
        return chosen[: config.batch_size // config.responses_per_prompt]

    run = run_in(folder, config.steps, "train_ppo.py", **kwargs)
    networks = Networks(policy, ref, critic)
    watch = Watch(networks, tokenizer, config, run, gold)
    return train(networks, reward or Share(), prompts_at, tokenizer, config, run, seed, watch)


@pytest.fixture
def plain_descent(monkeypatch):
    """Plain gradient descent, so that a step is its gradient; and the rollouts that were drawn, to look at."""

    monkeypatch.setattr(ppo, "adamw", descent)
    drawn = []

    def recorded(*args):
        drawn.append(rollout(*args))
        return drawn[-1]

    monkeypatch.setattr(ppo, "rollout", recorded)
    return drawn


def by_hand(policy, ref, critic, episodes, config):
    """The loss of the first step and its metrics, response by response and token by token."""
    tokens_of, per_token, scores = [], [], []
    for tokens, counted in zip(episodes.tokens, episodes.counted):
        where = counted.nonzero().flatten().tolist()
        first, n = where[0], len(where)
        row = tokens[: first + n]
        logp, logq = (
            torch.log_softmax(m.logits(m(row[None]))[0, first - 1 : -1] / config.temperature, -1) for m in (policy, ref)
        )
        values = critic(row[None])[0, first - 1 : -1]
        drawn = row[first:]
        tokens_of.append(drawn.tolist())
        scores.append(float((drawn < 100).double().mean()))
        per_token.append(
            {
                "logp": logp[range(n), drawn],
                "logq": logq[range(n), drawn].detach(),
                "kl": (logp.exp() * (logp - logq.detach())).sum(-1),
                "entropy": -(logp.exp() * logp).sum(-1),
                "value": values,
            }
        )

    def estimate(row):
        logratio = row["logp"] - row["logq"]
        k3 = (-logratio).exp() - 1 + logratio
        return {"k1": logratio, "k2": logratio**2 / 2, "k3": k3, "exact": row["kl"]}[config.kl_estimator]

    advantages, returns = [], []
    for row, score, truncated in zip(per_token, scores, episodes.truncated.tolist()):
        rewards = [-config.kl_coef * x if config.kl_in != "loss" else 0.0 for x in estimate(row).tolist()]
        rewards[-1] += score - config.missing_eot_penalty * truncated
        slow = slow_gae(rewards, row["value"].tolist(), config.gamma, config.lam)
        advantages += slow
        returns += [a + v for a, v in zip(slow, row["value"].tolist())]
    n = len(advantages)
    advantages = torch.tensor(advantages)
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    together = {name: torch.cat([row[name] for row in per_token]) for name in per_token[0]}
    ratio = (together["logp"] - together["logp"].detach()).exp()
    loss = (
        -(ratio * advantages).sum() + config.value_coef * 0.5 * ((together["value"] - torch.tensor(returns)) ** 2).sum()
    )
    loss = loss - config.entropy_coef * together["entropy"].sum()
    if config.kl_in != "reward":
        loss = loss + config.kl_coef * sum(estimate(row).sum() for row in per_token)
    k1 = torch.stack([(row["logp"] - row["logq"]).sum() for row in per_token])
    k3 = torch.stack([((row["logq"] - row["logp"]).exp() - 1 + row["logp"] - row["logq"]).sum() for row in per_token])
    exact = torch.stack([row["kl"].sum() for row in per_token])
    returns = torch.tensor(returns)
    metrics = {
        "reward": float(np.mean(scores)),
        "reward_std": float(np.std(scores)),
        "kl_k1": k1.mean().item(),
        "kl_k1_se": k1.std().item() / math.sqrt(len(k1)),
        "kl_k3": k3.mean().item(),
        "kl_exact": exact.mean().item(),
        "objective": float(np.mean(scores)) - config.kl_coef * exact.mean().item(),
        "entropy": together["entropy"].mean().item(),
        "length": n / len(scores),
        "eot_rate": sum(row[-1] == policy.config.vocab_size - 1 for row in tokens_of) / len(scores),
        "explained_variance": 1 - ((returns - together["value"]).var() / returns.var()).item(),
        "advantage_std": 1.0,
        "policy_loss": -(advantages.mean()).item(),
        "value_loss": 0.5 * ((together["value"] - returns) ** 2).mean().item(),
        "clip_fraction": 0.0,
        "ratio_max": 1.0,
        "old_kl": 0.0,
        "kl_coef": config.kl_coef,
        "updates": 1,
        "lr": config.lr,
    }
    return loss / n, metrics


@pytest.mark.parametrize(
    ("kl_in", "estimator"),
    [
        *(("reward", estimator) for estimator in ("k1", "k2", "k3")),
        *(("loss", estimator) for estimator in ("k2", "k3", "exact")),
        *(("both", estimator) for estimator in ("k1", "k2", "k3", "exact")),
    ],
)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_one_step_by_hand(tiny, tiny_tokenizer, tmp_path, plain_descent, kl_in, estimator, shared):
    make = shared_critic if shared else separate_critic
    config = dataclasses.replace(ONE, kl_in=kl_in, kl_estimator=estimator, critic="shared" if shared else "separate")
    policy, ref = tiny(0), clone(tiny(3))
    critic = make(policy)
    metrics = train_tiny(tmp_path / "run", policy, ref, critic, tiny_tokenizer, config)
    (episodes,) = plain_descent
    assert 0 < episodes.truncated.sum() < 8

    own_policy = tiny(0)
    own_critic = make(own_policy)
    loss, expected = by_hand(own_policy, ref, own_critic, episodes, config)
    loss.backward()
    for trained, own in ((policy, own_policy), (critic, own_critic)):
        for (name, after), before in zip(trained.named_parameters(), own.parameters()):
            torch.testing.assert_close(
                before - after, before.grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert metrics["ratio_drift"] < 1e-4
    assert metrics["rollout_seconds"] > 0 and metrics["update_seconds"] > 0


def test_without_whitening_advantages_are_as_they_are(tiny, tiny_tokenizer, tmp_path):
    deviations = []
    for whiten_them in (True, False):
        config = dataclasses.replace(ONE, whiten=whiten_them, lr=1e-3, critic_lr=1e-3)
        policy = tiny()
        out = tmp_path / str(whiten_them)
        metrics = train_tiny(out, policy, clone(tiny(3)), separate_critic(policy), tiny_tokenizer, config)
        deviations.append(metrics["advantage_std"])
    assert deviations[0] == pytest.approx(1.0, abs=1e-4)
    assert abs(deviations[1] - 1.0) > 0.05


def test_the_reward_reads_what_was_drawn(tiny, tiny_tokenizer, tmp_path, plain_descent):
    policy, reward, gold = tiny(), Share(), Share()
    metrics = train_tiny(
        tmp_path / "run", policy, clone(policy), separate_critic(policy), tiny_tokenizer, ONE, reward=reward, gold=gold
    )
    (episodes,) = plain_descent
    ((prompts, responses, texts),) = reward.asked
    assert [prompt.tokens for prompt in prompts] == [PROMPTS[i // 2] for i in range(8)]  # two responses a prompt
    for row, (prompt, response, text) in enumerate(zip(prompts, responses, texts)):
        assert response.tokens == episodes.responses[row][episodes.mask[row]].tolist()
        assert prompt == tiny_tokenizer.decode(prompt.tokens)
        assert response == tiny_tokenizer.decode(response.tokens)
        assert text == prompt + response
    assert any(tiny_tokenizer.encode(r) != [t for t in r.tokens if t != tiny_tokenizer.eot] for r in responses)
    assert metrics["gold"] == metrics["reward"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    for sample in samples:
        i = responses.index(sample["response"])
        assert sample["prompt"] == prompts[i]
        assert sample["reward"] == pytest.approx(sum(t < 100 for t in responses[i].tokens) / len(responses[i].tokens))


def test_response_limits_are_drawn_from_their_range(tiny, tiny_tokenizer, tmp_path, plain_descent):
    config = dataclasses.replace(ONE, batch_size=64, response_tokens="2:5")
    policy = tiny(ends=0.0)
    train_tiny(tmp_path / "run", policy, clone(policy), separate_critic(policy), tiny_tokenizer, config)
    lengths = plain_descent[0].mask.sum(-1)[plain_descent[0].truncated]
    assert set(lengths.tolist()) == {2, 3, 4, 5}
    policy = tiny(ends=0.0)
    config = dataclasses.replace(config, response_tokens="4")
    train_tiny(tmp_path / "same", policy, clone(policy), separate_critic(policy), tiny_tokenizer, config)
    assert set(plain_descent[1].mask.sum(-1)[plain_descent[1].truncated].tolist()) == {4}


def test_log_probs_that_disagree_with_the_sampling_stop_the_run(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    policy = tiny()
    before = weights(policy)

    def shifted(*args):
        drawn = rollout(*args)
        return drawn._replace(old_logprobs=drawn.old_logprobs + 0.01 * drawn.mask)

    monkeypatch.setattr(ppo, "rollout", shifted)
    with pytest.raises(RuntimeError, match=r"differ from those the tokens were sampled with by 1\.\d+e-02 nats"):
        train_tiny(tmp_path / "run", policy, clone(policy), separate_critic(policy), tiny_tokenizer, ONE)
    assert torch.equal(weights(policy), before)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def moved(tiny, tiny_tokenizer):
    """A rollout, what is known of it, and the losses of some of its rows after both networks moved."""
    policy, ref = tiny(), clone(tiny(3))
    critic = separate_critic(policy)
    episodes = rollout(policy, PROMPTS * 2, [3, 7, 7, 5] * 2, tiny_tokenizer.eot, ONE.temperature, 0)
    networks = Networks(policy, ref, critic)
    old = ask_all(*networks[::2], ref, episodes, ONE.temperature, 0)
    experience = estimate_advantages(old, episodes, torch.linspace(-1, 1, 8), 0.3, ONE)
    with torch.no_grad():
        for parameter in (*policy.parameters(), *critic.parameters()):
            parameter.mul_(1.1)
    rows = torch.tensor([5, 0, 2])
    return networks, episodes, experience, rows, token_losses(networks, episodes, experience, rows, 0.3, ONE)


def test_losses_of_networks_that_moved_are_against_the_figures_of_the_rollout(moved):
    networks, episodes, experience, rows, terms = moved
    counts = episodes.mask[rows]
    old, advantages, old_values, returns = (
        table[rows][counts]
        for table in (episodes.old_logprobs, experience.advantages, experience.old.values, experience.returns)
    )
    now = ask(networks.policy, networks.critic, None, episodes, rows, ONE.temperature)
    logprobs_now, values, entropy = now.logprobs[counts], now.values[counts], now.entropy[counts]
    ratio, step = (logprobs_now - old).exp(), values - old_values
    assert 0 < ((ratio - 1).abs() > ONE.clip).sum() < len(ratio)
    assert 0 < (step.abs() > ONE.value_clip).sum() < len(step)
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    torch.testing.assert_close(terms.policy[counts], expected, rtol=1e-4, atol=1e-5)
    errors = torch.stack([values - returns, old_values + step.clamp(-0.2, 0.2) - returns])
    value = 0.5 * errors.square().amax(0)
    torch.testing.assert_close(terms.value[counts], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.logratio[counts], ratio.log(), rtol=1e-4, atol=1e-5)
    whole = expected + ONE.value_coef * value - ONE.entropy_coef * entropy
    torch.testing.assert_close(terms.total[counts], whole, rtol=1e-4, atol=1e-5)
    assert not any(term[~counts].any() for term in terms)


@pytest.mark.parametrize("kl_in", ["reward", "loss", "both"])
def test_the_kl_stands_in_the_loss_where_it_is_paid_for_there(moved, kl_in):
    networks, episodes, experience, rows, terms = moved
    config = dataclasses.replace(ONE, kl_in=kl_in, kl_estimator="k2")
    got = token_losses(networks, episodes, experience, rows, 0.2, config).total
    now = ask(*networks[::2], networks.ref, episodes, rows, ONE.temperature)
    paid = 0.5 * (now.logprobs - now.ref_logprobs).square() if kl_in != "reward" else 0.0
    assert kl_in == "reward" or paid.max() > 0.1
    torch.testing.assert_close(got, terms.total + 0.2 * paid)


def test_no_loss_reaches_the_other_network(moved):
    (policy, _, critic), *_, terms = moved
    for loss, own, other in ((terms.policy, policy, critic), (terms.value, critic, policy)):
        gradients = torch.autograd.grad(loss.sum(), [*own.parameters()], retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        strange = torch.autograd.grad(loss.sum(), [*other.parameters()], retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in strange)


# --- accumulation, metrics, options -----------------------------------------------------------------------------------

FEW = PPOConfig(
    steps=5, batch_size=8, epochs=2, minibatches=2, response_tokens="3:6", lr=5e-3, critic_lr=5e-3, kl_coef=0.1,
    sample_every=2,
)  # fmt: skip


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_microbatches_give_the_gradient_of_the_minibatch(tiny, tiny_tokenizer, tmp_path, plain_descent, size, shared):
    make, after = shared_critic if shared else separate_critic, []
    options = {"steps": 1, "lr": 0.05, "critic_lr": 0.05, "warmup_steps": 0, "entropy_coef": 0.1, "kl_in": "both"}
    for microbatch_size in (0, size):
        config = dataclasses.replace(FEW, **options, microbatch_size=microbatch_size)
        policy = tiny()
        critic = make(policy)
        before = torch.cat([weights(policy), weights(critic)])
        out = tmp_path / str(microbatch_size)
        metrics = train_tiny(out, policy, clone(tiny(3)), critic, tiny_tokenizer, config)
        after.append((torch.cat([weights(policy), weights(critic)]), metrics))
    assert (after[0][0] - before).abs().max() > 1e-2
    torch.testing.assert_close(after[1][0], after[0][0], rtol=0, atol=1e-5)
    seconds = {"rollout_seconds": 0, "update_seconds": 0, "ratio_drift": 0}
    assert (after[1][1] | seconds) == pytest.approx(after[0][1] | seconds, abs=1e-4)


def test_old_figures_stay_those_of_the_rollout_while_the_networks_move(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    seen = {"policy_loss": [], "value_loss": []}
    for name, original in (("policy_loss", policy_loss), ("value_loss", value_loss)):

        def spy(new, old, target, clip, name=name, original=original):
            seen[name].append([x.detach().flatten().sort().values for x in (new, old, target)])
            return original(new, old, target, clip)

        monkeypatch.setattr(losses, name, spy)
    policy = tiny()
    config = dataclasses.replace(FEW, steps=1, epochs=3, minibatches=1, warmup_steps=0)
    train_tiny(tmp_path / "run", policy, clone(policy), separate_critic(policy), tiny_tokenizer, config)
    for calls in seen.values():
        assert len(calls) == 3
        (first, old, target), *later = calls
        torch.testing.assert_close(first, old, rtol=0, atol=1e-5)  # nothing has moved yet
        for new, still_old, still_target in later:
            assert torch.equal(still_old, old) and torch.equal(still_target, target)
            assert (new - old).abs().max() > 1e-3


def test_every_metric_a_practitioner_looks_for_is_there(tiny, tiny_tokenizer, tmp_path):
    policy = tiny()
    config = dataclasses.replace(FEW, epochs=3)
    last = train_tiny(
        tmp_path / "run", policy, clone(policy), separate_critic(policy), tiny_tokenizer, config, gold=Share()
    )
    logged = rows(tmp_path / "run")
    names = [
        "reward",
        "reward_std",
        "gold",
        "kl_k1",
        "kl_k1_se",
        "kl_k3",
        "kl_exact",
        "objective",
        "entropy",
        "length",
        "eot_rate",
        "explained_variance",
        "advantage_std",
        "policy_loss",
        "value_loss",
        "clip_fraction",
        "ratio_max",
        "old_kl",
        "grad_norm",
        "updates",
        "ratio_drift",
        "kl_coef",
        "lr",
        "rollout_seconds",
        "update_seconds",
    ]
    assert [row["step"] for row in logged] == list(range(5))
    for row in logged:
        assert [name for name in names if row.get(name) is None] == []  # null is what a number that is none becomes
        assert row["updates"] == 6 and row["ratio_max"] > 1.0 and 0 <= row["clip_fraction"] <= 1
        assert 0 < row["eot_rate"] < 1 and 1 <= row["length"] <= 6 and row["old_kl"] > 0
    assert logged[0]["kl_exact"] == pytest.approx(0.0, abs=1e-5) and logged[-1]["kl_exact"] > 1e-3
    assert [row["lr"] for row in logged] == pytest.approx([cosine_lr(s, 5, 5e-3, 2) for s in range(5)])
    assert last["reward"] == logged[-1]["reward"]
    sampled = [json.loads(line)["step"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert sampled == [1, 1, 1, 3, 3, 3, 4, 4, 4]  # every second step, and the last


def test_padding_changes_no_logged_mean(tiny, tiny_tokenizer, tmp_path, plain_descent):
    # The same responses beside one that is much longer, whose tokens do not count, give the same metrics.
    config = dataclasses.replace(ONE, lr=1e-3, critic_lr=1e-3)
    policy, logged = tiny(), []
    for columns in (0, 9):

        def padded(*args, columns=columns):
            drawn = rollout(*args)
            pad = torch.nn.functional.pad
            return drawn._replace(
                tokens=pad(drawn.tokens, (0, columns), value=4),
                counted=pad(drawn.counted, (0, columns)),
                responses=pad(drawn.responses, (0, columns), value=4),
                mask=pad(drawn.mask, (0, columns)),
                old_logprobs=pad(drawn.old_logprobs, (0, columns)),
            )

        plain_descent.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo, "rollout", padded)
            fresh = tiny()
            out = tmp_path / str(columns)
            logged.append(train_tiny(out, fresh, clone(tiny(3)), separate_critic(policy), tiny_tokenizer, config))
    seconds = {"rollout_seconds": 0, "update_seconds": 0, "ratio_drift": 0}
    assert (logged[1] | seconds) == pytest.approx(logged[0] | seconds, abs=1e-4)


@pytest.mark.parametrize("kl_in", ["reward", "both"])
def test_two_threads_learn_what_one_learns(tiny, tiny_tokenizer, tmp_path, plain_descent, kl_in, monkeypatch):
    """Policy and critic side by side, in several microbatches, against one after the other."""
    config = dataclasses.replace(ONE, epochs=2, minibatches=2, microbatch_size=2, lr=0.1, critic_lr=0.1, kl_in=kl_in)
    found, calls, both = [], [], threads._both
    monkeypatch.setattr(threads, "_both", lambda f, g: calls.append(1) or both(f, g))
    for count in (1, 2):
        policy = tiny()
        critic = separate_critic(policy)
        calls.clear()
        plain_descent.clear()
        torch.set_num_threads(count)
        try:
            metrics = train_tiny(tmp_path / str(count), policy, clone(tiny(3)), critic, tiny_tokenizer, config)
        finally:
            after = torch.get_num_threads()
            torch.set_num_threads(1)
        assert after == count
        # Forward before the updates, and forward and backward of each microbatch in four steps.
        assert len(calls) == (0 if count == 1 else 4 + 4 * 2 * 2)
        found.append((metrics, weights(policy), weights(critic)))
    seconds = {"rollout_seconds": 0, "update_seconds": 0, "ratio_drift": 0}
    (one, *networks), (two, *others) = found
    assert (two | seconds) == pytest.approx(one | seconds, abs=1e-4)
    for network, other in zip(networks, others):
        torch.testing.assert_close(other, network, rtol=0, atol=2e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_a_critic_that_fails_on_its_thread_ends_the_run(tiny, tiny_tokenizer, tmp_path, monkeypatch, grad):
    def broken(self, tokens, mask=None, **layout):
        if torch.is_grad_enabled() == grad:
            raise ValueError("no values today")
        return ScalarModel.head(self, self.trunk(tokens, mask, **layout))

    policy = tiny()
    critic = separate_critic(policy)
    monkeypatch.setattr(ScalarModel, "forward", broken)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="no values today"):
            train_tiny(tmp_path / "run", policy, clone(policy), critic, tiny_tokenizer, ONE)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


LEARN = PPOConfig(
    steps=20, batch_size=32, epochs=2, minibatches=2, response_tokens="6", lr=1e-2, critic_lr=1e-2, kl_coef=0.02,
    missing_eot_penalty=0.0,
)  # fmt: skip


def learn(folder, tiny, tokenizer, **options):
    config = dataclasses.replace(LEARN, **options)
    policy = tiny()
    critic = shared_critic(policy) if config.critic == "shared" else separate_critic(policy)
    return train_tiny(folder, policy, clone(policy), critic, tokenizer, config), rows(folder)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_training_raises_the_reward(tiny, tiny_tokenizer, tmp_path, critic):
    metrics, logged = learn(tmp_path / "run", tiny, tiny_tokenizer, critic=critic)
    assert logged[0]["reward"] < 0.5
    assert np.mean([row["reward"] for row in logged[-5:]]) > logged[0]["reward"] + 0.3
    assert metrics["kl_exact"] > 1.0


def test_a_high_price_keeps_the_policy_at_the_reference(tiny, tiny_tokenizer, tmp_path):
    free, _ = learn(tmp_path / "free", tiny, tiny_tokenizer, kl_coef=0.0, steps=12)
    assert free["kl_exact"] > 1.0
    for kl_in, estimator in (("reward", "k1"), ("loss", "k2"), ("both", "exact")):
        options = {"kl_coef": 20.0, "steps": 12, "kl_in": kl_in, "kl_estimator": estimator}
        held, _ = learn(tmp_path / f"{kl_in} {estimator}", tiny, tiny_tokenizer, **options)
        assert held["kl_exact"] < 0.15 * free["kl_exact"]


def test_an_adaptive_price_follows_the_kl(tiny, tiny_tokenizer, tmp_path):
    for target, sign in ((1e-3, 1), (100.0, -1)):
        out = tmp_path / str(target)
        _, logged = learn(out, tiny, tiny_tokenizer, kl_target=target, kl_horizon=64, steps=6, kl_coef=0.1)
        assert logged[0]["kl_coef"] == 0.1
        for row, following in itertools.pairwise(logged):
            expected = adapt_kl_coef(row["kl_coef"], row["kl_exact"], target, 32, 64)
            assert following["kl_coef"] == pytest.approx(expected)
        assert sign * (logged[-1]["kl_coef"] - 0.1) > 0.02


def test_updates_end_when_the_policy_has_moved_far(tiny, tiny_tokenizer, tmp_path):
    options = {"steps": 3, "epochs": 4, "minibatches": 2, "warmup_steps": 0, "lr": 3e-2}
    _, free = learn(tmp_path / "free", tiny, tiny_tokenizer, **options)
    assert [row["updates"] for row in free] == [8, 8, 8]
    _, stopped = learn(tmp_path / "stopped", tiny, tiny_tokenizer, **options, stop_kl=1e-3)
    assert all(1 <= row["updates"] < 7 for row in stopped)
    _, never = learn(tmp_path / "never", tiny, tiny_tokenizer, **options, stop_kl=1e6)
    assert [row["updates"] for row in never] == [8, 8, 8]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_step_that_would_go_too_far_is_not_taken(tiny, tiny_tokenizer, tmp_path, monkeypatch, critic):
    moved, kls = [], []

    def spied_adamw(*args):
        optimizer = adamw(*args)
        optimizer.register_step_post_hook(lambda *_: moved.append(len(kls)))
        return optimizer

    def spied_loss(new, old, *rest):
        kl = torch.expm1(new - old) - (new - old)
        kls.append((kl.sum() / (new != 0).sum()).item())  # 0 past the end
        return policy_loss(new, old, *rest)

    monkeypatch.setattr(ppo, "adamw", spied_adamw)
    monkeypatch.setattr(losses, "policy_loss", spied_loss)
    options = {"steps": 1, "epochs": 4, "minibatches": 2, "warmup_steps": 0, "lr": 3e-2, "critic": critic}
    metrics, _ = learn(tmp_path / "run", tiny, tiny_tokenizer, **options, stop_kl=1e-3)
    assert 1 < len(kls) < 8
    assert max(kls[:-1]) <= 1e-3 < kls[-1]
    assert moved == list(range(1, len(kls)))  # neither network moves after the last minibatch
    assert metrics["updates"] == len(kls) - 1
    assert metrics["old_kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)  # which counts in the means


def test_bf16_runs_within_its_noise_floor(tiny, tiny_tokenizer, tmp_path):
    metrics = {}
    for dtype in ("fp32", "bf16"):
        policy = tiny()
        policy.run_with(dtype=dtype)
        critic = separate_critic(policy)  # whose trunk is a copy, with the same precision
        metrics[dtype] = train_tiny(tmp_path / dtype, policy, clone(policy), critic, tiny_tokenizer, FEW)
        assert metrics[dtype]["ratio_drift"] < logprobs.NOISE_FLOOR[dtype]
        assert math.isfinite(metrics[dtype]["kl_exact"])
    # Products really were rounded, in sampling and in training alike.
    assert abs(metrics["bf16"]["entropy"] - metrics["fp32"]["entropy"]) > 1e-5


# --- resuming, mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies_at", [1, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_a_killed_run_resumes_to_the_same_bits(tiny, tiny_tokenizer, tmp_path, shared, dies_at):
    config = dataclasses.replace(FEW, normalise_reward=True, kl_target=0.01, kl_horizon=50)
    ref = clone(tiny())

    def go(folder, seed=0, **kwargs):
        policy = tiny(seed)
        critic = (shared_critic if shared else separate_critic)(policy)
        train_tiny(tmp_path / folder, policy, ref, critic, tiny_tokenizer, config, **kwargs)
        return torch.cat([weights(policy), weights(critic)])

    def deterministic(folder):
        return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows(tmp_path / folder)]

    whole = go("whole")
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(go("again"), whole)
    with pytest.raises(Killed):
        go("killed", dies_at=dies_at)
    resumed = go("killed", seed=0 if dies_at < 2 else 9, resume=True)  # a checkpoint brings its own weights
    assert torch.equal(resumed, whole)
    assert deterministic("killed") == deterministic("whole") == deterministic("again")
    samples = [(tmp_path / folder / "samples.jsonl").read_text() for folder in ("whole", "killed")]
    assert samples[0] == samples[1]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [0.5] * (n - 1) + [math.nan], "returned NaN for response 7"),
        (lambda n: [0.5] * (n - 1), "returned shape (7,), expected (8,)"),
        (lambda n: torch.zeros(n, 1), "returned shape (8, 1), expected (8,)"),
        (lambda n: None, "returned NoneType, expected 8 numbers"),
    ],
    ids=["nan", "short", "column", "none"],
)
def test_a_reward_that_makes_a_mistake_is_named(tiny, tiny_tokenizer, tmp_path, returned, message):
    class Wrong:
        name = "my_rewards:politeness"

        def __call__(self, prompts, responses, texts):
            return returned(len(prompts))

    policy = tiny()
    with pytest.raises(InputError) as caught:
        train_tiny(
            tmp_path / "run", policy, clone(policy), separate_critic(policy), tiny_tokenizer, FEW, reward=Wrong()
        )
    assert str(caught.value).startswith(f"reward function my_rewards:politeness {message}")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_stops(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    policy = tiny()
    critic = separate_critic(policy)
    before = weights(policy), weights(critic)
    monkeypatch.setattr(losses, "value_loss", lambda values, *rest: values * math.nan)
    with pytest.raises(InputError, match=r"value_loss became nan at step 0 of train_ppo\.py"):
        train_tiny(tmp_path / "run", policy, clone(policy), critic, tiny_tokenizer, FEW)
    assert torch.equal(weights(policy), before[0]) and torch.equal(weights(critic), before[1])


def test_a_response_that_does_not_fit_is_refused(tiny, tiny_tokenizer, tmp_path):
    policy = tiny()
    config = dataclasses.replace(FEW, response_tokens="28")
    with pytest.raises(InputError, match="a prompt of 5 tokens and 28 new ones exceed"):
        train_tiny(tmp_path / "run", policy, clone(policy), separate_critic(policy), tiny_tokenizer, config)


@pytest.mark.parametrize(("text", "limits"), [("8", (8, 8)), ("2:8", (2, 8)), ("1:1", (1, 1))])
def test_a_range_of_lengths(text, limits):
    assert parse_range("--response-tokens", text) == limits
    assert PPOConfig(response_tokens=text).response_range == limits


@pytest.mark.parametrize("text", ["", ":", "a", "2:b", "8:2", "0", "0:4", "-1", "2.5", "2:3:4", ":4"])
def test_a_range_that_is_none_is_refused(text):
    for call in (lambda: parse_range("--response-tokens", text), lambda: PPOConfig(response_tokens=text)):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith("--response-tokens must ")
        assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("responses_per_prompt", 0), ("epochs", 0), ("minibatches", 0),
        ("microbatch_size", -1), ("temperature", 0.0), ("temperature", math.inf), ("lr", -1e-3), ("lr", math.nan),
        ("critic_lr", 0.0), ("warmup_steps", -1), ("weight_decay", -0.1), ("max_grad_norm", 0.0), ("clip", 0.0),
        ("value_clip", -0.1), ("value_coef", -1.0), ("entropy_coef", -0.1), ("gamma", 1.5), ("lam", -0.1),
        ("kl_coef", -0.1), ("kl_coef", math.nan), ("kl_target", -1.0), ("kl_horizon", 0), ("reward_clip", -1.0),
        ("missing_eot_penalty", -1.0), ("stop_kl", -0.1), ("sample_every", 0),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(InputError) as caught:
        PPOConfig(**{field: value})
    assert str(caught.value).startswith(f"--{field.replace('_', '-')} must ")
    assert str(caught.value).endswith(f"got {value}")


@pytest.mark.parametrize("options", [{"responses_per_prompt": 3}, {"minibatches": 5}])
def test_a_batch_that_cannot_be_divided_is_refused(options):
    with pytest.raises(InputError, match="--batch-size 16 must be a multiple of --responses-per-prompt"):
        PPOConfig(**{"batch_size": 16, "minibatches": 4, **options})


def test_the_loop_goes_through_the_one_place_where_a_softmax_is_taken(tiny, tiny_tokenizer, monkeypatch):
    policy, calls = tiny(), []
    drawn = rollout(policy, PROMPTS, [6] * 4, tiny_tokenizer.eot, 1.0, 0)
    one_place = gpt_module.linear_token_stats
    monkeypatch.setattr(
        gpt_module, "linear_token_stats", lambda *args, **kw: calls.append(kw) or one_place(*args, **kw)
    )
    policy.run_with("reference")
    ask(policy, separate_critic(policy), clone(policy), drawn, EVERYTHING, 0.7)
    assert [(kw["temperature"], kw["kernel"]) for kw in calls] == [(0.7, "reference")]


def test_a_microbatch_has_16_responses_unless_told_otherwise():
    assert [PPOConfig(microbatch_size=size).at_a_time for size in (None, 0, 5)] == [16, 0, 5]
