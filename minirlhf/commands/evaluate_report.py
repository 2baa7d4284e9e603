"""What an evaluation shows: tables for the terminal and the page, the picture."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from minirlhf.commands.measures import wins
from minirlhf.commands.plot import read_curves
from minirlhf.commands.style import DARK, LIGHT, figure_panels, right_axis
from minirlhf.data.tokenizer import TokenText


class Outcome(NamedTuple):
    """What one row of the table did with the prompts."""

    baseline: str  # the row it is compared with
    temperature: float
    responses: list[TokenText]
    gold: Float[Tensor, " B"]
    scores: Float[Tensor, " B"] | None
    kl: Float[Tensor, " B"]  # nats per response
    entropy: Float[Tensor, " B"] | None  # nats per response; None where there is no policy to ask
    kl_bound: float | None = None


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


MOST_CURVES = 4  # training curves beside each other; `minirlhf.plot` draws the rest


def training_curves(folder: Path) -> dict[str, list[float]]:
    """Columns of a run's metrics.jsonl, if it logged a reward and a KL: that is, if it was trained by PPO."""
    path = folder / "metrics.jsonl"
    rows = read_curves(folder, folder.name).rows if path.is_file() and path.stat().st_size else []
    rows = [row for row in rows if row.get("reward") is not None and row.get("kl_exact") is not None]
    keys = [key for key in ("step", "reward", "gold", "kl_exact") if all(row.get(key) is not None for row in rows)]
    return {key: [row[key] for row in rows] for key in keys} if len(rows) > 1 else {}


def plot_report(path: Path, report: dict[str, Any], curves: dict[str, dict[str, list[float]]]) -> None:
    """Draw win rates, reward against KL, and the training curves of runs that have them."""
    with figure_panels(path, columns=2 + len(curves), height=max(3.2, 0.22 * len(report["runs"]))) as panels:
        _plot_win_rates(panels[0], report)
        _plot_frontier(panels[1], report)
        for panel, (name, columns) in zip(panels[2:], curves.items()):
            _plot_curves(panel, name, columns)


def _plot_win_rates(axes, report: dict[str, Any]) -> None:
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


def _plot_frontier(axes, report: dict[str, Any]) -> None:
    kl = [row["kl"] for row in report["runs"].values()]
    axes.plot(kl, [row["gold"] for row in report["runs"].values()], "o", color=DARK, markersize=5)
    for i, (name, row) in enumerate(report["runs"].items()):  # in turn above and below, since runs may lie close
        axes.annotate(name, (row["kl"], row["gold"]), xytext=(8, 6 if i % 2 else -14), textcoords="offset points")
    axes.set(xlabel=f"KL(run‖{report['baseline']}), nats per response", ylabel="● judge", title="Reward against KL")
    axes.margins(0.2)
    if report["reward"] is not None:
        other = right_axis(axes, "◇ reward")
        other.plot(kl, [row["score"] for row in report["runs"].values()], "D", color=LIGHT, mfc="none", markersize=11)
        other.margins(0.2)


def _plot_curves(axes, name: str, columns: dict[str, list[float]]) -> None:
    axes.plot(columns["step"], columns["reward"], "-", color=DARK, label="reward")
    if "gold" in columns:
        axes.plot(columns["step"], columns["gold"], "--", color=DARK, label="gold")
    other = right_axis(axes, "exact KL, nats")
    other.plot(columns["step"], columns["kl_exact"], "-.", color=LIGHT, label="KL (right)")
    axes.set(xlabel="step", ylabel="reward", title=f"Training of {name}")
    lines = [*axes.lines, *other.lines]
    axes.legend(lines, [line.get_label() for line in lines], loc="center right")
