"""Where the time of a step goes: supervised fine-tuning, reward model, PPO, DPO, sampling; by kind of work.

    python benchmarks/profile_steps.py
    python benchmarks/profile_steps.py --case dpo --dtype bf16 --shape 12 768 12 50257 1024

Steps of the shipped train functions on tokens of fixed length, under torch.profiler. Each operator's own time counts
for its kind; what no operator accounts for is Python, and the profiler itself, which makes small operators dearer than
they are: the column `plain` is the same step without it. Only the main thread is followed: in PPO the policy's, while
the critic learns on another. The floor is the time that the matrix products alone would take here (_flops.py).

(Not named profile.py: beside these scripts, that would stand before Python's own `profile`, which torch imports.)
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _flops
import _ours
import torch
from _bench import DTYPES
from _report import console, machine, show_facts
from _rounds import Turns
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from vs_peers import CASES, Case, fit, write_inputs

from minirlhf.checks import check_at_least
from minirlhf.run import terminal
from minirlhf.run.command_line import cli
from minirlhf.run.folder import write_text

CaseName = Literal["sampling", "ppo", "dpo", "rm", "sft"]

# The first kind whose word is in the operator's name. Views and the like are cheap, and all of them Python's business.
KINDS: dict[str, tuple[str, ...]] = {
    "optimiser": ("adam", "_foreach", "clip_grad", "linalg_vector_norm"),
    "fused op": ("token_stats",),
    # A step of decoding is one operator: of a small model its own time is all of the network; of a large one, attention
    # and GELU.
    "decoding steps": ("minirlhf::decode_step",),
    # Attention alone multiplies in batches.
    "attention": ("scaled_dot_product", "flash_attention", "minirlhf::attention", "minirlhf::decode", "bmm"),
    "matrix products": ("addmm", "aten::mm", "mkldnn", "mkl_linear", "aten::linear", "matmul", "packed_linear"),
    "compiled": ("torch-compiled", "inductor", "compiledfxgraph", "graph_", "cpp_fused"),
    "copies": (
        "copy_", "_to_copy", "aten::to", "clone", "contiguous", "cat", "index", "gather", "scatter", "embedding",
        "select", "stack", "empty", "zeros", "fill_", "zero_", "new_", "nonzero", "masked",
    ),
    "elementwise and norms": ("aten::", "minirlhf::"),
}  # fmt: skip
OTHER = "Python and other"


@dataclass(frozen=True)
class Args:
    case: tuple[CaseName, ...] = ("sft", "rm", "ppo", "dpo", "sampling")
    """Which steps."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """As the train functions take it."""
    compile: bool = False
    """As the train functions take it, where they do."""
    steps: int = 5
    """Profiled, after two that warm up."""
    threads: int = 0
    """0: as many as torch takes by itself."""
    shape: tuple[int, int, int, int, int] | None = None
    """Layers, width, heads, vocabulary and context of another model."""
    batch: int = 0
    """Rows, or pairs, in place of each case's own."""
    tokens: tuple[int, int] | None = None
    """Of prompt and response, in place of each case's own."""
    top: int = 0
    """Also list so many of the operators that cost most."""
    json: Path | None = None
    """Where to write the results as JSON."""


@dataclass(frozen=True)
class Spent:
    """Seconds a step, under the profiler but for `plain`."""

    case: str
    plain: float
    profiled: float
    kinds: dict[str, float]
    floor: float
    operators: dict[str, tuple[float, int]]
    """Own seconds per step, and calls per step."""


class Watch(Turns):
    """In place of a parent process: it warms up, times some steps, and profiles as many."""

    WARM_UP = 2

    def __init__(self, steps: int):
        self.steps, self.plain, self.profiled, self.done = steps, [], [], 0
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def ready(self, **facts: Any) -> None:
        """Nothing waits."""

    def begin(self) -> None:
        if self.done == self.WARM_UP + self.steps:
            self.profile.start()
        self.begun = time.perf_counter()

    def end(self, **about: Any) -> None:
        seconds = time.perf_counter() - self.begun
        self.done += 1
        if self.done > self.WARM_UP:
            (self.plain if self.done <= self.WARM_UP + self.steps else self.profiled).append(seconds)
        if self.done == self.total:
            self.profile.stop()

    @property
    def total(self) -> int:
        return self.WARM_UP + 2 * self.steps


