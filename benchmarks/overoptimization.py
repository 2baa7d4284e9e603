"""Over-optimisation: what becomes of the judge's score while a reward model's own goes up and up.

    python benchmarks/overoptimization.py             3 seeds; about 25 minutes on 2 cores
    python benchmarks/overoptimization.py --quick     1 seed, short trainings: about 2 minutes

Reward models of three sizes learn from the same few noisy rankings, and PPO without a KL penalty and best-of-n are let
loose on each. On the smallest also: PPO with a KL penalty, and on ensembles of five such models, their mean and their
worst. Scores are in deviations of the SFT policy's responses, from their mean, so that proxy and judge share a scale.
Writes overoptimization.json, .csv and .png, and parted.jsonl: the responses where proxy and judge part company most.

Source: Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization": figure 1, and equation 1 and 2 for the fits,

    best of n    gold(d) = d (α - β d)          RL    gold(d) = d (α - β log d),       d = √KL(π‖π_SFT)

Ensembles: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization". Differs: our reward models differ
in size and not in their number of labels, PPO's KL is summed exactly over the vocabulary, and d of best-of-n is that of
log n - (n - 1)/n, with which the KL measured from the pool is compared.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _experiment import (
    ExperimentArgs,
    base,
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
from torch import Tensor

from minirlhf.algorithms.reward_model import pair_accuracy
from minirlhf.algorithms.rewards import GoldJudge, load_reward, score
from minirlhf.commands.best_of_n import expected_best, kl_bound, logratio
from minirlhf.commands.style import figure_panels, series_style
from minirlhf.data import helpdesk
from minirlhf.data.records import write_records
from minirlhf.data.tokenizer import TokenText
from minirlhf.model.generate import sample
from minirlhf.run.command_line import cli
from minirlhf.run.folder import load_run
from minirlhf.seeds import mix

SIZES = {"small": (1, 32, 2), "medium": (2, 64, 4), "large": (3, 96, 6)}  # blocks, width, heads; the policy is large
SMALLEST = "small"
MEMBERS = 5


@dataclass(frozen=True)
class Extent:
    """How much of everything."""

    rankings: int = 300  # labelled, for every reward model of a seed
    rm_steps: int = 200
    ppo_steps: int = 48
    kl_coefs: tuple[float, ...] = (0.02, 0.1)  # on the smallest, besides 0
    prompts: int = 100
    pool: int = 512  # responses per prompt for best-of-n
    best_of: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)


FULL = Extent()
QUICK = Extent(150, 30, 5, (0.1,), 20, 32, (2, 4, 8, 16))


@dataclass(frozen=True)
class Args(ExperimentArgs):
    """Over-optimisation of small reward models."""


class Curve(NamedTuple):
    """One policy's or one selection's way along √KL."""

    seed: int
    method: str  # PPO or best of n
    reward: str  # which reward model
    kl_coef: float
    at: list[float]  # √KL, of nats per response
    proxy: list[float]  # in deviations of the SFT policy's responses
    gold: list[float]


# --- trainings --------------------------------------------------------------------------------------------------------


def plan(
    root: Path, seed: int, extent: Extent, quick: bool
) -> tuple[list[Job], dict[str, Path | str], dict[tuple, Job]]:
    """The jobs of a seed; its reward models by name, as `--reward` takes them; its PPO runs by (reward, β)."""
    start = base(root, seed, quick)
    folder, sft = start.sft.made.parent.parent, start.sft.made.parent
    labels = folder / "few.jsonl"

    def write() -> None:
        rankings = helpdesk.rankings(extent.rankings, seed)
        rows = ({"prompt": r.prompt, "responses": list(r.responses), "ranking": list(r.ranks)} for r in rankings)
        write_records(labels, rows)

    few = Job(labels, write, note=f"{extent.rankings} rankings of seed {seed}")
    jobs = [start.pretrain, start.sft, few]
    models: dict[str, Path | str] = {}
    trained: dict[str, Job] = {}

    def reward_model(name: str, size: str, own_seed: int) -> None:
        layers, width, heads = SIZES[size]
        shape = ("--n-layer", layers, "--n-embd", width, "--n-head", heads)
        given = (
            "--data",
            "helpdesk:corpus",
            "--tokenizer",
            start.pretrain.made.parent,
            "--seed",
            own_seed,
            "--lr",
            4e-3,
        )
        trunk = train(
            "train_sft.py",
            folder / f"trunk-{name}",
            *given,
            *shape,
            *steps(quick, "trunk", 300),
            after=[start.pretrain],
        )
        models[name] = folder / f"rm-{name}"
        options = (
            "--steps",
            extent.rm_steps,
            "--batch-size",
            8,
            "--held-out",
            0,
            "--centring",
            0.02,
            "--seed",
            own_seed,
        )
        trained[name] = train(
            "train_rm.py", models[name], "--data", labels, "--init", trunk.made.parent, *options, after=[trunk, few]
        )
        jobs.extend([trunk, trained[name]])

    for size in SIZES:
        reward_model(size, size, seed)
    members = [SMALLEST] + [f"{SMALLEST}-{i}" for i in range(2, MEMBERS + 1)]
    for i, name in enumerate(members[1:], start=1):
        reward_model(name, SMALLEST, 1000 * i + seed)
    for how in ("mean", "worst"):
        models[how] = f"{how}:{','.join(str(models[name]) for name in members)}"

    runs: dict[tuple, Job] = {}
    settings = [(size, 0.0) for size in SIZES] + [(SMALLEST, coef) for coef in extent.kl_coefs]
    for name, coef in [*settings, ("mean", 0.0), ("worst", 0.0)]:
        needs = [trained[name]] if name in trained else [trained[member] for member in members]
        runs[name, coef] = train(
            "train_ppo.py", folder / f"over-{name}-{coef:g}", "--init", sft, "--reward", models[name], "--seed", seed,
            "--kl-coef", coef, "--lr", 3e-4, "--steps", extent.ppo_steps, "--sample-every", 1000,
            after=[start.sft, *needs],
        )  # fmt: skip
    pool, parted, over = folder / "pool" / "scores.json", folder / "parted" / "parted.jsonl", runs[SMALLEST, 0.0]
    note = f"prompts that PPO saw, seed {seed}, {extent}"
    draws = Job(pool, lambda: write_pool(pool, sft, models, seed, extent), [start.sft, *trained.values()], note)
    tell = Job(
        parted, lambda: write_parted(parted, over.made.parent, models[SMALLEST], pool, seed, extent), [over, draws],
        note,
    )  # fmt: skip
    return [*jobs, draws, *runs.values(), tell], models, runs


def write_pool(path: Path, sft: Path, models: dict[str, Path | str], seed: int, extent: Extent) -> None:
    """Many responses of the SFT policy to each prompt, and every reward model's score of each; and gold's."""
    policy, tokenizer = load_run(sft)
    prompts = [p.prompt for p in helpdesk.train_prompts(extent.prompts, seed)]  # as PPO logs
    asked = [TokenText(p, tokenizer.encode(p)) for p in prompts for _ in range(extent.pool)]
    drawn = sample(policy, [p.tokens for p in asked], tokenizer.eot, 48, mix(seed, 7))
    texts = [TokenText(tokenizer.decode(d.tokens), d.tokens) for d in drawn]
    found = {"gold": score(GoldJudge(), asked, texts).view(len(prompts), -1)}
    for name, spec in models.items():
        if not str(spec).startswith(("mean:", "worst:")):
            found[name] = score(load_reward(str(spec)), asked, texts).view(len(prompts), -1)
    members = torch.stack([found[name] for name in found if name.startswith(SMALLEST)])
    found |= {"mean": members.mean(0), "worst": members.amin(0)}
    write_json(path, {name: values.tolist() for name, values in found.items()})


def write_parted(path: Path, run: Path, spec: Path | str, pool: Path, seed: int, extent: Extent) -> None:
    """The last policy's responses, those first that the proxy likes and the judge does not."""
    policy, tokenizer = load_run(run)
    prompts = [p.prompt for p in helpdesk.train_prompts(extent.prompts, seed)]  # as PPO logs
    asked = [TokenText(p, tokenizer.encode(p)) for p in prompts]
    drawn = sample(policy, [p.tokens for p in asked], tokenizer.eot, 48, mix(seed, 8))
    texts = [TokenText(tokenizer.decode(d.tokens), d.tokens) for d in drawn]
    known = read_pool(pool)
    proxy = standardised(score(load_reward(str(spec)), asked, texts), known[SMALLEST])
    gold = standardised(score(GoldJudge(), asked, texts), known["gold"])
    order = (proxy - gold).argsort(descending=True).tolist()
    write_records(
        path,
        [
            {"prompt": prompts[i], "response": str(texts[i]), "proxy": float(proxy[i]), "gold": float(gold[i])}
            for i in order
        ],
    )


