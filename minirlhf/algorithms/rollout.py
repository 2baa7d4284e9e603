"""Rollouts: responses sampled from the policy, laid out for training. Token in, token out: no text in between."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.devices import upload
from minirlhf.model.generate import generate
from minirlhf.model.gpt import GPT
from minirlhf.model.sampling import Sampling
from minirlhf.seeds import seeded


class Rollout(NamedTuple):
    """Responses as they were sampled. Responses begin in the first column of (B, R), prompts in that of (B, T)."""

    tokens: Int[Tensor, "B T"]  # prompt and response, right-padded
    counted: Bool[Tensor, "B T"]  # True at the response's tokens in `tokens`; on the CPU, which knows the lengths
    responses: Int[Tensor, "B R"]
    mask: Bool[Tensor, "B R"]  # True at the response's tokens in `responses`
    old_logprobs: Float[Tensor, "B R"]  # the log-probs the tokens were sampled with
    truncated: Bool[Tensor, " B"]  # cut at the limit, without end-of-text; on the CPU

    def texts(self, tokenizer: Tokenizer) -> tuple[list[TokenText], list[TokenText]]:
        """The prompts and the responses as text, for people and for rewards that read text, with their tokens."""
        prompts, responses = [], []
        for row, counts in zip(self.tokens.tolist(), self.counted.tolist()):
            start, end = counts.index(True), len(counts) - counts[::-1].index(True)
            prompts.append(TokenText(tokenizer.decode(row[:start]), row[:start]))
            responses.append(TokenText(tokenizer.decode(row[start:end]), row[start:end]))
        return prompts, responses

    def cut(self, rows: Int[Tensor, " b"]) -> tuple[Int[Tensor, "b T"], Bool[Tensor, "b T"]]:
        """Tokens of some rows, and which of them count (on the CPU), without the padding that all of them share."""
        counted = self.counted[rows]
        width = int(counted.any(0).nonzero().max()) + 1
        return self.tokens.index_select(0, upload(rows, self.tokens.device))[:, :width], counted[:, :width]


def rollout(
    policy: GPT,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    eot: int,
    temperature: float,
    seed: int | Sequence[int],
) -> Rollout:
    """Sample one response to each prompt.

    Args:
        policy: what is sampled from.
        prompts: B lists of token ids.
        limits: the most tokens of each response.
        eot: id of end-of-text, which ends a response and counts.
        temperature: divides the logits.
        seed: one per row, or one for all.
    """
    sampled = generate(policy, prompts, eot, limits, seed, Sampling(temperature))
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]  # (B, 1)
    ends = starts + torch.tensor([len(row) for row in sampled.rows])[:, None]
    T = int(ends.max())
    position = torch.arange(T)
    counted = (position >= starts) & (position < ends)  # (B, T)
    rows = [[*prompt, *row] for prompt, row in zip(prompts, sampled.rows)]
    tokens = upload(torch.tensor([[*row, *[eot] * (T - len(row))] for row in rows]), sampled.mask.device)
    truncated = torch.tensor([row[-1] != eot for row in sampled.rows])
    return Rollout(tokens, counted, sampled.responses, sampled.mask, sampled.logprobs, truncated)


def choose_prompts(
    prompts: Sequence[list[int]], count: int, seed: int, step: int, lengths: tuple[int, int] | None = None
) -> list[list[int]]:
    """The prompts of a step, chosen with replacement: a pure function of the step.

    Args:
        prompts: all there are, as token ids.
        count: how many to choose.
        seed, step: of the run.
        lengths: cut each to a length from this range; None = whole.
    """
    generator = seeded(seed, step, 0)
    chosen = torch.randint(len(prompts), (count,), generator=generator).tolist()
    if lengths is None:
        return [prompts[i] for i in chosen]
    cut = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator).tolist()
    return [prompts[i][:length] for i, length in zip(chosen, cut)]


def response_limits(low: int, high: int, n: int, seed: int, step: int) -> list[int]:
    """The response limit of each row of a step, uniform from low to high."""
    return torch.randint(low, high + 1, (n,), generator=seeded(seed, step, 1)).tolist()


def minibatches(n: int, epochs: int, per_epoch: int, seed: int, step: int) -> Iterator[Int[Tensor, " b"]]:
    """Rows of the optimiser steps after a rollout of n: every epoch all rows, in another random order."""
    for epoch in range(epochs):
        yield from torch.randperm(n, generator=seeded(seed, step, 3, epoch)).chunk(per_epoch)


def microbatches(counted: Bool[Tensor, "B T"], rows: Int[Tensor, " b"], size: int) -> Sequence[Int[Tensor, " ..."]]:
    """Some rows of a rollout in pieces of at most `size` (0 = all in one), short ones together."""
    ends = (counted[rows] * torch.arange(1, counted.shape[1] + 1)).amax(-1)  # (b,)
    return rows[ends.argsort(stable=True)].split(size or len(rows))
