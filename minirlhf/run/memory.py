"""Will it fit? Parameters, tokens per step and the peak of memory, estimated and said before the first step.

Training keeps 16 bytes for each parameter that learns (weight, gradient, AdamW's two moments), 4 for each that does
not, and the activations that the gradient needs, those of one microbatch at a time. The estimate follows the network
operation by operation (`activation_bytes`); what Python and torch need for themselves comes on top.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from minirlhf.data.batches import Data
from minirlhf.kernels.choice import use_fused
from minirlhf.kernels.tiles import TILE_ELEMENTS
from minirlhf.model.decoding import packing_of
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel
from minirlhf.run.terminal import console

TILES = {device: 4 * elements for device, elements in TILE_ELEMENTS.items()}  # bytes of logits at a time, at most


class Shape(NamedTuple):
    """What is in memory at a time."""

    rows: int
    width: int  # tokens per row
    counted: int  # tokens whose logits are needed


class Footprint(NamedTuple):
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
    if device == "cpu" and use_fused(kernel, "cpu"):
        attention = 3 * size * D * tokens
    else:  # torch's operator, which on a CPU gets float32
        attention = 4 * (4 if device == "cpu" else size) * D * tokens
    block = (2 * 4 * D + 11 * size * D) * tokens + attention
    kept = config.n_layer * 4 * D * tokens + block if checkpointing else config.n_layer * block
    return kept + 12 * size * D * tokens


def footprint(
    trained: Sequence[GPT | ScalarModel],
    frozen: Sequence[GPT | ScalarModel],
    shapes: Sequence[Shape],
    tokens: int,
    sampled: Shape | None = None,
) -> Footprint:
    """What a run with these networks and microbatches needs.

    Args:
        trained: networks with gradients; all of them are in memory with their activations at a time. They run with the
            kernel and dtype of the first.
        frozen: networks that are only read.
        shapes: of the microbatches that may come; the largest decides.
        tokens: read in a step.
        sampled: what is sampled at a time, if anything: keys and values of so many rows, which stay for the next time.
    """
    learning = {id(p): p.numel() for model in trained for p in model.parameters()}  # a shared trunk counts once
    still = {id(p): p.numel() for model in frozen for p in model.parameters() if id(p) not in learning}
    trunks = {id(trunk): trunk for trunk in (m if isinstance(m, GPT) else m.trunk for m in trained)}
    trunk = next(iter(trunks.values()))
    device, config, kernel, dtype = trunk.wte.weight.device.type, trunk.config, trunk.kernel, trunk.dtype

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
        peak += own * (2 if dtype == "bf16" else 4 if packing_of(trunk, None) == "ours" else 1)
    return Footprint(sum(learning.values()), sum(still.values()), tokens, peak)


def say_fit(trained: Sequence[GPT | ScalarModel], frozen: Sequence[GPT | ScalarModel], data: Data, steps: int) -> None:
    """Say what a run will take, from the microbatches of some of its steps."""
    some = range(0, steps, max(1, steps // 16))
    shapes = [Shape(*piece.shape) for step in some for piece in data.at(step)]
    tokens = sum(shape.rows * shape.width for shape in shapes) // len(some)
    say(footprint(trained, frozen, shapes, tokens), max(s.rows * s.width for s in shapes))


def fit_rollout(
    config: Any, trained: Sequence[GPT | ScalarModel], frozen: Sequence[GPT | ScalarModel], longest: int
) -> Any:
    """Say what PPO will take where every prompt and every response is as long as the longest may be.

    Args:
        config: a `PPOConfig`.
        trained, frozen: as for `footprint`, the policy first.
        longest: tokens of the longest prompt.

    Returns:
        The config, on a GPU with the largest microbatch that fits (unless one was asked for): the minibatch, halved as
        often as it takes.
    """
    trunk, response = trained[0], config.response_range[1]
    tokens = config.batch_size * (longest + response)
    sampled = Shape(config.batch_size, longest + response, 0)

    def needs(rows: int) -> Footprint:
        return footprint(trained, frozen, [Shape(rows, longest + response, rows * response)], tokens, sampled)

    minibatch = config.batch_size // config.minibatches
    if config.microbatch_size is None and trunk.wte.weight.device.type == "cuda":
        rows = largest(minibatch, needs, memory(trunk.wte.weight.device))
        config = dataclasses.replace(config, microbatch_size=rows)
    rows = min(config.at_a_time or minibatch, minibatch)
    say(needs(rows), rows * (longest + response))
    return config


def memory(device: torch.device) -> int:
    """Bytes of a GPU that a run may count on: nine tenths of what it has, whoever uses it now. So a run that is resumed
    gets the microbatches it had."""
    return torch.cuda.get_device_properties(device).total_memory * 9 // 10


def largest(rows: int, needs: Callable[[int], Footprint], memory: int) -> int:
    """The most rows at a time that fit: `rows`, halved until the estimate stays within the memory; at least one."""
    while rows > 1 and needs(rows).peak > memory:
        rows = (rows + 1) // 2
    return rows


def say(needed: Footprint, microbatch: int | None = None) -> None:
    """One line before training: how large, and what it will take."""
    frozen = f" and {_count(needed.frozen)} frozen ones" if needed.frozen else ""
    at_a_time = f", {microbatch:,} at a time" if microbatch is not None and microbatch < needed.tokens else ""
    console.print(
        f"  {_count(needed.trained)} parameters{frozen}, {needed.tokens:,} tokens per step{at_a_time}, "
        f"about {_bytes(needed.peak)}"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters < 1e8 else f"{parameters / 1e6:.0f} M"


def _bytes(n: int) -> str:
    return f"{n / 2**20:.0f} MiB" if n < 2**30 else f"{n / 2**30:.1f} GiB"
