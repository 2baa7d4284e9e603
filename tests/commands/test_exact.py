"""exact: the enumerable world by brute force, and what the training loops ship against exact objectives and gradients.

Every expectation is a sum over all responses, in float64, over the functions that the loops themselves call.
"""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.algorithms import dpo, losses, ppo, reward_model, sft
from minirlhf.algorithms.dpo import DPOConfig
from minirlhf.algorithms.logprobs import ask_all
from minirlhf.algorithms.ppo import PPOConfig
from minirlhf.algorithms.rewards import shape_scores
from minirlhf.algorithms.rollout import Rollout, microbatches
from minirlhf.commands import exact
from minirlhf.commands.exact import ExactCritic, World, make_policy, make_scalar, make_world
from minirlhf.data.batches import Batch, Example, collate, examples_of_rankings
from minirlhf.model.generate import generate
from minirlhf.model.gpt import GPT, ScalarModel, clone
from minirlhf.model.sampling import Sampling
from minirlhf.seeds import seeded

TOLERANCE = 1e-8  # of the largest entry of the exact gradient
SEEDS = st.integers(0, 10**6)
SIZES = st.tuples(st.integers(3, 4), st.integers(1, 3), st.integers(1, 3), SEEDS, st.floats(0.1, 3))  # of a world


def policy_of(world: World, seed: int, sure: float = 1.0) -> GPT:
    """A policy in float64; `sure` scales its logits."""
    policy = make_policy(world, seed, width=8).double()
    policy.ln_f.weight.data.fill_(sure)
    return policy


