"""Compare runs on the same held-out prompts: who wins, by how much, at what KL; a table, a picture, a page to read.

    python -m minirlhf.evaluate runs/ppo runs/dpo --baseline runs/sft --reward runs/rm --out runs/report
    python -m minirlhf.evaluate runs/ppo --best-of 4 16                 and the best of 4 and of 16 of the baseline's
    python -m minirlhf.evaluate runs/ppo --temperature 0.5 1            each at several temperatures
    python -m minirlhf.evaluate runs/ppo --judge human                  and you choose, blind

    report.json        {"baseline", "judge", …, "runs": {NAME: {"win_rate", "gold", "kl", …}}, "head_to_head": […]}
    report.html        the table, the picture and the responses side by side, in one file
    report.png         win rates, reward against KL, training curves
    responses.jsonl    every response, with its scores
    human.jsonl        a person's verdicts, with --judge human; never replaced

Two numbers say whether a reward was learned or exploited: the judge's score, which no training saw, and the KL to the
baseline, the price paid for it (Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", figure 1).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from jaxtyping import Float
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from minirlhf import InputError, helpdesk, human
from minirlhf.best_of_n import draw, kl_bound, logratio
from minirlhf.data import write_records
from minirlhf.measures import (
    bootstrap_interval,
    distinct_n,
    repetition,
    sequence_stats,
    sign_test,
    standard_error,
    win_rate,
    wins,
)
from minirlhf.plot import DARK, LIGHT, drawing, read_curves, right_axis
from minirlhf.prompts import PromptArgs, read_prompts, respond
from minirlhf.report_page import page
from minirlhf.rewards import Reward, TokenText, load_reward, reward_models, score
from minirlhf.runs import (
    check_at_least,
    check_positive,
    cli,
    console,
    load_run,
    mix,
    pick_device,
    require_same_tokenizer,
    show_samples,
    write_text,
)
from minirlhf.tokenizer import Tokenizer

SCRIPTS = {"runs/sft": "train_sft.py", "runs/rm": "train_rm.py", "runs/ppo": "train_ppo.py", "runs/dpo": "train_dpo.py"}
MOST_CURVES = 4  # training curves beside each other; `minirlhf.plot` draws the rest
POOL = 64  # responses a prompt that best-of-n draws at least: those it does not choose from say how rare the best is


@dataclass(frozen=True)
class Args(PromptArgs):
    """Compare runs with a baseline on the same held-out prompts."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Runs to compare; without any, runs/ppo and runs/dpo, and runs/rm as the reward."""
    baseline: Path = Path("runs/sft")
    """The run they started from, or GPT-2 (a folder, gpt2, ORG/NAME)."""
    out: Path = Path("runs/report")
    """Folder of the report; an older report in it is replaced, but for a person's verdicts."""
    reward: str | None = None
    """What the runs were trained on, scored beside the judge: a folder, pkg.module:function or hf:DIR."""
    judge: str | None = None
    """Who decides the wins, with the same choice; gold on the helpdesk. human: you, beside the automatic one."""
    human_n: int = 40
    """--judge human: comparisons to show."""
    best_of: tuple[int, ...] = ()
    """Rows for the best of so many responses of the baseline, chosen by the reward (without one, by the judge)."""
    temperature: tuple[float, ...] = (1.0,)
    """Divides the logits, in sampling and in the KL; of several, each run has a row for each, and is compared with the
    baseline at the same one."""
    show: int = 3
    """Prompts whose responses are shown side by side."""
    page: int = 100
    """Prompts whose responses are on the page."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(0, show=self.show, page=self.page)
        check_at_least(1, human_n=self.human_n, temperatures=len(self.temperature))
        for temperature in self.temperature:
            check_positive(temperature=temperature)
        for n in self.best_of:
            check_at_least(2, best_of=n)
        for flag, values in (("--temperature", self.temperature), ("--best-of", self.best_of)):
            if len(set(values)) < len(values):
                raise InputError(f"{flag} {' '.join(map(str, values))}: one is named twice; name each once")


class Outcome(NamedTuple):
    """What one row of the table did with the prompts."""

    baseline: str  # the row it is compared with
    temperature: float
    responses: list[TokenText]
    gold: Float[Tensor, " B"]
    scores: Float[Tensor, " B"] | None
    kl: Float[Tensor, " B"]  # nats a response
    entropy: Float[Tensor, " B"] | None  # nats a response; None where there is no policy to ask
    kl_bound: float | None = None


def main(args: Args) -> None:
    """Sample every run, judge, compare, and write the report."""
    folders = [args.baseline, *(args.runs or (Path("runs/ppo"), Path("runs/dpo")))]
    reward_spec = args.reward if args.runs or args.reward else "runs/rm"
    judge_spec = None if args.judge == "human" else args.judge
    for named in [*folders, reward_spec, judge_spec]:
        if str(named) in SCRIPTS and not Path(named).is_dir():
            raise InputError(f"{named} does not exist yet; run python {SCRIPTS[str(named)]} first")
    if judge_spec is None and args.prompts == "helpdesk":
        judge_spec = "gold"
    elif judge_spec is None and args.judge == "human":
        judge_spec = reward_spec  # the automatic judge that the person's verdicts are held against
    if judge_spec is None:
        needs = "--reward beside --judge human" if args.judge == "human" else "--judge to decide the wins"
        raise InputError(f"--prompts {args.prompts} needs a {needs}; gold only knows the helpdesk")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file; name a folder")
    if args.judge == "human":
        human.read_verdicts(args.out / "human.jsonl")  # a damaged file is better known before than after

    device = pick_device(args.device)
    baseline, tokenizer = load_run(args.baseline, device=device)
    models = {}
    curves = {folder: _curves(folder) for folder in folders}  # read first: a damaged line is better known before
    for name, folder in zip(_names(folders, [f"best of {n}" for n in args.best_of]), folders):
        models[name], own = (baseline, tokenizer) if not models else load_run(folder, device=device)
        models[name].use_kernel(args.kernel)
        require_same_tokenizer(tokenizer, args.baseline, own, folder)
    shared = {"policy_tokenizer": tokenizer, "policy_folder": args.baseline}
    judge = load_reward(judge_spec, device, **shared)
    reward = load_reward(reward_spec, device, **shared) if reward_spec else None
    read = [*models.values(), *(scorer.model for scorer in [*reward_models(judge), *reward_models(reward)])]
    context = min(model.config.n_positions for model in read)
    prompts = read_prompts(args, helpdesk.held_out_prompts, tokenizer, context, "minirlhf.evaluate")

    first = next(iter(models))
    outcomes: dict[str, Outcome] = {}
    for temperature in args.temperature:
        at = "" if len(args.temperature) == 1 else f", T = {temperature}"
        for name, model in models.items():  # a seed for each row: no two share their luck
            console.print(f"{name}{at}: {len(prompts)} responses", markup=False)
            drawn = respond(model, tokenizer, prompts, args, mix(args.seed, len(outcomes)), temperature)
            tokens = [prompt.tokens for prompt in prompts], [response.tokens for response in drawn]
            stats = sequence_stats(model, baseline, *tokens, temperature, args.kernel)
            scores = score(reward, prompts, drawn) if reward else None
            gold = score(judge, prompts, drawn)
            outcomes[name + at] = Outcome(first + at, temperature, drawn, gold, scores, stats.kl, stats.entropy)
        rows = best_of_rows(args, baseline, tokenizer, prompts, judge, reward, temperature, first + at, len(outcomes))
        outcomes |= {f"best of {n}{at}": row for n, row in rows.items()}

    report = {
        "baseline": first,
        "judge": judge.name,
        "reward": reward.name if reward else None,
        "prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "temperatures": list(args.temperature),
        "seed": args.seed,
        "runs": {name: _measure(o, outcomes[o.baseline], tokenizer.eot, args.seed) for name, o in outcomes.items()},
        "head_to_head": head_to_head(outcomes, args.seed),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_records(args.out / "responses.jsonl", _response_rows(prompts, outcomes))
    if args.judge == "human":
        judged = human.ask(comparisons(prompts, outcomes), args.out / "human.jsonl", args.human_n, args.seed)
        report["human"] = human.summarise(judged, args.seed)
    trained = [(name, curves[folder]) for name, folder in zip(models, folders) if curves[folder]]
    draw_report(args.out / "report.png", report, dict(trained[:MOST_CURVES]))
    picture = (args.out / "report.png").read_bytes()
    shown = prompts[: args.page]
    write_text(args.out / "report.html", page(report, tables(report), shown, answers(outcomes, len(shown)), picture))
    write_text(args.out / "report.json", json.dumps(report, indent=2) + "\n")

    rows = [
        {"prompt": str(prompt)} | {name: f"{o.responses[i]}\n({o.gold[i]:.2f})" for name, o in outcomes.items()}
        for i, prompt in enumerate(prompts[: args.show])
    ]
    show_samples(escape(f"the same prompts, with the score of the judge ({judge.name})"), rows)
    for grid in tables(report):
        console.print(for_terminal(grid))
    console.print(f"report.json, report.html, report.png and responses.jsonl are in {args.out}", markup=False)


def best_of_rows(
    args: Args,
    baseline: Any,
    tokenizer: Tokenizer,
    prompts: list[TokenText],
    judge: Reward,
    reward: Reward | None,
    temperature: float,
    compared_with: str,
    row: int,
) -> dict[int, Outcome]:
    """The best of n of the baseline's own responses, for each n; its KL from how rare its scores are."""
    if not args.best_of:
        return {}
    pool = max(2 * max(args.best_of), POOL)  # at least as many again as are chosen from
    console.print(f"best of {', '.join(map(str, args.best_of))}: {pool * len(prompts):,} responses")
    asked, drawn = draw(baseline, tokenizer, prompts, pool, args, mix(args.seed, row, 1), temperature)
    scores = score(reward or judge, asked, drawn).view(len(prompts), pool)
    rows = {}
    for n in args.best_of:
        best, place = scores[:, :n].max(-1)  # among equals, the first drawn
        chosen = [drawn[i * pool + int(k)] for i, k in enumerate(place)]
        kl = logratio(best, scores[:, n:], n)
        gold = score(judge, prompts, chosen)
        rows[n] = Outcome(compared_with, temperature, chosen, gold, best if reward else None, kl, None, kl_bound(n))
    return rows


