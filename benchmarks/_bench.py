"""What op_cpu.py and op_gpu.py share: what is computed, in plain PyTorch too, and interleaved timing."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.model.token_stats import linear_token_stats, token_stats

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 3  # calls; the first compiles, and is compared with eager

# --- what is computed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One thing to time. `outputs` are fields of `TokenStats`; the timed part is the forward, the backward, or both."""

    name: str
    outputs: tuple[str, ...]
    forward: bool = True
    backward: bool = False
    linear: bool = False

    def bytes_moved(self, logits: Tensor) -> int | None:
        """What one pass forward and one backward must move: logits read in each, a gradient written in the latter.

        An implementation that keeps intermediates moves more. None for linear: it is bound by arithmetic.
        """
        reads = 2 if "kl" in self.outputs else 1
        passes = reads * self.forward + (reads + 1) * self.backward
        return None if self.linear else passes * logits.numel() * logits.element_size()


FORWARD = Task("forward: log-prob, entropy", ("logprobs", "entropy"))
FORWARD_KL = Task("forward: log-prob, entropy, KL", ("logprobs", "entropy", "kl"))
BACKWARD = Task("backward: log-prob, entropy", ("logprobs", "entropy"), forward=False, backward=True)
BOTH = Task("forward + backward: log-prob", ("logprobs",), backward=True)
BOTH_KL = Task("forward + backward: log-prob, entropy, KL", ("logprobs", "entropy", "kl"), backward=True)
LINEAR = Task("linear, forward + backward: log-prob", ("logprobs",), backward=True, linear=True)

Function = Callable[..., tuple[Tensor, ...]]


def ours(task: Task, kernel: str) -> Function:
    """`token_stats` or `linear_token_stats`, of which the task's outputs are used."""
    op = linear_token_stats if task.linear else token_stats

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        stats = op(*tensors, kernel=kernel)
        return tuple(getattr(stats, name) for name in task.outputs)

    return function


def logprob(logits: Tensor, targets: Tensor) -> tuple[Tensor]:
    """As people write it in PyTorch; so are the next three. Nothing is computed that is not asked for."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    return (logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1),)


def logprob_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.float(), dim=-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def logprob_entropy_kl(logits: Tensor, targets: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp = torch.log_softmax(logits.float(), dim=-1)
    logq = torch.log_softmax(ref_logits.float(), dim=-1)
    p = logp.exp()
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(p * logp).sum(-1), (p * (logp - logq)).sum(-1)


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    return logprob(F.linear(hidden, weight), targets)


def eager(task: Task) -> Function:
    if task.linear:
        return linear_logprob
    by_outputs = {1: logprob, 2: logprob_entropy, 3: logprob_entropy_kl}
    return by_outputs[len(task.outputs)]


# --- timing -----------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What is timed is `run(prepare())`, without the `prepare`."""

    run: Callable[[Any], tuple[Tensor, ...]]
    prepare: Callable[[], Any] = lambda: None
    comparable: bool = True
    """Whether it returns what eager returns, sign aside."""


class Clock(Protocol):
    def seconds(self, call: Call) -> float: ...

    def extra_bytes(self, call: Call) -> int | None:
        """Memory that a call needs at its highest, beyond its inputs and what it returns. None if not to be had."""


class Data(NamedTuple):
    """A task's input: what gets a gradient, the rest, and an upstream gradient for each output."""

    leaves: tuple[Tensor, ...]
    rest: tuple[Tensor, ...]
    upstream: Tensor  # (outputs, N)