def critic_of(world: World, seed: int) -> ScalarModel:
    return make_scalar(world, seed, width=8, spread=1.0).double()


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(model.parameters(), grads)])


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error, relative to the largest entry; of a gradient that is zero, to a millionth."""
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))


# --- the world by brute force -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("letters", "length", "prompts"), [(3, 1, 1), (3, 4, 3), (4, 3, 2), (6, 2, 3)])
def test_the_list_is_complete(letters, length, prompts):
    world = make_world(letters, length, prompts, seed=1)
    drawable = set()
    for row in itertools.product(range(letters + 1), repeat=length):  # as tokens are drawn: to end-of-text or the limit
        drawable.add(row[: row.index(world.eot) + 1] if world.eot in row else row)
    assert set(world.responses) == drawable and len(world.responses) == len(drawable)
    assert world.truncated.tolist() == [world.eot not in response for response in world.responses]
    assert [len(prompt) for prompt in world.prompts] == list(range(1, prompts + 1))
    assert len({prompt[0] for prompt in world.prompts}) == prompts
    assert world.text(world.prompts[-1]).tokens == world.tokenizer.encode(world.text(world.prompts[-1]))


@pytest.mark.parametrize("sizes", [(2, 2, 1), (7, 2, 1), (3, 0, 1), (3, 5, 1), (3, 2, 0), (3, 2, 4)])
def test_a_world_too_large_to_list_is_refused(sizes):
    with pytest.raises(ValueError, match="3 to 6 letters"):
        make_world(*sizes)


def test_rewards_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rewards must have shape \(3, 13\), got \(3, 12\)"):
        dataclasses.replace(make_world(3, 2, 3), rewards=torch.zeros(3, 12, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_product_over_the_tokens(temperature):
    world = make_world(4, 3, 3, seed=2)
    policy = policy_of(world, 1, sure=2.0)
    logps = exact.log_probs(world, policy, temperature)
    torch.testing.assert_close(logps.exp().sum(-1), torch.ones(3).double())
    for x, prompt in enumerate(world.prompts):
        for k, response in enumerate(world.responses):
            with torch.no_grad():
                logits = policy.logits(policy(torch.tensor([[*prompt, *response]])))[0] / temperature
            table = torch.log_softmax(logits, -1)
            total = sum(table[len(prompt) + t - 1, token] for t, token in enumerate(response))
            assert logps[x, k].item() == pytest.approx(total.item(), abs=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_what_is_drawn_follows_the_list(temperature):
    world = make_world(3, 3, 3, seed=3)
    policy = make_policy(world, 5)
    p = exact.log_probs(world, policy, temperature).detach().double().exp()
    n, place = 4000, {response: k for k, response in enumerate(world.responses)}
    prompts = [list(prompt) for prompt in world.prompts for _ in range(n)]
    drawn = generate(policy, prompts, world.eot, world.length, 7, Sampling(temperature))
    counts = torch.zeros_like(p)
    for row, (tokens, keep, truncated) in enumerate(zip(drawn.responses, drawn.mask, drawn.truncated)):
        k = place[tuple(tokens[keep].tolist())]
        counts[row // n, k] += 1
        assert bool(truncated) == bool(world.truncated[k])
    chi_square = ((counts - n * p).square() / (n * p)).sum()
    freedom = p.numel() - len(p)
    assert abs(float(chi_square) - freedom) < 4 * math.sqrt(2 * freedom)  # a chi-square's mean and deviation


def test_a_listing_is_a_rollout_of_everything():
    world = make_world(3, 3, 3, seed=4)
    policy = policy_of(world, 2)
    episodes = exact.listing(world, policy)
    logps = exact.log_probs(world, policy).detach()
    torch.testing.assert_close(episodes.old_logprobs.sum(-1), logps.flatten())
    torch.testing.assert_close(exact.weights(logps).sum(), torch.ones(()).double())
    for row, (prompt, response) in enumerate(itertools.product(world.prompts, world.responses)):
        n = len(response)
        assert episodes.responses[row][episodes.mask[row]].tolist() == list(response)
        assert episodes.tokens[row, : len(prompt) + n].tolist() == [*prompt, *response]
        assert episodes.counted[row].nonzero().flatten().tolist() == list(range(len(prompt), len(prompt) + n))
        assert bool(episodes.truncated[row]) == (response[-1] != world.eot)


# --- the quantities ---------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(SIZES, SEEDS, st.floats(0.1, 5))
def test_the_optimum_is_one(sizes, seed, beta):
    world = make_world(*sizes)
    ref_logps, logps = (exact.log_probs(world, policy_of(world, seed + i, 2.0)).detach() for i in (0, 1))
    best, log_z = exact.optimum(ref_logps, world.rewards, beta)
    torch.testing.assert_close(best.exp().sum(-1), torch.ones(len(best)).double())
    highest = exact.objective(best, ref_logps, world.rewards, beta)
    torch.testing.assert_close(highest, beta * log_z.mean())  # J(π*) = β log Z
    torch.testing.assert_close(
        exact.regret(logps, ref_logps, world.rewards, beta),
        highest - exact.objective(logps, ref_logps, world.rewards, beta),
    )
    assert exact.regret(logps, ref_logps, world.rewards, beta) > 0
    assert exact.regret(best, ref_logps, world.rewards, beta).abs() < 1e-12
    free = best.clone().requires_grad_(True)  # nothing to gain by any small step from there
    moved = exact.objective(torch.log_softmax(free, -1), ref_logps, world.rewards, beta)
    assert torch.autograd.grad(moved, free)[0].abs().max() < 1e-12


@settings(max_examples=15)
@given(SIZES, SEEDS)
def test_no_policy_has_more_reward_at_its_kl_than_the_frontier(sizes, seed):
    world = make_world(*sizes)
    ref_logps = exact.log_probs(world, policy_of(world, seed)).detach()
    betas = [0.05, 0.2, 0.8, 3.2, 12.8]
    curve = exact.frontier(ref_logps, world.rewards, betas)
    kls, rewards = curve.unbind(-1)
    assert (kls.diff() < 1e-12).all() and (rewards.diff() < 1e-12).all()  # a higher price buys less of both
    other = exact.log_probs(world, policy_of(world, seed + 1, 3.0)).detach()
    for logps in (other, exact.best_of_n(ref_logps, world.rewards, 3)):
        kl, reward = exact.kl(logps, ref_logps).mean(), exact.expected_reward(logps, world.rewards).mean()
        for beta, (best_kl, best_reward) in zip(betas, curve):
            assert reward - beta * kl <= best_reward - beta * best_kl + 1e-12


@settings(max_examples=15)
@given(SIZES, SEEDS, st.floats(0, 1))
def test_state_values_are_what_is_to_come(sizes, seed, gamma):
    world = make_world(*sizes)
    policy = policy_of(world, seed)
    logps = exact.log_probs(world, policy).detach()
    episodes = exact.listing(world, policy)
    rewards = torch.randn(episodes.mask.shape, generator=seeded(seed)).double()
    # The reward of a token may depend on the state and the token only, not on what comes after it.
    table = {}
    for row, (x, response) in enumerate(itertools.product(range(len(world.prompts)), world.responses)):
        for t in range(world.length):
            known = t < len(response)
            rewards[row, t] = table.setdefault((x, response[: t + 1]), rewards[row, t].item()) if known else 0.0
    values = exact.state_values(world, logps, rewards, gamma)
    next_probs = {}
    for row, (x, response) in enumerate(itertools.product(range(len(world.prompts)), world.responses)):
        for t, token in enumerate(response):
            next_probs[x, response[:t], token] = episodes.old_logprobs[row, t].exp().item()

    def value(x, state):  # the definition, state by state
        total = 0.0
        for token in range(world.eot + 1):
            after = (*state, token)
            future = 0.0 if token == world.eot or len(after) == world.length else value(x, after)
            total += next_probs[x, state, token] * (table[x, after] + gamma * future)
        return total

    for row, (x, response) in list(enumerate(itertools.product(range(len(world.prompts)), world.responses)))[::5]:
        for t in range(len(response)):
            assert values[row, t].item() == pytest.approx(value(x, response[:t]), abs=1e-9)
        assert not values[row, len(response) :].any()


# --- best of n --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_by_going_through_every_draw(n, ties):
    world = make_world(3, 2, 2, seed=5)
    rewards = world.rewards.round() if ties else world.rewards
    assert (len(set(rewards[0].tolist())) < len(world.responses)) == ties
    ref_logps = exact.log_probs(world, policy_of(world, 3, 2.0)).detach()
    expected = torch.zeros_like(ref_logps)
    for x, drawn in itertools.product(range(2), itertools.product(range(len(world.responses)), repeat=n)):
        p = ref_logps[x, list(drawn)].sum().exp()
        expected[x, max(drawn, key=lambda k: rewards[x, k].item())] += p  # the first of the best
    torch.testing.assert_close(exact.best_of_n(ref_logps, rewards, n).exp(), expected)


@settings(max_examples=25)
@given(SIZES, SEEDS, st.integers(1, 64))
def test_the_kl_of_best_of_n_stays_under_its_bound(sizes, seed, n):
    world = make_world(*sizes)
    ref_logps = exact.log_probs(world, policy_of(world, seed)).detach()
    logps = exact.best_of_n(ref_logps, world.rewards, n)
    torch.testing.assert_close(logps.exp().sum(-1), torch.ones(len(logps)).double())
    kl = exact.kl(logps, ref_logps)
    assert (kl <= exact.best_of_n_bound(n) + 1e-12).all() and (kl >= -1e-12).all()


def test_the_bound_of_best_of_n_is_reached_where_no_response_has_weight():
    # 3000 equally likely responses, all of different worth, are about as good as infinitely many.
    ref_logps = torch.full((1, 3000), -math.log(3000)).double()
    kl = exact.kl(exact.best_of_n(ref_logps, torch.arange(3000.0).double()[None], 8), ref_logps)
    assert 0.99 * exact.best_of_n_bound(8) < kl.item() < exact.best_of_n_bound(8)


# --- preferences ------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(SIZES)
def test_preferences_are_distributions_and_agree_with_each_other(sizes):
    world = make_world(*sizes)
    pairs = exact.bradley_terry(world.rewards)
    torch.testing.assert_close(pairs + pairs.transpose(1, 2), torch.ones_like(pairs))
    orders = torch.tensor(list(itertools.permutations(range(3))))
    three = exact.plackett_luce(world.rewards[:, :3][:, orders])  # (X, 6)
    torch.testing.assert_close(three.exp().sum(-1), torch.ones(len(three)).double())
    ahead = torch.tensor([order.index(0) < order.index(1) for order in orders.tolist()])
    torch.testing.assert_close((three.exp() * ahead).sum(-1), pairs[:, 0, 1])  # a third one changes no comparison
    torch.testing.assert_close(exact.plackett_luce(world.rewards[:, :2]).exp(), pairs[:, 0, 1])


def test_the_population_of_pairs_is_that_of_two_draws_and_a_choice():
    world = make_world(3, 1, 2, seed=6)
    logps = exact.log_probs(world, policy_of(world, 1)).detach()
    population = exact.pair_population(logps, world.rewards)
    assert population.sum().item() == pytest.approx(1.0)
    assert not population.diagonal(dim1=1, dim2=2).any()
    p, better = logps.exp(), exact.bradley_terry(world.rewards)
    for x in range(2):
        different = 1 - p[x].square().sum()
        for i, j in itertools.permutations(range(len(world.responses)), 2):
            expected = 2 * p[x, i] * p[x, j] / different * better[x, i, j] / 2  # either may be drawn first
            assert population[x, i, j].item() == pytest.approx(expected.item())


def test_rankings_are_drawn_as_plackett_luce_has_it():
    world = make_world(3, 1, 2, seed=7)
    seen = torch.tensor([[True, True, True, False], [True, True, False, True]])
    n = 12000
    drawn = exact.draw_rankings(world, torch.zeros(2, 4).double(), n, seed=1, size=3, seen=seen)
    again = exact.draw_rankings(world, torch.zeros(2, 4).double(), n, seed=1, size=3, seen=seen)
    assert drawn == again
    place = {response: k for k, response in enumerate(world.responses)}
    for x, prompt in enumerate(world.prompts):
        mine = [r for r in drawn if tuple(r.prompt.tokens) == prompt]
        assert len(mine) == n // 2 and all(r.ranks == (1, 2, 3) for r in mine)
        orders = [tuple(place[tuple(text.tokens)] for text in r.responses) for r in mine]
        possible = list(itertools.permutations(seen[x].nonzero().flatten().tolist()))
        p = exact.plackett_luce(world.rewards[x][torch.tensor(possible)]).exp()
        counts = torch.tensor([orders.count(order) for order in possible])
        assert counts.sum() == len(mine)
        assert (((counts - len(mine) * p).square() / (len(mine) * p)).sum()) < 25  # 5 degrees of freedom


# --- PPO --------------------------------------------------------------------------------------------------------------

EXACT = PPOConfig(
    batch_size=8, minibatches=1, kl_coef=0.4, lam=1.0, whiten=False, missing_eot_penalty=0.0, value_clip=0.0
)
FRESH = {"score_count": 0.0, "score_mean": 0.0, "score_m2": 0.0}


def expectation(world: World, episodes: Rollout, term: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Σ_y π_old(y|x) Σ_t of the loss (b, R); the loop divides such a sum by the number of tokens."""
    share = exact.weights(episodes.old_logprobs.sum(-1).view(len(world.prompts), -1))
    return (share[rows, None] * term).sum()


