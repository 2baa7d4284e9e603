"""Reward against KL: what PPO, DPO, best-of-n and training on the best make of the same preferences.

    python benchmarks/frontier.py             3 seeds; about 20 minutes on 2 cores
    python benchmarks/frontier.py --quick     1 seed, short trainings: about 2 minutes

From scratch, for each seed: the SFT policy, a reward model from noisy rankings, and then each method at several
strengths. Each policy answers the same 300 held-out prompts; the gold judge, which no training saw, marks the answers
(0 to 10), and KL(π‖π_SFT) is summed exactly over the vocabulary at every token. Writes frontier.json, .csv and .png.

Source: Rafailov et al. 2023, "Direct Preference Optimization", figure 2 (left), on another task. Differs: their labels
come from the judge itself; here people's noise is in them, and only the PPO runs marked so see the judge.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _experiment import (
    Base,
    ExperimentArgs,
    base,
    half_width,
    mean,
    show_table,
    shown,
    steps,
    work,
    write_csv,
    write_json,
)
from _jobs import Job, train
from _report import console

from minirlhf.commands.style import figure_panels, series_style
from minirlhf.run.command_line import cli

PPO = "PPO, reward model"
ADAPTIVE = "PPO, reward model, adaptive KL"
ORACLE = "PPO, gold judge"
DPO = "DPO"
BARE = "DPO, the paper's loss"
BEST = "best of n, reward model"
TRAINED = "SFT on the best of n"
MEASURES = ("gold", "score", "kl", "win_rate", "length", "distinct_2")  # of the evaluation's report


@dataclass(frozen=True)
class Strengths:
    """How hard each method pulls."""

    kl_coefs: tuple[float, ...] = (0.2, 0.07, 0.025, 0.008)  # of the reward model's scores
    kl_targets: tuple[float, ...] = (2.0, 8.0)  # nats per response
    gold_kl_coefs: tuple[float, ...] = (0.4, 0.08)  # of the judge's, which spread about twice as wide
    betas: tuple[float, ...] = (0.5, 0.2, 0.1, 0.03)
    bare_betas: tuple[float, ...] = (0.2, 0.05)
    best_of: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    trained_on_best_of: tuple[int, ...] = (4, 16, 64)
    prompts: int = 300  # held out, for the evaluation
    best_prompts: int = 600  # to train on the best of n


FULL = Strengths()
QUICK = Strengths((0.07,), (4.0,), (0.2,), (0.1,), (0.1,), (4, 16), (8,), 100, 100)


@dataclass(frozen=True)
class Args(ExperimentArgs):
    """The frontier of reward against KL."""


@dataclass(frozen=True)
class Policy:
    """One policy to evaluate."""

    method: str
    setting: str
    job: Job


def policies(start: Base, seed: int, strengths: Strengths, quick: bool) -> tuple[list[Policy], list[Job]]:
    """Everything that is trained for one seed, and what has to be written for it first."""
    folder, sft, rm = start.sft.made.parent.parent, start.sft.made.parent, start.rm.made.parent
    found, files = [], []

    def ppo(method: str, setting: str, name: str, reward: Path | str, *arguments: object) -> None:
        job = train(
            "train_ppo.py", folder / name, "--init", sft, "--reward", reward, "--seed", seed, *arguments,
            *steps(quick, "ppo"), after=[start.sft] if reward == "gold" else [start.rm],
        )  # fmt: skip
        found.append(Policy(method, setting, job))

    for coef in strengths.kl_coefs:
        ppo(PPO, f"β = {coef:g}", f"ppo-kl-{coef:g}", rm, "--kl-coef", coef)
    for target in strengths.kl_targets:
        # The default horizon, 2000 responses, moves β by 1.3% a rollout at most: too little to arrive in 24 rollouts.
        given = ("--kl-target", target, "--kl-horizon", 200)
        ppo(ADAPTIVE, f"target {target:g} nats", f"ppo-target-{target:g}", rm, *given)
    for coef in strengths.gold_kl_coefs:
        ppo(ORACLE, f"β = {coef:g}", f"ppo-gold-{coef:g}", "gold", "--kl-coef", coef)

    for method, name, betas, arguments in (
        (DPO, "dpo", strengths.betas, ()),
        (BARE, "dpo-bare", strengths.bare_betas, ("--label-smoothing", 0, "--sft-coef", 0)),
    ):
        for beta in betas:
            out, given = folder / f"{name}-{beta:g}", ("--init", sft, "--seed", seed, "--beta", beta)
            job = train("train_dpo.py", out, *given, *arguments, *steps(quick, "dpo"), after=[start.sft])
            found.append(Policy(method, f"β = {beta:g}", job))

    for n in strengths.trained_on_best_of:
        best = folder / f"best-of-{n}" / "best.jsonl"
        asked = (sft, "--reward", rm, "--of", n, "--n", strengths.best_prompts, "--seed", seed, "--out", best)
        written = Job(best, ["-m", "minirlhf.best_of_n", *map(str, asked)], [start.rm])
        files.append(written)
        given = ("--data", best, "--init", sft, "--seed", seed, "--lr", 1e-3, *steps(quick, "best", 150))
        found.append(
            Policy(TRAINED, f"n = {n}", train("train_sft.py", folder / f"sft-best-{n}", *given, after=[written]))
        )
    return found, files


def evaluation(start: Base, seed: int, found: Sequence[Policy], strengths: Strengths) -> Job:
    """All policies of a seed beside each other, and best-of-n among the baseline's own responses."""
    folder, sft, rm = start.sft.made.parent.parent, start.sft.made.parent, start.rm.made.parent
    out = folder / "frontier-report"
    runs = [policy.job.made.parent for policy in found]
    command = [
        "-m", "minirlhf.evaluate", *runs, "--baseline", sft, "--reward", rm, "--judge", "gold",
        "--n", strengths.prompts, "--seed", seed, "--show", 0, "--best-of", *strengths.best_of, "--out", out,
    ]  # fmt: skip
    return Job(out / "report.json", [str(part) for part in command], [start.rm, *(policy.job for policy in found)])


