"""How many floating-point operations a step needs, and how fast this machine does them: the floor of its cost.

A product of (m, k) and (k, n) is 2·m·k·n operations, and its backward twice as many, a product for the gradient of
each factor. In the forward of a block, with width D, each token takes

    2·D·3D + 2·D·D + 2·D·4D + 2·4D·D = 24 D²      queries, keys and values; output; both layers of the MLP
    4·D                                           for each token it looks at: q·k, and the weighted sum of the v

and a predicted token 2·D·V in the head. Norms, activations, softmax and the optimiser are not counted. What is counted
is what the task needs and no implementation's detours: of causal attention the pairs that are not masked, a prompt
once for all responses to it, the head where something is predicted, nothing computed twice.

Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1 and table 1. Differs: attention
counts the pairs that the causal mask lets through.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from _rounds import METERS

from minirlhf.model.gpt import GPTConfig

TRAINED = 3  # times the forward: itself, and twice as much backward


@dataclass(frozen=True)
class Work:
    """Products of matrices with this many rows, in the blocks or in the head."""

    flops: float
    rows: int
    head: bool = False

    def times(self, factor: float) -> "Work":
        """So many times as much, in as many more products."""
        return Work(factor * self.flops, self.rows, self.head)


def causal(length: int, before: int = 0) -> int:
    """Pairs of a token and one that it may look at, itself among them, in a sequence that goes on after `before`."""
    return length * before + length * (length + 1) // 2


def trunk(config: GPTConfig, tokens: int, pairs: int) -> int:
    """Forward of all blocks: tokens computed, and pairs (token, token looked at), both summed over the batch."""
    D = config.n_embd
    return config.n_layer * (24 * D * D * tokens + 4 * D * pairs)


def head(config: GPTConfig, predicted: int) -> int:
    """Forward of the head for so many predicted tokens."""
    return 2 * config.n_embd * config.vocab_size * predicted


def _forward(config: GPTConfig, batch: int, micro: int, tokens: int, pairs: int, predicted: int) -> list[Work]:
    """One forward over a batch, in microbatches of `micro` rows; tokens, pairs and predicted are those of a row."""
    parts = [Work(trunk(config, batch * tokens, batch * pairs), micro * tokens)]
    return parts + [Work(head(config, batch * predicted), micro * predicted, head=True)] * (predicted > 0)


def generation(config: GPTConfig, batch: int, prompt: int, new: int) -> list[Work]:
    """Sampling with a KV cache: the prompt at once, then token by token; the last one drawn is never read."""
    steps = new - 1
    return [
        Work(trunk(config, batch * prompt, batch * causal(prompt)), batch * prompt),
        Work(trunk(config, batch * steps, batch * causal(steps, prompt)), batch),
        Work(head(config, batch * new), batch, head=True),
    ]


def sft_step(config: GPTConfig, batch: int, prompt: int, response: int) -> list[Work]:
    """One step on prompts and responses; with `prompt` = 1, on text of which all but the first token is predicted."""
    read = prompt + response - 1
    return [part.times(TRAINED) for part in _forward(config, batch, batch, read, causal(read), response)]


def _pair(prompt: int, response: int) -> tuple[int, int]:
    """Tokens and pairs of two responses behind one prompt."""
    return prompt + 2 * response, causal(prompt) + 2 * causal(response, prompt)


def rm_step(config: GPTConfig, pairs: int, prompt: int, response: int) -> list[Work]:
    """One step of a reward model on pairs, each after one prompt; a head of one output is not counted."""
    return [part.times(TRAINED) for part in _forward(config, pairs, pairs, *_pair(prompt, response), 0)]


def dpo_step(
    config: GPTConfig, pairs: int, prompt: int, response: int, reference: bool = False, micro: int = 0
) -> list[Work]:
    """One step on pairs; `reference`: with the reference's forward, which is needed once for each pair."""
    forward = _forward(config, pairs, micro or pairs, *_pair(prompt, response - 1), 2 * response)
    return [part.times(TRAINED + reference) for part in forward]


def ppo_step(
    config: GPTConfig, batch: int, prompt: int, response: int, epochs: int, micro: int
) -> dict[str, list[Work]]:
    """One step of PPO with a critic and a reward model of the policy's size, in its two phases.

    rollout: sampling, the reward model, and the forward of the critic, the reference and, once more, nobody: the
    policy's log-probs are those that the tokens were drawn with.
    """
    read = prompt + response - 1
    policy = _forward(config, batch, micro, read, causal(read), response)  # as the reference
    critic = _forward(config, batch, micro, read, causal(read), 0)
    reward = _forward(config, batch, batch, read + 1, causal(read + 1), 0)
    return {
        "rollout": [*generation(config, batch, prompt, response), *reward, *policy, *critic],
        "update": [part.times(TRAINED * epochs) for part in policy + critic],
    }


# --- what the machine does --------------------------------------------------------------------------------------------


@cache
def matrix_rate(
    config: GPTConfig, rows: int, dtype: torch.dtype, head: bool = False, device: str = "cpu", seconds: float = 0.03
) -> float:
    """Operations a second in the products of this model's blocks, or of its head, with so many rows; measured now.

    Args:
        config: the model's shape.
        rows: of the matrix on the left: tokens at a time.
        dtype: of the matrices.
        head: the head's product in place of the blocks' four.
        device: cpu or cuda. A GPU reads the weights of as many blocks as the model has, since those of one would stay
            in its cache, and a vocabulary padded to a multiple of 64, since others are slow. The products are one
            CUDA graph, since Python's time is no part of the floor.
        seconds: how long to measure.
    """
    D, V, new = config.n_embd, config.vocab_size, {"dtype": dtype, "device": device}
    shapes = [(D, V)] if head else [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
    blocks = 1 if head or device == "cpu" else config.n_layer
    given = {k: torch.randn(rows, k, **new) for k, _ in shapes}
    unit = 1 if device == "cpu" else 64
    weights = [torch.randn(-(-n // unit) * unit, k, **new) for _ in range(blocks) for k, n in shapes]
    flops = blocks * sum(2 * rows * k * n for k, n in shapes)
    meter, calls = METERS[device](), 1 if device == "cpu" else 10

    def products() -> None:
        for weight in weights:
            F.linear(given[weight.shape[1]], weight)

    with torch.no_grad():
        run, times = products if device == "cpu" else _graph(products), []
        while len(times) < 4 or calls * sum(times) < seconds:
            meter.wait()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            meter.wait()
            times.append((time.perf_counter() - start) / calls)
    return flops / min(times)  # what it can do, whatever else it does at times


def _graph(function: Callable[[], None]) -> Callable[[], None]:
    """The function's work on the GPU, without the function."""
    function()  # what libraries set up when they are first called is no part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def floor_seconds(works: Sequence[Work], config: GPTConfig, dtype: torch.dtype, device: str = "cpu") -> float:
    """The time this machine needs for the products alone."""
    return sum(work.flops / matrix_rate(config, work.rows, dtype, work.head, device) for work in works)