def experienced(world, policy, critic, ref, config, scores=None):
    """The rollout of all responses, and what the loop makes of it before its first update."""
    episodes = exact.listing(world, policy, config.temperature)
    scores = world.rewards.flatten() if scores is None else scores
    shaped = shape_scores(scores, episodes.truncated, dict(FRESH), missing_eot_penalty=config.missing_eot_penalty)
    old = ask_all(policy, critic, ref, episodes, config.temperature, config.at_a_time)
    return episodes, ppo.estimate_advantages(old, episodes, shaped, config.kl_coef, config)


def expected_loss(world, policy, critic, ref, config, scores=None, size=0, old=None, old_critic=None):
    """The loss of the loop's update, expected over the responses of `old` (by default the policy itself).

    `old` and `old_critic` are the networks at the rollout, where the update finds others.
    """
    episodes, experience = experienced(world, old or policy, old_critic or critic, ref, config, scores)
    total = 0.0
    order = torch.randperm(len(episodes.mask), generator=seeded(1))
    for rows in microbatches(episodes.counted, order, size):
        networks = ppo.Networks(policy, ref, critic)
        terms = ppo.token_losses(networks, episodes, experience, rows, config.kl_coef, config)
        total = total + expectation(world, episodes, terms.total, rows)
    return total, experience


def exact_objective(world, policy, ref, config, rewards=None):
    """J of the policy as it is sampled: at the temperature, and less what truncated responses are charged."""
    logps, ref_logps = (exact.log_probs(world, model, config.temperature) for model in (policy, ref))
    rewards = world.rewards if rewards is None else rewards
    rewards = rewards - config.missing_eot_penalty * world.truncated
    return exact.objective(logps, ref_logps.detach(), rewards, config.kl_coef)


@settings(max_examples=20)
@given(SIZES, SEEDS, st.floats(0, 2), st.sampled_from([0.7, 1.0, 1.4]), st.sampled_from([0, 5]))
def test_ppo_with_any_critic_and_lambda_1_has_the_exact_gradient(sizes, seed, penalty, temperature, size):
    world = make_world(*sizes)
    policy, ref, critic = policy_of(world, seed, 2.0), clone(policy_of(world, seed + 1)), critic_of(world, seed)
    config = dataclasses.replace(EXACT, missing_eot_penalty=penalty, temperature=temperature)
    loss, _ = expected_loss(world, policy, critic, ref, config, size=size)
    want = -gradient(exact_objective(world, policy, ref, config), policy)
    assert off(gradient(loss, policy), want) <= TOLERANCE


@settings(max_examples=15)
@given(SIZES, SEEDS, st.floats(0, 1))
def test_ppo_with_the_exact_critic_has_the_exact_gradient_at_any_lambda(sizes, seed, lam):
    world = make_world(*sizes)
    policy, ref = policy_of(world, seed, 2.0), clone(policy_of(world, seed + 1))
    config = dataclasses.replace(EXACT, lam=lam)
    logps = exact.log_probs(world, policy).detach()
    _, experience = expected_loss(world, policy, critic_of(world, seed), ref, config)
    critic = ExactCritic(world, exact.state_values(world, logps, experience.rewards))
    loss, _ = expected_loss(world, policy, critic, ref, config)
    assert off(gradient(loss, policy), -gradient(exact_objective(world, policy, ref, config), policy)) <= TOLERANCE