def read_points(report: dict[str, Any], seed: int, found: Sequence[Policy], strengths: Strengths) -> list[dict]:
    """A row for each policy of a seed."""
    named = [("SFT", "", report["baseline"])]
    named += [(policy.method, policy.setting, policy.job.made.parent.name) for policy in found]
    named += [(BEST, f"n = {n}", f"best of {n}") for n in strengths.best_of]
    keys = (
        "gold",
        "score",
        "kl",
        "kl_se",
        "win_rate",
        "win_rate_low",
        "win_rate_high",
        "length",
        "eos_rate",
        "distinct_2",
    )
    rows = []
    for method, setting, name in named:
        row = report["runs"][name]
        rows.append({"method": method, "setting": setting, "seed": seed} | {key: row[key] for key in keys})
        rows[-1]["kl_bound"] = row.get("kl_bound")
    return rows


def summarise(points: Sequence[dict]) -> list[dict[str, Any]]:
    """Each method and setting over its seeds: means, and half of their 95% intervals."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in points:
        groups.setdefault((row["method"], row["setting"]), []).append(row)
    summary = []
    for (method, setting), rows in groups.items():
        own: dict[str, Any] = {"method": method, "setting": setting, "seeds": len(rows)}
        roots = [max(row["kl"], 0.0) ** 0.5 for row in rows]
        columns = {key: [row[key] for row in rows] for key in MEASURES}
        for key, values in (columns | {"sqrt_kl": roots}).items():
            own |= {key: mean(values), f"{key}_pm": half_width(values)}
        summary.append(own)
    return summary


def draw(path: Path, points: Sequence[dict], summary: Sequence[dict]) -> None:
    """Gold and reward against √KL: a line a method, a mark a seed."""
    start = next(row for row in summary if row["method"] == "SFT")
    methods = list(dict.fromkeys(row["method"] for row in summary if row["method"] != "SFT"))
    with figure_panels(path, columns=2, width=5.2, height=4.0) as panels:
        for axes, key, label in (
            (panels[0], "gold", "gold judge's score, 0 to 10"),
            (panels[1], "score", "reward model's score"),
        ):
            for i, method in enumerate(methods):
                own = sorted((row for row in summary if row["method"] == method), key=lambda row: row["kl"])
                at = [row["sqrt_kl"] for row in own]
                axes.errorbar(
                    at, [row[key] for row in own], yerr=[row[f"{key}_pm"] for row in own], capsize=2, elinewidth=0.7,
                    label=method, **series_style(i),
                )  # fmt: skip
                single = [row for row in points if row["method"] == method]
                axes.plot(
                    [max(row["kl"], 0) ** 0.5 for row in single], [row[key] for row in single], ".", markersize=2,
                    color=series_style(i)["color"], alpha=0.5,
                )  # fmt: skip
            axes.plot(0, start[key], "*", color="black", markersize=9, label="SFT")
            axes.set(xlabel="√KL(π‖SFT), KL in nats per response", ylabel=label)
        panels[0].set_title("What was wanted: the judge")
        panels[1].set_title("What was optimised: the reward model")
        panels[0].legend(fontsize=7, loc="lower right")


def main(args: Args) -> None:
    """Train everything, evaluate it, show and write the frontier."""
    strengths = QUICK if args.quick else FULL
    jobs: list[Job] = []
    seeds = []
    for seed in args.used_seeds:
        start = base(args.root, seed, args.quick)
        found, files = policies(start, seed, strengths, args.quick)
        report = evaluation(start, seed, found, strengths)
        jobs += [*start.jobs, *files, *(policy.job for policy in found)]
        seeds.append((seed, found, report))
    about = work(args, jobs + [report for _, _, report in seeds])
    write_results(args.root, about, seeds, strengths)


def write_results(root: Path, about: dict[str, Any], seeds: Sequence[tuple], strengths: Strengths) -> None:
    """frontier.json, .csv and .png, and the table."""
    points = []
    for seed, found, report in seeds:
        points += read_points(json.loads(report.made.read_text()), seed, found, strengths)
    summary = summarise(points)
    write_csv(root / "frontier.csv", points)
    write_json(root / "frontier.json", about | {"summary": summary, "points": points})
    draw(root / "frontier.png", points, summary)
    show(points, summary)
    console.print(f"frontier.json, frontier.csv and frontier.png are in {root}")


def show(points: Sequence[dict], summary: Sequence[dict]) -> None:
    """The table: a row for each method and strength."""
    rows = []
    for own in summary:
        same = [row for row in points if (row["method"], row["setting"]) == (own["method"], own["setting"])]
        column = {key: [row[key] for row in same] for key in MEASURES}
        rows.append([
            own["method"], own["setting"], shown(column["kl"]), shown(column["gold"]), shown(column["score"]),
            shown(column["win_rate"]), shown(column["length"], 1), shown(column["distinct_2"]),
        ])  # fmt: skip
    title = f"{len({row['seed'] for row in points})} seeds: mean ± half of its 95% interval (Student's t)"
    show_table(title, ["method", "strength", "KL, nats", "gold", "reward", "win rate", "tokens", "dist-2"], rows)


if __name__ == "__main__":
    cli(main, Args)
