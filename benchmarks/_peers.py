"""What ours is put beside: eager PyTorch, torch.compile, and other people's kernels where they are installed.

Of the kernels (TRL, Liger-Kernel, flash-attn, quack) none has the KL, and only TRL's has the entropy. The others stand
beside our log-prob and entropy with the log-prob alone: less work, and named so.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from _bench import Call, Data, Function, Task, bind, eager, ours


class Peer(NamedTuple):
    """Its functions take what ours take and return log-probs (or losses: minus log-probs), or those and the entropy."""

    name: str
    logprob: Function | None = None
    logprob_entropy: Function | None = None
    linear_logprob: Function | None = None
    gradient_in_forward: bool = False
    """Computes the gradient in the forward and writes it over the logits: gets a copy of its own, and has no backward
    that could be timed alone."""
    summed: bool = False
    """Its loss is a sum over all rows, so that all have the same upstream gradient."""

    def offer(self, task: Task) -> tuple[str, Function] | None:
        """What to call this peer in the task, and its function; None if it has nothing to compare."""
        if task.linear:
            return (self.name, self.linear_logprob) if self.linear_logprob else None
        if "kl" in task.outputs or (self.gradient_in_forward and not task.forward):
            return None
        if self.summed and not task.backward:
            return None
        if "entropy" in task.outputs and self.logprob_entropy:
            return self.name, self.logprob_entropy
        only = f"{self.name}, log-prob only" if "entropy" in task.outputs else self.name
        return (only, self.logprob) if self.logprob else None


def implementations(
    task: Task, data: Data, kernel: str, against: Sequence[str], peers: Sequence[Peer]
) -> dict[str, Call]:
    """Everything that can do this task, ready to be called. Eager PyTorch is always among them."""
    calls = {"ours": bind(task, ours(task, kernel), data), "eager": bind(task, eager(task), data)}
    if "compile" in against:
        torch.compiler.reset()  # each shape is compiled anew, for itself
        calls["torch.compile"] = bind(task, torch.compile(eager(task), dynamic=False), data)
    for peer in peers:
        if offer := peer.offer(task):
            name, function = offer
            calls[name] = bind(task, function, data, own_copy=peer.gradient_in_forward, summed=peer.summed)
    return calls


def find_peers(device: str) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be imported on this device; and of every one its version, or why it is not there."""
    found: list[Peer] = []
    status: dict[str, str] = {}
    for distribution, load in PEERS[device].items():
        try:
            status[distribution] = version(distribution)
            found += load(f"{distribution} {status[distribution]}")
        except PackageNotFoundError:
            status[distribution] = "not installed"
        except Exception as error:  # installed, but for another torch, another GPU, or without its own dependencies
            status[distribution] += f" cannot be imported ({type(error).__name__}: {error})".splitlines()[0][:100]
    return found, status


def _trl_cpu(name: str) -> list[Peer]:
    """What TRL's trainers call where there is no Triton: two functions of plain PyTorch, row by row or in chunks."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    peer = Peer(
        name,
        logprob=lambda logits, targets: (selective_log_softmax(logits, targets),),
        logprob_entropy=lambda logits, targets: (selective_log_softmax(logits, targets), entropy_from_logits(logits)),
    )
    return [peer._replace(linear_logprob=_trl_linear())]


def _trl_cuda(name: str) -> list[Peer]:
    """TRL's Triton kernel (in its package since 1.x): log-prob and entropy, forward and backward."""
    from trl.kernels import selective_log_softmax_and_entropy

    return [
        Peer(
            name,
            logprob=lambda logits, targets: selective_log_softmax_and_entropy(logits, targets)[:1],
            logprob_entropy=selective_log_softmax_and_entropy,
            linear_logprob=_trl_linear(),
        )
    ]


def _trl_linear() -> Function | None:
    """hidden × weightᵀ in tiles of 4,096 tokens and the vocabulary chunk that TRL's trainers use. None in older TRL."""
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError:
        return None
    chunk = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, chunk, None, 1.0, ()
    )[:1]


def _liger(name: str) -> list[Peer]:
    """Cross-entropy by token, as RLHF needs it, and summed, as Liger is mostly used and fastest."""
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_fused_linear_cross_entropy

    def peer(suffix: str, reduction: str) -> Peer:
        return Peer(
            name + suffix,
            logprob=lambda logits, targets: (liger_cross_entropy(logits, targets, reduction=reduction),),
            linear_logprob=lambda hidden, weight, targets: (
                liger_fused_linear_cross_entropy(hidden, weight, targets, reduction=reduction),
            ),
            gradient_in_forward=True,
            summed=reduction == "sum",
        )

    return [peer("", "none"), peer(", summed", "sum")]


def _flash_attn(name: str) -> list[Peer]:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return [Peer(name, logprob=lambda logits, targets: cross_entropy_loss(logits, targets)[:1])]


def _quack(name: str) -> list[Peer]:
    from quack.cross_entropy import cross_entropy

    return [Peer(name, logprob=lambda logits, targets: (cross_entropy(logits, targets, reduction="none"),))]


PEERS: dict[str, dict[str, Callable[[str], list[Peer]]]] = {
    "cpu": {"trl": _trl_cpu},
    "cuda": {"trl": _trl_cuda, "liger-kernel": _liger, "flash-attn": _flash_attn, "quack-kernels": _quack},
}