def test_a_wrong_critic_and_lambda_below_1_bias_the_gradient():
    world = make_world(3, 3, 3, seed=8)
    policy, ref, critic = policy_of(world, 1, 2.0), clone(policy_of(world, 2)), critic_of(world, 3)
    want = -gradient(exact_objective(world, policy, ref, EXACT), policy)
    errors = []
    for lam in (1.0, 0.95, 0.5, 0.0):
        loss, _ = expected_loss(world, policy, critic, ref, dataclasses.replace(EXACT, lam=lam))
        errors.append(off(gradient(loss, policy), want))
    assert errors[0] < TOLERANCE < 1e-2 < errors[1] < errors[2] < errors[3]


@settings(max_examples=15)
@given(SIZES, SEEDS)
def test_whitening_turns_the_gradient_nowhere_and_scales_it_by_a_known_number(sizes, seed):
    world = make_world(*sizes)
    # The mean that is removed is a baseline, the same for every token, and leaves the expectation alone.
    policy, ref, critic = policy_of(world, seed, 2.0), clone(policy_of(world, seed + 1)), critic_of(world, seed)
    _, plain = expected_loss(world, policy, critic, ref, EXACT)
    mask = exact.listing(world, policy).mask
    scale = torch.rsqrt(plain.advantages[mask].var(correction=0) + 1e-8)
    loss, _ = expected_loss(world, policy, critic, ref, dataclasses.replace(EXACT, whiten=True))
    want = -scale * gradient(exact_objective(world, policy, ref, EXACT), policy)
    assert off(gradient(loss, policy), want) <= TOLERANCE


def test_the_gradient_does_not_depend_on_the_other_prompts_or_the_padding():
    world = make_world(3, 3, 3, seed=9)
    policy, ref, critic = policy_of(world, 1, 2.0), clone(policy_of(world, 2)), critic_of(world, 3)
    whole = gradient(expected_loss(world, policy, critic, ref, EXACT)[0], policy)
    alone = torch.zeros_like(whole)
    for x in range(3):
        one = World(world.tokenizer, world.prompts[x : x + 1], world.responses, world.rewards[x : x + 1])
        alone += gradient(expected_loss(one, policy, critic, ref, EXACT)[0], policy) / 3
    assert off(alone, whole) <= TOLERANCE


@settings(max_examples=15)
@given(SIZES, SEEDS, st.floats(0, 1))
def test_the_critic_is_drawn_to_the_value_function(sizes, seed, lam):
    world = make_world(*sizes)
    # Where the critic is right, its expected gradient is zero, though hardly any single return equals its value.
    policy, ref = policy_of(world, seed, 2.0), clone(policy_of(world, seed + 1))
    config = dataclasses.replace(EXACT, lam=lam)
    logps = exact.log_probs(world, policy).detach()
    _, experience = expected_loss(world, policy, critic_of(world, seed), ref, config)
    right = exact.state_values(world, logps, experience.rewards)
    _, experience = expected_loss(world, policy, ExactCritic(world, right), ref, config)
    mask = exact.listing(world, policy).mask
    values = experience.old.values[mask].requires_grad_(True)
    share = exact.weights(logps)[:, None].expand(mask.shape)[mask]
    loss = (share * losses.value_loss(values, experience.old.values[mask], experience.returns[mask], 0.0)).sum()
    pull = torch.zeros(mask.shape, dtype=torch.float64)
    pull[mask] = torch.autograd.grad(loss, values)[0]
    states = {}
    for row, (x, response) in enumerate(itertools.product(range(len(world.prompts)), world.responses)):
        for t in range(len(response)):
            states[x, response[:t]] = states.get((x, response[:t]), 0.0) + pull[row, t].item()
    assert max(map(abs, states.values())) < 1e-10
    assert pull.abs().max() > 1e-4


@settings(max_examples=15)
@given(SIZES, SEEDS, st.sampled_from([0.0, 0.2]))
def test_the_value_loss_moves_the_critic_and_nothing_else(sizes, seed, clip):
    world = make_world(*sizes)
    policy, ref = policy_of(world, seed, 2.0), clone(policy_of(world, seed + 1))
    old_critic, critic = critic_of(world, seed), critic_of(world, seed + 1)  # it has moved since the rollout
    config = dataclasses.replace(EXACT, value_clip=clip, value_coef=0.7, lam=0.9)
    loss, seen = expected_loss(world, policy, critic, ref, config, old_critic=old_critic)
    batch = collate(exact.examples(world), world.eot)
    share = exact.weights(exact.log_probs(world, policy).detach())
    plain = 0.0  # response by response: ½ (V - G)², V read before the token is drawn
    for row, (tokens, counted) in enumerate(zip(batch.tokens, batch.response_mask)):
        where = counted.nonzero().flatten()
        values = critic(tokens[None, : int(where[-1])])[0, where - 1]
        old, target = (table[row, : len(where)] for table in (seen.old.values, seen.returns))
        error = (values - target).square()
        if clip:  # the larger error, of the value and of the value held within ε of the old one
            error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - target).square())
        plain = plain + share[row] * error.sum() / 2
    assert off(gradient(loss, critic), 0.7 * gradient(plain, critic)) <= TOLERANCE
    without, _ = expected_loss(
        world, policy, critic, ref, dataclasses.replace(config, value_coef=0.0), old_critic=old_critic
    )
    assert torch.equal(gradient(loss, policy), gradient(without, policy))
    assert not gradient(without, critic).any()


