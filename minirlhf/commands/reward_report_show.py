"""What a reward report shows: the CSV, tables for the terminal, the picture."""

import csv
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from minirlhf.commands.calibration import BINS, Estimate, Pairs, clustered_error, quantile_bins
from minirlhf.commands.style import figure_panels, right_axis, series_style
from minirlhf.data.records import Ranking
from minirlhf.run.terminal import console


class Data(NamedTuple):
    """N responses of Q rankings, side by side, and who rates them."""

    rankings: Sequence[Ranking]
    prompts: list[str]  # N
    responses: list[str]  # N
    group: Int[Tensor, " N"]  # which prompt: what another sample would draw anew
    groups: int
    pairs: Pairs  # all of them
    labelled: Pairs  # those that the annotators ordered, chosen first
    chosen_first: Bool[Tensor, " P"]  # of the labelled: whether a forecast is made of chosen ≻ rejected, or the reverse
    raters: dict[str, Float[Tensor, " N"]]  # annotators, annotators again, gold, longer: what they order by


class Judge(NamedTuple):
    """What one reward says about the responses."""

    spec: str
    scores: Float[Tensor, " N"]
    probed: Int[Tensor, " M"]  # responses that fit with the filler behind them
    filled: Float[Tensor, " M"]  # their scores with it
    tokens: Float[Tensor, " N"] | None  # lengths, where the reward has a tokenizer
    temperature: float  # of the differences: P(a ≻ b) = σ((r_a - r_b) / temperature)


