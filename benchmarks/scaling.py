"""What a training step and a batch of samples cost, against sequence length, vocabulary, batch and size of the model.

    python benchmarks/scaling.py                                    # tables, and scaling.png
    python benchmarks/scaling.py --axes length vocabulary --out results/scaling.png --json results/scaling.json
    python benchmarks/scaling.py --device cuda --dtype bf16 --minutes 3                  # around GPT-2 small

One size changes at a time, the others stay at their first values. Beside each time stands its floor: the time that the
matrix products alone would take here (_flops.py), at the rate that this machine has in products of these very shapes.
Where cost / floor falls with size, what is beside the products (norms, attention's softmax, Python) weighs less; where
it rises, something grows faster than it should. A training step is one of `sft.train` on whole rows of random tokens;
samples are drawn behind a prompt of a quarter of the length, and nothing ends early. On a GPU each time goes from idle
to idle, and memory at its peak and host synchronisations stand there as well (_rounds.py).
"""

import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _flops
import matplotlib
import torch
from _bench import DTYPES
from _ours import LR, make_model, run_with
from _report import built, console, machine, show_facts
from _rounds import METERS, Cpu, Gpu
from profile_steps import quiet
from rich.box import SIMPLE
from rich.table import Table

from minirlhf import InputError
from minirlhf.algorithms import sft
from minirlhf.checks import check_at_least
from minirlhf.data.batches import Batch, Data
from minirlhf.devices import pick_device
from minirlhf.model.generate import generate
from minirlhf.model.gpt import GPTConfig
from minirlhf.model.sampling import Sampling
from minirlhf.run.arguments import RunArgs
from minirlhf.run.command_line import cli
from minirlhf.run.folder import Run, write_text
from minirlhf.seeds import seeded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Axis = Literal["length", "vocabulary", "batch", "layers", "width"]
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "length": (64, 128, 256, 512), "vocabulary": (1024, 4096, 16384, 50257), "batch": (16, 32, 64, 128),
        "layers": (4, 8, 12), "width": (128, 256, 512),
    },
    "cuda": {
        "length": (128, 256, 512, 1024), "vocabulary": (50257, 128256), "batch": (32, 64, 128), "layers": (12, 24),
        "width": (768, 1024),
    },
}  # fmt: skip


def head_width(width: int) -> int:
    """Of an attention head: GPT-2's in models as wide as GPT-2, half of it in smaller ones."""
    return 64 if width >= 768 else 32


@dataclass(frozen=True)
class Args:
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    axes: tuple[Axis, ...] = ("length", "vocabulary", "batch", "layers", "width")
    """Which sizes to change."""
    length: tuple[int, ...] | None = None
    """Tokens of a sequence, prompt and response together; by default 64 to 512, on a GPU 128 to 1024."""
    vocabulary: tuple[int, ...] | None = None
    """Tokens of the vocabulary; by default 1024 to 50257, on a GPU 50257 and 128256."""
    batch: tuple[int, ...] | None = None
    """Sequences; by default 16 to 128, on a GPU 32 to 128."""
    layers: tuple[int, ...] | None = None
    """Transformer blocks; by default 4 to 12, on a GPU 12 and 24."""
    width: tuple[int, ...] | None = None
    """Of the hidden states; by default 128 to 512, on a GPU 768 and 1024. A multiple of 32, the width of a head, and
    from 768 on of 64."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """As the functions take it, where they do."""
    compile: bool = False
    """As the functions take it, where they do."""
    rounds: int = 5
    """How often each is timed, after one that warms up and one in which synchronisations are counted."""
    minutes: float = 0
    """What would end later than this is left out, and named. 0: no limit."""
    threads: int = 0
    """0: as many as torch takes by itself."""
    out: Path = Path("scaling.png")
    """Where to write the plot."""
    json: Path | None = None
    """Where to write the results as JSON."""

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """By axis: what was given, or the device's own."""
        own = SIZES[self.device]
        return {axis: own[axis] if getattr(self, axis) is None else getattr(self, axis) for axis in own}