@settings(max_examples=20)
@given(SIZES, SEEDS, st.floats(0.05, 0.4))
def test_outside_the_trust_region_the_gradient_is_the_papers(sizes, seed, clip):
    world = make_world(*sizes)
    # ∇L = -E_old[ ρ A ∇log π ], but for tokens that are already further than ε in the direction A asks for.
    old, policy = policy_of(world, seed, 2.0), policy_of(world, seed, 2.0)
    for parameter, other in zip(policy.parameters(), policy_of(world, seed + 1, 2.0).parameters()):
        parameter.data.lerp_(other.data, 0.3)
    ref, critic = clone(policy_of(world, seed + 2)), critic_of(world, seed)
    config = dataclasses.replace(EXACT, clip=clip)
    loss, experience = expected_loss(world, policy, critic, ref, config, old=old)

    episodes = exact.listing(world, old)
    batch = collate(exact.examples(world), world.eot)
    logprobs = torch.zeros(episodes.mask.shape, dtype=torch.float64)
    table = torch.log_softmax(policy.logits(policy(batch.tokens[:, :-1])), -1)
    drawn = table.gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)[batch.response_mask[:, 1:]]
    logprobs = logprobs.masked_scatter(episodes.mask, drawn)
    ratio, advantages = (logprobs - episodes.old_logprobs).exp().detach(), experience.advantages
    too_far = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    share = exact.weights(episodes.old_logprobs.sum(-1).view(len(world.prompts), -1))[:, None]
    plain = -(share * ratio * advantages * ~too_far * logprobs * episodes.mask).sum()
    want = gradient(plain, policy)
    got = gradient(loss, policy)
    assert (got - want).abs().max() <= TOLERANCE * max(want.abs().max(), 1e-6)


def test_the_clipping_examples_do_clip():
    world = make_world(3, 2, 3, seed=10)
    old, policy = policy_of(world, 1, 2.0), policy_of(world, 4, 2.0)
    ref, critic = clone(policy_of(world, 2)), critic_of(world, 3)
    free, _ = expected_loss(world, policy, critic, ref, dataclasses.replace(EXACT, clip=1e6), old=old)
    held, _ = expected_loss(world, policy, critic, ref, EXACT, old=old)
    assert off(gradient(held, policy), gradient(free, policy)) > 0.05


# --- KL ---------------------------------------------------------------------------------------------------------------


def kl_config(kl_in: str, estimator: str) -> PPOConfig:
    """Any combination, the two that are refused included."""
    config = dataclasses.replace(EXACT)
    object.__setattr__(config, "kl_in", kl_in)
    object.__setattr__(config, "kl_estimator", estimator)
    return config


@settings(max_examples=20)
@given(SIZES, SEEDS, st.sampled_from([0.7, 1.0]))
def test_k1_and_k3_and_exact_agree_on_the_kl_of_whole_responses(sizes, seed, temperature):
    world = make_world(*sizes)
    policy, ref = policy_of(world, seed, 2.0), clone(policy_of(world, seed + 1))
    config = dataclasses.replace(EXACT, temperature=temperature)
    _, seen = expected_loss(world, policy, critic_of(world, seed), ref, config)
    logps, ref_logps = (exact.log_probs(world, model, temperature).detach() for model in (policy, ref))
    share = exact.weights(logps)[:, None]
    want = exact.kl(logps, ref_logps).mean().item()
    mask = exact.listing(world, policy).mask
    for name in ("k1", "k3", "exact"):
        terms = losses.kl_terms(seen.old.logprobs, seen.old.ref_logprobs, seen.old.kl, name) * mask
        assert (share * terms).sum().item() == pytest.approx(want, rel=1e-9)


def test_k2_is_biased():
    world = make_world(3, 2, 3, seed=11)
    policy, ref = policy_of(world, 1, 3.0), clone(policy_of(world, 2))
    _, seen = expected_loss(world, policy, critic_of(world, 1), ref, EXACT)
    logps, ref_logps = (exact.log_probs(world, model).detach() for model in (policy, ref))
    k2 = losses.kl_terms(seen.old.logprobs, seen.old.ref_logprobs, seen.old.kl, "k2")
    assert abs((exact.weights(logps)[:, None] * k2).sum() / exact.kl(logps, ref_logps).mean() - 1) > 0.1


@settings(max_examples=10)
@given(SEEDS)
def test_which_kl_has_which_gradient(seed):
    # The table of docs/exact.md and of the README, from model to loss. Scores of 0 leave the KL alone.
    world = make_world(3, 3, 2, seed)
    policy, ref, critic = policy_of(world, seed, 2.0), clone(policy_of(world, seed + 1)), critic_of(world, seed)
    logps, ref_logps = exact.log_probs(world, policy), exact.log_probs(world, ref).detach()
    batch = collate(exact.examples(world), world.eot)
    predicts = batch.response_mask[:, 1:]
    logp, logq = (torch.log_softmax(m.logits(m(batch.tokens[:, :-1]))[predicts], -1) for m in (policy, ref))
    share = exact.weights(logps).detach()[:, None].expand(predicts.shape)[predicts]
    whole = gradient(exact.kl(logps, ref_logps).mean(), policy)
    direct = gradient((share * (logp.exp() * (logp - logq)).sum(-1)).sum(), policy)
    turned_around = gradient((share * (logq.exp() * (logq - logp)).sum(-1)).sum(), policy)
    nothing = torch.zeros_like(whole)
    assert min(off(direct, whole), off(turned_around, whole), off(turned_around, direct)) > 1e-3

    def got(kl_in, estimator):
        scores = torch.zeros(len(batch.tokens), dtype=torch.float64)
        loss, _ = expected_loss(world, policy, critic, ref, kl_config(kl_in, estimator), scores)
        return gradient(loss, policy) / EXACT.kl_coef

    for kl_in, estimator, want in (
        ("reward", "k1", whole),
        ("both", "k1", whole),
        ("both", "k3", whole),
        ("both", "exact", whole),
        ("loss", "k2", direct),
        ("loss", "exact", direct),
        ("loss", "k3", turned_around),
        ("loss", "k1", nothing),  # refused
        ("reward", "exact", whole - direct),  # refused: the effect on later tokens only
    ):
        error = (got(kl_in, estimator) - want).abs().max() / whole.abs().max()
        assert error <= TOLERANCE, f"{estimator} in {kl_in}: {error:.1e}"
    for kl_in, estimator in (("reward", "k2"), ("reward", "k3"), ("both", "k2")):
        assert off(got(kl_in, estimator), whole) > 1e-3, f"{estimator} in {kl_in}"


