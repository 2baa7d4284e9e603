"""Compare runs on the same held-out prompts: win rate, rewards, KL, length, diversity; a table, a picture, the text.

    python -m minirlhf.evaluate runs/ppo runs/dpo --baseline runs/sft --reward runs/rm --out runs/report

    report.json        {"baseline", "judge", …, "runs": {NAME: {"win_rate", "gold", "kl", …}}}
    report.png         win rates, reward against KL, training curves
    responses.jsonl    every response, with its scores

Two numbers say whether a reward was learned or exploited: the judge's score, which no training saw, and the KL to the
baseline, the price paid for it (Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", figure 1).
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from jaxtyping import Float
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from minirlhf import InputError, helpdesk
from minirlhf.data import Demonstration, Example, Prompt, Ranking, Text, collate, expect, read_records, write_records
from minirlhf.generate import encode_prompt, sample
from minirlhf.model import GPT, response_stats, scatter_counted
from minirlhf.rewards import TokenText, load_reward, score
from minirlhf.runs import (
    check_at_least,
    check_kernel,
    check_positive,
    cli,
    console,
    load_run,
    mix,
    pick_device,
    require_same_tokenizer,
    seeded,
    show_samples,
    write_text,
)
from minirlhf.sampling import Sampling
from minirlhf.token_stats import Kernel
from minirlhf.tokenizer import Tokenizer

SCRIPTS = {"runs/sft": "train_sft.py", "runs/rm": "train_rm.py", "runs/ppo": "train_ppo.py", "runs/dpo": "train_dpo.py"}

# --- measures ---------------------------------------------------------------------------------------------------------


def wins(scores: Float[Tensor, " B"], baseline_scores: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1 where the response beats the baseline's to the same prompt, 0 where it loses, 1/2 where they tie."""
    return (torch.sign(scores - baseline_scores) + 1) / 2


def win_rate(scores: Float[Tensor, " B"], baseline_scores: Float[Tensor, " B"]) -> float:
    """Share of prompts on which the run beats the baseline; ties count half."""
    return float(wins(scores, baseline_scores).mean())