def kind_of(operator: str) -> str | None:
    """The kind of an operator; None for what is none, such as a range that the profiler marks."""
    name = operator.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), None)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what a run says of itself."""
    before, terminal.console.quiet = terminal.console.quiet, True
    try:
        yield
    finally:
        terminal.console.quiet = before


def spent(case: Case, args: Args) -> Spent:
    """Run a case and sum up."""
    watch = Watch(args.steps)
    settings = {"dtype": args.dtype, "compile": args.compile}
    with tempfile.TemporaryDirectory(prefix="profile_steps.") as folder:
        write_inputs(case, Path(folder))
        job = {"task": case.task, "folder": Path(folder), "settings": settings, "batch": case.batch}
        job |= {"response": case.response, "epochs": case.epochs, "micro": case.micro, "minibatches": case.minibatches}
        with quiet():
            data = json.loads((Path(folder) / "data.json").read_text())
            _ours.CASES[case.task](job | {"steps": watch.total}, data, watch)
    kinds, operators = dict.fromkeys([*KINDS, OTHER], 0.0), {}
    for event in watch.profile.key_averages():
        kind = kind_of(event.key)
        if kind is not None:
            own = event.self_cpu_time_total / 1e6 / args.steps
            kinds[kind] += own
            operators[event.key] = (own, round(event.count / args.steps))
    profiled = statistics.mean(watch.profiled)  # a sum over the same steps as the operators'
    kinds[OTHER] = max(0.0, profiled - sum(kinds.values()))
    works = [work for part in case.works(reference=True).values() for work in part]
    floor = _flops.floor_seconds(works, case.config, DTYPES[args.dtype])
    return Spent(case.name, statistics.median(watch.plain), profiled, kinds, floor, operators)


def show(results: Sequence[Spent], top: int) -> None:
    """One column a case, in per cent of the profiled step."""
    table = Table(box=SIMPLE, title="Share of a step", title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("kind")
    for result in results:
        table.add_column(result.case, justify="right")
    for kind in (*KINDS, OTHER):
        table.add_row(kind, *(f"{result.kinds[kind] / result.profiled:.1%}" for result in results))
    table.add_section()
    table.add_row("profiled, ms", *(f"{1e3 * result.profiled:.1f}" for result in results))
    table.add_row("plain, ms", *(f"{1e3 * result.plain:.1f}" for result in results))
    table.add_row("floor, ms", *(f"{1e3 * result.floor:.1f}" for result in results))
    table.add_row("floor / plain", *(f"{result.floor / result.plain:.0%}" for result in results))
    console.print(table)
    for result in results if top else ():
        dearest = sorted(result.operators.items(), key=lambda one: -one[1][0])[:top]
        table = Table(box=SIMPLE, title=escape(result.case), title_justify="left", pad_edge=False)
        for column in ("operator", "kind", "ms per step", "calls per step"):
            table.add_column(column, justify="left" if column in ("operator", "kind") else "right")
        for name, (own, calls) in dearest:
            table.add_row(escape(name), kind_of(name), f"{1e3 * own:.2f}", str(calls))
        console.print(table)


def main(args: Args) -> None:
    check_at_least(1, steps=args.steps)
    check_at_least(0, threads=args.threads, batch=args.batch, top=args.top)
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [fit(CASES[name][0], args.shape, args.batch, args.tokens) for name in args.case]
    information = {"machine": machine("cpu")}
    show_facts(information)
    for case in cases:
        console.print(escape(case.title))
    results = [spent(case, args) for case in cases]
    show(results, args.top)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(result) for result in results]
        write_text(args.json, json.dumps(information | {"rows": rows}, indent=1, ensure_ascii=False) + "\n")
        console.print(f"written: {args.json}")


if __name__ == "__main__":
    cli(main, Args)
