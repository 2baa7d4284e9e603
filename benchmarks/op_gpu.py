"""The fused op on a CUDA GPU beside eager PyTorch, torch.compile and other kernels: is it right, and how fast is it?

    python benchmarks/op_gpu.py                         # at most 8 minutes, the kernel's build included; no network
    python benchmarks/op_gpu.py --json results.json
    python benchmarks/op_gpu.py --tiles --linear 8192 768 50257     # which tiles of logits are fastest

First the certificate (against float64); a kernel that is wrong is not timed. Bandwidth is measured against a plain
`copy_` of as many values. Without a GPU: one line, and exit code 2.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from _bench import (
    BACKWARD,
    BOTH,
    BOTH_KL,
    DTYPES,
    FORWARD,
    FORWARD_KL,
    LINEAR,
    Call,
    Data,
    Row,
    Task,
    bind,
    compare,
    ours,
)
from _peers import find_peers, implementations
from _report import Bound, console, faster, find, finish, linear_bounds, machine, show_facts, show_rows
from rich.box import SIMPLE
from rich.table import Table

from minirlhf import InputError
from minirlhf.checks import check_at_least, check_positive
from minirlhf.commands.certificate import certificate
from minirlhf.kernels import ops as fused
from minirlhf.kernels.build import KernelUnavailable, facts, load
from minirlhf.run.command_line import cli
from minirlhf.run.folder import write_text

DEVICE = "cuda"
TASKS = {
    "forward": FORWARD,
    "backward": BACKWARD,
    "both": BOTH,
    "forward-kl": FORWARD_KL,
    "both-kl": BOTH_KL,
    "linear": LINEAR,
}
COPY = "copy_"


@dataclass(frozen=True)
class Args:
    rows: int = 8192
    """N, but for linear."""
    vocab: tuple[str, ...] = ("50257", "50257:50304", "128256")
    """Vocabulary sizes, but for linear; V:S is a view of V of S columns."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("bf16",)
    """Of the logits; the first is that of linear too."""
    linear: tuple[int, int, int] = (8192, 768, 50257)
    """N, width and V of linear."""
    tasks: tuple[Literal["forward", "backward", "both", "forward-kl", "both-kl", "linear"], ...] = tuple(TASKS)
    """What to time."""
    against: tuple[Literal["compile", "peers"], ...] = ("compile", "peers")
    """What to put beside ours and eager PyTorch."""
    rounds: int = 50
    """How often each is timed; linear half as often."""
    minutes: float = 8
    """What would end later than this is left out, and named."""
    kernel: Literal["fused", "reference"] = "fused"
    """What to time as ours."""
    no_certificate: bool = False
    """Do not check the kernel first."""
    tiles: bool = False
    """Time `linear` alone, with tiles of logits of several sizes, and name the fastest within the promised memory."""
    json: Path | None = None
    """Where to write the results as JSON."""

    @property
    def linear_rounds(self) -> int:
        """It takes seconds a call, and varies less."""
        return max(1, self.rounds // 2)


class CudaClock:
    """CUDA events around a call. Before it, a read of 1 GiB: it empties the L2 cache of the call's inputs, leaves
    nothing in it that would have to be written back, and keeps the GPU busy while Python enqueues the call."""

    def __init__(self) -> None:
        self.elsewhere = torch.zeros(2**28, device=DEVICE)
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, call: Call) -> float:
        given = call.prepare()
        self.elsewhere.amax()
        self.start.record()
        call.run(given)
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3

    def extra_bytes(self, call: Call) -> int | None:
        """From PyTorch's allocator. What a backward alone frees while it runs was there before, and does not count."""
        given = call.prepare()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call.run(given)
        return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)


def parse(columns: str) -> tuple[int, int]:
    """`50257` or `50257:50304`: the vocabulary and the row stride."""
    vocabulary, _, stride = columns.partition(":")
    try:
        v, s = int(vocabulary), int(stride or vocabulary)
    except ValueError:
        v = s = 0
    if not 1 <= v <= s:
        raise InputError(f"--vocab takes V or V:S with 1 ≤ V ≤ S, got {columns!r}")
    return v, s


