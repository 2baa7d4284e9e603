"""The fused op on the CPU beside eager PyTorch, torch.compile and TRL: time, bandwidth, memory, and what was promised.

    python benchmarks/op_cpu.py                         # some minutes, on an otherwise idle machine
    python benchmarks/op_cpu.py --json results.json

The promises are for two cores. Bandwidth is measured against a plain read: `amax()` over as many float32 values.
"""

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from _bench import BOTH, BOTH_KL, DTYPES, FORWARD, FORWARD_KL, LINEAR, Call, Data, Row, Task, compare
from _peers import Peer, find_peers, implementations
from _report import Bound, faster, find, finish, linear_bounds, machine, show_facts, show_rows

from minirlhf import InputError
from minirlhf.checks import check_at_least
from minirlhf.kernels.build import KernelUnavailable, facts, load
from minirlhf.run.command_line import cli

TASKS = {"forward": FORWARD, "forward-kl": FORWARD_KL, "both": BOTH, "both-kl": BOTH_KL, "linear": LINEAR}
READ = "amax() over fp32"


@dataclass(frozen=True)
class Args:
    rows: int = 512
    """N, but for linear."""
    vocab: tuple[int, ...] = (50257, 128256)
    """Vocabulary sizes, but for linear."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of the logits; linear is in fp32."""
    linear: tuple[int, int, int] = (2048, 256, 50257)
    """N, width and V of linear."""
    tasks: tuple[Literal["forward", "forward-kl", "both", "both-kl", "linear"], ...] = tuple(TASKS)
    """What to time."""
    against: tuple[Literal["compile", "peers"], ...] = ("compile", "peers")
    """What to put beside ours and eager PyTorch."""
    rounds: int = 20
    """How often each is timed; linear half as often."""
    threads: int = 0
    """0: as many as torch takes by itself."""
    kernel: Literal["fused", "reference"] = "fused"
    """What to time as ours."""
    no_build: bool = False
    """Do not measure how long a first build and a later start take."""
    json: Path | None = None
    """Where to write the results as JSON."""

    @property
    def linear_rounds(self) -> int:
        """It takes seconds a call, and varies less."""
        return max(1, self.rounds // 2)


class CpuClock:
    def seconds(self, call: Call) -> float:
        given = call.prepare()
        start = time.perf_counter()
        results = call.run(given)
        stop = time.perf_counter()
        del results  # freed outside
        return stop - start

    def extra_bytes(self, call: Call) -> int | None:
        """How far the resident memory of the process rises (Linux only: VmHWM, reset through clear_refs).

        It sees every allocation, a kernel's own scratch too. Freed memory that malloc has kept would be used again
        unseen, so it is first given back to the system, and so is the room for tiles that our op keeps between calls.
        """
        gc.collect()
        if "minirlhf.fused" in sys.modules:
            sys.modules["minirlhf.fused"].forget_room()
        given = call.prepare()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (AttributeError, OSError):
            return None
        before = _status("VmRSS")
        results = call.run(given)
        highest = _status("VmHWM")
        return highest - before - sum(x.nbytes for x in results)


def _status(name: str) -> int:
    """A size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def make_data(task: Task, rows: int, vocabulary: int, dtype: torch.dtype, width: int) -> Data:
    """Normal logits of deviation 3, and a reference not far from them."""
    targets = torch.randint(vocabulary, (rows,))
    upstream = torch.randn(len(task.outputs), rows)
    if task.linear:
        hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width) * 3 / width**0.5
        return Data((hidden, weight), (targets,), upstream)
    logits = torch.randn(rows, vocabulary).mul_(3)
    reference = (logits + torch.randn(rows, vocabulary)).to(dtype)
    return Data((logits.to(dtype),), (targets, reference) if "kl" in task.outputs else (targets,), upstream)


def time_task(case: str, task: Task, data: Data, args: Args, peers: list[Peer]) -> list[Row]:
    calls = implementations(task, data, args.kernel, args.against, peers)
    if task.linear:
        return compare(case, task, calls, CpuClock(), args.linear_rounds)
    values = torch.randn(data.leaves[0].shape)
    baseline = (READ, Call(lambda _: (values.amax(),), comparable=False), values.nbytes)
    return compare(case, task, calls, CpuClock(), args.rounds, task.bytes_moved(data.leaves[0]), baseline)


CHILD = """
import time, torch
start = time.perf_counter()
from minirlhf.kernels import build as kernels
kernels.load()
print(time.perf_counter() - start)
"""


def start_seconds(starts: int = 3) -> tuple[float, float]:
    """Seconds to load the kernels in a fresh process, torch imported: with an empty cache, and after that."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", CHILD]
        environment = os.environ | {"MINIRLHF_CACHE": cache}
        seconds = []
        for _ in range(1 + starts):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            seconds.append(float(done.stdout.splitlines()[-1]))
    return seconds[0], statistics.median(seconds[1:])