@dataclass(frozen=True)
class Size:
    """One point."""

    length: int
    vocabulary: int
    batch: int
    layers: int
    width: int

    @property
    def prompt(self) -> int:
        return max(1, self.length // 4)

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(self.vocabulary, self.length, self.layers, self.width // head_width(self.width), self.width)


@dataclass(frozen=True)
class Point:
    """What it cost: medians in seconds, and the floor."""

    axis: str
    value: int
    what: str
    seconds: float
    fastest: float
    floor: float
    to_first: float
    """Times the first point of the axis."""
    floor_to_first: float
    tokens_per_second: float
    """Read in training, drawn in sampling."""
    peak_bytes: int | None
    """Of the GPU's memory."""
    syncs: int | None
    """How often the host waits for the GPU."""


class Rounds:
    """Rounds of one thing: the first warms up, in the second host synchronisations are counted, the rest is timed."""

    def __init__(self, meter: Cpu | Gpu):
        self.meter, self.done, self.seconds, self.syncs = meter, 0, [], None
        meter.rest()

    @contextmanager
    def one(self) -> Iterator[None]:
        self.done += 1
        self.meter.wait()
        if self.done == 2:
            self.meter.watch()
        begun = time.perf_counter()
        yield
        if self.done == 2:
            self.syncs = self.meter.watched()
        self.meter.wait()
        if self.done > 2:
            self.seconds.append(time.perf_counter() - begun)


class StepRun(Run):
    """A run whose steps are rounds."""

    def __init__(self, folder: str, steps: int, meter: Cpu | Gpu):
        args = RunArgs(out=Path(folder) / "run", device=meter.device, checkpoint_every=10**9)
        super().__init__(args, "scaling.py", steps)
        self.rounds = Rounds(meter)

    def range(self, start: int) -> Iterator[int]:
        for step in super().range(start):
            with self.rounds.one():
                yield step


def train(size: Size, settings: dict[str, Any], rounds: int, meter: Cpu | Gpu) -> Rounds:
    """Steps of sft.train on one batch of random tokens, all but the first of a row predicted."""
    model = make_model(size.config, seed=0).to(meter.device)
    run_with(settings, model)
    tokens = torch.randint(size.vocabulary - 1, (size.batch, size.length), generator=seeded(0))
    counts = torch.ones_like(tokens, dtype=torch.bool)
    counts[:, 0] = False
    batch = Batch(tokens, torch.ones_like(counts), counts)
    config = sft.SFTConfig(steps=2 + rounds + 1, batch_size=size.batch, lr=LR, held_out=0.0)
    with tempfile.TemporaryDirectory(prefix="scaling.") as folder:
        run = StepRun(folder, config.steps, meter)
        sft.train(model, Data(lambda step: [batch], []), config, run)
    run.rounds.seconds.pop()  # the last step looks over the weights
    return run.rounds


def sample(size: Size, settings: dict[str, Any], rounds: int, meter: Cpu | Gpu) -> Rounds:
    """Batches of samples behind random prompts."""
    model = make_model(size.config, seed=0, endless=True).eval().to(meter.device)
    run_with(settings, model, compiled=True)
    prompts = torch.randint(size.vocabulary - 1, (size.batch, size.prompt), generator=seeded(0)).tolist()
    given, drawn = (prompts, size.vocabulary - 1, size.length - size.prompt), Rounds(meter)
    for seed in range(2 + rounds):
        with drawn.one():
            generate(model, *given, seed, Sampling())
    return drawn


def floor(what: str, size: Size, dtype: torch.dtype, device: str) -> float:
    if what == "train":
        works = _flops.sft_step(size.config, size.batch, 1, size.length - 1)
    else:
        works = _flops.generation(size.config, size.batch, size.prompt, size.length - size.prompt)
    return _flops.floor_seconds(works, size.config, dtype, device)


TASKS: dict[str, Callable[[Size, dict[str, Any], int, Cpu | Gpu], Rounds]] = {"train": train, "sample": sample}


def measure(axis: str, args: Args, deadline: float) -> list[Point]:
    """All points of one axis that should end before the deadline, on the clock of `time.monotonic`."""
    first = Size(**{name: values[0] for name, values in args.sizes.items()})
    settings = {"dtype": args.dtype, "compile": args.compile}
    points: dict[str, list[Point]] = {what: [] for what in TASKS}
    longest = 0.0
    for value in args.sizes[axis]:
        size = dataclasses.replace(first, **{axis: value})
        for what, task in TASKS.items():
            at, meter = time.monotonic(), METERS[args.device]()
            if at + longest > deadline:
                console.print(f"left out, since it would end after {args.minutes:g} minutes: {what}, {axis} {value:,}")
                continue
            with quiet():
                rounds = task(size, settings, args.rounds, meter)
            peak = meter.peak() if args.device == "cuda" else None
            median = statistics.median(rounds.seconds)
            least = floor(what, size, DTYPES[args.dtype], args.device)
            start = points[what][0] if points[what] else None
            ratios = (median / start.seconds, least / start.floor) if start else (1.0, 1.0)
            rate = size.batch * (size.length if what == "train" else size.length - size.prompt) / median
            seconds = median, min(rounds.seconds), least
            points[what].append(Point(axis, value, what, *seconds, *ratios, rate, peak, rounds.syncs))
            longest = max(longest, time.monotonic() - at)
    return [point for what in TASKS for point in points[what]]


def show(axis: str, points: list[Point], device: str) -> None:
    table = Table(box=SIMPLE, title=axis, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    more = ("tokens/s", "peak MiB", "syncs") if device == "cuda" else ()
    for column in ("", axis, "ms", "floor, ms", "cost / floor", "× first", "floor × first", *more):
        table.add_column(column, justify="right" if column else "left")
    previous = ""
    for point in points:
        if point.what != previous and previous:
            table.add_section()
        table.add_row(
            point.what if point.what != previous else "",
            f"{point.value:,}",
            f"{1e3 * point.seconds:.1f}",
            f"{1e3 * point.floor:.1f}",
            f"{point.seconds / point.floor:.2f}",
            f"{point.to_first:.2f}",
            f"{point.floor_to_first:.2f}",
            *((f"{x:,.0f}" for x in (point.tokens_per_second, point.peak_bytes / 2**20, point.syncs)) if more else ()),
        )
        previous = point.what
    console.print(table)


def plot(points: list[Point], path: Path, title: str) -> None:
    """A panel an axis, both logarithmic: cost with its marks, floor dashed."""
    axes = list(dict.fromkeys(point.axis for point in points))
    figure, panels = plt.subplots(1, len(axes), figsize=(3.2 * len(axes) + 0.6, 3.4), sharey=True, squeeze=False)
    for panel, axis in zip(panels[0], axes):
        for what, colour in zip(TASKS, ("tab:blue", "tab:orange")):
            mine = [point for point in points if (point.axis, point.what) == (axis, what)]
            values = [point.value for point in mine]
            panel.plot(values, [1e3 * point.seconds for point in mine], "o-", color=colour, label=what)
            panel.plot(values, [1e3 * point.floor for point in mine], "--", color=colour, label=f"{what}, floor")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check(args: Args) -> None:
    pick_device(args.device)
    check_at_least(1, rounds=args.rounds)
    check_at_least(0, threads=args.threads, minutes=args.minutes)
    for axis, values in args.sizes.items():
        if not values or not args.axes:
            raise InputError(f"--{axis if args.axes else 'axes'} needs at least one value")
        check_at_least({"length": 4, "vocabulary": 257, "width": 32}.get(axis, 1), **{axis: min(values)})
    if wrong := [width for width in args.sizes["width"] if width % head_width(width)]:
        raise InputError(f"--width {wrong[0]} must be a multiple of {head_width(wrong[0])}, the width of a head")
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {args.out}: name a file that ends in .png, .pdf or .svg")


def write(path: Path, information: dict[str, Any], points: list[Point]) -> None:
    """What is known so far, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"rows": [dataclasses.asdict(point) for point in points]}
    write_text(path, json.dumps(information | rows, indent=1, ensure_ascii=False) + "\n")


def main(args: Args) -> None:
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    information = {"machine": machine(args.device)} | built(args.device)
    show_facts(information)
    console.print("elsewhere: " + " · ".join(f"{axis} {values[0]:,}" for axis, values in args.sizes.items()))
    points: list[Point] = []
    for axis in args.axes:
        new = measure(axis, args, deadline)
        if new:
            show(axis, new, args.device)
        points += new
        if args.json is not None:
            write(args.json, information, points)  # whoever is stopped later has this
    if points:
        facts = information["machine"]
        where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
        plot(points, args.out, f"{where}, {args.dtype}; {facts['date']}")
        console.print(f"written: {args.out}")
    if args.json is not None:
        console.print(f"written: {args.json}")


if __name__ == "__main__":
    cli(main, Args)