def at_the_optimum(world: World, policy: GPT, ref: GPT, beta: float) -> World:
    """The world with rewards that make this policy the optimum: r = β log π/π_ref + c(x)."""
    logps, ref_logps = (exact.log_probs(world, model).detach() for model in (policy, ref))
    constant = torch.linspace(-1, 1, len(world.prompts)).double()[:, None]
    return dataclasses.replace(world, rewards=beta * (logps - ref_logps) + constant)


@settings(max_examples=15)
@given(SIZES, SEEDS, st.floats(0, 1))
def test_at_the_optimum_k1_in_the_reward_leaves_nothing_to_learn_from_any_response(sizes, seed, lam):
    world = make_world(*sizes)
    # What the score gives and what the KL takes cancel in every response: not only is the expected gradient zero, there
    # is no noise left in it. The exact KL has a zero expectation there too, but each response still pulls.
    policy, ref = policy_of(world, seed, 2.0), clone(policy_of(world, seed + 1))
    world = at_the_optimum(world, policy, ref, EXACT.kl_coef)
    logps = exact.log_probs(world, policy).detach()
    for kl_in, estimator in (("reward", "k1"), ("both", "exact")):
        config = dataclasses.replace(EXACT, kl_in=kl_in, kl_estimator=estimator, lam=lam)
        _, seen = expected_loss(world, policy, critic_of(world, seed), ref, config)
        critic = ExactCritic(world, exact.state_values(world, logps, seen.rewards))
        loss, seen = expected_loss(world, policy, critic, ref, config)
        assert gradient(loss, policy).abs().max() < 1e-10
        if estimator == "k1":
            assert seen.advantages.abs().max() < 1e-10
        else:
            assert seen.advantages.abs().max() > 1e-3


