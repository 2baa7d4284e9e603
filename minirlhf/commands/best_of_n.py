"""Best of n: draw n responses and keep the one that the reward likes best. No training; n times the sampling.

It is the plainest way to spend a reward, and a hard one to beat: every other policy of this project can be held against
it at the KL it pays. Trained on, its choices become a policy of their own (rejection sampling):

    python -m minirlhf.best_of_n runs/sft --reward runs/rm --of 16 --out best.jsonl
    python train_sft.py --data best.jsonl --init runs/sft --out runs/best

Source: Stiennon et al. 2020, appendix G.3; Nakano et al. 2021, "WebGPT", section 3.2 (best of n), Dong et al. 2023,
"RAFT" (training on it).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from minirlhf import InputError
from minirlhf.algorithms.rewards import load_reward, score
from minirlhf.checks import check_at_least, check_positive
from minirlhf.commands.prompts import PromptArgs, read_prompts, respond
from minirlhf.data import helpdesk
from minirlhf.data.records import write_records
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.devices import pick_device
from minirlhf.model.gpt import GPT
from minirlhf.run.folder import load_run
from minirlhf.run.terminal import console
from minirlhf.seeds import mix

# --- equations --------------------------------------------------------------------------------------------------------


def kl_bound(n: int) -> float:
    """log n - (n - 1)/n: the most that KL(best of n‖policy) can be, in nats; reached where no two scores tie and no
    response is likely.

    Source: Stiennon et al. 2020, appendix G.3; Beirami et al. 2024, theorem 1 (that it is a bound).
    """
    return math.log(n) - (n - 1) / n


def logratio(best: Float[Tensor, " B"], others: Float[Tensor, "B M"], n: int) -> Float[Tensor, " B"]:
    """log π_n(y|x)/π(y|x) of the best of n responses, from their scores; its mean is KL(best of n‖policy), in nats.

        π_n(y)/π(y) = (F(s)^n - F⁻(s)^n) / (F(s) - F⁻(s)),    s = r(x, y),  F(s) = P(r ≤ s),  F⁻(s) = P(r < s)

    where r is the score of a response drawn from the policy. Where no other response has this score it is n F(s)^{n-1}.
    F is (k + 1/2)/(M + 1/2) if k of the M `others` score no higher: the logarithm of the plain share would be low by
    1/2M on average, whatever n.

    Source: Beirami et al. 2024, lemma 1. Differs: written with the scores' distribution, which samples can estimate.

    Args:
        best: (B,) scores of the responses chosen.
        others: (B, M) scores of responses to the same prompts that had no part in the choice.
        n: out of how many each was chosen.
    """
    M = others.shape[1]
    upto = ((others <= best[:, None]).double().sum(-1) + 0.5) / (M + 0.5)  # (B,) F
    mass = (others == best[:, None]).double().sum(-1) / (M + 0.5)
    below = upto - mass  # F⁻
    tied = (upto**n - below**n) / mass.clamp(min=1e-300)
    ratio = torch.where(mass > 0, tied, n * upto ** (n - 1))
    return ratio.log().float()


def expected_best(scores: Float[Tensor, "B N"], values: Float[Tensor, "B N"], n: int) -> Float[Tensor, " B"]:
    """Mean of `values` at the best-scored of n responses, over all ways to choose n of the N; ties are shared.

        Σ_i  C(i-1, n-1)/C(N, n) · value of the i-th lowest score

    Every choice of n responses is used instead of one, which leaves far less to chance.
    Source: Nakano et al. 2021, appendix I.

    Raises:
        ValueError: n is not in 1 … N.
    """
    B, N = scores.shape
    if not 1 <= n <= N:
        raise ValueError(f"the best of {n} cannot be chosen among {N} responses")
    log_factorial = torch.lgamma(torch.arange(1, N + 2, dtype=torch.float64))  # [k] = log k!
    i = torch.arange(n, N + 1)  # among the n - 1 lower ones only those below i can be
    log_ways = log_factorial[i - 1] - log_factorial[n - 1] - log_factorial[i - n]
    log_all = log_factorial[N] - log_factorial[n] - log_factorial[N - n]
    weights = torch.cat([torch.zeros(n - 1, dtype=torch.float64), (log_ways - log_all).exp()])  # (N,)

    ordered, order = scores.cpu().sort(dim=-1)
    starts = torch.ones(B, N, dtype=torch.bool)  # where a run of equal scores begins
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = starts.flatten().cumsum(0) - 1  # (B N,)
    size = run.bincount()
    shared = torch.zeros(len(size), dtype=torch.float64).index_add(0, run, weights.repeat(B)) / size
    return (shared[run].view(B, N) * values.cpu().gather(1, order)).sum(-1).to(values.dtype)


def sample_each(
    model: GPT, tokenizer: Tokenizer, prompts: list[TokenText], n: int, args: PromptArgs, seed: int, temperature: float
) -> tuple[list[TokenText], list[TokenText]]:
    """n responses to each prompt, prompt by prompt: (the prompts, each n times; the responses)."""
    asked = [prompt for prompt in prompts for _ in range(n)]
    return asked, respond(model, tokenizer, asked, args, seed, temperature)


# --- python -m minirlhf.best_of_n -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args(PromptArgs):
    """Write the best of n responses to each prompt: records of a prompt and a response, to read or to train on."""

    run: Annotated[Path, tyro.conf.Positional] = Path("runs/sft")
    """The policy: a run, or GPT-2 (a folder, gpt2, ORG/NAME)."""
    reward: str = "runs/rm"
    """What chooses: a reward model's folder, gold, pkg.module:function, hf:DIR, mean:A,B or worst:A,B."""
    out: Path = Path("best.jsonl")
    """The file to write, {"prompt", "response", "score"} a line."""
    of: int = 16
    """Responses to each prompt, of which one is kept."""
    temperature: float = 1.0
    """Divides the logits."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, of=self.of)
        check_positive(temperature=self.temperature)


def main(args: Args) -> None:
    """Prompts → n responses each → scores → the best of each."""
    if args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder; name a file")
    device = pick_device(args.device)
    model, tokenizer = load_run(args.run, device=device)
    model.run_with(args.kernel)
    reward = load_reward(args.reward, device, policy_tokenizer=tokenizer, policy_folder=args.run)
    prompts = read_prompts(args, helpdesk.train_prompts, tokenizer, model.config.n_positions, "minirlhf.best_of_n")
    console.print(f"{len(prompts):,} prompts, {args.of} responses each")
    asked, drawn = sample_each(model, tokenizer, prompts, args.of, args, mix(args.seed, args.of), args.temperature)
    scores = score(reward, asked, drawn).view(len(prompts), args.of)
    best, place = scores.max(-1)  # among equals, the first
    chosen: Sequence[TokenText] = [drawn[i * args.of + int(k)] for i, k in enumerate(place)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": str(p), "response": str(r), "score": float(s)} for p, r, s in zip(prompts, chosen, best)]
    write_records(args.out, rows)
    console.print(
        f"mean score of {reward.name}: {float(scores.mean()):.2f} of all, {float(best.mean()):.2f} of the best; "
        f"{args.out}"
    )