def read_bounds(rows: list[Row], case: str) -> list[Bound]:
    """The forward's share of the read bandwidth: of its bytes, and as time beside the maximum over as many fp32."""
    row, read = find(rows, case, FORWARD.name, "ours"), find(rows, case, FORWARD.name, READ)
    if row is None:
        return []
    what = f"{case}, {FORWARD.name}"
    bounds = [Bound(what, f"≥ 70% of the bandwidth of {READ}", f"{row.share:.0%}", row.share >= 0.7)]
    if row.bytes_moved != read.bytes_moved:  # bf16: half the bytes, the same number of exponentials
        share = read.median / row.median
        bounds.append(Bound(what, f"≥ 70% of the values/s of {READ}", f"{share:.0%}", share >= 0.7))
    return bounds


def main(args: Args) -> None:
    check_at_least(1, rows=args.rows, rounds=args.rounds)
    check_at_least(0, threads=args.threads)
    if args.threads:
        torch.set_num_threads(args.threads)
    information: dict[str, Any] = {"machine": machine("cpu")}
    if args.kernel == "fused":
        try:
            load()
        except KernelUnavailable as reason:
            raise InputError(f"nothing to time (--kernel reference times the plain PyTorch): {reason}") from None
        information["kernel"] = facts()
    peers, information["peers"] = find_peers("cpu") if "peers" in args.against else ([], {})
    show_facts(information)

    rows: list[Row] = []
    bounds: list[Bound] = []
    wanted = [TASKS[name] for name in args.tasks]
    for dtype in args.dtypes:
        for vocabulary in args.vocab:
            case = f"{dtype}, N = {args.rows}, V = {vocabulary}"
            for task in (t for t in wanted if not t.linear):
                torch.manual_seed(0)
                data = make_data(task, args.rows, vocabulary, DTYPES[dtype], 0)
                rows += time_task(case, task, data, args, peers)
            show_rows(case, [row for row in rows if row.case == case], "read")
            bounds += faster(rows, case, FORWARD.name, "eager", 10)
            bounds += faster(rows, case, FORWARD.name, "torch.compile", 2)
            bounds += read_bounds(rows, case)
            bounds += faster(rows, case, FORWARD_KL.name, "eager", 15)
            bounds += faster(rows, case, FORWARD_KL.name, "torch.compile", 1.5)
            bounds += faster(rows, case, BOTH.name, "eager", 2.5)
            bounds += faster(rows, case, BOTH.name, "torch.compile", 2)
    if LINEAR in wanted:
        n, width, vocabulary = args.linear
        case = f"fp32, N = {n}, D = {width}, V = {vocabulary}"
        torch.manual_seed(0)
        rows += time_task(case, LINEAR, make_data(LINEAR, n, vocabulary, torch.float32, width), args, peers)
        show_rows(case, [row for row in rows if row.case == case], "read")
        bounds += linear_bounds(rows, case, 4 * n * vocabulary)
    if args.kernel == "fused" and not args.no_build:
        cold, cached = start_seconds()
        information["start_seconds"] = {"cold build": cold, "cached": cached}
        bounds.append(Bound("first build, CPU only", "≤ 30 s", f"{cold:.1f} s", cold <= 30))
        bounds.append(Bound("later start", "≤ 0.5 s", f"{cached:.2f} s", cached <= 0.5))
    finish(information, rows, bounds, args.rounds, args.linear_rounds, args.json)


if __name__ == "__main__":
    cli(main, Args)