def noise(world: World, policy: GPT, ref: GPT, kl_in: str, estimator: str) -> float:
    """E‖g‖² - ‖E g‖² of a response's gradient g, with the exact critic."""
    config = dataclasses.replace(EXACT, kl_in=kl_in, kl_estimator=estimator)
    logps = exact.log_probs(world, policy).detach()
    _, seen = expected_loss(world, policy, critic_of(world, 0), ref, config)
    critic = ExactCritic(world, exact.state_values(world, logps, seen.rewards))
    episodes, seen = experienced(world, policy, critic, ref, config)
    pulls = []
    for row in range(len(episodes.mask)):
        networks = ppo.Networks(policy, ref, critic)
        terms = ppo.token_losses(networks, episodes, seen, torch.tensor([row]), config.kl_coef, config)
        pulls.append(gradient(terms.total.sum(), policy))
    pulls, share = torch.stack(pulls), exact.weights(logps)[:, None]
    return float((share * (pulls - (share * pulls).sum(0)).square()).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_k1_in_the_reward_has_less_noise_than_the_exact_kl_on_the_way_to_the_optimum_only(seed):
    world = make_world(3, 2, 2, seed)
    end, start = policy_of(world, 1, 2.0), policy_of(world, 2)
    ref = clone(start)
    world = at_the_optimum(world, end, ref, EXACT.kl_coef)
    halfway = policy_of(world, 2)
    for parameter, target in zip(halfway.parameters(), end.parameters()):
        parameter.data.lerp_(target.data, 0.5)
    begin, half, there = (
        [noise(world, policy, ref, *kind) for kind in (("reward", "k1"), ("both", "exact"))]
        for policy in (start, halfway, end)
    )
    assert begin[0] == pytest.approx(begin[1]) and begin[0] > 1  # there is no KL yet to differ in
    assert half[0] < half[1]
    assert there[0] < 1e-12 and there[1] > 1
    # Where there is nothing but the KL it is the other way round: no score whose noise it could cancel.
    alone = dataclasses.replace(world, rewards=torch.zeros_like(world.rewards))
    k1, full = (noise(alone, end, ref, *kind) for kind in (("reward", "k1"), ("both", "exact")))
    assert 0 < full < k1 / 2


# --- what a policy can be ---------------------------------------------------------------------------------------------


def least_regret(world: World) -> float:
    """What is left, as a share of the reference's regret, when J itself is climbed by its exact gradient."""
    policy, ref = (make_policy(world, 3, width=16).double() for _ in range(2))
    ref_logps = exact.log_probs(world, ref).detach()
    optimizer = torch.optim.LBFGS(policy.parameters(), max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = exact.regret(exact.log_probs(world, policy), ref_logps, world.rewards, 0.3)
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    return closure().item() / before


def test_prompts_that_begin_alike_cannot_both_have_their_optimum():
    # Prompt "a", response "bc" and prompt "ab", response "c" end in the same network state, where two rewards want two
    # distributions. It is not a matter of size or training: the same rewards behind prompts that differ are reached.
    apart = make_world(3, 2, 2, seed=15)
    apart = dataclasses.replace(apart, prompts=((0,), (1, 0)))
    alike = dataclasses.replace(apart, prompts=((0,), (0, 1)))
    assert least_regret(apart) < 1e-4
    assert least_regret(alike) > 0.02


# --- the reward model -------------------------------------------------------------------------------------------------


def model_scores(world: World, model: ScalarModel) -> torch.Tensor:
    """(X, K) scores as training reads them: all responses to a prompt packed in one row."""
    K = len(world.responses)
    rankings = [world.ranking(x, range(K), range(1, K + 1)) for x in range(len(world.prompts))]
    examples, cut = examples_of_rankings(world.tokenizer, rankings, model.config.n_positions)
    assert not cut
    ranked = [reward_model.RankedExamples(own, ranking.ranks) for own, ranking in zip(examples, rankings)]
    return reward_model.score_batch(model, reward_model.collate_rankings(ranked, world.eot)).view(-1, K)


def pair_loss(scores: torch.Tensor, population: torch.Tensor) -> torch.Tensor:
    """The shipped loss, expected over a population of pairs (X, K, K)."""
    x, better, worse = population.nonzero(as_tuple=True)
    pairs = torch.stack([scores[x, better], scores[x, worse]], dim=-1)
    return (population[x, better, worse] * losses.ranking_loss(pairs, (1, 2))).sum()


TIES = ((1, 2, 3), (1, 2, 2), (1, 1, 2))  # the whole order is known, or the best only, or the worst only


def triple_loss(scores: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """The shipped loss, expected over all triples of responses and what annotators say of them: a third of them give
    the whole order, a third name the best, a third the worst."""
    X, K = rewards.shape
    triples = torch.tensor(list(itertools.combinations(range(K), 3)))
    loss = scores.new_zeros(())
    for order in itertools.permutations(range(3)):
        rows = triples[:, list(order)]  # best first
        p = exact.plackett_luce(rewards[:, rows]).exp()  # (X, triples)
        for ranks in TIES:
            ours = losses.ranking_loss(scores[:, rows].flatten(0, 1), ranks).view(X, -1)
            loss = loss + (p * ours).sum() / (3 * X * len(triples))
    return loss


@settings(max_examples=15)
@given(SIZES, SEEDS)
def test_the_reward_models_gradient_is_that_of_the_exact_likelihood(sizes, seed):
    world = make_world(*sizes)
    model, sampler = critic_of(world, seed), exact.log_probs(world, policy_of(world, seed)).detach()
    population = exact.pair_population(sampler, world.rewards)
    scores = model_scores(world, model)
    alone = torch.stack([model(torch.tensor([e.tokens]))[0, -1] for e in exact.examples(world)]).view(scores.shape)
    plain = -(population * F.logsigmoid(alone[:, :, None] - alone[:, None, :])).sum()
    assert off(gradient(pair_loss(scores, population), model), gradient(plain, model)) <= TOLERANCE


@settings(max_examples=10)
@given(st.integers(1, 2), st.integers(1, 3), SEEDS, SEEDS)
def test_at_the_true_rewards_the_reward_model_has_nothing_to_learn(length, prompts, world_seed, seed):
    world = make_world(3, length, prompts, world_seed)
    model = critic_of(world, seed)
    scores = model_scores(world, model)
    shift = torch.arange(len(world.prompts)).double()[:, None]  # a constant a prompt, which nobody can see
    rewards = scores.detach() + shift
    uniform = torch.zeros_like(rewards)
    for loss in (
        pair_loss(scores, exact.pair_population(torch.log_softmax(uniform, -1), rewards)),
        triple_loss(scores, rewards),
    ):
        assert gradient(loss, model).abs().max() < 1e-10
    wrong = rewards + torch.randn(rewards.shape, generator=seeded(seed)).double()
    assert gradient(triple_loss(scores, wrong), model).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["pairs", "rankings with ties"])
def test_the_reward_is_recovered_up_to_a_constant_a_prompt(kind):
    world = make_world(3, 2, 2, seed=12)
    model = make_scalar(world, 1, width=16, spread=0.1).double()
    population = exact.pair_population(torch.log_softmax(torch.zeros_like(world.rewards), -1), world.rewards)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scores = model_scores(world, model)
        loss = pair_loss(scores, population) if kind == "pairs" else triple_loss(scores, world.rewards)
        loss.backward()
        return loss

    optimizer.step(closure)
    difference = model_scores(world, model).detach() - world.rewards
    assert (difference - difference.mean(-1, keepdim=True)).abs().max() < 1e-3
    assert (model_scores(world, model).detach() - world.rewards).abs().max() > 0.05  # the constants are not known


# --- DPO --------------------------------------------------------------------------------------------------------------


def dpo_pairs(world: World, policy: GPT, ref_logps: torch.Tensor, config: DPOConfig):
    """Every pair of different responses through the loop's own `pair_metrics`: losses and metrics, (X, K, K)."""
    X, K = ref_logps.shape
    rankings = [world.ranking(x, range(K), [1] * K) for x in range(X)]
    examples, cut = examples_of_rankings(world.tokenizer, rankings, policy.config.n_positions)
    assert not cut
    both_ways = list(itertools.permutations(range(K), 2))
    records = [dpo.Compared(own, both_ways, logps) for own, logps in zip(examples, ref_logps)]
    losses, seen = dpo.pair_metrics(policy, dpo.collate_records(records, world.eot), config)
    where = [torch.tensor(column) for column in zip(*both_ways)]
    spread = {}
    for name, values in {"losses": losses, **seen}.items():
        spread[name] = values.new_zeros(X, K, K)
        spread[name][:, where[0], where[1]] = values.view(X, -1)
    return spread


BARE = DPOConfig(beta=0.3, label_smoothing=0.0, sft_coef=0.0)


@settings(max_examples=15)
@given(SIZES, SEEDS, st.floats(0.05, 2), st.sampled_from([0.0, 0.2]))
def test_dpos_gradient_is_that_of_the_exact_loss(sizes, seed, beta, smoothing):
    world = make_world(*sizes)
    policy, ref_logps = policy_of(world, seed, 2.0), exact.log_probs(world, policy_of(world, seed + 1)).detach()
    config = dataclasses.replace(BARE, beta=beta, label_smoothing=smoothing)
    population = exact.pair_population(ref_logps, world.rewards)
    loss = (population * dpo_pairs(world, policy, ref_logps, config)["losses"]).sum()
    implied = beta * (exact.log_probs(world, policy) - ref_logps)  # DPO's own reward
    margins = implied[:, :, None] - implied[:, None, :]
    labels = (1 - smoothing) * population + smoothing * population.transpose(1, 2)
    assert off(gradient(loss, policy), -gradient((labels * F.logsigmoid(margins)).sum(), policy)) <= TOLERANCE


@settings(max_examples=15)
@given(SIZES, SEEDS, st.floats(0.05, 2))
def test_at_the_optimum_dpo_has_nothing_to_learn(sizes, seed, beta):
    world = make_world(*sizes)
    policy, sampler = policy_of(world, seed, 2.0), exact.log_probs(world, policy_of(world, seed + 1)).detach()
    # The reference for which this policy is the optimum of the world's rewards.
    ref_logps = torch.log_softmax(exact.log_probs(world, policy).detach() - world.rewards / beta, -1)
    losses = dpo_pairs(world, policy, ref_logps, dataclasses.replace(BARE, beta=beta))["losses"]
    population = exact.pair_population(sampler, world.rewards)
    whole = gradient((population * losses).sum(), policy)
    flipped = gradient((population.transpose(1, 2) * losses).sum(), policy)
    assert whole.abs().max() < 1e-10
    assert flipped.abs().max() > 1e-4


@settings(max_examples=10)
@given(SIZES, SEEDS, st.floats(0.05, 2), st.floats(0.01, 0.4))
def test_the_optimum_of_label_smoothing(sizes, seed, beta, smoothing):
    world = make_world(*sizes)
    # A pair that is preferred with probability p ends where σ(β h) = p (1 - ε) + (1 - p) ε. Pairs that share responses
    # cannot all have that, so each response stands in one pair here.
    policy, K = policy_of(world, seed, 2.0), len(world.responses)
    p = exact.bradley_terry(world.rewards)
    h = torch.logit(p * (1 - smoothing) + (1 - p) * smoothing) / beta
    logps = exact.log_probs(world, policy).detach()
    ref_logps, population = logps.clone(), torch.zeros_like(p)
    for i, j in zip(range(0, K - 1, 2), range(1, K, 2)):
        ref_logps[:, i] = ref_logps[:, j] + logps[:, i] - logps[:, j] - h[:, i, j]
        population[:, i, j], population[:, j, i] = p[:, i, j], p[:, j, i]
    config = dataclasses.replace(BARE, beta=beta, label_smoothing=smoothing)
    losses = dpo_pairs(world, policy, ref_logps, config)["losses"]
    assert gradient((population * losses).sum(), policy).abs().max() < 1e-9
    plain = dpo_pairs(world, policy, ref_logps, dataclasses.replace(config, label_smoothing=0.0))["losses"]
    assert gradient((population * plain).sum(), policy).abs().max() > 1e-5


@settings(max_examples=10)
@given(SIZES, SEEDS, st.floats(0.05, 2))
def test_the_optimum_of_ipo(sizes, seed, beta):
    world = make_world(*sizes)
    # π(y|x) ∝ π_ref(y|x) exp( E_{y'~μ} P(y preferred to y') / β ), for pairs of two draws from μ (Azar et al. 2023,
    # section 5). No reward is infinite, and certain preferences have a bounded effect.
    policy, mu = policy_of(world, seed, 2.0), exact.log_probs(world, policy_of(world, seed + 1)).detach().exp()
    p = exact.bradley_terry(world.rewards)
    preferred = (mu[:, None, :] * p).sum(-1)
    ref_logps = exact.log_probs(world, policy).detach() - preferred / beta
    losses = dpo_pairs(world, policy, ref_logps, DPOConfig(loss="ipo", beta=beta, sft_coef=0.0))["losses"]
    population = mu[:, :, None] * mu[:, None, :] * p
    scale = gradient((population.transpose(1, 2) * losses).sum(), policy).abs().max()
    assert gradient((population * losses).sum(), policy).abs().max() < 1e-9 * max(1.0, scale)
    assert scale > 1e-4


@settings(max_examples=10)
@given(SIZES, SEEDS, st.floats(0.01, 5), st.floats(0, 0.5))
def test_at_the_reference_dpos_loss_is_ln_2(sizes, seed, beta, smoothing):
    world = make_world(*sizes)
    policy = policy_of(world, seed, 2.0)
    ref_logps = exact.log_probs(world, policy).detach()
    seen = dpo_pairs(world, policy, ref_logps, dataclasses.replace(BARE, beta=beta, label_smoothing=smoothing))
    apart = ~torch.eye(len(world.responses), dtype=torch.bool)
    assert (seen["loss"][:, apart] - math.log(2)).abs().max() < 1e-12
    assert seen["margin"].abs().max() < 1e-12


# --- SFT --------------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(SIZES, SEEDS, st.integers(0, 9), st.integers(0, 4))
def test_sfts_gradient_is_that_of_the_exact_cross_entropy_whatever_the_batch(sizes, seed, size, padding):
    world = make_world(*sizes)
    # A data set in which response y to prompt x stands c(x, y) times; rows in any order, in pieces of any size.
    policy = policy_of(world, seed)
    g = seeded(seed)
    counts = torch.randint(0, 3, world.rewards.shape, generator=g)
    counts[0, 0] += 1
    data = [e for e, c in zip(exact.examples(world), counts.flatten().tolist()) for _ in range(c)]
    batch = collate([data[i] for i in torch.randperm(len(data), generator=g).tolist()], world.eot)
    filled = [F.pad(batch.tokens, (0, padding), value=1), *(F.pad(part, (0, padding)) for part in batch[1:])]
    batch = Batch(*filled)
    tokens = batch.counted
    got = sum(gradient(sft.sft_loss(policy, piece) / tokens, policy) for piece in sft.microbatches(batch, size))
    lengths = torch.tensor([len(response) for response in world.responses])
    exact_loss = -(counts * exact.log_probs(world, policy)).sum() / (counts * lengths).sum()
    assert off(got, gradient(exact_loss, policy)) <= TOLERANCE


def test_a_policy_that_writes_the_data_has_nothing_to_learn_from_it():
    # Cross-entropy is least where the policy is the distribution of the data: there the expected gradient is zero.
    world = make_world(3, 3, 2, seed=13)
    policy = policy_of(world, 1, 2.0)
    share = exact.weights(exact.log_probs(world, policy).detach())
    pull = 0.0
    for example, p in zip(exact.examples(world), share):
        pull = pull + p * gradient(sft.sft_loss(policy, collate([example], world.eot)), policy)
    assert pull.abs().max() < 1e-10


def test_a_response_of_the_world_is_what_training_reads():
    world = make_world(3, 2, 2, seed=14)
    ranking = world.ranking(1, [0, len(world.responses) - 1], (1, 2))
    (examples,), _ = examples_of_rankings(world.tokenizer, [ranking], 8)
    ended, truncated = (example.tokens for example in examples)
    assert ended == [*world.prompts[1], world.eot]
    assert truncated == [*world.prompts[1], *world.responses[-1]] and world.eot not in truncated
    assert examples[0] == Example(ended, 2)
