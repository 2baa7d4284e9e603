"""The bug zoo: classic mistakes of RLHF code, each a small edit of one shipped function, and the test that catches it.

    python tests/bug_zoo.py                                          what every bug does to a small run, side by side
    python tests/bug_zoo.py kl-sign clip-max                         these two
    python tests/bug_zoo.py kl-sign --test                           its test with the bug in the code: it fails
    python tests/bug_zoo.py kl-sign -- train_ppo.py --out runs/sick  any script with the bug in the code
    python tests/bug_zoo.py --write                                  measure all; write docs/bug-zoo.json and .md
    python tests/bug_zoo.py --page                                   write the .md anew, after a change of words

A bug lives in memory only: the function's source is edited as text and compiled, and the function that everybody has
already imported gets the new code until `infect` ends. What a bug does is measured on worlds small enough to be listed
(`minirlhf.exact`), by the shipped training loops; what is exact about it is computed afterwards, by healthy code.
"""

import argparse
import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import linecache
import math
import runpy
import statistics
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from minirlhf import seeds
from minirlhf.algorithms import dpo, logprobs, ppo, reward_model, rewards, sft
from minirlhf.commands import evaluate, exact
from minirlhf.data.records import Demonstration, Ranking
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.model import gpt
from minirlhf.model.generate import generate
from minirlhf.run import arguments, folder, terminal

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURES = ROOT / "docs" / "bug-zoo.md", ROOT / "docs" / "bug-zoo.json"
SEEDS = (0, 1, 2)  # figures are means over these


@dataclass(frozen=True)
class Bug:
    """One mistake: where it is made, what a person would see of it, which test sees it."""

    name: str
    title: str
    where: str
    """module:function"""
    before: str
    """What stands there, exactly once."""
    after: str
    symptom: str
    """What a person who looks at the metrics sees."""
    why: str
    """Why the mistake is so easy to make."""
    test: str
    """Node id of the test that must fail by its own assertion."""
    look: tuple[str, ...]
    """Telling figures: a name and a time, see `TIMES`."""
    world: str = "ppo"
    """Which of `WORLDS` shows it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the world's config, where the bug needs them to show."""


# --- infecting --------------------------------------------------------------------------------------------------------


def healthy(where: str) -> types.FunctionType:
    """The function itself, under whatever decorators and type checkers wrap it."""
    module, _, path = where.partition(":")
    return inspect.unwrap(functools.reduce(getattr, path.split("."), importlib.import_module(module)))


def infected_code(bug: Bug) -> types.CodeType:
    """The function's code after the edit.

    Raises:
        ValueError: what the bug replaces does not stand there exactly once; the code has moved, mend the table.
    """
    function = healthy(bug.where)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(bug.before) != 1:
        raise ValueError(f"{bug.name}: {bug.where} holds {bug.before!r} {source.count(bug.before)} times, not once")
    source = source.replace(bug.before, bug.after)
    filename = f"<{bug.name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for tracebacks
    module = compile(source, filename, "exec", dont_inherit=True)
    # The code of a function is a constant of the module that defines it: nothing has to be executed.
    codes = [constant for constant in module.co_consts if isinstance(constant, types.CodeType)]
    (code,) = (code for code in codes if code.co_name == function.__code__.co_name)
    if code.co_freevars != function.__code__.co_freevars:
        raise ValueError(f"{bug.name}: {bug.where} uses names of a function around it; choose another")
    return code


@contextmanager
def infect(bug: Bug) -> Iterator[None]:
    """The bug is in the code, for everybody who has imported the function, until the block ends."""
    function, code = healthy(bug.where), infected_code(bug)
    original = function.__code__
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = original


# --- worlds -----------------------------------------------------------------------------------------------------------
# Each is a short run of a shipped loop. Only `go` may be infected: its data and its judge are made by healthy code.


