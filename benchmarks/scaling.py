"""What a training step and a batch of samples cost, against sequence length, vocabulary, batch and size of the model.

    python benchmarks/scaling.py                                    # tables, and scaling.png
    python benchmarks/scaling.py --axes length vocabulary --out results/scaling.png --json results/scaling.json
    python benchmarks/scaling.py --device cuda --dtype bf16 --layers 12 24 --width 768 1024 --vocabulary 50257 \\
        --length 512 1024 --batch 16 32 64        # sizes like GPT-2's

One size changes at a time, the others stay at their first values. Beside each time stands its floor: the time that the
matrix products alone would take here (_flops.py), at the rate that this machine has in products of these very shapes.
Where cost / floor falls with size, what is beside the products (norms, attention's softmax, Python) weighs less; where
it rises, something grows faster than it should. A training step is one of `sft.train` on whole rows of random tokens;
samples are drawn behind a prompt of a quarter of the length, and nothing ends early.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _flops
import matplotlib
import torch
from _bench import DTYPES
from _device import settle
from _ours import LR, accepted, make_model
from _report import console, machine, show_facts
from profile_steps import quiet
from rich.box import SIMPLE
from rich.table import Table

from minirlhf import InputError, sft
from minirlhf.data import Batch
from minirlhf.generate import Sampling, generate
from minirlhf.model import GPTConfig
from minirlhf.runs import Run, RunArgs, check_at_least, cli, seeded, write_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Axis = Literal["length", "vocabulary", "batch", "layers", "width"]
HEAD_WIDTH = 32  # of an attention head, whatever the model's width


@dataclass(frozen=True)
class Args:
    axes: tuple[Axis, ...] = ("length", "vocabulary", "batch", "layers", "width")
    """Which sizes to change."""
    length: tuple[int, ...] = (64, 128, 256, 512)
    """Tokens of a sequence, prompt and response together."""
    vocabulary: tuple[int, ...] = (1024, 4096, 16384, 50257)
    """Tokens of the vocabulary."""
    batch: tuple[int, ...] = (16, 32, 64, 128)
    """Sequences."""
    layers: tuple[int, ...] = (4, 8, 12)
    """Transformer blocks."""
    width: tuple[int, ...] = (128, 256, 512)
    """Of the hidden states; a multiple of 32, the width of a head."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs; on a GPU the floor is at the rate of large products."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """As the functions take it, where they do."""
    compile: bool = False
    """As the functions take it, where they do."""
    rounds: int = 5
    """How often each is timed, after one that warms up."""
    threads: int = 0
    """0: as many as torch takes by itself."""
    out: Path = Path("scaling.png")
    """Where to write the plot."""
    json: Path | None = None
    """Where to write the results as JSON."""


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
        return GPTConfig(self.vocabulary, self.length, self.layers, self.width // HEAD_WIDTH, self.width)


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


class StepRun(Run):
    """A run that keeps the seconds of its steps."""

    def __init__(self, folder: str, steps: int, device: str = "cpu"):
        self.device = device
        args = RunArgs(out=Path(folder) / "run", device="cpu", checkpoint_every=10**9)
        super().__init__(args, "scaling.py", steps)
        self.seconds: list[float] = []

    def range(self, start: int) -> Iterator[int]:
        for step in super().range(start):
            settle(self.device)
            begun = time.perf_counter()
            yield step
            settle(self.device)
            self.seconds.append(time.perf_counter() - begun)


def train_seconds(size: Size, settings: dict[str, Any], rounds: int, device: str) -> list[float]:
    """Steps of sft.train on one batch of random tokens, all but the first of a row predicted."""
    model = make_model(size.config, seed=0).to(device)
    tokens = torch.randint(size.vocabulary - 1, (size.batch, size.length), generator=seeded(0))
    counts = torch.ones_like(tokens, dtype=torch.bool)
    counts[:, 0] = False
    batch = Batch(tokens, torch.ones_like(counts), counts)
    config = sft.SFTConfig(steps=rounds + 2, batch_size=size.batch, lr=LR, held_out=0.0)
    with tempfile.TemporaryDirectory(prefix="scaling.") as folder:
        run = StepRun(folder, config.steps, device)
        sft.train(model, lambda step: batch, [], config, run, **accepted(sft.train, settings))
    return run.seconds[1:-1]  # the first warms up, and the last looks over the weights


def sample_seconds(size: Size, settings: dict[str, Any], rounds: int, device: str) -> list[float]:
    """Batches of samples behind random prompts."""
    model = make_model(size.config, seed=0, endless=True).eval().to(device)
    prompts = torch.randint(size.vocabulary - 1, (size.batch, size.prompt), generator=seeded(0)).tolist()
    seconds = []
    for i in range(2 + rounds):  # on a GPU the second captures what the first has not
        given = prompts, size.vocabulary - 1, size.length - size.prompt, i, Sampling()
        settle(device)
        begun = time.perf_counter()
        generate(model, *given, **accepted(generate, settings))
        settle(device)
        seconds.append(time.perf_counter() - begun)
    return seconds[2:]


def floor(what: str, size: Size, dtype: torch.dtype, device: str) -> float:
    if what == "train":
        works = _flops.sft_step(size.config, size.batch, 1, size.length - 1)
    else:
        works = _flops.generation(size.config, size.batch, size.prompt, size.length - size.prompt)
    return _flops.floor_seconds(works, size.config, dtype, device)


TASKS: dict[str, Callable[[Size, dict[str, Any], int, str], list[float]]] = {
    "train": train_seconds, "sample": sample_seconds,
}  # fmt: skip


def measure(axis: str, args: Args) -> list[Point]:
    """All points of one axis."""
    first = Size(*(getattr(args, field.name)[0] for field in dataclasses.fields(Size)))
    settings = {"dtype": args.dtype, "compile": args.compile}
    points: dict[str, list[Point]] = {what: [] for what in TASKS}
    for value in getattr(args, axis):
        size = dataclasses.replace(first, **{axis: value})
        for what, task in TASKS.items():
            with quiet():
                seconds = task(size, settings, args.rounds, args.device)
            median, least = statistics.median(seconds), floor(what, size, DTYPES[args.dtype], args.device)
            start = points[what][0] if points[what] else None
            ratios = (median / start.seconds, least / start.floor) if start else (1.0, 1.0)
            points[what].append(Point(axis, value, what, median, min(seconds), least, *ratios))
    return [point for what in TASKS for point in points[what]]


def show(axis: str, points: list[Point]) -> None:
    table = Table(box=SIMPLE, title=axis, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("", axis, "ms", "floor, ms", "cost / floor", "× first", "floor × first"):
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
    check_at_least(1, rounds=args.rounds)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a CUDA GPU, and torch sees none; --device cpu measures the CPU")
    check_at_least(0, threads=args.threads)
    for field in dataclasses.fields(Size):
        values = getattr(args, field.name)
        if not values or not args.axes:
            raise InputError(f"--{field.name if args.axes else 'axes'} needs at least one value")
        least = {"length": 4, "vocabulary": 257, "width": HEAD_WIDTH}.get(field.name, 1)
        check_at_least(least, **{field.name: min(values)})
    if wrong := [width for width in args.width if width % HEAD_WIDTH]:
        raise InputError(f"--width {wrong[0]} must be a multiple of {HEAD_WIDTH}, the width of a head")
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {args.out}: name a file that ends in .png, .pdf or .svg")


def main(args: Args) -> None:
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    information = {"machine": machine(args.device)}
    show_facts(information)
    first = Size(*(getattr(args, field.name)[0] for field in dataclasses.fields(Size)))
    console.print("elsewhere: " + " · ".join(f"{name} {value:,}" for name, value in vars(first).items()))
    points: list[Point] = []
    for axis in args.axes:
        new = measure(axis, args)
        show(axis, new)
        points += new
    facts = information["machine"]
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    plot(points, args.out, f"{where}, {args.dtype}; {facts['date']}")
    console.print(f"written: {args.out}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        rows = {"rows": [dataclasses.asdict(point) for point in points]}
        write_text(args.json, json.dumps(information | rows, indent=1, ensure_ascii=False) + "\n")
        console.print(f"written: {args.json}")


if __name__ == "__main__":
    cli(main, Args)
