"""The training curves of runs, from their metrics.jsonl.

    python -m minirlhf.plot runs/ppo                                      RUN/plot.png, what its script logs
    python -m minirlhf.plot runs/a runs/b runs/c                          plot.png, over each other
    python -m minirlhf.plot runs/ppo --metrics reward kl_coef --out a.png

A run may still be going on. A picture is data first: what was logged at every step is a faint line, and over it runs
its mean over neighbouring steps, whose number the picture states; what was logged now and then is points.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from minirlhf import InputError
from minirlhf.commands.style import MARKERS, band, figure_panels, right_axis, series_style
from minirlhf.run.folder import read_run
from minirlhf.run.terminal import console


class Panel(NamedTuple):
    """Columns that are drawn together."""

    title: str
    unit: str
    columns: tuple[str, ...]
    right: tuple[str, ...] = ()
    right_unit: str = ""


PANELS = {
    "train_ppo.py": (
        Panel("Reward", "mean of a rollout", ("reward", "gold")),
        Panel("KL(policy‖reference)", "nats per response", ("kl_exact", "kl_k1")),
        Panel("Entropy", "nats per token", ("entropy",)),
        Panel("Length", "tokens per response", ("length",), ("eot_rate",), "share that ended"),
        Panel("Explained variance of the critic", "share", ("explained_variance",)),
        Panel("Clipped ratios", "share of tokens", ("clip_fraction",)),
    ),
    "train_dpo.py": (
        Panel("Loss", "nats per pair", ("loss", "held_out_loss")),
        Panel("Accuracy", "share of pairs", ("accuracy", "held_out_accuracy")),
        Panel("Implicit rewards", "β · log π/π_ref", ("chosen_reward", "rejected_reward")),
        Panel("Log-probabilities", "nats per response", ("chosen_logps", "rejected_logps")),
    ),
    "train_rm.py": (
        Panel("Loss", "nats", ("loss",)),
        Panel("Best over worst", "share of records", ("best_over_worst",)),
        Panel("Held-out accuracy", "share of pairs", ("held_out_accuracy",)),
    ),
    "train_sft.py": (Panel("Loss", "nats per token", ("loss", "held_out_loss")),),
}


ERRORS = {"kl_k1": "kl_k1_se"}  # columns with a standard error: drawn with a band of two of them to each side


class Curves(NamedTuple):
    """One run's metrics."""

    name: str
    path: Path
    script: str | None
    rows: list[dict[str, Any]]

    def column(self, key: str, *also: str) -> list[tuple[float, ...]]:
        """(step, value, …) of the rows in which each of the columns is a number."""
        wanted = ("step", key, *also)
        return [tuple(row[k] for k in wanted) for row in self.rows if all(_is_number(row.get(k)) for k in wanted)]

    @property
    def columns(self) -> list[str]:
        """Names of the columns with a number in any row, as they were logged."""
        names = dict.fromkeys(key for row in self.rows for key in row if key != "step")
        return [key for key in names if self.column(key)]

    @property
    def window(self) -> int:
        """Steps of the running mean: odd, about a twentieth of the run; 1, no mean at all, below 60 steps."""
        return len(self.rows) // 20 | 1 if len(self.rows) >= 60 else 1


def read_curves(folder: Path, name: str) -> Curves:
    """A run's metrics; the last line of a run that goes on may be half written."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name the folder of a run, what --out of its script was")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing; name the folder of a run, what --out of its script was")
    *lines, unfinished = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, unfinished], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not _is_number(row.get("step")):
                raise ValueError("no step in it")
            rows.append(row)
        except ValueError as error:  # what json and utf-8 refuse are ValueErrors too
            if number > len(lines):
                break
            raise InputError(f"{path}:{number}: not one step's metrics ({error}); mend or delete this line") from error
    if not rows:
        raise InputError(f"{path}: holds no step yet; draw it when the first one is done")
    return Curves(name, path, (read_run(folder) or {}).get("script"), rows)


def choose_panels(runs: Sequence[Curves], metrics: Sequence[str]) -> list[Panel]:
    """What to draw: the metrics asked for, or what the runs' script is about, or what runs of several have in common.

    Runs over each other take a panel for each column, since look and legend tell the runs apart.
    """
    logged = [run.columns for run in runs]
    if metrics:
        for run, columns in zip(runs, logged):
            for key in metrics:
                if key not in columns:
                    raise InputError(f"--metrics {key}: {run.path} has no such number; it has {', '.join(columns)}")
        return [Panel(key, "", (key,)) for key in dict.fromkeys(metrics)]
    panels = PANELS.get(runs[0].script or "") if len({run.script for run in runs}) == 1 else None
    if panels is None:
        common = [key for key in logged[0] if all(key in columns for columns in logged)]
        panels = [Panel(key, "", (key,)) for key in common if not key.endswith("_seconds")]
    elif len(runs) > 1:
        sides = [side for p in panels for side in ((p.columns, p.unit), (p.right, p.right_unit))]
        panels = [Panel(key, unit, (key,)) for keys, unit in sides for key in keys]
    panels = [panel for panel in panels if any(key in columns for key in panel.columns for columns in logged)]
    if not panels and len(runs) > 1:
        paths = " and ".join(str(run.path) for run in runs)
        raise InputError(f"{paths} have no metric in common that could be drawn; draw them one by one")
    if not panels:
        raise InputError(
            f"{runs[0].path}: none of what is drawn of its script is in it; name something else with --metrics: "
            f"{', '.join(logged[0]) or 'but no row holds a number'}"
        )
    return panels


@dataclass(frozen=True)
class Args:
    """Draw the training curves of one or several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs/ppo"),)
    """Folders of runs; several are drawn over each other, eight at most."""
    out: Path | None = None
    """The picture, a .png; by default plot.png, in the run's folder, or of several runs in the current one. A picture
    that is there is replaced."""
    metrics: tuple[str, ...] = ()
    """Columns of metrics.jsonl to draw, a panel each; by default those that the script is about."""

    def __post_init__(self):
        if not 1 <= len(self.runs) <= len(MARKERS):
            raise InputError(f"{len(self.runs)} runs: one picture shows 1 to {len(MARKERS)}; draw several pictures")
        if len({run.resolve() for run in self.runs}) < len(self.runs):
            raise InputError("a run is named twice; name each one once")
        if self.out is not None and (self.out.suffix != ".png" or self.out.is_dir()):
            raise InputError(f"--out {self.out}: the picture is a PNG file; give it a name that ends in .png")


