"""Will it fit? Parameters, tokens a step and the peak of memory, estimated and said before the first step.

Training keeps 16 bytes for each parameter that learns (weight, gradient, AdamW's two moments), 4 for each that does
not, and the activations that the gradient needs, those of one microbatch at a time. The estimate follows the network
operation by operation (`activation_bytes`); what Python and torch need for themselves comes on top.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from minirlhf.decode import packing_of
from minirlhf.model import GPT, GPTConfig, ScalarModel
from minirlhf.runs import console
from minirlhf.token_stats import _use_fused

TILES = {"cpu": 16 << 20, "cuda": 64 << 20}  # bytes of logits that the fused head holds at a time, at most


class Shape(NamedTuple):
    """What is in memory at a time."""

    rows: int
    width: int  # tokens a row
    counted: int  # tokens whose logits are needed


class Estimate(NamedTuple):
    """What a run needs, as far as its shapes tell."""

    trained: int  # parameters
    frozen: int
    tokens: int  # read in a step, padding included
    peak: int  # bytes


def activation_bytes(
    config: GPTConfig, shape: Shape, dtype: str, checkpointing: bool, device: str, kernel: str = "auto"
) -> int:
    """Bytes that one network keeps for its gradient, and those that are in use while the gradient is computed.

    A block keeps, a token and in units of the width D: the input of both norms (2), what they pass on (2), queries,
    keys and values (3), the mixed values (1, and once more as the output of torch's operator, which our own attention
    does not keep), the hidden layer before and after its GELU (8). Under bf16 all of it but the inputs of the norms
    takes half. The gradient itself holds about 12 D a token at a time. With checkpointing a block keeps its input, and
    only the one at hand has all.

    Args:
        config: the network's.
        shape: the largest microbatch.
        dtype: fp32 or bf16 products.
        checkpointing: whether blocks are computed again.
        device: cpu or cuda.
        kernel: as for training.
    """
    D, tokens = config.n_embd, shape.rows * shape.width
    size = 2 if dtype == "bf16" else 4
    if device == "cpu" and _use_fused(kernel, "cpu"):
        attention = 3 * size * D * tokens
    else:  # torch's operator, which on a CPU gets float32
        attention = 4 * (4 if device == "cpu" else size) * D * tokens
    block = (2 * 4 * D + 11 * size * D) * tokens + attention
    kept = config.n_layer * 4 * D * tokens + block if checkpointing else config.n_layer * block
    return kept + 12 * size * D * tokens


def estimate(
    trained: Sequence[GPT | ScalarModel],
    frozen: Sequence[GPT | ScalarModel],
    shapes: Sequence[Shape],
    tokens: int,
    dtype: str = "fp32",
    kernel: str = "auto",
    sampled: Shape | None = None,
) -> Estimate:
    """Parameters and peak memory of a run.

    Args:
        trained: networks with gradients; all of them are in memory with their activations at a time.
        frozen: networks that are only read.
        shapes: of the microbatches that may come; the largest decides.
        tokens: read in a step.
        dtype, kernel: as for training.
        sampled: what is drawn at a time, if anything: keys and values of so many rows, which stay for the next time.
    """
    learning = {id(p): p.numel() for model in trained for p in model.parameters()}  # a shared trunk counts once
    still = {id(p): p.numel() for model in frozen for p in model.parameters() if id(p) not in learning}
    trunks = {id(trunk): trunk for trunk in (m if isinstance(m, GPT) else m.trunk for m in trained)}
    trunk = next(iter(trunks.values()))
    device, config = trunk.wte.weight.device.type, trunk.config

    def needed(shape: Shape) -> int:
        activations = sum(
            activation_bytes(t.config, shape, dtype, t.checkpointing, device, kernel) for t in trunks.values()
        )
        logits = 4 * shape.counted * config.padded_vocab_size
        return activations + (4 * logits if kernel == "reference" else min(logits, TILES.get(device, logits)))

    weights = 16 * sum(learning.values()) + 4 * sum(still.values())
    copies = 2 * sum(learning.values()) if dtype == "bf16" else 0  # of the weights, made by autocast
    peak = weights + copies + max(map(needed, shapes), default=0)
    if sampled is not None:
        # Keys and values; and all weights, rounded or packed, or else c_attn's, a quarter of them, turned around.
        peak += 2 * 4 * config.n_layer * sampled.rows * sampled.width * config.n_embd
        own = sum(p.numel() for p in trunk.parameters())
        peak += own * (2 if dtype == "bf16" else 4 if packing_of(trunk, None, kernel) == "ours" else 1)
    return Estimate(sum(learning.values()), sum(still.values()), tokens, peak)


def memory(device: torch.device) -> int:
    """Bytes of a GPU that a run may count on: nine tenths of what it has, whoever uses it now. So a run that is resumed
    gets the microbatches it had."""
    return torch.cuda.get_device_properties(device).total_memory * 9 // 10


def largest(rows: int, needs: Callable[[int], Estimate], memory: int) -> int:
    """The most rows at a time that fit: `rows`, halved until the estimate stays within the memory; at least one."""
    while rows > 1 and needs(rows).peak > memory:
        rows = (rows + 1) // 2
    return rows


def say(found: Estimate, microbatch: int | None = None) -> None:
    """One line before training: how large, and what it will take."""
    frozen = f" and {_count(found.frozen)} frozen ones" if found.frozen else ""
    at_a_time = f", {microbatch:,} at a time" if microbatch is not None and microbatch < found.tokens else ""
    console.print(
        f"  {_count(found.trained)} parameters{frozen}, {found.tokens:,} tokens a step{at_a_time}, "
        f"about {_bytes(found.peak)}"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters < 1e8 else f"{parameters / 1e6:.0f} M"


def _bytes(n: int) -> str:
    return f"{n / 2**20:.0f} MiB" if n < 2**30 else f"{n / 2**30:.1f} GiB"
