"""The rest that the benchmarks of speed share: the tables, what was promised beside what was measured, the JSON."""

import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _bench import LINEAR, Row
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minirlhf import InputError, __version__
from minirlhf.kernels import build as kernels
from minirlhf.run.folder import write_text

console = Console(highlight=False)
console.width = max(console.width, 132)  # in a file too, one row is one line


@dataclass(frozen=True)
class Bound:
    """One promise of the README, and what was measured."""

    what: str
    asked: str
    measured: str
    met: bool


def machine(device: str) -> dict[str, str]:
    """What a figure depends on, and when it was measured."""
    facts = {"date": datetime.date.today().isoformat(), "cpu": _cpu(), "threads": str(torch.get_num_threads())}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "L2": f"{gpu.L2_cache_size / 2**20:.0f} MiB", "cuda": str(torch.version.cuda)}
    return facts | {"torch": torch.__version__, "python": platform.python_version(), "minirlhf": __version__}


def built(device: str) -> dict[str, dict[str, str]]:
    """On a GPU, how the CUDA kernels were built: now, so that no time has it in it. Without them it is an error."""
    if device == "cpu":
        return {}
    try:
        kernels.load(cuda=True)
    except kernels.KernelUnavailable as reason:
        raise InputError(f"nothing to time: {reason}") from None
    return {"kernel": kernels.facts()}


def _cpu() -> str:
    """The processor's name and how many of its cores are ours."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def show_facts(information: dict[str, dict[str, str]]) -> None:
    """A line each; what an earlier line has said, and long paths, are left to the JSON."""
    said: set[str] = {"path"}
    for name, about in information.items():
        new = {key: value for key, value in about.items() if value and key not in said}
        said |= new.keys()
        if new:
            console.print(escape(f"{name}: " + " · ".join(f"{key} {value}" for key, value in new.items())))


def show_rows(title: str, rows: Sequence[Row], bandwidth: str) -> None:
    """One case as a table, a section a task. `bandwidth` says what the share is of."""
    table = Table(box=SIMPLE, title=escape(title), title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task")
    table.add_column("implementation", no_wrap=True)
    for column in ("ms", "quartiles", "GB/s", f"of {bandwidth}", "÷ ours", "extra MB", "off by"):
        table.add_column(column, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1].task != row.task
        last = i + 1 == len(rows) or rows[i + 1].task != row.task
        cells = [escape(row.note)] if row.median is None else _cells(row)
        table.add_row(row.task if first else "", escape(row.implementation), *cells, end_section=last)
    console.print(table)


def _cells(row: Row) -> list[str]:
    low, high = row.quartiles
    return [
        _ms(row.median),
        f"{_ms(low)} – {_ms(high)}",
        "" if row.bandwidth is None else f"{row.bandwidth / 1e9:.1f}",
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.times_ours is None else f"{row.times_ours:.2f}",
        "" if row.extra_bytes is None else f"{max(0, row.extra_bytes) / 1e6:.1f}",
        "" if row.difference is None else f"{row.difference:.0e}",
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}" if seconds < 1e-2 else f"{1e3 * seconds:.1f}"


LEGEND = """\
Medians of {rounds} rounds ({linear_rounds} for linear) in one process; a round calls each implementation once, in turn.
GB/s: what one pass forward and one backward must move (logits read in each, gradient written in the latter) ÷ median.
÷ ours: how many times our median. extra MB: memory at its highest, beyond the inputs and what the call returns.
off by: largest difference from eager in what the call returns, sign aside (a gradient where there is a backward)."""


def find(rows: Sequence[Row], case: str, task: str, implementation: str) -> Row | None:
    """The row, if it was measured. A peer is found by the beginning of its name."""
    found = [r for r in rows if (r.case, r.task) == (case, task) and r.implementation.startswith(implementation)]
    return next((r for r in found if r.median is not None), None)


def faster(rows: Sequence[Row], case: str, task: str, than: str, times: float) -> list[Bound]:
    """The promise to be at least so many times faster, if both were measured."""
    row = find(rows, case, task, than)
    if row is None or row.times_ours is None:
        return []
    asked = f"≥ {times:g}× as fast as {row.implementation}"
    return [Bound(f"{case}, {task}", asked, f"{row.times_ours:.2f}×", row.times_ours >= times)]


def linear_bounds(rows: list[Row], case: str, logits_bytes: int) -> list[Bound]:
    """No slower than the unfused compiled path, in a sixteenth of the memory of the logits."""
    row = find(rows, case, LINEAR.name, "ours")
    bounds = faster(rows, case, LINEAR.name, "torch.compile", 1)
    if row is not None and row.extra_bytes is not None:
        share = row.extra_bytes / logits_bytes
        bounds.append(Bound(f"{case}, {LINEAR.name}", "extra memory ≤ 1/16 of N·V·4", f"{share:.4f}", share <= 1 / 16))
    return bounds


def show_bounds(bounds: Sequence[Bound]) -> None:
    table = Table(box=SIMPLE, title="Asked and measured", title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("what", "asked", "measured", ""):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for bound in bounds:
        met = "met" if bound.met else "[bold red]not met[/]"
        table.add_row(escape(bound.what), bound.asked, bound.measured, met)
    console.print(table)
    console.print(f"{sum(b.met for b in bounds)} of {len(bounds)} met")


def finish(
    facts: dict[str, Any],
    rows: Sequence[Row],
    bounds: Sequence[Bound],
    rounds: int,
    linear_rounds: int,
    path: Path | None,
) -> None:
    """Print what is left to say, write the same as JSON (seconds, bytes), and fail if our own op failed somewhere."""
    console.print(LEGEND.format(rounds=rounds, linear_rounds=linear_rounds))
    show_bounds(bounds)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lists = {"rows": [dataclasses.asdict(row) for row in rows], "bounds": [dataclasses.asdict(b) for b in bounds]}
        write_text(path, json.dumps(facts | lists, indent=1, ensure_ascii=False) + "\n")
        console.print(f"written: {path}")
    if any(row.implementation == "ours" and row.median is None for row in rows):
        sys.exit(1)
