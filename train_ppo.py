"""Improve a policy on a reward with PPO, held to where it started by a KL penalty.

    python train_ppo.py                                                 the embedded help desk, its reward model
    python train_ppo.py --reward gold                                   straight on the gold judge
    python train_ppo.py --explain 3                                     and what happened to every token of 3 responses
    python train_ppo.py --prompts mine.jsonl --init runs/mine --reward my_rewards:politeness --out runs/mine-ppo

A reward function is any `def politeness(prompts, responses, texts)` that returns one number per response.
"""

from dataclasses import dataclass
from pathlib import Path

from minirlhf import InputError
from minirlhf.algorithms.critic import make_critic
from minirlhf.algorithms.ppo import Networks, PPOConfig, train
from minirlhf.algorithms.rewards import GoldJudge, load_reward, require_context, reward_models
from minirlhf.algorithms.rollout import choose_prompts
from minirlhf.checks import check_at_least, parse_range
from minirlhf.commands.prompts import fitting_prompts
from minirlhf.commands.watch import Watch
from minirlhf.data import helpdesk
from minirlhf.data.records import read_records
from minirlhf.devices import pick_device
from minirlhf.model.gpt import clone
from minirlhf.run import Run, RunArgs, cli, console, ensure_run, fit_rollout, load_run, prepare


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
    """Prompts sampled from the embedded world."""
    prompt_tokens: str | None = None
    """LOW:HIGH: take the first LOW to HIGH tokens of each text as its prompt."""
    skip_long_prompts: bool = False
    """Leave out prompts that do not fit the context with their response, instead of stopping."""
    explain: int = 0
    """Responses to break down per token, at the first rollout and wherever samples are shown: tables on the terminal,
    and explain.html in the run's folder; 0 = none."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, n=self.n)
        check_at_least(0, explain=self.explain)
        if self.explain > self.config.batch_size:
            raise InputError(
                f"--explain {self.explain} is more than the {self.config.batch_size} responses of a rollout; lower it, "
                "or raise --batch-size"
            )
        if self.critic_init != "auto" and self.config.critic == "shared":
            raise InputError(
                f"--critic-init {self.critic_init} is for a separate critic; leave it out with --critic shared"
            )
        if self.prompt_tokens is not None:
            parse_range("--prompt-tokens", self.prompt_tokens)

    @property
    def prompt_range(self) -> tuple[int, int] | None:
        """--prompt-tokens."""
        return None if self.prompt_tokens is None else parse_range("--prompt-tokens", self.prompt_tokens)


def main(args: Args) -> None:
    """Prompts → policy, reference, critic, reward → one call → save."""
    config, run = args.config, Run(args, "train_ppo.py", args.config.steps)
    if run.finished:
        return console.print(f"{args.out} is finished; nothing to resume")
    device, on_helpdesk = pick_device(args.device), args.prompts == "helpdesk"
    records = helpdesk.train_prompts(args.n, args.seed) if on_helpdesk else read_records(args.prompts)
    if args.init == "runs/sft" and on_helpdesk:
        ensure_run(Path("runs/sft"), "train_sft.py", "--seed", str(args.seed))
        if args.reward == "runs/rm":
            ensure_run(Path("runs/rm"), "train_rm.py", "--seed", str(args.seed))

    policy, tokenizer = load_run(args.init, device=device)
    reward = load_reward(args.reward, device, policy_tokenizer=tokenizer, policy_folder=args.init)
    first, limit = args.prompt_range and args.prompt_range[1], ("--response-tokens", config.response_range[1])
    context = policy.config.n_positions
    prompts = fitting_prompts(records, tokenizer, first, limit, context, args.skip_long_prompts, cut=first)
    longest = max((len(prompt.tokens) for prompt in prompts), default=0)
    if not prompts:
        raise InputError(f"{args.prompts}: no prompt fits the context of {context}; lower --response-tokens")
    require_context(reward, longest, limit[1])
    shared = config.critic == "shared"
    critic = make_critic(policy, tokenizer, reward, args.critic_init, shared, args.init)
    networks = Networks(policy, clone(policy), critic)

    console.print(f"{len(prompts):,} prompts of {args.prompts}, reward {reward.name}")
    frozen = [networks.ref, *(scorer.model for scorer in reward_models(reward))]
    prepare(args, policy, critic, *frozen)
    policy.compiled = args.compile
    config = fit_rollout(config, [policy, critic], frozen, longest)
    tokens, count = [prompt.tokens for prompt in prompts], config.batch_size // config.responses_per_prompt
    gold = GoldJudge() if on_helpdesk and args.reward != "gold" else None
    train(
        networks, reward, lambda step: choose_prompts(tokens, count, args.seed, step, args.prompt_range), tokenizer,
        config, run, args.seed, Watch(networks, tokenizer, config, run, gold, args.explain),
    )  # fmt: skip
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    cli(main, Args)
