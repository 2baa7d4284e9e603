"""Ablations: PPO with one thing changed at a time, each against the default, over seeds.

    python benchmarks/ablations.py             3 seeds; about 15 minutes on 2 cores
    python benchmarks/ablations.py --quick     1 seed, short trainings: about 2 minutes

Everything but the named option is `make demo`'s. Win rates are over the SFT policy as the gold judge decides them, on
300 held-out prompts; "against the default" is on the same prompts, the changed run's responses against the default's.
The time is that of the training alone, on one thread, beside as many other trainings as there are cores. Writes
ablations.json, .csv and .png.

Source: the questions are those of Andrychowicz et al. 2021, "What Matters for On-Policy Deep Actor-Critic Methods", and
Zheng et al. 2023, "Secrets of RLHF in Large Language Models Part I: PPO".
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
    read_rows,
    show_table,
    shown,
    steps,
    work,
    write_csv,
    write_json,
)
from _jobs import Job, train
from _report import console

from minirlhf.commands.style import DARK, LIGHT, figure_panels
from minirlhf.run.command_line import cli

DEFAULT = "default"
RM, GOLD = "the reward model", "gold"
CHANGES: dict[str, tuple[str, ...]] = {
    DEFAULT: ("--kl-coef", "0.07"),  # the default, as frontier.py names it: trained once for both
    "advantages not whitened": ("--no-whiten",),
    "no value clipping": ("--value-clip", "0"),
    "rewards normalised": ("--normalise-reward",),
    "exact KL, in reward and loss": ("--kl-estimator", "exact", "--kl-in", "both"),
    "exact KL so, not whitened": ("--kl-estimator", "exact", "--kl-in", "both", "--no-whiten"),
    "shared critic": ("--critic", "shared"),
    "1 epoch": ("--epochs", "1"),
    "4 epochs": ("--epochs", "4"),
    "λ = 1": ("--lam", "1"),
    "λ = 0.8": ("--lam", "0.8"),
    "critic starts as the policy": ("--critic-init", "policy"),
    # The judge's marks spread about twice as wide as the reward model's, so a nat costs twice as much.
    "gold judge as the reward": ("--reward", GOLD, "--kl-coef", "0.14"),
    "so, no value clipping": ("--reward", GOLD, "--kl-coef", "0.14", "--value-clip", "0"),
    "so, critic from the reward model": ("--reward", GOLD, "--kl-coef", "0.14", "--critic-init", RM),
}
MEASURES = ("gold", "score", "kl", "win_rate", "length", "distinct_2")


@dataclass(frozen=True)
class Args(ExperimentArgs):
    """PPO with one thing changed at a time."""


def _plain(option: str) -> str:
    """An option as part of a folder's name."""
    return option.lstrip("-").replace("the reward model", "rm")


def runs_of(start: Base, seed: int, quick: bool) -> dict[str, Job]:
    """The training of each change."""
    folder, sft, rm = start.sft.made.parent.parent, start.sft.made.parent, start.rm.made.parent
    found = {}
    for change, options in CHANGES.items():
        name = "ppo-kl-0.07" if change == DEFAULT else "ppo-" + "-".join(map(_plain, options))
        given = ["--init", sft, "--reward", rm, "--seed", seed, *options]
        if "--reward" in options:
            given = ["--init", sft, "--seed", seed, *(rm if option == RM else option for option in options)]
        found[change] = train("train_ppo.py", folder / name, *given, *steps(quick, "ppo"), after=[start.rm])
    return found


def evaluation(start: Base, seed: int, runs: dict[str, Job], quick: bool) -> Job:
    """All changes of a seed beside each other."""
    out = start.sft.made.parent.parent / "ablations-report"
    folders = [job.made.parent for job in runs.values()]
    command = [
        "-m", "minirlhf.evaluate", *folders, "--baseline", start.sft.made.parent, "--reward", start.rm.made.parent,
        "--judge", "gold", "--n", 60 if quick else 300, "--seed", seed, "--show", 0, "--out", out,
    ]  # fmt: skip
    return Job(out / "report.json", [str(part) for part in command], [start.rm, *runs.values()])


