"""What has been sampled so far, as tables on the device; and who is done."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf.devices import upload
from minirlhf.model.sampling import Sampling, draw, tokens_seen
from minirlhf.model.token_stats import token_stats
from minirlhf.seeds import uniforms


class Sampler:
    """Tables of C rows: what the next step needs, in the decoder's order; what was sampled, in the prompts' order."""

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
        kernel: str,
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
            sampling: how tokens are chosen, and whether those seen are kept.
            vocab_size: V.
            kernel: which `token_stats`.
            capacity: C ≥ B, the rows that a step may compute.
            columns: at least the highest limit.
            entropy: whether it is kept.
            dtype: of log-probs and entropy.
            device: where the tables are.
            keep: gives each table the place it had, see `Decoder.keep`.
        """
        B = len(prompts)
        self.sampling, self.kernel = sampling, kernel

        def table(name: str, fill: Any, dtype: torch.dtype) -> Tensor:
            return keep(name, torch.full((capacity + 1, columns), fill, dtype=dtype, device=device))

        def column(name: str, values: Sequence[Any], fill: Any) -> Tensor:
            return keep(name, upload(torch.tensor([*values, *[fill] * (capacity - B)]), device))

        numbers = torch.zeros(capacity + 1, columns, dtype=torch.float64)
        numbers[torch.tensor(live), : max(limits)] = uniforms(seeds, max(limits))
        self.eot, self.nowhere = eot, columns * capacity
        # In the order of the prompts: random numbers, and what is sampled with them. The last row is for rows that a
        # step computes and nobody wants.
        self.u = keep("u", upload(numbers, device))
        self.sampled = table("sampled", eot, torch.long)
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

    def pick(self, logits: Float[Tensor, "N V"], forbid: int | None = None) -> None:
        """Sample the next token of the first N rows, and put it and its statistics into the tables."""
        sampling = self.sampling
        N = len(logits)
        at, seen = self.at[:N], None if self.seen is None else self.seen[:N]
        tokens = draw(logits, sampling, self.u.view(-1).index_select(0, at), forbid, seen)  # (N,)
        stats = token_stats(logits, tokens, temperature=sampling.temperature or 1.0, kernel=self.kernel)
        self.sampled.view(-1).index_copy_(0, at, tokens)
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
        tables = (self.u, self.sampled, self.logprobs, self.tokens, self.at, self.last, self.done)
        return tuple(x.data_ptr() for x in (*tables, self.entropy, self.seen) if x is not None)


class DoneFlags:
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
