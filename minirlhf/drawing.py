"""What sampling has drawn so far, as tables on the device; and steps of a GPU, captured once and then replayed.

A step of decoding is a few hundred small operations, and a GPU does each of them sooner than Python can ask for it. So
there a step is recorded as one CUDA graph: the network, the draw, the statistics and the tables they go into. A graph
holds addresses, not tensors: all that a step reads or writes stays where it is from call to call.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf.data import upload
from minirlhf.sampling import Sampling, draw, tokens_seen, uniforms
from minirlhf.token_stats import _use_fused, token_stats


class Drawing:
    """Tables of C rows: what the next step needs, in the decoder's order; what was drawn, in the prompts' order."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        seeds: Sequence[int],
        live: Sequence[int],
        eot: int,
        sampling: Sampling,
        vocab_size: int,
        *,
        capacity: int,
        columns: int,
        entropy: bool,
        dtype: torch.dtype,
        device: torch.device,
        keep: Callable[[str, Tensor], Tensor],
    ):
        """
        Args:
            prompts, limits, seeds, live: of B rows, in the order of the decoder's.
            eot: id of end-of-text.
            sampling: whether tokens seen are kept.
            vocab_size: V.
            capacity: C ≥ B, the rows that a step may compute.
            columns: at least the highest limit.
            entropy: whether it is kept.
            dtype: of log-probs and entropy.
            device: where the tables are.
            keep: gives each table the place it had, see `Decoder.keep`.
        """
        B = len(prompts)

        def table(name: str, fill: Any, dtype: torch.dtype) -> Tensor:
            return keep(name, torch.full((capacity + 1, columns), fill, dtype=dtype, device=device))

        def column(name: str, values: Sequence[Any], fill: Any) -> Tensor:
            return keep(name, upload(torch.tensor([*values, *[fill] * (capacity - B)]), device))

        numbers = torch.zeros(capacity + 1, columns, dtype=torch.float64)
        numbers[torch.tensor(live), : max(limits)] = uniforms(seeds, max(limits))
        self.eot, self.nowhere = eot, columns * capacity
        # In the order of the prompts: random numbers, and what is drawn with them. The last row is for rows that a step
        # computes and nobody wants.
        self.u = keep("u", upload(numbers, device))
        self.found = table("found", eot, torch.long)
        self.logprobs = table("logprobs", 0.0, dtype)
        self.entropy = table("entropy", 0.0, dtype) if entropy else None
        # In that of the decoder's rows: what the next step reads, and where it goes in the flattened tables.
        self.tokens = column("tokens", [prompt[-1] for prompt in prompts], eot)
        self.at = column("at", [columns * row for row in live], self.nowhere)
        self.last = column("last place", [columns * row + limit - 1 for row, limit in zip(live, limits)], 0)
        self.done = column("done", [False] * B, True)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            unused = [[]] * (capacity - B)
            self.seen = keep("seen", tokens_seen([*prompts, *unused], vocab_size, device))

    def pick(
        self, logits: Float[Tensor, "N V"], sampling: Sampling, forbid: int | None = None, kernel: str = "auto"
    ) -> None:
        """Draw the next token of the first N rows, and put it and its statistics into the tables."""
        N = len(logits)
        at, seen = self.at[:N], None if self.seen is None else self.seen[:N]
        tokens = draw(logits, sampling, self.u.view(-1).index_select(0, at), forbid, seen)  # (N,)
        stats = token_stats(logits, tokens, temperature=sampling.temperature or 1.0, kernel=kernel)
        self.found.view(-1).index_copy_(0, at, tokens)
        self.logprobs.view(-1).index_copy_(0, at, stats.logprobs)
        if self.entropy is not None:
            self.entropy.view(-1).index_copy_(0, at, stats.entropy)
        self.done[:N].logical_or_((tokens == self.eot) | (at >= self.last[:N]))
        self.tokens[:N] = tokens
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        self.at += 1

    def move(self, to: Int[Tensor, " M"], source: Int[Tensor, " M"], rows: int) -> None:
        """Row source[i] goes to row to[i]; from then on only the first `rows` are wanted."""
        for table in (self.tokens, self.at, self.last, self.done, self.seen):
            if table is not None:
                table[to] = table[source]
        self.at[rows:] = self.nowhere

    def addresses(self) -> tuple[int, ...]:
        """Where the tables are."""
        tables = (self.u, self.found, self.logprobs, self.tokens, self.at, self.last, self.done)
        return tuple(x.data_ptr() for x in (*tables, self.entropy, self.seen) if x is not None)


class Look:
    """Who is done. A GPU is not waited for: what is read is as it was at the look before."""

    def __init__(self) -> None:
        self.flags: Tensor | None = None

    def read(self, done: Bool[Tensor, " N"]) -> list[bool] | None:
        """Which rows go on, if it is known."""
        if done.device.type == "cpu":
            return (~done).tolist()
        if self.flags is None:
            return None
        self.event.synchronize()  # long since there, unless Python is that far ahead
        return (~self.flags).tolist()

    def start(self, done: Bool[Tensor, " N"]) -> None:
        """Have the GPU say it on its way."""
        if done.device.type != "cpu":
            self.flags = torch.empty(done.shape, dtype=torch.bool).pin_memory().copy_(done, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()


# --- captured steps ---------------------------------------------------------------------------------------------------


def can_capture(device: torch.device, kernel: str) -> bool:
    """Whether steps are captured there; plain PyTorch's statistics look at their targets, which no graph can do."""
    return device.type == "cuda" and _use_fused(kernel, "cuda")


def record(step: Callable[[], None], pool: Any) -> Callable[[], None]:
    """A step as a CUDA graph, which is captured and not run; what it needs for itself comes out of `pool`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


class Steps:
    """A step for each key: run as it is the first time, captured the second, and replayed from then on.

    The first run also does what must not happen in a capture: libraries are loaded, workspaces made.
    """

    def __init__(self) -> None:
        self.kept: dict[Any, Callable[[], None] | None] = {}
        self.addresses: tuple[int, ...] | None = None
        self.pool: Any = None
        self.replays = 0
        self.refused = False

    def at(self, addresses: tuple[int, ...]) -> None:
        """What steps read and write lies there; those that were captured elsewhere are dropped."""
        if addresses != self.addresses:
            self.kept.clear()
            self.addresses = addresses

    def __call__(self, key: Any, step: Callable[[], None]) -> None:
        """Take the step that this key stands for."""
        if self.refused or key not in self.kept:
            self.kept[key] = None
            step()
            return
        replay = self.kept[key]
        if replay is None:
            try:
                if self.pool is None and torch.cuda.is_available():
                    self.pool = torch.cuda.graph_pool_handle()
                replay = self.kept[key] = record(step, self.pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.refused = True
                reason = str(error).strip().partition("\n")[0][:200]
                print(f"steps of sampling are not captured, and take longer: {reason}", file=sys.stderr)
                step()
                return
        replay()
        self.replays += 1
