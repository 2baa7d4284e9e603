"""The shipped training loops beside the exact optimum, on random worlds: how far from it do they end?

    python -m minirlhf.exact                        five worlds: a table, exact.json and exact.png in runs/exact

In each world `ppo.train` (k1 in the reward, and the exact KL) and `dpo.train` start from the same reference; their
regret is computed exactly all along, and so is best-of-n. One more DPO run sees preferences between half of the
responses only: among these it comes close to the best, and its regret is large all the same, for the loss says nothing
about the rest, which goes wherever the network happens to take it.

Settings differ from the scripts' defaults where the question asks for it. Advantages are not whitened: near the optimum
they go to zero, and to whiten them is to blow up what noise is left. DPO's labels are not smoothed, and it does not
learn the chosen responses beside: either moves its optimum away from π*.
"""

import gc
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from minirlhf import InputError
from minirlhf.algorithms import dpo, ppo
from minirlhf.checks import check_at_least, check_positive
from minirlhf.commands import exact
from minirlhf.commands.exact import World
from minirlhf.commands.style import DARK, LIGHT, figure_panels
from minirlhf.model.gpt import GPT, clone
from minirlhf.run import terminal
from minirlhf.run.arguments import RunArgs
from minirlhf.run.command_line import cli
from minirlhf.run.folder import Run, write_text
from minirlhf.run.terminal import console

LETTERS, LENGTH, PROMPTS = 4, 2, 3  # 21 responses to each of three prompts
POINTS = 25  # points of a curve
PPO = ppo.PPOConfig(
    steps=50, batch_size=1008, epochs=1, minibatches=6, microbatch_size=0, response_tokens=str(LENGTH), lr=2e-3,
    critic_lr=3e-3, warmup_steps=5, value_clip=0.0, whiten=False, missing_eot_penalty=0.0, sample_every=10**6,
)  # fmt: skip
# Near the optimum the exact KL leaves noise in every response where k1 leaves none (docs/exact.md): more rollouts.
PPO_EXACT = replace(PPO, kl_estimator="exact", kl_in="both", steps=72)
DPO = dpo.DPOConfig(steps=150, batch_size=60, lr=4e-3, label_smoothing=0.0, sft_coef=0.0)
RANKED = 12  # responses in each of DPO's rankings
DPO_HALF = replace(DPO, steps=80, batch_size=40)
RANKED_OF_HALF = 5
BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128)
BETA = 0.5  # what the settings are made for, and the bounds with them
BOUNDS = {"ppo": 0.02, "ppo_exact": 0.01, "dpo": 0.02}  # of the reference's regret
NAMES = {"ppo": "PPO, k1 in the reward", "ppo_exact": "PPO, exact KL", "dpo": "DPO", "dpo_half": "DPO, half unseen"}


@dataclass(frozen=True)
class Args:
    """Train the shipped loops on random worlds and measure their regret against the exact optimum."""

    out: Path = Path("runs/exact")
    """Folder of exact.json and exact.png; older ones in it are replaced."""
    worlds: int = 5
    """Random worlds."""
    seed: int = 0
    """Of the first world; the others follow."""
    beta: float = BETA
    """β, the price of a nat of KL. At another than this one the learning rates may not suit, and no bound is checked.
    """
    workers: int = 0
    """Runs at a time, each on one thread; 0 = as many as there are cores."""

    def __post_init__(self):
        check_at_least(1, worlds=self.worlds)
        check_at_least(0, workers=self.workers, seed=self.seed)
        check_positive(beta=self.beta)
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out} is a file; name a folder")


# --- one run ----------------------------------------------------------------------------------------------------------


class WatchedRun(Run):
    """A run that takes a look now and then and leaves its files in a folder that is thrown away."""

    def __init__(self, folder: Path, script: str, steps: int, measured: Callable[[], dict[str, float]]):
        super().__init__(RunArgs(out=folder, checkpoint_every=steps), script, steps)
        self.measured, self.curve = measured, [{"share": 0.0, **measured()}]

    def log(self, step: int, metrics: dict[str, Any], show: tuple[str, ...] = ()) -> None:
        super().log(step, metrics, show)
        if (step + 1) * POINTS // self.steps > step * POINTS // self.steps:
            self.curve.append({"share": (step + 1) / self.steps, **self.measured()})


def reference_of(world: World, seed: int) -> GPT:
    """Fresh weights, frozen."""
    return clone(exact.make_policy(world, seed))