# --- curves -----------------------------------------------------------------------------------------------------------


def read_pool(path: Path) -> dict[str, Tensor]:
    """Scores by judge, (prompts, pool)."""
    return {name: torch.tensor(values) for name, values in json.loads(path.read_text()).items()}


def standardised(scores: Tensor, pool: Tensor) -> Tensor:
    """In deviations of the SFT policy's responses, from their mean."""
    return (scores - pool.mean()) / pool.std()


def curves_of(seed: int, pool: dict[str, Tensor], runs: dict[tuple, Job], extent: Extent) -> list[Curve]:
    """PPO's from what it logged, best-of-n's from the pool."""
    curves = []
    for (name, coef), job in runs.items():
        _, *rows = read_rows(
            job.made.parent / "metrics.jsonl"
        )  # the first rollout is the SFT policy's: 0 by definition
        curves.append(
            Curve(
                seed, "PPO", name, coef,
                [0.0, *(math.sqrt(max(row["kl_exact"], 0.0)) for row in rows)],
                [0.0, *standardised(torch.tensor([row["reward"] for row in rows]), pool[name]).tolist()],
                [0.0, *standardised(torch.tensor([row["gold"] for row in rows]), pool["gold"]).tolist()],
            )
        )  # fmt: skip
    for name in (*SIZES, "mean", "worst"):
        ns = [1, *extent.best_of]
        at = [math.sqrt(kl_bound(n)) for n in ns]
        values = [
            [float(expected_best(pool[name], standardised(pool[judge], pool[judge]), n).mean()) for n in ns]
            for judge in (name, "gold")
        ]
        curves.append(Curve(seed, "best of n", name, 0.0, at, *values))
    return curves