def bootstrap_interval(values: Float[Tensor, " B"], seed: int, resamples: int = 2000) -> tuple[float, float]:
    """95% interval of a mean: draw B of the B values with replacement, again and again; keep the middle of the means.

    Values that are all equal give an interval of no width: where nothing was seen to vary, nothing is resampled.
    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (the percentile interval).

    Args:
        values: (B,), one for each prompt: prompts are what another evaluation would draw anew.
        seed: the same seed gives the same interval.
        resamples: means to draw.

    Returns:
        The 2.5th and the 97.5th percentile.
    """
    rows = torch.randint(len(values), (resamples, len(values)), generator=seeded(seed))
    low, high = values.cpu()[rows].mean(-1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all n-grams of the texts: low when a policy says the same thing to everyone.

    It falls with the number of texts, so compare it only at the same number.
    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.
    Differs: divided by the n-grams, not the words.
    """
    words = [text.split() for text in texts]
    ngrams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class SequenceStats(NamedTuple):
    """Divergence from the reference, each summed over the tokens of a response, in nats."""

    kl: Float[Tensor, " B"]  # Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)), over the whole vocabulary at each state visited
    k1: Float[Tensor, " B"]  # Σ_t log π(a_t|s_t) - log π_ref(a_t|s_t), of the tokens drawn


@torch.no_grad()
def sequence_stats(
    model: GPT,
    ref_model: GPT,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float = 1.0,
    kernel: str = "auto",
    batch_size: int = 16,
) -> SequenceStats:
    """KL(policy‖reference) along each response: exact at every state, and as sampled.

        KL(π‖π_ref) = E_{y ~ π} Σ_t KL(π(·|y_<t) ‖ π_ref(·|y_<t)) = E_{y ~ π} Σ_t log π(y_t|y_<t)/π_ref(y_t|y_<t)

    When the responses are the policy's own samples, the mean over them estimates the same KL both ways; the first
    leaves less to chance, since only the states are sampled and not the token drawn at each.

    Args:
        model: the policy that drew the responses.
        ref_model: the reference, with the same vocabulary.
        prompts: B lists of token ids.
        responses: B lists of token ids, each with its end-of-text where one was drawn.
        temperature: the one the responses were drawn at.
        kernel: which `token_stats`.
        batch_size: sequences at a time; logits of all their response tokens are held at once.

    Returns:
        `SequenceStats` of tensors (B,), on the CPU.
    """
    device = model.wte.weight.device
    kl, k1 = torch.zeros(len(prompts)), torch.zeros(len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        batch = collate([Example([*prompts[i], *responses[i]], len(prompts[i])) for i in rows], fill=0)
        tokens, counted = batch.tokens.to(device), batch.response_mask.to(device)  # (b, T)
        stats = response_stats(model, tokens, counted, ref_model, temperature=temperature, kernel=kernel)
        kl[rows] = scatter_counted(stats.kl, counted).sum(-1).cpu()
        k1[rows] = scatter_counted(stats.logprobs - stats.ref_logprobs, counted).sum(-1).cpu()
    return SequenceStats(kl, k1)


# --- python -m minirlhf.evaluate --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Compare runs with a baseline on the same held-out prompts."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Runs to compare; without any, runs/ppo and runs/dpo, and runs/rm as the reward."""
    baseline: Path = Path("runs/sft")
    """The run they started from, or GPT-2 (a folder, gpt2, ORG/NAME)."""
    out: Path = Path("runs/report")
    """Folder of the report; an older report in it is replaced."""
    prompts: str = "helpdesk"
    """helpdesk, or a file of records whose prompts no training saw."""
    n: int = 300
    """Prompts; of a longer file, a random choice."""
    prompt_tokens: int = 4
    """Where the file holds plain texts: the first tokens of each that are the prompt."""
    skip_long_prompts: bool = False
    """Leave out prompts that do not fit the context with their response, instead of stopping."""
    reward: str | None = None
    """What the runs were trained on, scored beside the judge: a folder, pkg.module:function or hf:DIR."""
    judge: str | None = None
    """Who decides the wins, with the same choice; gold on the helpdesk."""
    max_new_tokens: int = 48
    """The longest response."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in the KL."""
    batch_size: int = 64
    """Prompts sampled at a time."""
    show: int = 3
    """Prompts whose responses are shown side by side."""
    seed: int = 0
    """Of the prompts, the samples and the intervals."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernel: Kernel = "auto"
    """Which token_stats: fused (compiled at first use), reference (plain PyTorch) or auto (fused where it can be)."""

    def __post_init__(self):
        check_at_least(2, n=self.n)
        check_at_least(0, show=self.show)
        check_positive(
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
        )
        check_kernel(self.kernel, self.device)


class Outcome(NamedTuple):
    """What one run did with the prompts."""

    responses: list[TokenText]
    gold: Float[Tensor, " B"]
    scores: Float[Tensor, " B"] | None
    kl: Float[Tensor, " B"]


def main(args: Args) -> None:
    """Sample every run, judge, compare, and write the report."""
    folders = [args.baseline, *(args.runs or (Path("runs/ppo"), Path("runs/dpo")))]
    reward_spec = args.reward if args.runs or args.reward else "runs/rm"
    for named in [*folders, reward_spec, args.judge]:
        if str(named) in SCRIPTS and not Path(named).is_dir():
            raise InputError(f"{named} does not exist yet; run python {SCRIPTS[str(named)]} first")
    if args.judge is None and args.prompts != "helpdesk":
        raise InputError(f"--prompts {args.prompts} needs a --judge to decide the wins; gold only knows the helpdesk")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file; name a folder")

    device = pick_device(args.device)
    baseline, tokenizer = load_run(args.baseline, device=device)
    models = {}
    for name, folder in zip(_names(folders), folders):
        models[name], own = (baseline, tokenizer) if not models else load_run(folder, device=device)
        models[name].use_kernel(args.kernel)
        require_same_tokenizer(tokenizer, args.baseline, own, folder)
    shared = {"policy_tokenizer": tokenizer, "policy_folder": args.baseline}
    judge = load_reward(args.judge or "gold", device, **shared)
    reward = load_reward(reward_spec, device, **shared) if reward_spec else None
    prompts = _read_prompts(args, tokenizer, min(model.config.n_positions for model in models.values()))

    outcomes: dict[str, Outcome] = {}
    for row, (name, model) in enumerate(models.items()):  # a seed for each row: no two share their luck
        console.print(f"{name}: {len(prompts)} responses")
        drawn = _sample(model, tokenizer, prompts, args, row)
        tokens = [prompt.tokens for prompt in prompts], [response.tokens for response in drawn]
        kl = sequence_stats(model, baseline, *tokens, args.temperature, args.kernel).kl
        scores = score(reward, prompts, drawn) if reward else None
        outcomes[name] = Outcome(drawn, score(judge, prompts, drawn), scores, kl)

    first = next(iter(models))
    report = {
        "baseline": first,
        "judge": judge.name,
        "reward": reward.name if reward else None,
        "prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "runs": {name: _measure(o, outcomes[first], tokenizer.eot, args.seed) for name, o in outcomes.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_records(args.out / "responses.jsonl", _response_rows(prompts, outcomes))
    write_text(args.out / "report.json", json.dumps(report, indent=2) + "\n")
    draw_report(args.out / "report.png", report, {n: c for n, f in zip(models, folders) if (c := _curves(f))})

    rows = [
        {"prompt": str(prompt)} | {name: f"{o.responses[i]}\n({o.gold[i]:.2f})" for name, o in outcomes.items()}
        for i, prompt in enumerate(prompts[: args.show])
    ]
    show_samples(f"the same prompts, with the score of the judge ({judge.name})", rows)
    console.print(_table(report))
    console.print(f"report.json, report.png and responses.jsonl are in {args.out}")


def _names(folders: Sequence[Path]) -> list[str]:
    """A folder's own name; where that is taken, its path, and then a number."""
    names: list[str] = []
    for folder in folders:
        choice = [folder.resolve().name, str(folder), *(f"{folder} ({i})" for i in range(2, len(folders) + 1))]
        names.append(next(name for name in choice if name not in names))
    return names


def _read_prompts(args: Args, tokenizer: Tokenizer, context: int) -> list[TokenText]:
    """The prompts as text and tokens: the same for every run."""
    if args.prompts == "helpdesk":
        records = helpdesk.held_out_prompts(args.n, args.seed)
    else:
        kinds = (Prompt, Demonstration, Ranking, Text)
        records = expect(read_records(args.prompts), kinds, args.prompts, "minirlhf.evaluate")
        if len(records) < 2:
            raise InputError(f"{args.prompts}: holds one record; give at least 2 prompts to compare on")
        if len(records) > args.n:
            records = random.Random(f"evaluate {args.seed}").sample(records, args.n)
    prompts = []
    for record in records:
        if isinstance(record, Text):
            tokens = tokenizer.encode(record.text)[: args.prompt_tokens]
            prompt = TokenText(tokenizer.decode(tokens), tokens)
        else:
            prompt = TokenText(record.prompt, encode_prompt(tokenizer, record.prompt))
        if len(prompt.tokens) + args.max_new_tokens <= context:
            prompts.append(prompt)
        elif not args.skip_long_prompts:
            raise InputError(
                f"{record.source or 'a prompt of the helpdesk'}: a prompt of {len(prompt.tokens)} tokens and "
                f"--max-new-tokens {args.max_new_tokens} exceed the context of {context}; shorten one of them, or "
                "leave such prompts out with --skip-long-prompts"
            )
    if len(prompts) < len(records):
        left_out = len(records) - len(prompts)
        console.print(
            f"{left_out:,} of {len(records):,} prompts were too long for the context of {context} and left out"
        )
    if len(prompts) < 2:
        raise InputError(
            f"{args.prompts}: {len(prompts)} of {len(records)} prompts fit the context of {context}; give at least 2 "
            "that do, or lower --max-new-tokens"
        )
    return prompts


def _sample(model: GPT, tokenizer: Tokenizer, prompts: list[TokenText], args: Args, row: int) -> list[TokenText]:
    drawn = sample(
        model,
        [prompt.tokens for prompt in prompts],
        tokenizer.eot,
        args.max_new_tokens,
        mix(args.seed, row),
        Sampling(temperature=args.temperature),
        args.batch_size,
        args.kernel,
    )
    return [TokenText(tokenizer.decode(response.tokens), response.tokens) for response in drawn]


def _measure(run: Outcome, baseline: Outcome, eot: int, seed: int) -> dict[str, float | None]:
    """One run's row of the report."""
    low, high = bootstrap_interval(wins(run.gold, baseline.gold), seed)
    n = len(run.responses)
    return {
        "win_rate": win_rate(run.gold, baseline.gold),
        "win_rate_low": low,
        "win_rate_high": high,
        "gold": float(run.gold.mean()),
        "score": None if run.scores is None else float(run.scores.mean()),
        "kl": float(run.kl.mean()),
        "kl_se": float(run.kl.std()) / math.sqrt(n),
        "length": sum(len(response.tokens) for response in run.responses) / n,
        "eos_rate": sum(response.tokens[-1] == eot for response in run.responses) / n,
        "distinct_2": distinct_n(run.responses, 2),
    }


def _response_rows(prompts: list[TokenText], outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """One record a response, which the other commands read as {"prompt", "response"}."""
    rows = []
    for i, prompt in enumerate(prompts):
        for name, run in outcomes.items():
            row = {"run": name, "prompt": prompt, "response": run.responses[i], "gold": float(run.gold[i])}
            row |= {} if run.scores is None else {"score": float(run.scores[i])}
            rows.append(row | {"kl": float(run.kl[i])})
    return rows


def _table(report: dict[str, Any]) -> Table:
    title = f"{report['prompts']} held-out prompts; wins over {report['baseline']} as judged by {report['judge']}"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("run", overflow="fold")
    for column in ("win rate, 95%", "judge", "reward", "KL, nats", "tokens", "ended", "dist-2"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in report["runs"].items():
        table.add_row(
            name,
            f"{row['win_rate']:.2f} [{row['win_rate_low']:.2f}, {row['win_rate_high']:.2f}]".replace("[", r"\["),
            f"{row['gold']:.2f}",
            "–" if row["score"] is None else f"{row['score']:.2f}",
            f"{row['kl']:.2f} ± {row['kl_se']:.2f}",
            f"{row['length']:.1f}",
            f"{row['eos_rate']:.2f}",
            f"{row['distinct_2']:.2f}",
        )
    return table


# --- the picture ------------------------------------------------------------------------------------------------------

# Colours that stay apart in grayscale, and never alone: shape or dash says the same.
DARK, LIGHT = "#1d3557", "#e09f3e"
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


def _curves(folder: Path) -> dict[str, list[float]]:
    """Columns of a run's metrics.jsonl, if it logged a reward and a KL: that is, if it was trained by PPO."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = [row for row in rows if row.get("reward") is not None and row.get("kl_exact") is not None]
    keys = [key for key in ("step", "reward", "gold", "kl_exact") if all(row.get(key) is not None for row in rows)]
    return {key: [row[key] for row in rows] for key in keys} if len(rows) > 1 else {}


def draw_report(path: Path, report: dict[str, Any], curves: dict[str, dict[str, list[float]]]) -> None:
    """Draw win rates, reward against KL, and the training curves of runs that have them."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * (2 + len(curves)), 3.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15)  # inches, between the panels
        panels = figure.subplots(1, 2 + len(curves))
        _draw_win_rates(panels[0], report)
        _draw_frontier(panels[1], report)
        for panel, (name, columns) in zip(panels[2:], curves.items()):
            _draw_curves(panel, name, columns)
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format="png")
    partial.replace(path)


def _draw_win_rates(axes, report: dict[str, Any]) -> None:
    rows = {name: row for name, row in report["runs"].items() if name != report["baseline"]}
    rates = [row["win_rate"] for row in rows.values()]
    below = [row["win_rate"] - row["win_rate_low"] for row in rows.values()]
    above = [row["win_rate_high"] - row["win_rate"] for row in rows.values()]
    axes.barh(list(rows), rates, xerr=[below, above], height=0.5, color=LIGHT, ecolor=DARK, capsize=3)
    for i, rate in enumerate(rates):
        axes.text(0.02, i, f"{rate:.2f}", verticalalignment="center", color=DARK)
    axes.axvline(0.5, color=DARK, linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), xlabel="share of prompts won, 95% interval", title=f"Wins over {report['baseline']}")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _draw_frontier(axes, report: dict[str, Any]) -> None:
    kl = [row["kl"] for row in report["runs"].values()]
    axes.plot(kl, [row["gold"] for row in report["runs"].values()], "o", color=DARK, markersize=5)
    for i, (name, row) in enumerate(report["runs"].items()):  # in turn above and below, since runs may lie close
        axes.annotate(name, (row["kl"], row["gold"]), xytext=(8, 6 if i % 2 else -14), textcoords="offset points")
    axes.set(xlabel=f"KL(run‖{report['baseline']}), nats a response", ylabel="● judge", title="Reward against KL")
    axes.margins(0.2)
    if report["reward"] is not None:
        other = _right_axis(axes, "◇ reward")
        other.plot(kl, [row["score"] for row in report["runs"].values()], "D", color=LIGHT, mfc="none", markersize=11)
        other.margins(0.2)


def _draw_curves(axes, name: str, columns: dict[str, list[float]]) -> None:
    axes.plot(columns["step"], columns["reward"], "-", color=DARK, label="reward")
    if "gold" in columns:
        axes.plot(columns["step"], columns["gold"], "--", color=DARK, label="gold")
    other = _right_axis(axes, "exact KL, nats")
    other.plot(columns["step"], columns["kl_exact"], "-.", color=LIGHT, label="KL (right)")
    axes.set(xlabel="step", ylabel="reward", title=f"Training of {name}")
    lines = [*axes.lines, *other.lines]
    axes.legend(lines, [line.get_label() for line in lines], loc="center right")


def _right_axis(axes, label: str):
    other = axes.twinx()
    other.spines["right"].set_visible(True)
    other.grid(visible=False)
    other.set_ylabel(label)
    return other


if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.evaluate")