def head_to_head(outcomes: dict[str, Outcome], seed: int) -> list[dict[str, Any]]:
    """Every two rows at one temperature, on the same prompts: who wins, and could it be chance?"""
    found = []
    names = list(outcomes)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if outcomes[one].baseline == outcomes[other].baseline:
                won = wins(outcomes[one].gold, outcomes[other].gold)
                low, high = bootstrap_interval(won, seed)
                found.append({
                    "run": one, "over": other, "win_rate": float(won.mean()), "win_rate_low": low,
                    "win_rate_high": high, "ties": float((won == 0.5).float().mean()), "p_value": sign_test(won),
                })  # fmt: skip
    return found


def comparisons(prompts: list[TokenText], outcomes: dict[str, Outcome]) -> list[human.Comparison]:
    """Every row against its baseline on every prompt."""
    return [
        human.Comparison(
            name, run.baseline, str(prompt), str(run.responses[i]), str(outcomes[run.baseline].responses[i]),
            float(run.gold[i] - outcomes[run.baseline].gold[i]),
        )
        for name, run in outcomes.items()
        if name != run.baseline
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def _names(folders: Sequence[Path], taken: Sequence[str] = ()) -> list[str]:
    """A folder's own name; where that is taken, its path, and then a number."""
    names: list[str] = []
    for folder in folders:
        choice = [folder.resolve().name, str(folder), *(f"{folder} ({i})" for i in range(2, len(folders) + 2))]
        names.append(next(name for name in choice if name not in (*names, *taken)))
    return names


def _measure(run: Outcome, baseline: Outcome, eot: int, seed: int) -> dict[str, Any]:
    """One row of the report."""
    won, lead = wins(run.gold, baseline.gold), run.gold - baseline.gold
    low, high = bootstrap_interval(won, seed)
    lead_low, lead_high = bootstrap_interval(lead, seed)
    n = len(run.responses)
    tokens = sum(len(response.tokens) for response in run.responses)
    return {
        "baseline": run.baseline,
        "temperature": run.temperature,
        "win_rate": win_rate(run.gold, baseline.gold),
        "win_rate_low": low,
        "win_rate_high": high,
        "ties": float((won == 0.5).float().mean()),
        "p_value": sign_test(won),
        "gold": float(run.gold.mean()),
        "gold_se": standard_error(run.gold),
        "lead": float(lead.mean()),
        "lead_low": lead_low,
        "lead_high": lead_high,
        "score": None if run.scores is None else float(run.scores.mean()),
        "score_se": None if run.scores is None else standard_error(run.scores),
        "kl": float(run.kl.mean()),
        "kl_se": standard_error(run.kl),
        "kl_bound": run.kl_bound,
        "length": tokens / n,
        "eos_rate": sum(response.tokens[-1] == eot for response in run.responses) / n,
        "entropy": None if run.entropy is None else float(run.entropy.sum()) / tokens,
        "repetition": repetition(run.responses),
        **{f"distinct_{k}": distinct_n(run.responses, k) for k in (1, 2, 3)},
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


# --- tables -----------------------------------------------------------------------------------------------------------


def share_with_interval(row: dict[str, Any], key: str = "win_rate") -> str:
    """'0.84 [0.79, 0.88]', or – where there is none."""
    if row[key] is None:
        return "–"
    return f"{row[key]:.2f} [{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]"


def chance(p: float) -> str:
    """A p-value."""
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


COLUMNS = ("win rate, 95%", "judge", "reward", "KL, nats", "tokens", "ended", "dist-2")
MORE = ("ties", "p", "lead, 95%", "KL at most", "entropy", "rep-4", "dist-1")


def cells(row: dict[str, Any]) -> dict[str, str]:
    """What stands in a row of the tables, on the terminal and on the page."""

    def number(key: str, digits: int = 2) -> str:
        return "–" if row[key] is None else f"{row[key]:.{digits}f}"

    return {
        "win rate, 95%": share_with_interval(row),
        "judge": number("gold"),
        "reward": number("score"),
        "KL, nats": f"{row['kl']:.2f} ± {row['kl_se']:.2f}",
        "tokens": number("length", 1),
        "ended": number("eos_rate"),
        "dist-2": number("distinct_2"),
        "ties": number("ties"),
        "p": chance(row["p_value"]),
        "lead, 95%": f"{row['lead']:+.2f} [{row['lead_low']:+.2f}, {row['lead_high']:+.2f}]",
        "KL at most": number("kl_bound"),
        "entropy": number("entropy"),
        "rep-4": number("repetition", 3),
        "dist-1": number("distinct_1"),
    }


class Grid(NamedTuple):
    """A table of texts."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def for_terminal(grid: Grid) -> Table:
    """The same for rich."""
    title, columns, rows = grid
    table = Table(title=escape(title), title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(columns[0], overflow="fold", min_width=min(12, max((len(row[0]) for row in rows), default=0)))
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def tables(report: dict[str, Any]) -> list[Grid]:
    """What the report says; the main table stands last, where the eye is when the command ends."""
    rows, by = {name: cells(row) for name, row in report["runs"].items()}, report["judge"]
    more = [[name, *(row[key] for key in MORE)] for name, row in rows.items()]
    found = [Grid(f"more of them; lead and p (sign test) against {report['baseline']}", ["run", *MORE], more)]
    between = [row for row in report["head_to_head"] if report["runs"][row["run"]]["baseline"] != row["run"]]
    if 0 < len(between) <= 10:  # of more, the report has them all
        lines = [
            [f"{row['run']} over {row['over']}", share_with_interval(row), f"{row['ties']:.2f}", chance(row["p_value"])]
            for row in between
        ]
        found.append(Grid("run against run", ["", "win rate, 95%", "ties", "p"], lines))
    if "human" in report:
        lines = [
            [name, str(row["comparisons"]), share_with_interval(row), f"{row['ties']:.2f}", str(row["strict"]),
             share_with_interval(row, "agreement")]
            for name, row in report["human"].items()
        ]  # fmt: skip
        columns = ["run", "compared", "win rate, 95%", "ties", "both strict", "agreement, 95%"]
        found.append(Grid(f"as you judged, and how far {by} agrees", columns, lines))
    title = f"{report['prompts']} held-out prompts; wins over {report['baseline']} as judged by {by}"
    return [
        *found,
        Grid(title, ["run", *COLUMNS], [[name, *(row[key] for key in COLUMNS)] for name, row in rows.items()]),
    ]


def answers(outcomes: dict[str, Outcome], count: int) -> list[list[tuple[str, str, str, str]]]:
    """For the page: of each of the first prompts, every row's response, its scores, and whether it won."""
    found = []
    won_by = {name: wins(run.gold, outcomes[run.baseline].gold).tolist() for name, run in outcomes.items()}
    for i in range(count):
        own = []
        for name, run in outcomes.items():
            said = f"judge {run.gold[i]:.2f}" + ("" if run.scores is None else f", reward {run.scores[i]:.2f}")
            outcome = "" if name == run.baseline else {1.0: "won", 0.0: "lost"}.get(won_by[name][i], "tied")
            own.append((name, str(run.responses[i]), f"{said}, KL {run.kl[i]:.2f}", outcome))
        found.append(own)
    return found


# --- the picture ------------------------------------------------------------------------------------------------------


def _curves(folder: Path) -> dict[str, list[float]]:
    """Columns of a run's metrics.jsonl, if it logged a reward and a KL: that is, if it was trained by PPO."""
    path = folder / "metrics.jsonl"
    rows = read_curves(folder, folder.name).rows if path.is_file() and path.stat().st_size else []
    rows = [row for row in rows if row.get("reward") is not None and row.get("kl_exact") is not None]
    keys = [key for key in ("step", "reward", "gold", "kl_exact") if all(row.get(key) is not None for row in rows)]
    return {key: [row[key] for row in rows] for key in keys} if len(rows) > 1 else {}


def draw_report(path: Path, report: dict[str, Any], curves: dict[str, dict[str, list[float]]]) -> None:
    """Draw win rates, reward against KL, and the training curves of runs that have them."""
    with drawing(path, columns=2 + len(curves), height=max(3.2, 0.22 * len(report["runs"]))) as panels:
        _draw_win_rates(panels[0], report)
        _draw_frontier(panels[1], report)
        for panel, (name, columns) in zip(panels[2:], curves.items()):
            _draw_curves(panel, name, columns)


def _draw_win_rates(axes, report: dict[str, Any]) -> None:
    rows = {name: row for name, row in report["runs"].items() if name != row["baseline"]}
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
        other = right_axis(axes, "◇ reward")
        other.plot(kl, [row["score"] for row in report["runs"].values()], "D", color=LIGHT, mfc="none", markersize=11)
        other.margins(0.2)


def _draw_curves(axes, name: str, columns: dict[str, list[float]]) -> None:
    axes.plot(columns["step"], columns["reward"], "-", color=DARK, label="reward")
    if "gold" in columns:
        axes.plot(columns["step"], columns["gold"], "--", color=DARK, label="gold")
    other = right_axis(axes, "exact KL, nats")
    other.plot(columns["step"], columns["kl_exact"], "-.", color=LIGHT, label="KL (right)")
    axes.set(xlabel="step", ylabel="reward", title=f"Training of {name}")
    lines = [*axes.lines, *other.lines]
    axes.legend(lines, [line.get_label() for line in lines], loc="center right")


if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.evaluate")