def main(args: Args) -> None:
    """Read, choose, draw."""
    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]
    runs = [read_curves(folder, name) for folder, name in zip(args.runs, names)]
    panels = choose_panels(runs, args.metrics)
    out = args.out or (args.runs[0] if len(runs) == 1 else Path()) / "plot.png"
    try:
        plot_curves(out, runs, panels)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); name another file with --out") from error
    console.print(f"{out}: {', '.join(f'{len(run.rows):,} steps of {run.name}' for run in runs)}", markup=False)


def plot_curves(path: Path, runs: Sequence[Curves], panels: Sequence[Panel]) -> None:
    """Draw every panel: of one run, a look for each column; of several, a look for each run."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    with figure_panels(path, columns, math.ceil(len(panels) / columns)) as every:
        for axes, panel in zip(every, panels):
            plot_panel(axes, panel, runs)
        for axes in every[len(panels) :]:
            axes.remove()
        figure = every[0].figure
        if len(runs) == 1:
            figure.suptitle(runs[0].name + (f" ({runs[0].script})" if runs[0].script else ""))
            return
        lines = {line.get_label(): line for axes in every[: len(panels)] for line in axes.lines}
        labels = [_label(run) for run in runs if _label(run) in lines]
        figure.legend([lines[label] for label in labels], labels, loc="outside lower center", ncols=columns)


def plot_panel(axes, panel: Panel, runs: Sequence[Curves]) -> None:
    """Draw the columns of one panel; a legend names them where one run is drawn alone."""
    alone = len(runs) == 1
    window = f" (line: mean of {runs[0].window} neighbouring steps)" if alone and runs[0].window > 1 else ""
    places = [(axes, key, key + (" ± 2 se" if key in ERRORS else "")) for key in panel.columns]
    axes.set(title=panel.title if alone else places[0][2], xlabel=f"step{window}", ylabel=panel.unit)
    if any(run.column(key) for key in panel.right for run in runs):
        other = right_axis(axes, panel.right_unit)
        places += [(other, key, f"{key} (right)") for key in panel.right]
    lines = []
    for j, (place, key, label) in enumerate(places):
        for i, run in enumerate(runs):
            lines += plot_column(place, run, key, series_style(j if alone else i), label if alone else _label(run))
    if alone and lines:
        axes.legend(lines, [line.get_label() for line in lines])


def plot_column(axes, run: Curves, key: str, style: dict[str, Any], label: str) -> list[Any]:
    """Draw one column of one run; return the line that its legend shows, or nothing where it was not logged."""
    points = run.column(key)
    if not points:
        return []
    x, y = zip(*points)
    if key in ERRORS and run.column(key, ERRORS[key]):
        at, middle, error = zip(*run.column(key, ERRORS[key]))
        band(axes, at, [m - 2 * e for m, e in zip(middle, error)], [m + 2 * e for m, e in zip(middle, error)], **style)
    if 2 * len(y) < len(run.rows):  # logged now and then
        return axes.plot(x, y, **style, linewidth=1, label=label)
    if run.window > 1:
        axes.plot(x, y, color=style["color"], alpha=0.3, linewidth=0.7, label="_")
    every = max(1, len(y) // 8)
    return axes.plot(x, running_mean(y, run.window), **style, markevery=every, markersize=4, label=label)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over `window` neighbours, half of them on each side; fewer where the values begin and end."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(part) / len(part) for part in parts]


def _label(run: Curves) -> str:
    return run.name + (f" (mean of {run.window} steps)" if run.window > 1 else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