class Watched(folder.Run):
    """A run that writes nothing and keeps the metrics of each step and the weights after it."""

    def __init__(self, steps: int, network: torch.nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            super().__init__(arguments.RunArgs(out=Path(folder) / "run", checkpoint_every=10**9), "bug zoo", steps)
        self.network, self.rows, self.states = network, [], []

    def log(self, step: int, metrics: dict[str, Any], show: Sequence[str] = ()) -> None:
        self.rows.append({name: float(value) for name, value in metrics.items() if value is not None})
        self.states.append(copy.deepcopy(self.network.state_dict()))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Nobody reads them."""

    def judged(self, judge: Callable[[torch.nn.Module], dict[str, float]]) -> list[dict[str, float]]:
        """The metrics of each step, and what the judge says of the weights after it."""
        network = copy.deepcopy(self.network)
        for row, state in zip(self.rows, self.states, strict=True):
            network.load_state_dict(state)
            with torch.no_grad():
                row |= judge(network)
        return self.rows


@dataclass(frozen=True)
class World:
    """A small run: its config, its data, how it goes, and what is to be said of the network it trains."""

    config: Any
    data: Callable[[Any, int], Any]
    go: Callable[[Any, Any, int], Watched]
    judge: Callable[[Any, torch.nn.Module], dict[str, float]]


class Scorer(rewards.RewardModelScorer):
    """A reward model that comes from memory."""

    def __init__(self, network: gpt.ScalarModel, tokenizer: Tokenizer):
        self.name, self.batch_size, self.model, self.tokenizer = "scorer", 64, network, tokenizer


Setting = tuple[exact.World, gpt.GPT, rewards.Reward]


@functools.cache
def letters() -> Setting:
    """Three prompts, forty responses of up to three tokens, random rewards, and a policy that is rather unsure."""
    world = exact.make_world(letters=3, length=3, prompts=3, seed=2)
    return world, exact.make_policy(world, seed=0), exact.TableReward(world)


@functools.cache
def generous() -> Setting:
    """The same, but every reward is higher by 4, which is no reason to prefer another policy."""
    world, policy, _ = letters()
    world = dataclasses.replace(world, rewards=world.rewards + 4.0)
    return world, policy, exact.TableReward(world)


@functools.cache
def syllables() -> Setting:
    """The same, but the third token spells what the first two do, and a reward model says what a response is worth."""
    world, policy, _ = letters()
    world = dataclasses.replace(world, tokenizer=Tokenizer({b"a": 0, b"b": 1, b"ab": 2}, name="syllables"))
    network = gpt.ScalarModel(gpt.GPTConfig(world.tokenizer.vocab_size, 8, n_layer=1, n_head=2, n_embd=32))
    gpt.init_weights(network, seed=3)
    network.score.weight.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
    scorer = Scorer(network, world.tokenizer)
    asked = [world.text(prompt) for prompt in world.prompts for _ in world.responses]
    answers = [world.text(response) for response in world.responses] * len(world.prompts)
    scores = rewards.score(scorer, asked, answers).double().view(world.rewards.shape)
    return dataclasses.replace(world, rewards=scores), policy, scorer


@functools.cache
def teacher() -> tuple[exact.World, torch.Tensor]:
    """Who writes the demonstrations: the log-probs of all responses under a policy that is rather sure."""
    world, _, _ = letters()
    author = exact.make_policy(world, seed=5)
    author.ln_f.weight.data.mul_(3.0)
    return world, exact.log_probs(world, author).detach().double()


def preferences(records: int, config: dpo.DPOConfig, seed: int) -> tuple[exact.World, gpt.GPT, list[Ranking]]:
    world, base, _ = letters()
    return world, base, exact.draw_rankings(world, exact.log_probs(world, base).detach().double(), records, seed)


def three_at_a_time(
    config: reward_model.RewardModelConfig, seed: int
) -> tuple[exact.World, list[Ranking], list[Ranking]]:
    world, base, _ = letters()
    logps = exact.log_probs(world, base).detach().double()
    return world, *(exact.draw_rankings(world, logps, n, seed + n, size=3) for n in (1500, 300))


def demonstrations(config: sft.SFTConfig, seed: int) -> tuple[exact.World, list[Demonstration]]:
    world, logps = teacher()
    n = config.steps * config.batch_size // len(world.prompts)
    drawn = logps.exp().multinomial(n, replacement=True, generator=seeds.seeded(seed)).tolist()  # (X, n)
    texts = [world.text(response) for response in world.responses]
    return world, [Demonstration(world.text(x), texts[k]) for x, row in zip(world.prompts, drawn) for k in row]


def go_ppo(data: Setting, config: ppo.PPOConfig, seed: int) -> Watched:
    world, base, reward = data
    policy = copy.deepcopy(base)
    ref = gpt.clone(policy)
    critic = exact.make_scalar(world, seed)
    prompts = [list(world.prompts[i % len(world.prompts)]) for i in range(config.batch_size)]
    run = Watched(config.steps, policy)
    networks = ppo.Networks(policy, ref, critic)
    ppo.train(networks, reward, lambda step: prompts, world.tokenizer, config, run, seed)
    return run


def go_dpo(data: tuple[exact.World, gpt.GPT, list[Ranking]], config: dpo.DPOConfig, seed: int) -> Watched:
    world, base, rankings = data
    policy = copy.deepcopy(base)
    run = Watched(config.steps, policy)
    dpo.train(policy, dpo.batches(rankings, [], world.tokenizer, gpt.clone(policy), config, seed), config, run)
    return run


def go_rm(
    data: tuple[exact.World, list[Ranking], list[Ranking]], config: reward_model.RewardModelConfig, seed: int
) -> Watched:
    world, seen, held_out = data
    network = exact.make_scalar(world, seed, spread=0.1)
    data = reward_model.batches(seen, held_out, world.tokenizer, network.config.n_positions, config, seed)
    run = Watched(config.steps, network)
    reward_model.train(network, data, config, run)
    return run


def go_sft(data: tuple[exact.World, list[Demonstration]], config: sft.SFTConfig, seed: int) -> Watched:
    world, records = data
    network = exact.make_policy(world, seed + 10)
    data = sft.batches(records, world.tokenizer, network.config.n_positions, config, seed)
    run = Watched(config.steps, network)
    sft.train(network, data, config, run)
    return run


def go_evaluate(data: Setting, config: None, seed: int) -> Watched:
    """A policy against itself, drawn twice for each of 3,000 prompts, under a judge who gives whole marks."""
    world, base, reward = data
    prompts = [list(world.prompts[i % len(world.prompts)]) for i in range(3000)]
    asked, marks = [world.text(prompt) for prompt in prompts], []
    for draw in (0, 1):
        drawn = generate(base, prompts, world.eot, world.length, seeds.mix(seed, draw))
        answers = [world.text(row[keep].tolist()) for row, keep in zip(drawn.responses, drawn.mask)]
        marks.append(rewards.score(reward, asked, answers).round())
    run = Watched(1, base)
    run.log(0, {"win_rate": evaluate.win_rate(*marks)})
    return run


def judge_policy(
    setting: Callable[[], Setting], config: ppo.PPOConfig | dpo.DPOConfig, policy: gpt.GPT
) -> dict[str, float]:
    """Where a policy stands: its regret in percent of the reference's, its KL and its reward, all exact."""
    world, ref, _ = setting()
    is_ppo = isinstance(config, ppo.PPOConfig)
    beta, temperature = (config.kl_coef, config.temperature) if is_ppo else (config.beta, 1.0)
    worth = world.rewards - (config.missing_eot_penalty * world.truncated if is_ppo else 0.0)
    logps, start = (exact.log_probs(world, network, temperature).double() for network in (policy, ref))
    left, whole = (exact.regret(x, start, worth, beta) for x in (logps, start))
    return {
        "regret": 100 * float(left / whole),
        "true KL": float(exact.kl(logps, start).mean()),
        "true reward": float(exact.expected_reward(logps, worth).mean()),
    }


def judge_scores(config: reward_model.RewardModelConfig, network: gpt.ScalarModel) -> dict[str, float]:
    """Share of all pairs of responses to a prompt that the scores order as the true rewards do."""
    world, policy, _ = letters()
    everything = exact.listing(world, policy)
    scores = gpt.last_token(network(everything.tokens), everything.counted).double().view_as(world.rewards)
    leads, true_leads = (x[:, :, None] - x[:, None, :] for x in (scores, world.rewards))
    return {"true accuracy": float((leads * true_leads > 0)[true_leads != 0].double().mean())}


def judge_student(config: sft.SFTConfig, network: gpt.GPT) -> dict[str, float]:
    """How far a model is from its teacher, in nats a response and its first token, and how often it ends."""
    world, true = teacher()
    logps = exact.log_probs(world, network).double()
    first = torch.nn.functional.one_hot(torch.tensor([response[0] for response in world.responses])).double()  # (K, V)
    return {
        "KL to the teacher": float(exact.kl(true, logps).mean()),
        "first-token KL": float(exact.kl((true.exp() @ first).log(), (logps.exp() @ first).log()).mean()),
        "ended": float(logps.exp()[:, ~world.truncated].sum(-1).mean()),
    }


PPO = ppo.PPOConfig(
    steps=40, batch_size=240, epochs=2, minibatches=2, microbatch_size=0, response_tokens="3", lr=3e-3, critic_lr=1e-2,
    kl_coef=0.5, missing_eot_penalty=0.0, sample_every=10**6,
)  # fmt: skip
DPO = dpo.DPOConfig(steps=100, batch_size=64, lr=3e-3, beta=0.25, label_smoothing=0.0, sft_coef=0.0)
RM = reward_model.RewardModelConfig(steps=250, batch_size=32, lr=5e-3, warmup_steps=5, sft_coef=0.0, eval_every=50)
SFT = sft.SFTConfig(steps=150, batch_size=32, lr=5e-3, warmup_steps=5, held_out=0.0)


def ppo_on(setting: Callable[[], Setting]) -> World:
    return World(PPO, lambda config, seed: setting(), go_ppo, functools.partial(judge_policy, setting))


def dpo_on(records: int) -> World:
    return World(DPO, functools.partial(preferences, records), go_dpo, functools.partial(judge_policy, letters))


WORLDS = {
    "sft": World(SFT, demonstrations, go_sft, judge_student),
    "rm": World(RM, three_at_a_time, go_rm, judge_scores),
    "ppo": ppo_on(letters),
    "ppo, rewards + 4": ppo_on(generous),
    "ppo, reward model": ppo_on(syllables),
    "dpo": dpo_on(DPO.steps * DPO.batch_size),
    "dpo, few records": dpo_on(64),
    "evaluate": World(None, lambda config, seed: letters(), go_evaluate, lambda config, network: {}),
}


# --- measuring --------------------------------------------------------------------------------------------------------

TIMES: dict[str, Callable[[list[float]], float]] = {
    "first": lambda values: values[0],
    "fifth": lambda values: values[4],
    "last": lambda values: statistics.fmean(values[-max(1, len(values) // 4) :]),
    "highest": max,
    "lowest": min,
}


@dataclass(frozen=True)
class Observed:
    """What a bug does to a small run."""

    figures: dict[str, tuple[float, float]]  # healthy, with the bug; each of the bug's `look`
    stops: str = ""  # what the run says when it refuses to go on; the figures are then those with that check taken out


@contextmanager
def silence(check: bool = True) -> Iterator[None]:
    """Nothing is printed; with `check` False, PPO goes on whatever its first ratio is."""
    quiet, floor = terminal.console.quiet, logprobs.NOISE_FLOOR["fp32"]
    terminal.console.quiet = True
    logprobs.NOISE_FLOOR["fp32"] = floor if check else math.inf
    try:
        yield
    finally:
        terminal.console.quiet, logprobs.NOISE_FLOOR["fp32"] = quiet, floor


def run_in(name: str, config: Any, seed: int, bug: Bug | None = None, check: bool = True) -> list[dict[str, float]]:
    """The metrics of each step, and what healthy code says of the weights after it."""
    world = WORLDS[name]
    data = world.data(config, seed)
    with silence(check), infect(bug) if bug else nullcontext():
        run = world.go(data, config, seed)
    return run.judged(functools.partial(world.judge, config))


healthy_run = functools.cache(run_in)  # many bugs are set against the same


def observe(bug: Bug, seeds: Sequence[int] = SEEDS) -> Observed:
    """Both runs, with each seed; the means of the telling figures."""
    config, stops = WORLDS[bug.world].config, ""
    config = dataclasses.replace(config, **bug.options) if bug.options else config
    pairs = []
    for seed in seeds:
        try:
            infected = run_in(bug.world, config, seed, bug)
        except RuntimeError as error:  # check_ratio's
            stops = stops or str(error)
            infected = run_in(bug.world, config, seed, bug, check=False)
        pairs.append((healthy_run(bug.world, config, seed), infected))
    return Observed({spec: tuple(mean_of(rows, spec) for rows in zip(*pairs)) for spec in bug.look}, stops)


def mean_of(seeds: Sequence[list[dict[str, float]]], spec: str) -> float:
    name, time = spec.rsplit(" ", 1)
    value = statistics.fmean(TIMES[time]([row[name] for row in rows if name in row]) for rows in seeds)
    return float(f"{value:.4g}")


# --- the bugs ---------------------------------------------------------------------------------------------------------
# The first sentence of a symptom stands alone in the page's index.

BUGS = (
    # Supervised fine-tuning: what counts, and what the loss is divided by.
    Bug(
        name="mask-off-by-one",
        title="The response mask is off by one",
        where="minirlhf.algorithms.logprobs:response_stats",
        before="predictors(counted, tokens.device)",
        after="predictors(torch.cat([counted[:, :1], counted[:, :-1]], dim=1), tokens.device)",
        symptom="The loss is lower than it should be, and responses begin badly. The first token of a response is "
        "never learned, and the padding after its end, which is easy, is learned instead.",
        why="The mask is of tokens and the logits are of the positions before them. One of the two has to be shifted, "
        "and shifting the wrong one runs just as well.",
        test="tests/algorithms/test_sft.py::test_the_loss_is_the_cross_entropy_of_the_responses_alone",
        look=("loss last", "KL to the teacher last", "first-token KL last"),
        world="sft",
    ),
    Bug(
        name="prompt-in-loss",
        title="Prompt tokens count in the loss",
        where="minirlhf.data.batches:collate",
        before="mask & (position >= torch.tensor([example.start for example in examples])[:, None])",
        after="mask",
        symptom="`tokens` counts whole sequences, and the loss is another one. Nothing else here, where three prompts"
        " are learned in no time; where prompts are long and all different, most of the gradient goes into "
        "writing prompts.",
        why="A language model learns every token unless it is told otherwise.",
        test="tests/algorithms/test_sft.py::test_the_loss_is_the_cross_entropy_of_the_responses_alone",
        look=("tokens first", "loss last", "KL to the teacher last"),
        world="sft",
    ),
    Bug(
        name="eot-as-padding",
        title="Padding is told by its id, which is that of end-of-text",
        where="minirlhf.data.batches:collate",
        before="mask = position < torch.tensor([len(example.tokens) for example in examples])[:, None]",
        after="mask = tokens != fill",
        symptom="The model never ends: all its responses run to the limit. The loss does not tell. It is lower, "
        "because the end of a response was hard to predict and counts no longer.",
        why="GPT-2 has no token for padding, so that end-of-text stands in for it, and `tokens != pad` drops both.",
        test="tests/data/test_records.py::test_collate_pads_on_the_right",
        look=("loss last", "ended last", "KL to the teacher last"),
        world="sft",
    ),
    Bug(
        name="labels-not-shifted",
        title="A token is predicted from itself",
        where="minirlhf.algorithms.logprobs:response_stats",
        before="before, at = tokens[:, :-1],",
        after="before, at = tokens[:, 1:],",
        symptom="The loss falls to 0. No honest loss falls below the entropy of what people write; what this model "
        "writes is rubbish.",
        why="Some libraries shift the labels inside the loss and others expect them shifted.",
        test="tests/model/test_gpt.py::test_response_stats_are_those_of_all_positions_picked_out",
        look=("loss last", "KL to the teacher last"),
        world="sft",
    ),
    Bug(
        name="unscaled-accumulation",
        title="The optimiser steps on an unscaled accumulation",
        where="minirlhf.algorithms.sft:train",
        before="loss = sft_loss(model, piece) / tokens",
        after="loss = sft_loss(model, piece) / piece.counted",
        symptom="Loss and gradient are as many times too large as there are microbatches. Here there are four, and a "
        "loss above log 4 = 1.39 is worse than guessing. Adam forgives the scale, but the clip at norm 1 now binds to "
        "the end, and tokens of a short microbatch weigh more than those of a long one.",
        why="The mean over a microbatch is what a loss function gives; that their sum is not the mean over the batch "
        "shows only where there is more than one.",
        test="tests/algorithms/test_sft.py::test_accumulated_gradients_are_those_of_one_big_batch",
        look=("loss first", "loss last", "grad_norm last", "KL to the teacher last"),
        world="sft",
        options={"microbatch_size": 8},
    ),
    # The reward model, and what reads it.
    Bug(
        name="ranks-reversed",
        title="Ranks are read as scores: higher is better",
        where="minirlhf.algorithms.losses:ranking_loss",
        before="loss = scores.new_zeros(len(scores))",
        after="ranks = [-rank for rank in ranks]\n    loss = scores.new_zeros(len(scores))",
        symptom="The loss falls as it should, while the accuracy sinks below one half.",
        why="Rank 1 is the best and a score of 1 the worst, and data come with either.",
        test="tests/algorithms/test_reward_model.py::test_a_ranking_by_hand",
        look=("loss last", "best_over_worst last", "held_out_accuracy last", "true accuracy last"),
        world="rm",
    ),
    Bug(
        name="score-past-end",
        title="The score is read one past the end",
        where="minirlhf.model.gpt:last_places",
        before="last = torch.where(mask, positions, -1).amax(dim=1)",
        after="last = (torch.where(mask, positions, -1).amax(dim=1) + 1).clamp(max=mask.shape[1] - 1)",
        symptom="The same response gets another score in other company. The metrics do not tell: `reward` rises, but "
        "to what the reward model says of the padding behind a response. The longest of a batch alone gets "
        "its own score.",
        why="The number of tokens is the place of the last one plus one.",
        test="tests/algorithms/test_rewards.py::test_scores_do_not_depend_on_the_batch",
        look=("reward last", "true reward last", "regret last"),
        world="ppo, reward model",
    ),
    Bug(
        name="retokenised",
        title="The text is tokenised again before it is scored",
        where="minirlhf.algorithms.rewards:RewardModelScorer.example",
        before="tokens_of(self.tokenizer, prompt, response)",
        after="tokens_of(self.tokenizer, str(prompt), str(response))",
        symptom="`reward` rises less than it could, and the policy is worse off than it began. It is paid for another "
        "response than it wrote: two tokens that spell a third are scored as that one, and a response that was cut "
        "gets an end that it does not have.",
        why="Reward functions take text, and nothing warns that encoding does not always undo decoding.",
        test="tests/algorithms/test_rewards.py::test_reward_model_never_tokenises_what_was_drawn_again",
        look=("reward last", "true reward last", "regret last"),
        world="ppo, reward model",
    ),
    # Sampling against training: the first ratio is what gives these away.
    Bug(
        name="positions-not-reset",
        title="Positions are those of the longest prompt",
        where="minirlhf.model.decoding:Decoder.begin",
        before="positions = upload(torch.tensor([length - 1 for length, _ in self.spans]), device)",
        after="positions = torch.full((capacity,), max(length - 1 for length, _ in self.spans), device=device)",
        symptom="The first ratio is not 1, and the run stops. Without that check, much is clipped and the reward "
        "rises much less, since the policy that is trained is not the one that is sampled.",
        why="Training pads on the right, where positions need no thought; a sampler draws the next tokens of all rows "
        "at once, and a shorter prompt has its own elsewhere.",
        test="tests/model/test_generate.py::test_logprobs_are_those_of_a_second_reading",
        look=("ratio_drift first", "clip_fraction last", "reward last", "true reward last", "regret last"),
    ),
    Bug(
        name="cache-off-by-one",
        title="The KV cache is off by one",
        where="minirlhf.model.decoding:_forward",
        before="stores, tokens, positions)",
        after="stores, tokens, (positions - 1).clamp(min=0))",
        symptom="The first ratio is not 1, and the run stops. Without that check, much is clipped and the reward rises "
        "less: the sampler puts a new token where the last one stands, and never looks at that one again.",
        why="The place of the last token and the place where the next one goes are one apart.",
        test="tests/model/test_generate.py::test_logprobs_are_those_of_a_second_reading",
        look=("ratio_drift first", "clip_fraction last", "reward last", "true reward last", "regret last"),
    ),
    Bug(
        name="temperature-once",
        title="The temperature is missing in one of two log-probs",
        where="minirlhf.model.sampler:Sampler.pick",
        before="stats = token_stats(logits, tokens, temperature=sampling.temperature or 1.0, kernel=self.kernel)",
        after="stats = token_stats(logits, tokens, kernel=self.kernel)",
        symptom="The first ratio is not 1, and the run stops. Without that check, half of all tokens are clipped, and "
        "`kl_k1` is below 0 at the first rollout, where policy and reference are the same.",
        why="The sampler divides the logits, and the training code was written by somebody who only sees tokens.",
        test="tests/model/test_generate.py::test_logprobs_are_those_of_a_second_reading",
        look=("ratio_drift first", "kl_k1 first", "clip_fraction last", "reward last", "regret last"),
        options={"temperature": 0.7},
    ),
    # The KL.
    Bug(
        name="reference-temperature",
        title="The temperature is missing in the reference's log-probs",
        where="minirlhf.algorithms.logprobs:ask",
        before="ref_hidden = ref(before, at=at)",
        after="ref_hidden = temperature * ref(before, at=at)",
        symptom="`kl_exact` is not 0 at the first rollout, where policy and reference are the same. From there on it "
        "looks as always, and holds the policy to a reference that was never sampled from.",
        why="The reference is run by itself, often elsewhere and earlier, with the settings of evaluation.",
        test="tests/algorithms/test_ppo.py::test_one_step_by_hand",
        look=("kl_exact first", "kl_exact last", "true KL last", "regret last"),
        options={"temperature": 0.7},
    ),
    Bug(
        name="kl-of-itself",
        title="The KL is taken against the updated policy",
        where="minirlhf.model.gpt:clone",
        before="    twin = copy.deepcopy(model)\n    twin.requires_grad_(False)\n    return twin.eval()",
        after="    twin = copy.copy(model)\n    return twin.eval()",
        symptom="Every KL is 0 and stays 0, while `reward` rises higher than it should. The policy goes wherever the "
        "reward is and keeps a single answer: the entropy falls to 0.",
        why="Copying a module copies the names of its weights and not the weights; `ref = policy` does not even that. "
        "Whoever freezes the copy is saved: there is nothing left to train.",
        test="tests/model/test_gpt.py::test_a_clone_is_frozen_and_independent",
        look=("kl_exact last", "true KL last", "reward last", "entropy last", "regret last"),
    ),
    Bug(
        name="kl-sign",
        title="The KL has the wrong sign",
        where="minirlhf.algorithms.losses:shape_rewards",
        before="rewards = torch.where(mask, -kl_coef * kl, 0.0)",
        after="rewards = torch.where(mask, kl_coef * kl, 0.0)",
        symptom="`kl_exact` grows several times as large as it should, and `entropy` falls to 0. `reward` does not "
        "tell, it is even higher; `objective` does.",
        why="The KL is subtracted from a reward and added to a loss.",
        test="tests/algorithms/test_ppo.py::test_shaped_rewards_by_hand",
        look=("kl_exact last", "entropy last", "reward last", "objective last", "regret last"),
    ),
    Bug(
        name="reversed-k3",
        title="k3 is reversed",
        where="minirlhf.algorithms.losses:kl_terms",
        before="return torch.expm1(-logratio) + logratio",
        after="return torch.expm1(logratio) - logratio",
        symptom="`kl_k3` is not `kl_exact`, of which it should be an estimate. Where it only is logged, that is all. "
        "Here it is the KL that is paid for, which no longer holds the policy where it should.",
        why="Schulman's note writes r for π_ref/π where code has log π - log π_ref; and either way round it is "
        "never negative and 0 at the reference.",
        test="tests/algorithms/test_ppo.py::test_the_direction_of_the_kl_shows",
        look=("kl_k3 last", "kl_exact last", "entropy last", "regret last"),
        options={"kl_in": "both", "kl_estimator": "k3"},
    ),
    # Rewards and advantages.
    Bug(
        name="score-first-token",
        title="The score is put on the first token",
        where="minirlhf.algorithms.losses:shape_rewards",
        before="last = mask.sum(-1, keepdim=True) - 1",
        after="last = torch.zeros_like(mask[:, :1], dtype=torch.long)",
        symptom="`reward` stops rising early, and `entropy` stays high. The first token is taught as it should be, "
        "since the score is all that is to come; every later one learns the KL alone.",
        why="`rewards[:, 0]` or `rewards[:, -1]`, and neither is the last token of a padded row.",
        test="tests/algorithms/test_ppo.py::test_shaped_rewards_by_hand",
        look=("reward last", "entropy last", "explained_variance last", "regret last"),
    ),
    Bug(
        name="end-penalty-sign",
        title="The penalty for never ending has the wrong sign",
        where="minirlhf.algorithms.rewards:shape_scores",
        before="return scores - missing_eot_penalty * truncated.float()",
        after="return scores + missing_eot_penalty * truncated.float()",
        symptom="`length` goes towards the limit and `eot_rate` falls.",
        why="A penalty is a positive number to be subtracted, or a negative one to be added.",
        test="tests/algorithms/test_ppo.py::test_scores_are_clipped_and_the_unfinished_pay",
        look=("length last", "eot_rate last", "reward last", "regret last"),
        options={"missing_eot_penalty": 1.0},
    ),
    Bug(
        name="critic-sees-token",
        title="The critic sees the token that it is asked about",
        where="minirlhf.algorithms.logprobs:ask",
        before="lambda: (critic(before, at=at),)",
        after="lambda: (critic(tokens, at=places(counted)),)",
        symptom="Nothing that points to it: `reward` rises a little less, the critic is a little worse. What a token "
        "is worth is already in the value that is taken from it, so that much of what it earned is lost.",
        why="The state that a token leads to has the token's own index; the one it is drawn in has one less.",
        test="tests/algorithms/test_ppo.py::test_values_are_read_before_the_token_is_drawn",
        look=("reward last", "explained_variance last", "value_loss last", "regret last"),
    ),
    Bug(
        name="gae-without-cut",
        title="GAE is not cut at the last step",
        where="minirlhf.algorithms.losses:gae",
        before="next_value = next_advantage = rewards.new_zeros(len(rewards))",
        after="next_value, next_advantage = values[:, -1], rewards.new_zeros(len(rewards))",
        symptom="The critic explains nothing, and `length` goes to the limit. A response as long as the longest is "
        "promised its last value once more, so that its value may be anything, and being cut pays.",
        why="A game that is cut goes on, and its value has to be carried over the cut. A response is over.",
        test="tests/algorithms/test_ppo.py::test_advantages_by_hand",
        look=("explained_variance last", "value_loss last", "length last", "reward last", "regret last"),
    ),
    Bug(
        name="whiten-keeps-mean",
        title="Whitening adds the mean back",
        where="minirlhf.algorithms.losses:whiten",
        before="return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)",
        after="return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8) + mean, 0.0)",
        symptom="`policy_loss` begins far from 0: it is minus the mean advantage. `advantage_std` is 1, as it should "
        "be. Whatever is drawn is made likelier, until the critic knows how high rewards are; here, where "
        "they are about 4, that takes some ten rollouts.",
        why="Libraries have one function for both, with a flag: rewards keep their mean, advantages must not.",
        test="tests/algorithms/test_ppo.py::test_whitening_by_hand",
        look=("policy_loss first", "advantage_std first", "regret fifth", "regret last"),
        world="ppo, rewards + 4",
    ),
    Bug(
        name="whiten-over-padding",
        title="Whitening goes over the padding",
        where="minirlhf.algorithms.losses:whiten",
        before="    mean = masked_mean(x, mask)\n    variance = masked_mean((x - mean).square(), mask)",
        after="    mean = x.mean()\n    variance = (x - mean).square().mean()",
        symptom="`advantage_std` is not 1. It is too small while the mean is far from the padding's zeros, and too "
        "large afterwards. Nothing else here, where a quarter of a batch is padding at most.",
        why="The padding holds zeros, and zeros look harmless.",
        test="tests/algorithms/test_ppo.py::test_whitening_by_hand",
        look=("advantage_std first", "advantage_std last", "policy_loss first", "regret fifth", "regret last"),
        world="ppo, rewards + 4",
    ),
    # The update.
    Bug(
        name="advantage-not-detached",
        title="The advantage is not detached from the critic",
        where="minirlhf.algorithms.ppo:token_losses",
        before="losses.policy_loss(now.logprobs, old_logprobs, advantages, config.clip)",
        after="losses.policy_loss(now.logprobs, old_logprobs, advantages + old_values - now.values, config.clip)",
        symptom="`value_loss` settles at 2, and `explained_variance` looks fine. The policy's loss pulls every value "
        "down with slope 1, and the value loss holds against it with slope ½ (V - return). It gives way by 2,"
        " which is no variance, and the policy minds little.",
        why="An advantage made of the newest values looks fresher, and autograd follows them without being asked.",
        test="tests/algorithms/test_ppo.py::test_no_loss_reaches_the_other_network",
        look=("value_loss last", "explained_variance last", "reward last", "regret last"),
    ),
    Bug(
        name="returns-from-new-values",
        title="Returns are made of the new values",
        where="minirlhf.algorithms.ppo:token_losses",
        before="losses.value_loss(now.values, old_values, returns, config.value_clip)",
        after="losses.value_loss(now.values, old_values, returns - old_values + now.values.detach(), 0.2)",
        symptom="Nothing that one would notice: the critic is somewhat worse. Its target runs away from it, a step "
        "for every step, until the rollout ends; the more passes over a rollout, the further.",
        why="A return is an advantage plus a value, and by then there are two values.",
        test="tests/algorithms/test_ppo.py::test_losses_of_networks_that_moved_are_against_the_figures_of_the_rollout",
        look=("value_loss last", "explained_variance last", "reward last", "regret last"),
        options={"epochs": 4},
    ),
    Bug(
        name="value-clip-centre",
        title="The value clip is around the wrong centre",
        where="minirlhf.algorithms.losses:value_loss",
        before="clipped = old_values + (values - old_values).clamp(-clip, clip)",
        after="clipped = values.clamp(-clip, clip)",
        symptom="`explained_variance` stays at 0. No value gets far beyond ±0.2, where its error has no gradient any "
        "more. The policy learns all the same here, from whitened advantages and short responses.",
        why="The ratio is clipped around 1, a constant; values are clipped around what they were.",
        test="tests/algorithms/test_ppo.py::test_the_value_loss_by_hand",
        look=("explained_variance last", "value_loss last", "reward last", "regret last"),
    ),
    Bug(
        name="clip-max",
        title="The clip takes the maximum for the minimum",
        where="minirlhf.algorithms.losses:policy_loss",
        before="return -torch.minimum(",
        after="return -torch.maximum(",
        symptom="`ratio_max` and `old_kl` jump up and down from one rollout to the next. A token that already earns "
        "is pushed on beyond the clip, and one that has gone the wrong way is not pulled back.",
        why="The smaller of two gains is the larger of two losses; the minus sign moves through the formula and the "
        "minimum does not.",
        test="tests/algorithms/test_ppo.py::test_the_clipped_surrogate_by_hand",
        look=("ratio_max highest", "old_kl highest", "clip_fraction last", "reward last", "regret last"),
        options={"epochs": 4},
    ),
    Bug(
        name="old-logprobs-late",
        title="Old log-probs are taken anew before every update",
        where="minirlhf.algorithms.ppo:token_losses",
        before="    of_policy =",
        after="    old_logprobs = now.logprobs.detach()\n    of_policy =",
        symptom="`clip_fraction` and `old_kl` are 0 and `ratio_max` is 1, always. That looks calm, and nothing is "
        "clipped: the more passes over a rollout, the further the policy runs.",
        why="The log-probs are at hand in the update, and those of the sampler have to be kept.",
        test="tests/algorithms/test_ppo.py::test_losses_of_networks_that_moved_are_against_the_figures_of_the_rollout",
        look=("clip_fraction first", "ratio_max highest", "old_kl first", "kl_exact last", "regret last"),
        options={"epochs": 4},
    ),
    Bug(
        name="entropy-sign",
        title="The entropy bonus has the wrong sign",
        where="minirlhf.algorithms.ppo:token_losses",
        before="- config.entropy_coef * now.entropy",
        after="+ config.entropy_coef * now.entropy",
        symptom="`entropy` is lower with a bonus than without. The runs of [unmasked-mean](#unmasked-mean) have none.",
        why="A bonus is subtracted from a loss.",
        test="tests/algorithms/test_ppo.py::test_losses_of_networks_that_moved_are_against_the_figures_of_the_rollout",
        look=("entropy last", "kl_exact last", "reward last"),
        options={"entropy_coef": 0.3},
    ),
    Bug(
        name="unmasked-mean",
        title="A metric is a mean over the padding too",
        where="minirlhf.algorithms.experience:describe",
        before='"entropy": masked_mean(old.entropy, mask),',
        after='"entropy": old.entropy.mean(),',
        symptom="`entropy` is too low, and falls where responses get shorter. Training is untouched, which is why such "
        "a metric lives long.",
        why="A metric is written in a hurry, and `mean()` needs no mask.",
        test="tests/algorithms/test_ppo.py::test_padding_changes_no_logged_mean",
        look=("entropy first", "entropy last", "length last", "regret last"),
    ),
    # DPO.
    Bug(
        name="logps-averaged",
        title="Log-probs are averaged in DPO",
        where="minirlhf.algorithms.dpo:response_logps",
        before="return total / upload(packed.lengths, total.device) if average else total",
        after="return total / upload(packed.lengths, total.device)",
        symptom="`chosen_logps` is that of a token, about -1, and not that of a response. The margin grows more "
        "slowly, and what is learned is the optimum of another problem.",
        why="Cross-entropy is averaged everywhere else.",
        test="tests/algorithms/test_dpo.py::test_a_response_is_worth_the_sum_of_its_tokens",
        look=("chosen_logps first", "margin last", "accuracy last", "true KL last", "regret last"),
        world="dpo",
    ),
    Bug(
        name="smoothing-ignored",
        title="Label smoothing is ignored",
        where="minirlhf.algorithms.losses:preference_loss",
        before="return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)",
        after="return -F.logsigmoid(beta * h)",
        symptom="The loss falls below its floor, and the margin grows on. With a share ε of the labels taken to be "
        "wrong, no loss is below -ε log ε - (1-ε) log(1-ε), 0.50 for the 0.2 here, and no margin has reason to exceed "
        "log((1-ε)/ε) = 1.39.",
        why="The argument is there, is passed on, and nothing complains if it is never read.",
        test="tests/algorithms/test_dpo.py::test_a_bounded_aim_is_left_behind_no_further",
        look=("loss lowest", "margin last", "accuracy last", "chosen_logps last"),
        world="dpo, few records",
        options={"label_smoothing": 0.2},
    ),
    Bug(
        name="pair-swapped-once",
        title="Chosen and rejected are swapped in one place",
        where="minirlhf.algorithms.dpo:pair_metrics",
        before="ref_chosen, ref_rejected = (ref_logps[places] for places in pick)",
        after="ref_rejected, ref_chosen = (ref_logps[places] for places in pick)",
        symptom="The loss of the first step is not ln 2 = 0.693. From there on loss and accuracy look as they should: "
        "the policy orders the pairs, but around a reference turned upside down.",
        why="Four log-probs of one shape travel in tuples, and every order of them type-checks.",
        test="tests/algorithms/test_dpo.py::test_metrics_of_pairs_by_hand",
        look=("loss first", "loss last", "accuracy last", "regret last"),
        world="dpo",
    ),
    Bug(
        name="cache-misaligned",
        title="The reference's log-probs are those of other responses",
        where="minirlhf.algorithms.dpo:with_reference",
        before="for i, own in zip(places, ",
        after="for i, own in zip(sorted(places), ",
        symptom="The loss of the first step is not ln 2 = 0.693. From there on it is a little too high, and the "
        "accuracy a little too low.",
        why="Batches are sorted by length, and what comes out of them has to go back to where it belongs.",
        test="tests/algorithms/test_dpo.py::test_the_reference_is_kept_response_by_response",
        look=("loss first", "loss last", "accuracy last", "regret last"),
        world="dpo",
    ),
    # Evaluation.
    Bug(
        name="ties-win",
        title="Ties count as wins",
        where="minirlhf.commands.measures:wins",
        before="return (torch.sign(scores - baseline_scores) + 1) / 2",
        after="return (scores >= baseline_scores).float()",
        symptom="A model beats itself. Judges who give whole marks tie often, and each tie goes to whoever is asked "
        "about.",
        why="`>=` or `>`: one is as wrong as the other.",
        test="tests/commands/test_evaluate.py::test_ties_count_half",
        look=("win_rate last",),
        world="evaluate",
    ),
)


# --- the page ---------------------------------------------------------------------------------------------------------

EXACT = {  # what is summed over the list of all responses; every other figure is a metric of the run
    "regret": "exact regret, %",
    "true KL": "exact KL",
    "true reward": "exact reward",
    "true accuracy": "exact accuracy",
    "KL to the teacher": "exact KL to the teacher",
    "first-token KL": "exact KL of the first token",
    "ended": "exact share that ends",
}
WHEN = {
    "first": "first step",
    "fifth": "fifth step",
    "last": "at the end",
    "highest": "highest",
    "lowest": "lowest",
}
INTRODUCTION = """\
# The bug zoo

RLHF hides its mistakes. A run with a sign turned around still learns something, its reward still rises, and its loss
meant little to begin with. Here are {n} classic ones. Each is an edit of a line or two of one function of this
repository, and each has a test that fails because of it: `tests/test_bug_zoo.py` puts them into the code one at a time
and does not pass while any of them goes unnoticed.

```
python tests/bug_zoo.py kl-sign                                  # a small run with the bug and without, side by side
python tests/bug_zoo.py kl-sign --test                           # its test with the bug in the code: it fails
python tests/bug_zoo.py kl-sign -- train_ppo.py --out runs/sick  # any script with the bug in the code
```

No file is changed: a bug is put into the running process, and gone with it.

**The figures** are those of runs so small that all responses can be listed: three prompts, forty responses of up to
three tokens with random rewards, a GPT of one layer, forty rollouts of PPO or a hundred steps of DPO; means over three
seeds, *at the end* being the last quarter of a run. What is called *exact* is a sum over the list and no estimate
(`minirlhf/exact.py`). The *regret* is what the policy leaves of the objective it is trained on, reward less β times
KL, against the best policy there is: 0 % is the optimum, 100 % is where it began, and more is worse than nothing
learned. Names in `code` are metrics, as every run logs them.

**To find a bug**, start with what you see.
"""


def metric(spec: str) -> str:
    """`kl_k1 last` as the page writes it."""
    name, time = spec.rsplit(" ", 1)
    return f"{EXACT.get(name, f'`{name}`')}, {WHEN[time]}"


def number(value: float) -> str:
    """Three digits."""
    return "0" if abs(value) < 5e-4 else f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def page(observed: dict[str, Observed]) -> str:
    """docs/bug-zoo.md, from the table and the figures."""
    lines = [INTRODUCTION.format(n=len(BUGS)), "| what you see | the bug | the test that catches it |", "|---|---|---|"]
    for bug in BUGS:
        first, *_ = bug.symptom.partition(". ")
        lines.append(f"| {first.rstrip('.')} | [{bug.title}](#{bug.name}) | `{bug.test.rpartition('::')[2]}` |")
    for bug in BUGS:
        seen = observed[bug.name]
        module, _, function = bug.where.partition(":")
        lines += ["", f"### {bug.name}", "", f"**{bug.title}**: `{module.replace('.', '/')}.py`, `{function}`."]
        lines += ["", "```diff", *diff(bug), "```", "", fill(bug.symptom), ""]
        if seen.stops:
            lines += [fill(seen.stops, "> "), ""]
        settings = ", ".join([bug.world, *(f"{key} {value}" for key, value in bug.options.items())])
        lines += [f"| {settings} | healthy | with the bug |", "|---|---:|---:|"]
        lines += [f"| {metric(spec)} | {number(a)} | {number(b)} |" for spec, (a, b) in seen.figures.items()]
        lines += ["", fill(bug.why), "", f'`python -m pytest "{bug.test}"`']
    return "\n".join(lines) + "\n"


def diff(bug: Bug) -> list[str]:
    """The edit, in whole lines of the source."""
    source = textwrap.dedent(inspect.getsource(healthy(bug.where)))
    at = source.index(bug.before)
    end = at + len(bug.before)
    first, last = source.rfind("\n", 0, at) + 1, source.find("\n", end)
    indent = " " * min(len(line) - len(line.lstrip()) for line in source[first:last].splitlines())
    sides = source[first:last], source[first:at] + bug.after + source[end:last]
    before, after = ([line.removeprefix(indent) for line in side.splitlines()] for side in sides)
    return [line.rstrip() for line in difflib.ndiff(before, after) if not line.startswith("?")]


def fill(text: str, start: str = "") -> str:
    """A paragraph of lines of 120 characters."""
    return textwrap.fill(
        text, 120, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False
    )


def write(observed: dict[str, Observed]) -> None:
    """The figures, with what they were measured of; and the page."""
    bugs = {
        bug.name: {"edit": edit(bug), "stops": observed[bug.name].stops, "figures": observed[bug.name].figures}
        for bug in BUGS
    }
    FIGURES.write_text(json.dumps({"seeds": SEEDS, "bugs": bugs}, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(observed))


def edit(bug: Bug) -> dict[str, Any]:
    """What the figures of a bug follow from."""
    return {"where": bug.where, "before": bug.before, "after": bug.after, "world": bug.world, "options": bug.options}


def read() -> tuple[dict[str, Observed], dict[str, dict[str, Any]]]:
    """The figures as they were measured last, and of what."""
    bugs = json.loads(FIGURES.read_text())["bugs"]
    figures = {name: {spec: tuple(pair) for spec, pair in own["figures"].items()} for name, own in bugs.items()}
    observed = {name: Observed(figures[name], own["stops"]) for name, own in bugs.items()}
    return observed, {name: own["edit"] for name, own in bugs.items()}


# --- the command line -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Measure bugs and print what they do; or run a test, or a script, with one of them in the code."""
    ours, theirs = list(argv), []
    if "--" in ours:
        at = ours.index("--")
        ours, theirs = ours[:at], ours[at + 1 :]
    parser = argparse.ArgumentParser(prog="python tests/bug_zoo.py", description=main.__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="BUG", help=f"of {', '.join(bug.name for bug in BUGS)}; all of them"
    )
    parser.add_argument("--test", action="store_true", help="run the bug's test with the bug in the code")
    parser.add_argument("--write", action="store_true", help=f"measure all and write {FIGURES.name} and {PAGE.name}")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name} from the figures as they are")
    args = parser.parse_args(ours)
    by_name = {bug.name: bug for bug in BUGS}
    if unknown := [name for name in args.names if name not in by_name]:
        parser.error(f"there is no bug {unknown[0]!r}; there are {', '.join(by_name)}")
    if theirs and not Path(theirs[0]).is_file():
        parser.error(f"there is no script {theirs[0]!r}")
    if (args.test or theirs) and len(args.names) != 1:
        parser.error("one bug at a time")
    if (args.write or args.page) and (args.names or theirs):
        parser.error("--write and --page are for all bugs")
    bugs = [by_name[name] for name in args.names] or list(BUGS)

    if args.page:
        PAGE.write_text(page(read()[0]))
        return 0
    if args.test:
        with infect(bugs[0]):
            return int(pytest.main([str(ROOT / bugs[0].test), "-x", "-pno:cacheprovider", "-Wignore:Module already"]))
    torch.set_num_threads(1)  # policy and critic in one pass, see ppo.train
    if theirs:
        sys.argv = theirs
        with infect(bugs[0]):
            runpy.run_path(theirs[0], run_name="__main__")
        return 0
    observed = {}
    for bug in bugs:
        seen = observed[bug.name] = observe(bug)
        print(f"\n{bug.name}: {bug.title}  ({bug.world})")
        print(textwrap.indent(seen.stops + "\n", "  ") if seen.stops else "", end="")
        print(f"  {'':40}{'healthy':>12}{'with the bug':>15}")
        for spec, pair in seen.figures.items():
            print(f"  {metric(spec).replace('`', ''):40}{number(pair[0]):>12}{number(pair[1]):>15}", flush=True)
    if args.write:
        write(observed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