def bind(task: Task, function: Function, data: Data, own_copy: bool = False, summed: bool = False) -> Call:
    """The task on this data with this function. Every call allocates its own gradient, as in training.

    Args:
        own_copy: for a function that writes over its input.
        summed: its output is a sum over rows, whose upstream gradient is 1.
    """

    def leaf(x: Tensor) -> Tensor:
        if own_copy:
            x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        return x.detach().requires_grad_(task.backward)

    leaves = tuple(leaf(x) for x in data.leaves)

    def forward(_: None = None) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(task.backward):
            return function(*leaves, *data.rest)

    def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        upstream = [torch.ones_like(out) if summed else g.to(out.dtype) for g, out in zip(data.upstream, outputs)]
        return torch.autograd.grad(outputs, leaves, upstream)

    if not task.backward:
        return Call(forward)
    parts = (lambda _: backward(forward()), lambda: None) if task.forward else (backward, forward)
    return Call(*parts, comparable=not summed)


@dataclass(frozen=True)
class Row:
    """One implementation of one task. Times in seconds; `difference` is the largest from eager, sign aside."""

    case: str
    task: str
    implementation: str
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    fastest: float | None = None
    bytes_moved: int | None = None
    bandwidth: float | None = None
    """bytes_moved / median."""
    share: float | None = None
    """Of the bandwidth of the baseline, which ran in the same rounds."""
    times_ours: float | None = None
    extra_bytes: int | None = None
    difference: float | None = None
    note: str = ""


def largest_difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Sign aside, since some return losses. One that returns less is compared in that."""
    expected = expected[: len(results)]
    if [x.shape for x in results] != [y.shape for y in expected]:
        raise ValueError(f"returns {[tuple(x.shape) for x in results]}, not {[tuple(y.shape) for y in expected]}")
    chunks = ((a.float(), b.float()) for x, y in zip(results, expected) for a, b in zip(x.split(256), y.split(256)))
    return max(float((a.abs() - b.abs()).abs().max()) for a, b in chunks)


def compare(
    case: str,
    task: Task,
    calls: dict[str, Call],
    clock: Clock,
    rounds: int,
    moved: int | None = None,
    baseline: tuple[str, Call, int] | None = None,
) -> list[Row]:
    """Time all in turn, round after round, so that a drift of the machine hits all alike.

    Args:
        case: what the rows are filed under.
        task: what is timed.
        calls: by implementation, "ours" and "eager" among them. One that fails is a row that says why.
        clock: CPU's or GPU's.
        rounds: each calls everything once; the first of one round is the last of the next.
        moved: bytes that the task must move.
        baseline: name, call and bytes moved of a plain read or copy.
    """
    failed, differences, extra = {}, {}, {}
    everything = {"eager": calls["eager"], **calls, **({baseline[0]: baseline[1]} if baseline else {})}
    expected = None
    for name, call in everything.items():
        try:
            results = call.run(call.prepare())
            expected = results if name == "eager" else expected
            if call.comparable and expected is not None:
                differences[name] = largest_difference(results, expected)
            del results
            for _ in range(WARM_UP - 1):
                call.run(call.prepare())
            extra[name] = clock.extra_bytes(call)
        except Exception as error:  # a peer may refuse a shape or a type, and eager may not fit into memory
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:100]
    del expected

    names = [name for name in (*calls, *([baseline[0]] if baseline else [])) if name not in failed]
    times = {name: [] for name in names}
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(clock.seconds(everything[name]))

    median = {name: statistics.median(times[name]) for name in names}
    read = baseline[2] / median[baseline[0]] if baseline and baseline[0] in median else None
    rows = [Row(case, task.name, name, note=note) for name, note in failed.items()]
    for name in names:
        of_baseline = baseline is not None and name == baseline[0]
        size = baseline[2] if of_baseline else moved
        bandwidth = size / median[name] if size else None
        low, _, high = statistics.quantiles(times[name], n=4, method="inclusive") if rounds > 1 else 3 * times[name]
        rows.append(
            Row(
                case,
                task.name,
                name,
                median[name],
                (low, high),
                min(times[name]),
                size,
                bandwidth,
                bandwidth / read if bandwidth and read else None,
                None if of_baseline or "ours" in failed else median[name] / median["ours"],
                None if of_baseline else extra[name],
                differences.get(name),
            )
        )
    return rows
