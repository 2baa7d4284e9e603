"""Worlds so small that every response can be listed: there the optimum of RLHF is known, and so is every gradient.

    maximise  J(π) = E_x [ E_{y~π} r(x, y) - β · KL(π(·|x)‖π_ref(·|x)) ]

    π*(y|x) = π_ref(y|x) e^{r(x, y)/β} / Z(x),    J(π*) = E_x β log Z(x),    J(π*) - J(π) = E_x β · KL(π(·|x)‖π*(·|x))

The last is the regret, what a policy leaves on the table; it is 0 at π* and nowhere else. Everything here is a sum over
the list, differentiable, and goes through the shipped model and its shipped log-probs, so that what the training loops
estimate from samples can be compared with what it should be:

    python -m minirlhf.exact        the shipped loops against the optimum on random worlds: a table and a picture

It all lives on the CPU; for float64, make the models `.double()`. β is positive throughout.

Source: the optimum, Korbak et al. 2022, "RL with KL penalties is better viewed as Bayesian inference", section 3;
Rafailov et al. 2023, eq. 4. The regret follows from it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf.algorithms.logprobs import response_stats, scatter_counted
from minirlhf.algorithms.ppo import Rollout
from minirlhf.commands.best_of_n import kl_bound as best_of_n_bound  # noqa: F401
from minirlhf.data.batches import Example, collate
from minirlhf.data.records import Ranking
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, init_weights

# --- the world --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class World:
    """Prompts, every response there is, and what each is worth. X prompts, K responses, the same for all prompts.

    A response is either a few letters and end-of-text, or as many letters as the limit allows: then it is truncated.
    No prompt should begin with another one. Prompt "a" with the response "bc" and prompt "ab" with the response "c" are
    the same text to a policy, which then has one distribution for the next letter where the two rewards want two: it
    cannot be π*, whatever its size (`make_world` draws prompts that do not).

    Raises:
        ValueError: rewards that are not one number for each prompt and response.
    """

    tokenizer: Tokenizer
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    rewards: Float[Tensor, "X K"]  # r(x, y), float64

    def __post_init__(self):
        if self.rewards.shape != (len(self.prompts), len(self.responses)):
            wanted = len(self.prompts), len(self.responses)
            raise ValueError(f"rewards must have shape {wanted}, got {tuple(self.rewards.shape)}")

    @property
    def eot(self) -> int:
        """End-of-text."""
        return self.tokenizer.eot

    @property
    def length(self) -> int:
        """The limit: tokens of the longest response."""
        return max(map(len, self.responses))

    @property
    def truncated(self) -> Bool[Tensor, " K"]:
        """Which responses have no end-of-text."""
        return torch.tensor([response[-1] != self.eot for response in self.responses])

    def text(self, tokens: Sequence[int]) -> TokenText:
        """Tokens with the letters that they are."""
        return TokenText(self.tokenizer.decode(tokens), list(tokens))

    def ranking(self, prompt: int, responses: Sequence[int], ranks: Sequence[int]) -> Ranking:
        """A record for the reward model or DPO: some responses, by their place in the list, and their ranks."""
        texts = tuple(self.text(self.responses[k]) for k in responses)
        return Ranking(self.text(self.prompts[prompt]), texts, tuple(ranks))


def make_world(letters: int = 3, length: int = 3, prompts: int = 3, seed: int = 0, spread: float = 1.0) -> World:
    """A world with random rewards and prompts of 1, 2, … letters.

    Args:
        letters: ordinary tokens, 3 to 6; end-of-text is one more.
        length: the limit of a response in tokens, at most 4, so that the list stays short: with v letters it has
            1 + v + … + v^(length-1) responses that end and v^length that are truncated.
        prompts: how many, at most as many as letters, since each begins with another one.
        seed: of rewards and prompts.
        spread: deviation of the rewards, which are normal; for others, `dataclasses.replace(world, rewards=…)`.

    Raises:
        ValueError: sizes outside these ranges.
    """
    if not (3 <= letters <= 6 and 1 <= length <= 4 and 1 <= prompts <= letters):
        raise ValueError(
            f"a world has 3 to 6 letters, responses of 1 to 4, 1 prompt to as many as letters; got {letters} letters, "
            f"length {length}, {prompts} prompts"
        )
    tokenizer = Tokenizer({b"abcdef"[i : i + 1]: i for i in range(letters)}, name="letters")
    ended = [(*some, tokenizer.eot) for n in range(length) for some in itertools.product(range(letters), repeat=n)]
    responses = (*ended, *itertools.product(range(letters), repeat=length))
    g = torch.Generator().manual_seed(seed)
    first = torch.randperm(letters, generator=g).tolist()
    asked = tuple((first[x], *torch.randint(letters, (x,), generator=g).tolist()) for x in range(prompts))
    rewards = spread * torch.randn(prompts, len(responses), generator=g, dtype=torch.float64)
    return World(tokenizer, asked, responses, rewards)


def make_policy(world: World, seed: int = 0, width: int = 32, layers: int = 1) -> GPT:
    """A tiny GPT that reads and writes this world, with fresh weights: unsure, but not uniform."""
    model = GPT(_shape(world, width, layers))
    init_weights(model, seed)
    return model


def make_scalar(world: World, seed: int = 0, width: int = 32, layers: int = 1, spread: float = 0.0) -> ScalarModel:
    """A tiny critic or reward model whose outputs have about this deviation; 0 = they are all 0."""
    model = ScalarModel(_shape(world, width, layers))
    init_weights(model, seed)
    model.score.weight.data.mul_(spread / (0.01 * math.sqrt(width)))  # a head starts with deviation 0.01
    return model


def _shape(world: World, width: int, layers: int) -> GPTConfig:
    context = max(map(len, world.prompts)) + world.length
    return GPTConfig(world.tokenizer.vocab_size, context, layers, 2, width)


# --- listing ----------------------------------------------------------------------------------------------------------
# Rows of a listing run over prompts and, for each of them, over responses: row = prompt · K + response.


def examples(world: World) -> list[Example]:
    """Every prompt with every response, X·K of them."""
    return [Example([*prompt, *response], len(prompt)) for prompt in world.prompts for response in world.responses]


def listing(world: World, policy: GPT, temperature: float = 1.0) -> Rollout:
    """Every response to every prompt as if it had been drawn: what `rollout.rollout` gives, without the chance.

    Weighed with `weights`, sums over its rows are expectations.
    """
    batch = collate(examples(world), world.eot)
    mask = collate([Example(list(response), 0) for response in world.responses], world.eot).mask
    responses = torch.tensor([[*r, *[world.eot] * (world.length - len(r))] for r in world.responses])
    X = len(world.prompts)
    mask, responses = mask.repeat(X, 1), responses.repeat(X, 1)
    with torch.no_grad():
        stats = response_stats(policy, batch.tokens, batch.response_mask, temperature=temperature)
    logprobs = scatter_counted(stats.logprobs, mask)
    return Rollout(batch.tokens, batch.response_mask, responses, mask, logprobs, world.truncated.repeat(X))


def log_probs(world: World, policy: GPT, temperature: float = 1.0) -> Float[Tensor, "X K"]:
    """log π(y|x) = Σ_t log π(y_t|x, y_<t) of every response; of each prompt their probabilities sum to 1.

    Differentiable. Source: the chain rule; a truncated response has no factor for what would have come.
    """
    batch = collate(examples(world), world.eot)
    stats = response_stats(policy, batch.tokens, batch.response_mask, temperature=temperature)
    return scatter_counted(stats.logprobs, batch.response_mask).sum(-1).view(len(world.prompts), -1)


def weights(logps: Float[Tensor, "X K"]) -> Float[Tensor, " XK"]:
    """The share of each row of a listing in an expectation over prompts, all equally likely, and responses."""
    return (logps.exp() / len(logps)).flatten()


# --- quantities -------------------------------------------------------------------------------------------------------


def expected_reward(logps: Float[Tensor, "X K"], rewards: Float[Tensor, "X K"]) -> Float[Tensor, " X"]:
    """E_{y~π} r(x, y) = Σ_y π(y|x) r(x, y), of each prompt."""
    return (logps.exp() * rewards).sum(-1)


def kl(logps: Float[Tensor, "X K"], ref_logps: Float[Tensor, "X K"]) -> Float[Tensor, " X"]:
    """KL(π‖π_ref) = Σ_y π(y|x) log π(y|x)/π_ref(y|x), of whole responses to each prompt, in nats.

    Source: Kullback & Leibler 1951, eq. 2.4.
    """
    return (logps.exp() * (logps - ref_logps)).sum(-1)


def objective(
    logps: Float[Tensor, "X K"], ref_logps: Float[Tensor, "X K"], rewards: Float[Tensor, "X K"], beta: float
) -> Float[Tensor, ""]:
    """J(π) = E_x [ E_{y~π} r - β KL(π‖π_ref) ], what PPO and, by another way, DPO maximise.

    Source: Ziegler et al. 2019, section 2.2; Rafailov et al. 2023, eq. 3.
    """
    return (expected_reward(logps, rewards) - beta * kl(logps, ref_logps)).mean()


def optimum(
    ref_logps: Float[Tensor, "X K"], rewards: Float[Tensor, "X K"], beta: float
) -> tuple[Float[Tensor, "X K"], Float[Tensor, " X"]]:
    """log π* and log Z:  π*(y|x) = π_ref(y|x) e^{r(x, y)/β} / Z(x),  Z(x) = Σ_y π_ref(y|x) e^{r(x, y)/β}.

    Source: Rafailov et al. 2023, eq. 4; Korbak et al. 2022, section 3.
    """
    tilted = ref_logps + rewards / beta
    log_z = tilted.logsumexp(-1)
    return tilted - log_z[:, None], log_z


def regret(
    logps: Float[Tensor, "X K"], ref_logps: Float[Tensor, "X K"], rewards: Float[Tensor, "X K"], beta: float
) -> Float[Tensor, ""]:
    """J(π*) - J(π) = E_x β KL(π‖π*): what a policy leaves on the table, in units of the reward; 0 at π* only.

    Source: J(π) = E_x [β log Z - β KL(π‖π*)], by putting log π* into J; Rafailov et al. 2023, appendix A.1.
    """
    best, _ = optimum(ref_logps, rewards, beta)
    return beta * kl(logps, best).mean()


def frontier(
    ref_logps: Float[Tensor, "X K"], rewards: Float[Tensor, "X K"], betas: Sequence[float]
) -> Float[Tensor, "betas 2"]:
    """(KL(π*‖π_ref), E[r]) of the optimum at each β, means over prompts: no policy has more reward at its KL.

    Source: as for `optimum`; the Lagrangian of maximising E[r] under a bound on the KL has β as its multiplier.
    """
    best = [optimum(ref_logps, rewards, beta)[0] for beta in betas]
    return torch.stack([torch.stack([kl(b, ref_logps).mean(), expected_reward(b, rewards).mean()]) for b in best])


def best_of_n(ref_logps: Float[Tensor, "X K"], rewards: Float[Tensor, "X K"], n: int) -> Float[Tensor, "X K"]:
    """log-probs of the best of n responses drawn from the reference; among equals, the first that was drawn.

        π_n(y) = π_ref(y) (F(y)ⁿ - F₋(y)ⁿ) / (F(y) - F₋(y)),    F(y) = P(r ≤ r(y)),  F₋(y) = P(r < r(y))

    Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy" (there without ties).
    """
    if n < 1:
        raise ValueError(f"the best of n responses needs n >= 1, got {n}")
    p = ref_logps.exp()
    at_most = (p[:, None, :] * (rewards[:, None, :] <= rewards[:, :, None])).sum(-1)  # (X, K)
    below = (p[:, None, :] * (rewards[:, None, :] < rewards[:, :, None])).sum(-1)
    # (aⁿ - bⁿ)/(a - b) as a sum, which loses no digits where a response is very unlikely.
    return ref_logps + sum(at_most ** (n - 1 - k) * below**k for k in range(n)).log()


def bradley_terry(rewards: Float[Tensor, "X K"]) -> Float[Tensor, "X K K"]:
    """P(y_i preferred to y_j) = σ(r_i - r_j), of every two responses to a prompt.

    Source: Bradley & Terry 1952, eq. 1 with π = e^r.
    """
    return torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])


def plackett_luce(rewards: Float[Tensor, "... K"]) -> Float[Tensor, "..."]:
    """log P(y_1 > y_2 > … > y_K) = Σ_k [ r_k - log Σ_{j ≥ k} e^{r_j} ], of responses listed best first.

    Source: Plackett 1975, eq. 5; Luce 1959.
    """
    rest = rewards.flip(-1).logcumsumexp(-1).flip(-1)
    return (rewards - rest).sum(-1)


def pair_population(logps: Float[Tensor, "X K"], rewards: Float[Tensor, "X K"]) -> Float[Tensor, "X K K"]:
    """P(i is chosen, j rejected): of two different responses drawn from π, under Bradley–Terry; its sum is 1.

    Source: Rafailov et al. 2023, section 3 (the preferences that DPO's derivation assumes).
    """
    p = logps.exp()
    drawn = p[:, :, None] * p[:, None, :] * (1 - torch.eye(p.shape[1], dtype=p.dtype))
    return drawn / drawn.sum((1, 2), keepdim=True) * 2 * bradley_terry(rewards) / len(p)


def state_values(
    world: World, logps: Float[Tensor, "X K"], rewards: Float[Tensor, "XK R"], gamma: float = 1.0
) -> Float[Tensor, "XK R"]:
    """V(x, y_<t) = E_π[ Σ_{u ≥ t} γ^{u-t} r_u | x, y_<t ], the value function itself, at every token of a listing.

    Source: Schulman et al. 2016, section 2, for the reward a token that PPO sees.

    Args:
        world: what is listed.
        logps: (X, K), the policy's.
        rewards: (X·K, R), of each token of the listing, 0 past the end.
        gamma: discount per token.

    Returns:
        (X·K, R), 0 past the end.
    """
    lengths = [len(response) for _ in world.prompts for response in world.responses]
    states: dict[tuple, int] = {}
    for x in range(len(world.prompts)):
        for response in world.responses:
            for t in range(len(response)):
                states.setdefault((x, response[:t]), len(states))
    where = torch.zeros(rewards.shape, dtype=torch.long)
    for row, (x, response) in enumerate(itertools.product(range(len(world.prompts)), world.responses)):
        where[row, : len(response)] = torch.tensor([states[x, response[:t]] for t in range(len(response))])
    mask = torch.arange(rewards.shape[1]) < torch.tensor(lengths)[:, None]

    to_go = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        to_go[:, t] = rewards[:, t] + (gamma * to_go[:, t + 1] if t + 1 < rewards.shape[1] else 0.0)
    share = weights(logps).to(rewards.dtype)[:, None].expand_as(rewards)[mask]
    zero = rewards.new_zeros(len(states))
    mean = zero.index_add(0, where[mask], share * to_go[mask]) / zero.index_add(0, where[mask], share)
    return torch.where(mask, mean[where], 0.0)


class ExactCritic(ScalarModel):
    """A critic that knows: in the place of a trained one, it looks up V(x, y_<t).

    Args:
        world: what can be asked of it.
        values: (X·K, R), as `state_values` gives them.
    """

    def __init__(self, world: World, values: Float[Tensor, "XK R"]):
        super().__init__(_shape(world, 2, 1))
        self.table = {}
        for row, (prompt, response) in enumerate(itertools.product(world.prompts, world.responses)):
            for t in range(len(response)):
                self.table[(*prompt, *response[:t])] = float(values[row, t])

    def forward(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None, at: Tensor | None = None
    ) -> Float[Tensor, "B T"] | Float[Tensor, " N"]:
        """V at every position, 0 where no response can have begun or gone on; float64, without a gradient."""
        known = [[self.table.get(tuple(row[: t + 1]), 0.0) for t in range(len(row))] for row in tokens.tolist()]
        values = torch.tensor(known, dtype=torch.float64, device=tokens.device)
        return values if at is None else values.flatten()[at]


# --- what people would say --------------------------------------------------------------------------------------------


def draw_rankings(
    world: World,
    logps: Float[Tensor, "X K"],
    n: int,
    seed: int,
    size: int = 2,
    seen: Bool[Tensor, "X K"] | None = None,
) -> list[Ranking]:
    """Rankings of different responses drawn from π, ordered under Plackett–Luce by the world's rewards.

    The order is that of r + Gumbel noise, which is Plackett–Luce's (Yellott 1977); responses are drawn without
    replacement in the same way.

    Args:
        world: whose prompts, in turn.
        logps: (X, K), of what draws the responses.
        n: how many.
        seed: of the draws.
        size: responses in each.
        seen: (X, K), which responses can be drawn; None = all.
    """
    g = torch.Generator().manual_seed(seed)

    def gumbel(like: Tensor) -> Tensor:
        return -torch.empty_like(like).exponential_(generator=g).log()

    x = torch.arange(n) % len(world.prompts)
    odds = logps.detach()[x]  # (n, K)
    odds = odds if seen is None else odds.masked_fill(~seen[x], -math.inf)
    drawn = (odds + gumbel(odds)).topk(size, dim=-1).indices  # (n, size)
    noisy = world.rewards[x[:, None], drawn]
    drawn = drawn.gather(-1, (noisy + gumbel(noisy)).argsort(dim=-1, descending=True))
    ranks = tuple(range(1, size + 1))
    return [world.ranking(int(p), row, ranks) for p, row in zip(x.tolist(), drawn.tolist())]


class TableReward:
    """The world's own reward, as the training loops ask for it."""

    name = "table"

    def __init__(self, world: World):
        place = {response: k for k, response in enumerate(world.responses)}
        self.table = {
            (prompt, response): float(world.rewards[x, k])
            for x, prompt in enumerate(world.prompts)
            for response, k in place.items()
        }

    def __call__(
        self, prompts: Sequence[TokenText], responses: Sequence[TokenText], texts: Sequence[str]
    ) -> list[float]:
        return [self.table[tuple(p.tokens), tuple(r.tokens)] for p, r in zip(prompts, responses)]