def make_data(task: Task, rows: int, columns: str, dtype: torch.dtype, width: int) -> Data:
    """Normal logits of deviation 3, and a reference not far from them; both with the row stride asked for."""
    v, stride = parse(columns)
    targets = torch.randint(v, (rows,), device=DEVICE)
    upstream = torch.randn(len(task.outputs), rows, device=DEVICE)

    def normal(*shape: int, deviation: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype).mul_(deviation)

    if task.linear:
        return Data((normal(rows, width), normal(v, width, deviation=3 / width**0.5)), (targets,), upstream)
    padded = normal(rows, stride, deviation=3.0)
    reference = (padded + torch.randn_like(padded))[:, :v] if "kl" in task.outputs else None
    return Data((padded[:, :v],), (targets,) if reference is None else (targets, reference), upstream)


def copy_of(logits: torch.Tensor) -> tuple[str, Call, int]:
    """The baseline: as many contiguous values copied, each read once and written once."""
    source = torch.zeros(logits.numel(), dtype=logits.dtype, device=DEVICE)
    target = torch.zeros_like(source)
    return COPY, Call(lambda _: (target.copy_(source),), comparable=False), 2 * source.nbytes


def case_bounds(rows: list[Row], case: str) -> list[Bound]:
    """85% of the copy's bandwidth, level with the kernels of others and torch.compile, five times as fast as eager."""
    bounds = []
    for task in (FORWARD, BACKWARD, FORWARD_KL, BOTH):
        row = find(rows, case, task.name, "ours")
        if row is None:
            continue
        if task is not BOTH:
            asked = f"≥ 85% of the bandwidth of {COPY}"
            bounds.append(Bound(f"{case}, {task.name}", asked, f"{row.share:.1%}", row.share >= 0.85))
            bounds += faster(rows, case, task.name, "eager", 5)
        peers = [r.implementation for r in rows if (r.case, r.task) == (case, task.name) and r.median is not None]
        for name in peers:
            if name.startswith(("trl", "liger", "torch.compile")):
                bounds += faster(rows, case, task.name, name, 1)
    return bounds


def plan(args: Args) -> list[tuple[str, Task, torch.dtype, int, str]]:
    """Case, task, dtype, N and columns of everything to time, what was promised first."""
    for columns in args.vocab:
        parse(columns)
    wanted = [TASKS[name] for name in args.tasks]
    n, width, vocabulary = args.linear
    steps = [
        (f"{dtype}, N = {args.rows}, V = {columns}", task, DTYPES[dtype], args.rows, columns)
        for promised in (True, False)
        for dtype in args.dtypes
        for columns in args.vocab
        for task in wanted
        if not task.linear and ("kl" not in task.outputs) == promised
    ]
    if LINEAR in wanted:
        case = f"{args.dtypes[0]}, N = {n}, D = {width}, V = {vocabulary}"
        steps.append((case, LINEAR, DTYPES[args.dtypes[0]], n, str(vocabulary)))
    return steps


class Tiles(NamedTuple):
    """One size of the tiles in which `linear_token_stats` computes logits."""

    rows: int
    elements: int
    seconds: float
    extra_bytes: int


def sweep(args: Args, clock: Any) -> list[Tiles]:
    """`linear`, forward and backward, with tiles of several sizes: seconds, and memory beside inputs and results."""
    n, width, vocabulary = args.linear
    dtype = DTYPES[args.dtypes[0]]
    call = bind(LINEAR, ours(LINEAR, args.kernel), make_data(LINEAR, n, str(vocabulary), dtype, width))
    found: list[Tiles] = []
    before = fused.TILE_ROWS, fused.TILE_ELEMENTS, fused.TILE_SHARE
    try:
        fused.TILE_SHARE = 1
        for rows in dict.fromkeys(min(n, rows) for rows in (1024, 2048, 4096, 8192)):
            for elements in (2**power for power in range(18, 27)):
                if elements < 256 * rows or elements > 2 * n * vocabulary:
                    continue
                fused.TILE_ROWS, fused.TILE_ELEMENTS = {DEVICE: rows}, {DEVICE: elements}
                extra = clock.extra_bytes(call)  # warms up, too
                seconds = [clock.seconds(call) for _ in range(args.linear_rounds)]
                found.append(Tiles(rows, elements, statistics.median(seconds), extra))
    finally:
        fused.TILE_ROWS, fused.TILE_ELEMENTS, fused.TILE_SHARE = before
    return found