def as_csv(data: Data, judges: dict[str, Judge]) -> str:
    """The labelled pairs, chosen and rejected; `first` is the one that a forecast was made for."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    fields = ("chosen", "rejected", "margin")
    judged = [f"{name}:{field}" for name in judges for field in fields]
    writer.writerow(["ranking", "source", "prompt", "chosen", "rejected", "first", *judged])
    for a, b, q, ahead in zip(*(part.tolist() for part in data.labelled), data.chosen_first.tolist()):
        ranking, row = data.rankings[q], []
        for judge in judges.values():
            high, low = float(judge.scores[a]), float(judge.scores[b])
            row += [high, low, high - low]
        texts = ranking.source, ranking.prompt, data.responses[a], data.responses[b]
        writer.writerow([q, *texts, "chosen" if ahead else "rejected", *row])
    return text.getvalue()


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for what is not defined."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(found: Estimate | None, digits: int = 3) -> str:
    if found is None or math.isnan(found["value"]):
        return "–"
    return escape(f"{found['value']:.{digits}f} ") + rf"\[{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _plain(value: float, error: float | None = None, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None and not math.isnan(error) else "")


def _grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    for i, column in enumerate(columns):
        narrowest = min(24, max([len(column), *(len(row[0]) for row in rows)])) if i == 0 else None
        table.add_column(
            escape(column), justify="right" if i else "left", overflow="fold", no_wrap=bool(i), min_width=narrowest
        )
    for row in rows:
        if set(row[1:]) != {"–"}:  # what no judge has
            table.add_row(*row)
    return table


def tables(report: dict[str, Any]) -> list[Table]:
    judges, raters = report["judges"], report["agreement"]["raters"]
    known = report["noise_ceiling"] is not None
    title = f"{report['pairs']:,} pairs of {report['prompts']:,} prompts ({report['tied_pairs']:,} more are ties)"
    if known:
        title += f"; a perfect judge is right on {report['noise_ceiling']:.3f}"
    rows = [
        [escape(name), _show(row["accuracy"]), *[_show(row.get(k)) for k in ("below_ceiling", "gold_accuracy")] * known]
        for name, row in judges.items()
    ]
    columns = ["accuracy", "pairs right, 95%", *["below the ceiling", "gold's order"] * known]
    tables = [_grid(escape(title), columns, rows)]

    for name, row in judges.items():
        by = [row[key] for key in ("by_margin", "by_gold_margin") if key in row]
        columns = ["its own margin", "pairs", "pairs right, 95%", "gold margin", "pairs", "pairs right, 95%"]
        cells = [[[f"{b['mean_margin']:.2f}", f"{b['pairs']:,}", _show(b["accuracy"])] for b in bins] for bins in by]
        rows = [list(itertools.chain(*parts)) for parts in itertools.zip_longest(*cells, fillvalue=["", "", ""])]
        tables.append(_grid(f"{escape(name)}: accuracy by margin", columns[: 3 * len(by)], rows))

    beside = max(1, (console.width - 28) // 21)  # judges that fit beside each other
    for start in range(0, len(judges), beside):
        part = dict(list(judges.items())[start : start + beside])
        tables += [_calibration_table(part), _length_table(part, report["annotators_prefer_longer"])]

    for key, title in (
        ("share", "share of all pairs ordered alike, ties half"),
        ("tau_b", "Kendall's τ_b, mean over rankings"),
    ):
        table, errors = report["agreement"][key], report["agreement"][f"{key}_se"]
        largest = max((e for row in errors for e in row if not math.isnan(e)), default=math.nan)
        title += f" (s.e. at most {_plain(largest)})"
        rows = [
            [f"{i} {escape(name)}", *(_plain(v, digits=2) for v in table[i - 1])] for i, name in enumerate(raters, 1)
        ]
        tables.append(_grid(title, ["", *map(str, range(1, len(raters) + 1))], rows))
    return tables


def _calibration_table(judges: dict[str, Any]) -> Table:
    found = [row["calibration"] for row in judges.values()]
    rows = [
        ["T", *(f"{c['temperature']:g}" for c in found)],
        ["ECE", *(_plain(c["ece"]) for c in found)],
        ["ECE by chance (95% below)", *(f"{c['ece_by_chance']:.3f} ({c['ece_by_chance_95']:.3f})" for c in found)],
        ["Brier score", *(_show(c["brier"]) for c in found)],
        ["-log likelihood, nats", *(_show(c["nll"]) for c in found)],
        ["best T", *(_show(c["best_temperature"], 2) for c in found)],
        ["ECE at the best T", *(_plain(c["best_ece"]) for c in found)],
        ["rms distance to the truth", *(_plain(c.get("rms_from_truth", math.nan)) for c in found)],
    ]
    return _grid("calibration of P(a ≻ b) = σ((r_a - r_b) / T)", ["", *judges], rows)


def _length_table(judges: dict[str, Any], annotators: Estimate) -> Table:
    found, fillers = [row["length"] for row in judges.values()], [row["filler"] for row in judges.values()]
    names = [f"{how}_{unit}" for unit in ("words", "tokens") for how in CORRELATIONS]
    rows = [[name.replace("_", " "), *(_show(length.get(name), 2) for length in found)] for name in names]
    rows.append(["longer preferred", *(_show(length["prefers_longer"], 2) for length in found)])
    rows.append(["filler adds", *(_plain(f["change"], f["change_se"]) for f in fillers)])
    rows.append(["in deviations of the score", *(_plain(f["deviations"]) for f in fillers)])
    rows.append(["filler helps", *(_plain(f["rises"], f["rises_se"], 2) for f in fillers)])
    title = f"length; annotators prefer the longer of two in {_show(annotators, 2)}"
    return _grid(title, ["score and length", *judges], rows)


# --- the picture ------------------------------------------------------------------------------------------------------


BARS, CLOUD = "#e3e3e3", "#bdbdbd"  # behind the curves


def plot_report(path: Path, report: dict[str, Any], judges: dict[str, Judge], data: Data) -> None:
    """Draw reliability, accuracy by margin, and score against length."""
    with figure_panels(path, columns=3) as axes:
        _plot_reliability(axes[0], report)
        _plot_margins(axes[1], report)
        _plot_length(axes[2], judges, data)


def _bars(found: Sequence[Estimate]) -> list[list[float]]:
    """Error bars below and above."""
    below, above = ([max(sign * (f["value"] - f[end]), 0.0) for f in found] for sign, end in ((1, "low"), (-1, "high")))
    return [below, above]


def _plot_reliability(axes, report: dict[str, Any]) -> None:
    first = next(iter(report["judges"]))
    counts = right_axis(axes, f"pairs of {first} (bars)")
    pairs = [b["pairs"] for b in report["judges"][first]["calibration"]["reliability"]]
    counts.bar([(b + 0.5) / BINS for b in range(BINS)], pairs, width=0.9 / BINS, color=BARS, zorder=0)
    counts.set_ylim(0, 4 * max(pairs))  # they stay below the curves
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="calibrated")
    for i, (name, row) in enumerate(report["judges"].items()):
        bins = [b for b in row["calibration"]["reliability"] if b["pairs"]]
        found = [b["happened"] for b in bins]
        label = "true probability" if name == "gold" and report["noise_ceiling"] is not None else name
        axes.errorbar([b["claimed"] for b in bins], [f["value"] for f in found], _bars(found),
                      capsize=2, markersize=4, linewidth=1.2, label=label, **series_style(i))  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="σ(difference of scores)", ylabel="preferred, 95% interval")
    axes.set_title("Reliability")
    axes.legend(loc="upper left")


def _plot_margins(axes, report: dict[str, Any]) -> None:
    for i, (name, row) in enumerate(report["judges"].items()):
        found = [b["accuracy"] for b in row["by_margin"]]
        axes.errorbar([b["mean_margin"] for b in row["by_margin"]], [f["value"] for f in found], _bars(found),
                      capsize=2, markersize=4, linewidth=1.2, label=name, **series_style(i))  # fmt: skip
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.set(xlabel="|difference of scores|, mean of a fifth", ylabel="pairs right, 95% interval")
    axes.set_title("Accuracy by margin")
    axes.legend(loc="center right")


def _plot_length(axes, judges: dict[str, Judge], data: Data) -> None:
    words = data.raters["longer"]
    bins = quantile_bins(words, BINS)
    for i, (name, judge) in enumerate(judges.items()):
        z = (judge.scores - judge.scores.mean()) / judge.scores.std().clamp(min=1e-12)
        if i == 0:  # the first alone, for a cloud of several says nothing
            axes.plot(words, z, ".", color=CLOUD, markersize=1.5)
        here = [bins == b for b in range(int(bins.max()) + 1)]
        means = [float(z[h].mean()) for h in here]
        errors = [2 * clustered_error(z[h], data.group[h]) for h in here]
        axes.errorbar([float(words[h].mean()) for h in here], means, errors,
                      capsize=2, markersize=4, linewidth=1.2, label=name, **series_style(i))  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="words of the response", ylabel="score, standardised, ± 2 s.e.", title="Score against length")
    axes.legend(loc="upper right")


CORRELATIONS = ("within", "pearson", "pearson_given_gold", "spearman", "spearman_given_gold")  # of score and length