def seen_half(world: World, seed: int) -> Bool[Tensor, "X K"]:
    """A random half of the responses to each prompt."""
    order = torch.rand(world.rewards.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1).argsort(-1)
    return order < (len(world.responses) + 1) // 2


def measure(
    logps: Float[Tensor, "X K"], ref_logps: Float[Tensor, "X K"], world: World, beta: float, seen: Bool[Tensor, "X K"]
) -> dict[str, float]:
    """What a policy is worth, means over prompts.

    Returns:
        regret, kl, reward: in units of the reward, nats, the reward's; regret_among_seen: what it would be if only the
        responses seen existed; unseen: the probability of the others; forgotten: the probability under π* of what the
        policy has given up, responses with less than a hundredth of their share.
    """
    best, _ = exact.optimum(ref_logps, world.rewards, beta)
    among, best_among = (torch.log_softmax(x.masked_fill(~seen, -1e9), -1) for x in (logps, best))
    return {
        "regret": float(exact.regret(logps, ref_logps, world.rewards, beta)),
        "regret_among_seen": float(beta * exact.kl(among, best_among).mean()),
        "kl": float(exact.kl(logps, ref_logps).mean()),
        "reward": float(exact.expected_reward(logps, world.rewards).mean()),
        "unseen": float((logps.exp() * ~seen).sum(-1).mean()),
        "forgotten": float((best.exp() * (logps - best < math.log(0.01))).sum(-1).mean()),
    }


def train_one(seed: int, method: str, beta: float) -> dict[str, Any]:
    """Train in the world of this seed; the curve, and what it took."""
    torch.set_num_threads(1)
    gc.freeze()  # a rollout is many short lists, at every few of which Python would go through all objects of torch
    terminal.console.quiet = True
    world = exact.make_world(LETTERS, LENGTH, PROMPTS, seed)
    ref = reference_of(world, seed)
    policy = clone(ref).requires_grad_(True)
    ref_logps = exact.log_probs(world, ref).double()
    seen = seen_half(world, seed) if method == "dpo_half" else torch.ones_like(world.rewards, dtype=torch.bool)

    def measured() -> dict[str, float]:
        with torch.no_grad():
            return measure(exact.log_probs(world, policy).double(), ref_logps, world, beta, seen)

    config = {"ppo": PPO, "ppo_exact": PPO_EXACT, "dpo": DPO, "dpo_half": DPO_HALF}[method]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = WatchedRun(Path(folder) / "run", method, config.steps, measured)
        if isinstance(config, ppo.PPOConfig):
            config = replace(config, kl_coef=beta)
            prompts = [list(world.prompts[i % PROMPTS]) for i in range(config.batch_size)]
            critic, reward = exact.make_scalar(world, seed + 1), exact.TableReward(world)
            networks = ppo.Networks(policy, ref, critic)
            ppo.train(networks, reward, lambda step: prompts, world.tokenizer, config, run, seed)
        else:
            config = replace(config, beta=beta)
            size = RANKED_OF_HALF if method == "dpo_half" else RANKED
            rankings = exact.draw_rankings(world, ref_logps, config.steps * config.batch_size, seed, size, seen)
            dpo.train(policy, dpo.batches(rankings, [], world.tokenizer, ref, config, seed), config, run)
    return {"seed": seed, "method": method, "curve": run.curve, "seconds": time.perf_counter() - began}


def closed_forms(seed: int, beta: float) -> dict[str, Any]:
    """What needs no training: the reference, the optimum at this β and at others, best-of-n."""
    world = exact.make_world(LETTERS, LENGTH, PROMPTS, seed)
    ref_logps = exact.log_probs(world, reference_of(world, seed)).double()
    best, _ = exact.optimum(ref_logps, world.rewards, beta)
    betas = torch.logspace(math.log10(8 * beta), math.log10(beta / 8), 41).tolist()
    curve = exact.frontier(ref_logps, world.rewards, betas).tolist()
    everything = torch.ones_like(world.rewards, dtype=torch.bool)
    best_of = []
    for n in BEST_OF:
        measured = measure(exact.best_of_n(ref_logps, world.rewards, n), ref_logps, world, beta, everything)
        best_of.append({"n": n, "kl_bound": exact.best_of_n_bound(n), **measured})
    return {
        "seed": seed,
        "reference": measure(ref_logps, ref_logps, world, beta, seen_half(world, seed)),
        "optimum": measure(best, ref_logps, world, beta, seen_half(world, seed)),
        "frontier": [{"beta": b, "kl": kl, "reward": reward} for b, (kl, reward) in zip(betas, curve)],
        "best_of_n": best_of,
        "runs": {},
    }


