"""Improve a policy on a reward with PPO, held to where it started by a KL penalty.

    python train_ppo.py                                                 the embedded help desk, its reward model
    python train_ppo.py --reward gold                                   straight on the gold judge
    python train_ppo.py --explain 3                                     and what happened to every token of 3 responses
    python train_ppo.py --prompts mine.jsonl --init runs/mine --reward my_rewards:politeness --out runs/mine-ppo

A reward function is any `def politeness(prompts, responses, texts)` that returns one number a response.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minirlhf import InputError, fits, helpdesk
from minirlhf.data import Text, read_records
from minirlhf.generate import encode_prompt
from minirlhf.model import GPT, ScalarModel, clone
from minirlhf.ppo import PPOConfig, parse_range, train
from minirlhf.rewards import GoldJudge, Reward, load_reward, reward_models
from minirlhf.runs import (
    Run,
    RunArgs,
    check_at_least,
    cli,
    console,
    ensure_run,
    load_run,
    pick_device,
    prepare,
    require_same_tokenizer,
    seeded,
)
from minirlhf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Args(RunArgs):
    """Proximal policy optimisation with a KL penalty to the initial policy."""

    out: Path = Path("runs/ppo")
    """The run's folder."""
    checkpoint_every: int = 5
    """Rollouts between checkpoints."""
    prompts: str = "helpdesk"
    """A file of records, whose prompts are used, or helpdesk."""
    init: str = "runs/sft"
    """The policy to start from, which is also the reference: a run, or GPT-2 (a folder, gpt2, ORG/NAME)."""
    reward: str = "runs/rm"
    """runs/rm (a reward model's folder), gold, pkg.module:function, hf:DIR (a text classifier), or several as one:
    mean:A,B,… or worst:A,B,…"""
    config: PPOConfig = PPOConfig()
    critic_init: str = "auto"
    """What a separate critic starts as: auto (the reward model, if that is the reward, else policy), policy (its trunk,
    under a head of zeros), or the folder of a reward model."""
    n: int = 4000
    """Prompts drawn from the embedded world."""
    prompt_tokens: str | None = None
    """LOW:HIGH: take the first LOW to HIGH tokens of each text as its prompt."""
    skip_long_prompts: bool = False
    """Leave out prompts that do not fit the context with their response, instead of stopping."""
    explain: int = 0
    """Responses to take apart, token by token, at the first rollout and wherever samples are shown: tables on the
    terminal, and explain.html in the run's folder; 0 = none."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, n=self.n)
        check_at_least(0, explain=self.explain)
        if self.explain > self.config.batch_size:
            raise InputError(
                f"--explain {self.explain} is more than the {self.config.batch_size} responses of a rollout; lower it, "
                "or raise --batch-size"
            )
        if self.prompt_tokens is not None:
            parse_range("--prompt-tokens", self.prompt_tokens)
        if self.critic_init != "auto" and self.config.critic == "shared":
            raise InputError(
                f"--critic-init {self.critic_init} is for a separate critic; leave it out with --critic shared"
            )


def main(args: Args) -> None:
    """Prompts → policy, reference, critic, reward → one call → save."""
    run = Run(args, "train_ppo.py", args.config.steps)
    if run.finished:
        return console.print(f"{args.out} is finished; nothing to resume")
    device = pick_device(args.device)
    texts = read_prompts(args)
    if args.init == "runs/sft" and args.prompts == "helpdesk":
        ensure_run(Path("runs/sft"), "train_sft.py", "--seed", str(args.seed))
        if args.reward == "runs/rm":
            ensure_run(Path("runs/rm"), "train_rm.py", "--seed", str(args.seed))
    policy, tokenizer = load_run(args.init, device=device)
    reward = load_reward(args.reward, device, policy_tokenizer=tokenizer, policy_folder=args.init)
    prompts = tokenise(args, texts, tokenizer, policy)
    ref = clone(policy)
    require_room(args, prompts, reward)
    critic = make_critic(args, policy, reward)
    gold = GoldJudge() if args.prompts == "helpdesk" and args.reward != "gold" else None

    console.print(f"{len(prompts):,} prompts of {args.prompts}, reward {reward.name}")
    frozen: list[GPT | ScalarModel] = [ref]
    for scorer in reward_models(reward):
        scorer.dtype = args.dtype
        frozen.append(scorer.model)
    prepare(args, policy, critic, *frozen)
    config = fitted(args, policy, critic, frozen, prompts)
    train(
        policy, ref, critic, reward, lambda step: prompts_at(args, prompts, step), tokenizer, config, run,
        seed=args.seed, gold=gold, dtype=args.dtype, kernel=args.kernel, compile=args.compile, explain=args.explain,
    )  # fmt: skip
    run.finish(policy, tokenizer)


def read_prompts(args: Args) -> list[tuple[str, str]]:
    """(prompt, where it stands), each prompt once."""
    if args.prompts == "helpdesk":
        return [(record.prompt, "helpdesk") for record in helpdesk.train_prompts(args.n, args.seed)]
    found = {}
    for record in read_records(args.prompts):
        found.setdefault(record.text if isinstance(record, Text) else record.prompt, record.source)
        if isinstance(record, Text) and args.prompt_tokens is None:
            raise InputError(
                f"{record.source}: a text has no prompt; --prompt-tokens 2:8 takes its first tokens as one"
            )
    return list(found.items())


def tokenise(args: Args, texts: list[tuple[str, str]], tokenizer: Tokenizer, policy: GPT) -> list[list[int]]:
    """Token ids of the prompts; one that leaves no room for its response is an error, or left out if asked."""
    context, response = policy.config.n_positions, args.config.response_range[1]
    longest = None if args.prompt_tokens is None else parse_range("--prompt-tokens", args.prompt_tokens)[1]
    kept, skipped = [], 0
    for text, source in texts:
        tokens = encode_prompt(tokenizer, text)[:longest]
        if len(tokens) + response > context:
            if not args.skip_long_prompts:
                raise InputError(
                    f"{source}: a prompt of {len(tokens)} tokens and a response of {response} exceed the context of "
                    f"{context}; shorten it, lower --response-tokens, or leave such prompts out with "
                    "--skip-long-prompts"
                )
            skipped += 1
        else:
            kept.append(tokens)
    if skipped:
        console.print(f"{skipped:,} of {len(texts):,} prompts were too long for the context of {context} and left out")
    if not kept:
        raise InputError(f"{args.prompts}: no prompt fits the context of {context}; lower --response-tokens")
    return kept


def require_room(args: Args, prompts: list[list[int]], reward: Reward) -> None:
    """A reward model has to read the longest prompt with the longest response: better to know before the first step."""
    prompt, response = max(map(len, prompts)), args.config.response_range[1]
    for scorer in reward_models(reward):
        context = scorer.model.config.n_positions
        if prompt + response > context:
            raise InputError(
                f"{scorer.name}: this reward model reads {context} tokens, too few for a prompt of {prompt} and a "
                f"response of {response}; lower --response-tokens, shorten the prompts, or train it with a longer "
                "context"
            )


def fitted(args: Args, policy: GPT, critic: ScalarModel, frozen: list, prompts: list[list[int]]) -> PPOConfig:
    """Says what the run will take where every prompt and every response is as long as the longest may be.

    Returns:
        The config, on a GPU with the largest microbatch that fits (unless one was asked for): the minibatch, halved as
        often as it takes.
    """
    config, device = args.config, policy.wte.weight.device
    response, longest = config.response_range[1], max(map(len, prompts))
    if args.prompt_tokens is not None:
        longest = min(longest, parse_range("--prompt-tokens", args.prompt_tokens)[1])
    tokens = config.batch_size * (longest + response)
    sampled = fits.Shape(config.batch_size, longest + response, 0)

    def needs(rows: int) -> fits.Estimate:
        shape = fits.Shape(rows, longest + response, rows * response)
        return fits.estimate([policy, critic], frozen, [shape], tokens, args.dtype, args.kernel, sampled)

    minibatch = config.batch_size // config.minibatches
    if config.microbatch_size is None and device.type == "cuda":
        config = replace(config, microbatch_size=fits.largest(minibatch, needs, fits.memory(device)))
    rows = min(config.at_a_time or minibatch, minibatch)
    fits.say(needs(rows), rows * (longest + response))
    return config


def prompts_at(args: Args, prompts: list[list[int]], step: int) -> list[list[int]]:
    """The prompts of a step, a pure function of the step; with --prompt-tokens, cut to a length from the range."""
    generator = seeded(args.seed, step, 0)
    count = args.config.batch_size // args.config.responses_per_prompt
    chosen = torch.randint(len(prompts), (count,), generator=generator).tolist()
    if args.prompt_tokens is None:
        return [prompts[i] for i in chosen]
    low, high = parse_range("--prompt-tokens", args.prompt_tokens)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [prompts[i][:length] for i, length in zip(chosen, lengths)]


def make_critic(args: Args, policy: GPT, reward: Reward) -> ScalarModel:
    """Separate: starts as the reward model (the first, of several), which already knows what is coming (Stiennon et al.
    2020, section 3.4), or as the policy's trunk under a head of zeros. Shared: a head of zeros on the policy itself."""
    device, scorers = policy.wte.weight.device, reward_models(reward)
    if args.critic_init not in ("auto", "policy"):
        critic = critic_of(args, policy)
    elif scorers and args.critic_init == "auto" and args.config.critic == "separate":
        critic = clone(scorers[0].model)
    else:
        critic = ScalarModel(policy.config, trunk=policy if args.config.critic == "shared" else clone(policy))
        critic.score.weight.data.zero_()
    critic.requires_grad_(True)
    return critic.to(device)


def critic_of(args: Args, policy: GPT) -> ScalarModel:
    """The reward model that --critic-init names, if it can read what the policy writes."""
    critic, tokenizer = load_run(args.critic_init, scalar=True)
    require_same_tokenizer(load_run(args.init)[1], args.init, tokenizer, args.critic_init)
    if critic.config.n_positions < policy.config.n_positions:
        raise InputError(
            f"{args.critic_init}: this critic reads {critic.config.n_positions} tokens, the policy "
            f"{policy.config.n_positions}; name one with as long a context"
        )
    return critic


if __name__ == "__main__":
    cli(main, Args)