def best_of_kl(scores: Tensor, n: int) -> tuple[float, float]:
    """KL(best of n‖policy), measured, and its standard error over prompts: one half of the pool is chosen from, n at a
    time, and the other says how rare such scores are; then the other way around. The bound takes no account of ties:
    where the same text is drawn again, the true value lies a little below it."""
    prompts, half = len(scores), scores.shape[1] // 2
    ratios = torch.zeros(prompts)
    for chosen_from, others in (scores.split(half, dim=1), scores.flip(1).split(half, dim=1)):
        best = chosen_from.unfold(1, n, n).amax(-1)  # (prompts, groups)
        groups = best.shape[1]
        found = logratio(best.flatten(), others.repeat_interleave(groups, dim=0), n)
        ratios += found.view(prompts, groups).mean(-1) / 2
    return float(ratios.mean()), float(ratios.std()) / math.sqrt(prompts)


# --- fits -------------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """gold(d) = d (α - β d) or d (α - β log d)."""

    alpha: float
    beta: float
    r2: float


def fit(curve: Curve) -> Fit:
    """Least squares; d = 0 says nothing, for both forms are 0 there.

    R² is against the mean of gold. Fewer than three points are no fit: all NaN.
    Source: Gao et al. 2023, equations 1 and 2.
    """
    points = [(d, gold) for d, gold in zip(curve.at, curve.gold) if d > 1e-3]
    if len(points) < 3:
        return Fit(math.nan, math.nan, math.nan)
    d, gold = torch.tensor(points, dtype=torch.float64).unbind(-1)
    second = -d * (d.log() if curve.method == "PPO" else d)
    features = torch.stack([d, second], dim=-1)
    solved = torch.linalg.lstsq(features, gold[:, None]).solution[:, 0]
    left = (gold - features @ solved).square().sum()
    return Fit(float(solved[0]), float(solved[1]), float(1 - left / (gold - gold.mean()).square().sum()))


def smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Means over neighbouring points: at the start as few to the right as there are to the left, so that a curve that
    climbs from its first point still starts there."""
    reach = window // 2
    return [mean(values[i - min(reach, i) : i + min(reach, i) + 1]) for i in range(len(values))]


def ways(curve: Curve) -> tuple[list[float], list[float]]:
    """Gold and proxy; of PPO, whose every point is another rollout, smoothed over five, at the end over three."""
    return (smooth(curve.gold), smooth(curve.proxy)) if curve.method == "PPO" else (curve.gold, curve.proxy)


class Parting(NamedTuple):
    """How proxy and gold went, in deviations of the SFT policy's responses."""

    peak: float  # gold's highest
    peak_at: float  # √KL there
    last: float  # gold at the end
    proxy_at_peak: float
    proxy_last: float

    @property
    def parted(self) -> bool:
        """Gold fell from its peak to below the SFT policy's, and the proxy rose meanwhile."""
        return self.last < 0.0 and self.proxy_last > self.proxy_at_peak


def parting(curve: Curve) -> Parting:
    """Where gold turned, and where both ended."""
    gold, proxy = ways(curve)
    top = max(range(len(gold)), key=gold.__getitem__)
    return Parting(gold[top], curve.at[top], gold[-1], proxy[top], proxy[-1])


# --- what comes out ---------------------------------------------------------------------------------------------------


def label(curve: Curve) -> str:
    """What a row or a line is called."""
    return curve.reward + (f", β = {curve.kl_coef:g}" if curve.kl_coef else "")


def main(args: Args) -> None:
    """Train everything, follow proxy and gold, fit, show."""
    extent = QUICK if args.quick else FULL
    plans = {seed: plan(args.root, seed, extent, args.quick) for seed in args.used_seeds}
    about = work(args, [job for jobs, _, _ in plans.values() for job in jobs])
    pools = {
        seed: next(job.made for job in jobs if job.made.name == "scores.json") for seed, (jobs, _, _) in plans.items()
    }
    curves = [c for seed, (_, _, runs) in plans.items() for c in curves_of(seed, read_pool(pools[seed]), runs, extent)]
    kls = [
        {"seed": seed, "reward": name, "n": n, "kl": kl, "kl_se": se, "kl_bound": kl_bound(n)}
        for seed, path in pools.items()
        for name, scores in read_pool(path).items()
        for n in extent.best_of
        for kl, se in [best_of_kl(scores, n)]
        if name in SIZES
    ]
    found = {
        "accuracy": {seed: accuracy(models, seed) for seed, (_, models, _) in plans.items()},
        "best_of_n_kl": kls,
        "parting": [{**_named(c), **parting(c)._asdict(), "parted": parting(c).parted} for c in curves],
        "fits": [{**_named(c), **fit(c)._asdict()} for c in curves],
    }
    parted = {seed: read_rows(jobs[-1].made) for seed, (jobs, _, _) in plans.items()}
    write_json(args.root / "overoptimization.json", about | found | {"curves": [c._asdict() for c in curves]})
    points = [
        {**_named(c), "sqrt_kl": d, "proxy": proxy, "gold": gold}
        for c in curves
        for d, proxy, gold in zip(c.at, c.proxy, c.gold)
    ]
    write_csv(args.root / "overoptimization.csv", points)
    write_records(args.root / "parted.jsonl", [{"seed": seed, **row} for seed, rows in parted.items() for row in rows])
    draw(args.root / "overoptimization.png", curves)
    show(found, curves, parted)
    console.print(f"overoptimization.json, .csv and .png and parted.jsonl are in {args.root}")