def show_sweep(args: Args, found: list[Tiles]) -> Tiles | None:
    """The table, and the fastest within the promise: a 16th of the logits in fp32."""
    n, width, vocabulary = args.linear
    promised = 4 * n * vocabulary // 16
    table = Table(box=SIMPLE, title=f"tiles of linear, N = {n}, D = {width}, V = {vocabulary}", title_justify="left")
    for column in ("rows", "elements", "ms", "extra MB", "within the promise"):
        table.add_column(column, justify="right")
    for one in found:
        within = "yes" if one.extra_bytes <= promised else "no"
        table.add_row(
            f"{one.rows:,}", f"2^{one.elements.bit_length() - 1}", f"{1e3 * one.seconds:.3f}",
            f"{one.extra_bytes / 1e6:.1f}", within,
        )  # fmt: skip
    console.print(table)
    fits = [one for one in found if one.extra_bytes <= promised]
    best = min(fits, key=lambda one: one.seconds, default=None)
    if best is not None:
        power = best.elements.bit_length() - 1
        console.print(f"fastest within {promised / 1e6:.0f} MB: {best.rows:,} rows, 2^{power} elements")
    return best


def check(information: dict[str, Any], dtypes: list[torch.dtype]) -> None:
    """The certificate on the GPU, in one line; every row that fails, if any does, and then no timing."""
    begun = time.perf_counter()
    rows, passed = certificate(DEVICE, dtypes=dtypes)
    failed = [row for row in rows if not row.ok]
    information["certificate"] = {"rows": len(rows), "failed": len(failed)}
    for row in failed:
        console.print(f"FAIL {row}")
    seconds = time.perf_counter() - begun
    console.print(f"certificate: {len(rows) - len(failed)} of {len(rows)} rows pass ({seconds:.0f} s)")
    if not passed:
        console.print(
            "a kernel that is wrong is not timed; python -m minirlhf.token_stats prints the whole certificate"
        )
        sys.exit(1)


def main(args: Args) -> None:
    begun = time.perf_counter()
    check_at_least(1, rows=args.rows, rounds=args.rounds)
    check_positive(minutes=args.minutes)
    steps = plan(args)
    if not torch.cuda.is_available():
        raise InputError("op_gpu.py needs a CUDA GPU, and torch sees none; op_cpu.py measures the CPU")
    information: dict[str, Any] = {"machine": machine(DEVICE)}
    if args.kernel == "fused":
        try:
            load(cuda=True)
        except KernelUnavailable as reason:
            raise InputError(f"nothing to time (--kernel reference times the plain PyTorch): {reason}") from None
        information["kernel"] = facts()
    peers, information["peers"] = find_peers(DEVICE) if "peers" in args.against else ([], {})
    show_facts(information)
    if not args.no_certificate:
        check(information, [DTYPES[name] for name in args.dtypes])

    if args.tiles:
        found = sweep(args, CudaClock())
        best = show_sweep(args, found)
        if args.json is not None:
            tiles = {"tiles": [one._asdict() for one in found], "best": None if best is None else best._asdict()}
            write_text(args.json, json.dumps(information | tiles, indent=1) + "\n")
        return

    rows: list[Row] = []
    bounds: list[Bound] = []
    longest = 0.0
    clock = CudaClock()
    for case, task, dtype, size, columns in steps:
        at = time.perf_counter()
        if at - begun + longest > 60 * args.minutes:
            console.print(f"left out, since it would end after {args.minutes:g} minutes: {case}, {task.name}")
            continue
        torch.manual_seed(0)
        data = make_data(task, size, columns, dtype, args.linear[1])
        calls = implementations(task, data, args.kernel, args.against, peers)
        rounds, moved = args.linear_rounds if task.linear else args.rounds, task.bytes_moved(data.leaves[0])
        rows += compare(case, task, calls, clock, rounds, moved, None if task.linear else copy_of(data.leaves[0]))
        longest = max(longest, time.perf_counter() - at)
        new = (row for row in rows if (row.case, row.task) == (case, task.name))
        done = ", ".join(f"{row.implementation} {1e3 * row.median:.3f} ms" for row in new if row.median)
        console.print(f"{at - begun:4.0f} s  {case}, {task.name}: {done}")
    for case in dict.fromkeys(row.case for row in rows):
        show_rows(case, [row for row in rows if row.case == case], COPY)
        bounds += case_bounds(rows, case) + linear_bounds(rows, case, 4 * args.linear[0] * args.linear[2])
    finish(information, rows, bounds, args.rounds, args.linear_rounds, args.json)


if __name__ == "__main__":
    cli(main, Args)