# --- all of them ------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Every run of every world, side by side; the table, the figures, the picture."""
    began = time.perf_counter()
    make_writable(args.out)
    seeds = range(args.seed, args.seed + args.worlds)
    worlds = {seed: closed_forms(seed, args.beta) for seed in seeds}
    jobs = [(seed, method) for method in ("ppo_exact", "dpo", "ppo") for seed in seeds]
    jobs += [(seed, "dpo_half") for seed in seeds]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(args.workers or cores, len(jobs))
    size = len(exact.make_world(LETTERS, LENGTH, PROMPTS).responses)
    console.print(
        f"{args.worlds} worlds of {PROMPTS} prompts with {size} responses each, β = {args.beta:g}: {len(jobs)} runs, "
        f"{workers} at a time"
    )
    # Fresh processes, not forks: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(train_one, seed, method, args.beta) for seed, method in jobs]
        try:
            for done in as_completed(waiting):
                result = done.result()
                worlds[result["seed"]]["runs"][result["method"]] = result
                share = result["curve"][-1]["regret"] / worlds[result["seed"]]["reference"]["regret"]
                name = NAMES[result["method"]]
                console.print(f"  world {result['seed']}, {name}: regret {share:.2%} in {result['seconds']:.1f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what has not begun never will
            raise

    report = {"beta": args.beta, "bounds": BOUNDS if args.beta == BETA else {}, "worlds": list(worlds.values())}
    write_text(args.out / "exact.json", json.dumps(report, indent=1) + "\n")
    plot(args.out / "exact.png", report)
    print_tables(report)
    console.print(f"exact.json and exact.png are in {args.out}; {time.perf_counter() - began:.0f} s")
    missed = missed_bounds(report)
    for line in missed:
        print(line, file=sys.stderr)
    sys.exit(1 if missed else 0)


def make_writable(folder: Path) -> None:
    """Make the folder; better to know before the first run than after the last."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror}); name another folder") from error


def missed_bounds(report: dict[str, Any]) -> list[str]:
    """A line for each run that ended above its bound, and for each KL of best-of-n above its own."""
    missed = []
    for world in report["worlds"]:
        for method, bound in report["bounds"].items():
            share = world["runs"][method]["curve"][-1]["regret"] / world["reference"]["regret"]
            if not share <= bound:
                ends = f"ends at {share:.2%} of the reference's regret, bound {bound:.0%}"
                missed.append(f"world {world['seed']}: {NAMES[method]} {ends}")
        for row in world["best_of_n"]:
            if not row["kl"] <= row["kl_bound"] + 1e-12:
                missed.append(f"world {world['seed']}: best of {row['n']} has KL {row['kl']}, bound {row['kl_bound']}")
    return missed


def print_tables(report: dict[str, Any]) -> None:
    """Regret of every run in every world; reward and KL of the first world; what became of the unseen responses."""
    worlds = report["worlds"]
    table = _table("regret, in % of the reference's", ["", *(f"world {w['seed']}" for w in worlds), "worst", "bound"])
    for method in BOUNDS:
        shares = [w["runs"][method]["curve"][-1]["regret"] / w["reference"]["regret"] for w in worlds]
        bound = f"{100 * report['bounds'][method]:g}" if method in report["bounds"] else "–"
        table.add_row(NAMES[method], *(f"{100 * s:.2f}" for s in [*shares, max(shares)]), bound)
    for n in (4, 16):
        rows = [next(row for row in w["best_of_n"] if row["n"] == n) for w in worlds]
        shares = [row["regret"] / w["reference"]["regret"] for row, w in zip(rows, worlds)]
        table.add_row(f"best of {n}", *(f"{100 * s:.1f}" for s in [*shares, max(shares)]), "")
    console.print(table)

    first = worlds[0]
    table = _table(f"world {first['seed']}", ["", "reward", "KL, nats", "bound of KL", "reward − β·KL"])
    rows = [("reference", first["reference"], None), ("optimum", first["optimum"], None)]
    rows += [(NAMES[method], first["runs"][method]["curve"][-1], None) for method in BOUNDS]
    rows += [(f"best of {row['n']}", row, row["kl_bound"]) for row in first["best_of_n"] if row["n"] in (2, 4, 16, 64)]
    for name, row, bound in rows:
        worth = row["reward"] - report["beta"] * row["kl"]
        shown = "" if bound is None else f"{bound:.3f}"
        table.add_row(name, f"{row['reward']:.3f}", f"{row['kl']:.3f}", shown, f"{worth:.3f}")
    console.print(table)

    title = "DPO on preferences between half of the responses; regret in % of the reference's, among these and in all"
    names = ["", "among these", "in all", "the others' share: reference", "DPO", "optimum"]
    table = _table(title, names)
    for world in worlds:
        last, whole = world["runs"]["dpo_half"]["curve"], world["reference"]
        shares = last[-1]["regret_among_seen"] / last[0]["regret_among_seen"], last[-1]["regret"] / whole["regret"]
        unseen = [row["unseen"] for row in (whole, last[-1], world["optimum"])]
        table.add_row(
            f"world {world['seed']}", *(f"{100 * s:.1f}" for s in shares), *(f"{share:.2f}" for share in unseen)
        )
    console.print(table)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    return table


# --- the picture ------------------------------------------------------------------------------------------------------

LINES = {"ppo": "-", "ppo_exact": "--", "dpo": "-.", "dpo_half": ":"}
MARKS = {"ppo": "o", "ppo_exact": "s", "dpo": "^"}


def plot(path: Path, report: dict[str, Any]) -> None:
    """Regret along training, reward against KL beside the optimum, and the responses that no preference mentions."""
    with figure_panels(path, columns=3, width=4.5, height=4.0) as (left, middle, right):
        _plot_regret(left, report)
        _plot_frontier(middle, report)
        _plot_unseen(right, report)


def _curves(report: dict[str, Any], method: str, key: str) -> list[tuple[list[float], list[float]]]:
    """Of each world, the share of training and the quantity in % of the reference's."""
    curves = []
    for world in report["worlds"]:
        curve = world["runs"][method]["curve"]
        curves.append(([row["share"] for row in curve], [100 * row[key] / curve[0][key] for row in curve]))
    return curves


def _plot_regret(axes, report: dict[str, Any]) -> None:
    for method in BOUNDS:
        for i, (shares, regrets) in enumerate(_curves(report, method, "regret")):
            color = LIGHT if method == "dpo" else DARK
            label = NAMES[method] if i == 0 else None
            axes.plot(shares, regrets, LINES[method], color=color, linewidth=1.2, alpha=0.8, label=label)
    for bound in sorted(set(BOUNDS.values())):
        axes.axhline(100 * bound, color="0.6", linewidth=0.8)
    axes.set(yscale="log", xlabel="share of training", ylabel="% of the reference's", title="Regret against π*")
    axes.legend(loc="upper right")


def _plot_frontier(axes, report: dict[str, Any]) -> None:
    world = report["worlds"][0]
    axes.plot(
        [p["kl"] for p in world["frontier"]], [p["reward"] for p in world["frontier"]],
        color="0.6", linewidth=3, label="optimum, every β", zorder=1,
    )  # fmt: skip
    for method, mark in MARKS.items():
        curve = world["runs"][method]["curve"]
        color = LIGHT if method == "dpo" else DARK
        kl, reward = [row["kl"] for row in curve], [row["reward"] for row in curve]
        axes.plot(kl, reward, LINES[method], color=color, linewidth=0.8, alpha=0.7)
        axes.plot(kl[-1:], reward[-1:], mark, color=color, markersize=7, mfc="none", label=NAMES[method], zorder=3)
    best_of = world["best_of_n"]
    axes.plot([r["kl"] for r in best_of], [r["reward"] for r in best_of], "x", color=DARK, label="best of 1, 2, 4 …")
    limit = 1.25 * max(row["kl"] for method in MARKS for row in world["runs"][method]["curve"])
    axes.set(xlabel="KL(π‖π_ref), nats", ylabel="E[r]", title=f"World {world['seed']}: reward against KL")
    axes.set_xlim(-0.03 * limit, max(limit, best_of[3]["kl"] * 1.1))
    axes.legend(loc="lower right")


def _plot_unseen(axes, report: dict[str, Any]) -> None:
    styles = (("regret", "-", DARK, "all responses"), ("regret_among_seen", "--", LIGHT, "those compared"))
    for key, line, color, label in styles:
        for i, (shares, regrets) in enumerate(_curves(report, "dpo_half", key)):
            name = label if i == 0 else None
            axes.plot(shares, regrets, line, color=color, linewidth=1.2, alpha=0.8, label=name)
    axes.set(yscale="log", xlabel="share of training", ylabel="% of the reference's", title="DPO, half never compared")
    axes.legend(loc="lower left")


def run() -> None:
    """The command line."""
    cli(main, Args, prog="python -m minirlhf.exact")