def accuracy(models: dict[str, Path | str], seed: int) -> dict[str, float]:
    """Held-out pairs ordered as the annotators did, by reward model; and the ceiling that their noise leaves."""
    rankings = helpdesk.rankings(300, seed, held_out=True)
    found = {"ceiling": helpdesk.noise_ceiling(rankings)}
    for name, spec in models.items():
        reward = load_reward(str(spec))
        scores = [score(reward, [r.prompt] * len(r.responses), r.responses).tolist() for r in rankings]
        found[name], _ = pair_accuracy(scores, [r.ranks for r in rankings])
    return found


def _named(curve: Curve) -> dict[str, Any]:
    return {"seed": curve.seed, "method": curve.method, "reward": curve.reward, "kl_coef": curve.kl_coef}


def gold_at(curve: Curve, d: float) -> float:
    """Gold, smoothed, where the curve first reaches √KL = d; NaN if it never does."""
    gold, _ = ways(curve)
    for i in range(1, len(gold)):
        if curve.at[i] >= d > curve.at[i - 1]:
            share = (d - curve.at[i - 1]) / (curve.at[i] - curve.at[i - 1])
            return gold[i - 1] + share * (gold[i] - gold[i - 1])
    return math.nan


def show(found: dict[str, Any], curves: Sequence[Curve], parted: dict[int, list[dict]]) -> None:
    """All tables."""
    seeds = sorted({curve.seed for curve in curves})
    kinds = list(dict.fromkeys((curve.method, curve.reward, curve.kl_coef) for curve in curves))

    def of(kind: tuple) -> list[Curve]:
        return [curve for curve in curves if (curve.method, curve.reward, curve.kl_coef) == kind]

    names = list(next(iter(found["accuracy"].values())))
    show_table(
        "held-out pairs ordered as the annotators did",
        ["reward model", *(f"seed {seed}" for seed in seeds)],
        [[name, *(f"{found['accuracy'][seed][name]:.3f}" for seed in seeds)] for name in names],
    )
    rows = []
    for kind in kinds:
        partings = [parting(curve) for curve in of(kind)]
        rows.append([
            kind[0], label(of(kind)[0]), shown([p.peak for p in partings]), shown([p.peak_at for p in partings], 1),
            shown([p.last for p in partings]), shown([p.proxy_at_peak for p in partings]),
            shown([p.proxy_last for p in partings]), shown([curve.at[-1] for curve in of(kind)], 1),
            f"{sum(p.parted for p in partings)} of {len(partings)}",
        ])  # fmt: skip
    columns = [
        "",
        "reward",
        "gold's peak",
        "at √KL",
        "gold at the end",
        "proxy then",
        "proxy at the end",
        "√KL",
        "parted",
    ]
    show_table("in deviations of the SFT policy's responses; mean ± half of its 95% interval", columns, rows)

    rows = []
    for kind in kinds:
        fits = [fit(curve) for curve in of(kind)]
        rows.append([
            kind[0], label(of(kind)[0]), shown([f.alpha for f in fits]), shown([f.beta for f in fits], 3),
            " ".join(f"{f.r2:.2f}" for f in fits),
        ])  # fmt: skip
    title = "fits of gold: d (α - β d) for best of n, d (α - β log d) for PPO, d = √KL"
    show_table(title, ["", "reward", "α", "β", "R² by seed"], rows)

    ppo = [kind for kind in kinds if kind[0] == "PPO"]
    marks = (1.0, 1.5, 2.0, 3.0, 4.0)
    rows = []
    for kind in ppo:
        reached = [[gold_at(curve, d) for curve in of(kind)] for d in marks]
        cells = ["–" if any(map(math.isnan, values)) else shown(values) for values in reached]
        rows.append([label(of(kind)[0]), *cells])
    show_table("PPO: gold where √KL first is", ["reward", *(f"{d:g}" for d in marks)], rows)

    rows = []
    for n in dict.fromkeys(row["n"] for row in found["best_of_n_kl"]):
        cells = []
        for name in SIZES:
            own = [row for row in found["best_of_n_kl"] if row["n"] == n and row["reward"] == name]
            kl = mean([row["kl"] for row in own])
            error = math.sqrt(sum(row["kl_se"] ** 2 for row in own)) / len(own)
            cells.append(f"{kl:.3f} ± {error:.3f}")
        rows.append([str(n), f"{kl_bound(n):.3f}", *cells])
    show_table("KL(best of n‖SFT), nats, measured ± its standard error", ["n", "at most", *SIZES], rows)

    for seed, own in parted.items():
        console.print(f"seed {seed}: what the {SMALLEST} reward model likes and the judge does not (proxy, gold)")
        for row in own[:3]:
            console.print(f"  {row['proxy']:+.2f} {row['gold']:+.2f} {row['response'].strip()}", markup=False)
    verdicts = {curve.seed: parting(curve).parted for curve in of(("PPO", SMALLEST, 0.0))}
    said = ", ".join(f"seed {seed} {'yes' if yes else 'NO'}" for seed, yes in verdicts.items())
    console.print(
        f"gold falls below the SFT policy's while the proxy rises, PPO on the {SMALLEST} reward model: {said}"
    )


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(path: Path, curves: Sequence[Curve]) -> None:
    """PPO by size above; best-of-n, the KL penalty and ensembles below."""

    def of(method: str, reward: str, coef: float = 0.0) -> list[Curve]:
        return [c for c in curves if (c.method, c.reward, c.kl_coef) == (method, reward, coef)]

    def line(axes, own: Sequence[Curve], i: int, what: str, name: str, dashed: bool = False) -> None:
        for k, curve in enumerate(own):
            gold, proxy = ways(curve)
            values = gold if what == "gold" else proxy
            options = series_style(i) | {
                "marker": "" if curve.method == "PPO" else series_style(i)["marker"],
                "linewidth": 1.2,
            }
            if not dashed:  # gold solid, proxy dashed; where all are gold, dashes tell them apart
                options["linestyle"] = "-" if what == "gold" else "--"
            axes.plot(
                curve.at, values, markersize=3, alpha=1.0 if k == 0 else 0.45,
                label=name if k == 0 else None, **options,
            )  # fmt: skip

    with figure_panels(path, columns=3, rows=2, width=4.0, height=3.1) as panels:
        for axes, size in zip(panels, SIZES):
            own = of("PPO", size)
            line(axes, own, 1, "proxy", "reward model")
            line(axes, own, 0, "gold", "gold judge")
            found = fit(own[0])
            at = [x / 20 for x in range(1, int(20 * own[0].at[-1]) + 1)]
            axes.plot(at, [d * (found.alpha - found.beta * math.log(d)) for d in at], ":", color="black", label="fit")
            axes.set(title=f"PPO, β = 0, {size} reward model")
        for i, size in enumerate(SIZES):
            line(panels[3], of("best of n", size), i, "proxy", f"{size}, proxy")
            line(panels[3], of("best of n", size), i, "gold", f"{size}, gold")
        panels[3].set(title="Best of n")
        coefs = sorted({c.kl_coef for c in curves if c.reward == SMALLEST and c.method == "PPO"})
        for i, coef in enumerate(coefs):
            line(panels[4], of("PPO", SMALLEST, coef), i, "gold", f"β = {coef:g}", dashed=True)
        panels[4].set(title=f"PPO, {SMALLEST} reward model: gold by β")
        for i, (name, text) in enumerate(((SMALLEST, "one"), ("mean", "mean of five"), ("worst", "worst of five"))):
            line(panels[5], of("PPO", name), i, "gold", text, dashed=True)
        panels[5].set(title=f"PPO, β = 0, {SMALLEST} reward models: gold")
        for axes in panels:
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set(xlabel="√KL(π‖SFT), KL in nats per response", ylabel="deviations of SFT's responses")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)


if __name__ == "__main__":
    cli(main, Args)
