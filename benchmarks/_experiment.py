"""What the experiments share: the runs they start from, numbers over seeds, tables, files."""

import csv
import dataclasses
import datetime
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _jobs import Job, cores, run_all, train
from _report import console, machine
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from minirlhf import InputError
from minirlhf.checks import check_at_least
from minirlhf.run.folder import write_text

# The 97.5th percentile of Student's t for 1, 2, … degrees of freedom: from 3 seeds, 4.30 standard errors to each side.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(STUDENT) + 1


QUICK_STEPS = {"pretrain": 120, "sft": 80, "rm": 60, "ppo": 3, "dpo": 30, "best": 40, "trunk": 40}


def steps(quick: bool, what: str, full: int | None = None) -> tuple[object, ...]:
    """--steps of a training: few where it is to be quick, else `full`, else the script's own number."""
    wanted = QUICK_STEPS[what] if quick else full
    return () if wanted is None else ("--steps", wanted)


@dataclass(frozen=True)
class ExperimentArgs:
    """What every experiment takes."""

    out: Path = Path("runs/evidence")
    """Folder of runs and results. What is finished there is not run again, and the experiments share what they start
    from; delete it to begin anew."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Everything is repeated with each."""
    quick: bool = False
    """One seed, short trainings: shows that it works, not what comes out."""
    workers: int = 0
    """Trainings side by side, on one thread each; 0 = as many as there are cores."""

    def __post_init__(self):
        check_at_least(0, workers=self.workers, seeds=min(self.seeds, default=-1))
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds {' '.join(map(str, self.seeds))}: one is named twice; give different ones")
        if len(self.seeds) > MOST_SEEDS:
            raise InputError(f"--seeds: {len(self.seeds)} are more than {MOST_SEEDS}; give fewer")
        if "," in str(self.root):
            raise InputError(
                f"--out {self.out}: a comma in its path would divide the names of an ensemble; use another"
            )

    @property
    def root(self) -> Path:
        """Where this experiment's runs are: quick ones stand apart."""
        return self.out.resolve() / "quick" if self.quick else self.out.resolve()

    @property
    def used_seeds(self) -> tuple[int, ...]:
        return self.seeds[:1] if self.quick else self.seeds


@dataclass(frozen=True)
class Base:
    """The runs that a seed's experiments start from, as `make demo` makes them."""

    pretrain: Job
    sft: Job
    rm: Job

    @property
    def jobs(self) -> list[Job]:
        return [self.pretrain, self.sft, self.rm]


def base(root: Path, seed: int, quick: bool) -> Base:
    """Pre-training, fine-tuning and the reward model of one seed."""
    folder = root / f"seed-{seed}"
    own = ("--seed", seed, *steps(quick, "pretrain"))
    pretrain = train("train_sft.py", folder / "pretrain", "--data", "helpdesk:corpus", "--lr", 4e-3, *own)
    own = ("--seed", seed, *steps(quick, "sft"))
    sft = train("train_sft.py", folder / "sft", "--init", folder / "pretrain", *own, after=[pretrain])
    own = ("--seed", seed, *steps(quick, "rm"))
    rm = train("train_rm.py", folder / "rm", "--init", folder / "sft", *own, after=[sft])
    return Base(pretrain, sft, rm)


def work(args: ExperimentArgs, jobs: Sequence[Job]) -> dict[str, Any]:
    """Run the jobs; what they took, on what."""
    workers = args.workers or cores()
    began = time.perf_counter()
    core_seconds = run_all(jobs, workers)
    facts = machine("cpu")
    days = sorted({datetime.date.fromtimestamp(job.mark.stat().st_mtime).isoformat() for job in jobs})
    facts |= {
        "threads": "1 a training",
        "trainings side by side": str(workers),
        "trained": " to ".join({days[0], days[-1]}),
    }
    took = {"jobs": len(jobs), "core_seconds": core_seconds, "wall_seconds": time.perf_counter() - began}
    console.print(
        f"{len(jobs)} jobs, {core_seconds / 60:.0f} core-minutes in all; {took['wall_seconds'] / 60:.1f} minutes now"
    )
    return {"facts": facts, "took": took, "seeds": list(args.used_seeds)}


# --- numbers over seeds -----------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return statistics.fmean(values)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of their mean: t · s/√n, with Student's t, since seeds are few. NaN of a single one."""
    if len(values) < 2:
        return math.nan
    t = STUDENT[len(values) - 2]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], digits: int = 2) -> str:
    """'8.43 ± 0.21': mean and half of its 95% interval."""
    width = half_width(values)
    return f"{mean(values):.{digits}f}" + ("" if math.isnan(width) else f" ± {width:.{digits}f}")


# --- files and tables -------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One row a line, under the keys of the first."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def write_json(path: Path, what: dict[str, Any]) -> None:
    """As JSON, NaN as null."""
    write_text(path, json.dumps(_plain(what), indent=1, ensure_ascii=False) + "\n")


def _plain(what: Any) -> Any:
    if dataclasses.is_dataclass(what):
        return _plain(dataclasses.asdict(what))
    if isinstance(what, dict):
        return {str(key): _plain(value) for key, value in what.items()}
    if isinstance(what, (list, tuple)):
        return [_plain(value) for value in what]
    return None if isinstance(what, float) and not math.isfinite(what) else what


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table, its first column to the left."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