def read_points(report: dict[str, Any], seed: int, runs: dict[str, Job]) -> list[dict[str, Any]]:
    """A row for each change of a seed."""
    rows = []
    default = runs[DEFAULT].made.parent.name
    duels = {(row["run"], row["over"]): row["win_rate"] for row in report["head_to_head"]}
    for change, job in runs.items():
        name = job.made.parent.name
        measured = report["runs"][name]
        metrics = read_rows(job.made.parent / "metrics.jsonl")
        rows.append(
            {"change": change, "seed": seed}
            | {key: measured[key] for key in MEASURES}
            | {
                "against_default": 1 - duels[default, name] if name != default else 0.5,
                "seconds": sum(row["rollout_seconds"] + row["update_seconds"] for row in metrics),
                "explained_variance": mean([row["explained_variance"] for row in metrics[-5:]]),
                "clip_fraction": mean([row["clip_fraction"] for row in metrics]),
            }
        )
    return rows


def draw(path: Path, points: Sequence[dict[str, Any]]) -> None:
    """Wins against the default, a dot a seed."""
    with figure_panels(path, columns=2, width=4.6, height=3.6) as panels:
        changes = [change for change in CHANGES if change != DEFAULT]
        for axes, key, text, middle in (
            (panels[0], "against_default", "share won against the default", 0.5),
            (panels[1], "kl", "KL(π‖SFT), nats per response", None),
        ):
            shown_changes = changes if key == "against_default" else list(CHANGES)
            for i, change in enumerate(shown_changes):
                own = [row[key] for row in points if row["change"] == change]
                axes.errorbar(mean(own), i, xerr=half_width(own), fmt="D", color=DARK, markersize=4, capsize=3)
                axes.plot(own, [i] * len(own), "o", color=LIGHT, markersize=3, zorder=3)
            if middle is not None:
                axes.axvline(middle, color=DARK, linestyle="--", linewidth=1)
            axes.set(xlabel=text, yticks=range(len(shown_changes)), yticklabels=shown_changes)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
        panels[0].set_title("◆ mean, 95% interval; ● seeds")


def main(args: Args) -> None:
    """Train every change, evaluate, show."""
    plans = {}
    jobs: list[Job] = []
    for seed in args.used_seeds:
        start = base(args.root, seed, args.quick)
        runs = runs_of(start, seed, args.quick)
        plans[seed] = runs, evaluation(start, seed, runs, args.quick)
        jobs += [*start.jobs, *runs.values()]
    about = work(args, jobs + [report for _, report in plans.values()])
    points = [
        row
        for seed, (runs, report) in plans.items()
        for row in read_points(json.loads(report.made.read_text()), seed, runs)
    ]
    write_csv(args.root / "ablations.csv", points)
    write_json(args.root / "ablations.json", about | {"points": points})
    draw(args.root / "ablations.png", points)
    show(points)
    console.print(f"ablations.json, ablations.csv and ablations.png are in {args.root}")


def show(points: Sequence[dict[str, Any]]) -> None:
    """The table: a row for each change."""
    rows = []
    for change in CHANGES:
        own = {key: [row[key] for row in points if row["change"] == change] for key in points[0]}
        rows.append([
            change, shown(own["win_rate"]), shown(own["against_default"]), shown(own["gold"]), shown(own["kl"]),
            shown(own["explained_variance"]), shown(own["seconds"], 0),
        ])  # fmt: skip
    title = f"{len({row['seed'] for row in points})} seeds: mean ± half of its 95% interval (Student's t)"
    columns = ["change", "win rate over SFT", "against the default", "gold", "KL, nats", "expl. var.", "seconds"]
    show_table(title, columns, rows)


if __name__ == "__main__":
    cli(main, Args)
