"""Tokens and batches: records tokenised, masked, laid out side by side or packed.

A batch is a pure function of (seed, step), with no state to save: a run resumed at a step sees what it would have.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.data.records import Demonstration, Ranking
from minirlhf.data.tokenizer import Tokenizer, TokenText

# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Token ids, of which ``tokens[start:]`` count: the response with its end-of-text."""

    tokens: list[int]
    start: int


def make_example(tokenizer: Tokenizer, prompt: str, response: str, context: int) -> tuple[Example, bool]:
    """Tokens of a prompt, its response and end-of-text, cut to the context.

    Without a prompt, end-of-text comes first, as GPT-2 was trained, so that the response's first token is predicted
    from something. What is too long loses the beginning of its prompt, down to one token; only then the end of its
    response, which is thereby unfinished and gets no end-of-text.

    Args:
        tokenizer: text to ids.
        prompt: may be empty.
        response: what counts.
        context: most tokens that the model can read, at least 2.

    Returns:
        The example, and whether anything was cut.
    """
    if context < 2:
        raise ValueError(f"context {context} is too short for one token of a prompt and one of a response")
    before, after = tokens_of(tokenizer, prompt, response)
    cut = len(before) + len(after) > context
    before = before[-max(1, context - len(after)) :]
    after = after[: context - len(before)]
    return Example(before + after, len(before)), cut


def tokens_of(tokenizer: Tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt, which is end-of-text where it is empty, and of its response with end-of-text behind it.

    A `TokenText` already has its tokens, and they are taken as they are: of a response that was drawn, with end-of-text
    only if that was drawn too.
    """
    before = prompt.tokens if isinstance(prompt, TokenText) else tokenizer.encode(prompt) or [tokenizer.eot]
    after = response.tokens if isinstance(response, TokenText) else [*tokenizer.encode(response), tokenizer.eot]
    return before, after


def examples_from(
    tokenizer: Tokenizer, demonstrations: Sequence[Demonstration], context: int
) -> tuple[list[Example], int]:
    """`make_example` of every demonstration, and how many were cut."""
    made = [make_example(tokenizer, one.prompt, one.response, context) for one in demonstrations]
    return [example for example, _ in made], sum(cut for _, cut in made)


def examples_of_rankings(
    tokenizer: Tokenizer, rankings: Sequence[Ranking], context: int
) -> tuple[list[list[Example]], int]:
    """`make_example` of every response of each ranking, and how many rankings were cut."""
    made = [[make_example(tokenizer, one.prompt, text, context) for text in one.responses] for one in rankings]
    return [[example for example, _ in own] for own in made], sum(any(cut for _, cut in own) for own in made)


def token_stream(tokenizer: Tokenizer, texts: Iterable[str]) -> Int[Tensor, " tokens"]:
    """All texts in one row of tokens: end-of-text first, and after each text."""
    stream = [tokenizer.eot]
    for text in texts:
        stream += [*tokenizer.encode(text), tokenizer.eot]
    return torch.tensor(stream)


# --- batches ----------------------------------------------------------------------------------------------------------


def stream_batch(
    stream: Int[Tensor, " tokens"], batch_size: int, block: int, seed: int, step: int
) -> Int[Tensor, "B {block}+1"]:
    """Random windows of a stream of tokens, for pre-training.

    Args:
        stream: what `token_stream` gave.
        batch_size: number of windows.
        block: tokens to predict in each; a window is one longer.
        seed: of the run.
        step: of the run.

    Returns:
        ``(B, block + 1)`` tokens: ``[:, :-1]`` is read, ``[:, 1:]`` is predicted.

    Raises:
        InputError: the stream is shorter than one window.
    """
    if len(stream) <= block:
        what = f"the texts have {len(stream)} tokens, fewer than a window of {block + 1}"
        raise InputError(f"{what}; give more text or a shorter context")
    rng = random.Random(f"stream {seed} {step}")
    starts = torch.tensor([rng.randrange(len(stream) - block) for _ in range(batch_size)])
    return stream[starts[:, None] + torch.arange(block + 1)]


def batch_indices(lengths: Sequence[int], batch_size: int, seed: int, step: int) -> list[int]:
    """Which examples form the batch of a step: every epoch a new order, in a batch all of about the same length.

    Every example comes once an epoch, but for the remainder that does not fill a batch, which is another one in every
    epoch. Fewer examples than ``batch_size`` make one batch of all of them.

    Args:
        lengths: number of tokens of every example.
        batch_size: examples in a batch.
        seed: of the run.
        step: of the run, over all epochs.
    """
    lengths = tuple(lengths)
    if not lengths or batch_size < 1:
        raise ValueError(f"no batch of {batch_size} from {len(lengths)} examples")
    epoch, position = divmod(step, max(1, len(lengths) // batch_size))
    return list(_epoch(lengths, batch_size, seed, epoch)[position])


@functools.lru_cache(maxsize=4)  # training asks for the same epoch at every step
def _epoch(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    rng = random.Random(f"epoch {seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    order = order[: max(1, len(order) // batch_size) * batch_size]
    # Sorted all at once, neighbours would meet in every epoch. Sorted in chunks of fifty random batches, they are
    # new company each time and still waste little on padding.
    chunk = 50 * batch_size
    chunks = [sorted(order[i : i + chunk], key=lengths.__getitem__) for i in range(0, len(order), chunk)]
    batches = [part[i : i + batch_size] for part in chunks for i in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return batches


class Batch(NamedTuple):
    """Examples side by side, padded on the right.

    Attributes:
        tokens: ids, the fill where there is no token.
        mask: True where there is a token.
        response_mask: True where the token is part of a response and counts.
    """

    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    response_mask: Bool[Tensor, "B T"]

    @property
    def counted(self) -> int:
        """Tokens that count; the first of a row is never predicted."""
        return int(self.response_mask[:, 1:].sum())

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, tokens per row, and tokens whose logits are needed: what a step with it takes of memory."""
        return (*self.tokens.shape, self.counted)


class Data(NamedTuple):
    """What a run trains on: the microbatches of a step, a pure function of the step, and those held out."""

    at: Callable[[int], list[Any]]
    held_out: list[Any]


def in_pieces(rows: Sequence[Any], length: Callable[[Any], int], size: int) -> list[list[Any]]:
    """Rows in microbatches of at most `size`, those of like length together."""
    ordered = sorted(rows, key=length)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def collate(examples: Sequence[Example], fill: int) -> Batch:
    """Pad examples on the right to the longest of them; any id will do as the fill, the masks hide it."""
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.tensor([example.tokens + [fill] * (longest - len(example.tokens)) for example in examples])
    position = torch.arange(longest)
    mask = position < torch.tensor([len(example.tokens) for example in examples])[:, None]
    return Batch(tokens, mask, mask & (position >= torch.tensor([example.start for example in examples])[:, None]))


# --- packed rows ------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Sequences that begin alike, several in a row: what they share stands there, and is computed, once."""

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]  # of each token in its own sequence
    parts: Int[Tensor, "B T"]  # 0 = the common beginning, k = the rest of the row's k-th sequence, -1 = padding
    ends: Int[Tensor, " N"]  # where the sequences' last tokens stand in the flattened (B·T)
    predictors: Int[Tensor, " M"]  # where the token before each response token stands there, sequence after sequence
    targets: Int[Tensor, " M"]  # the response tokens themselves
    owners: Int[Tensor, " M"]  # which of the N sequences each belongs to

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, tokens per row, and response tokens, whose logits are needed."""
        return (*self.tokens.shape, len(self.targets))

    @property
    def attend(self) -> Bool[Tensor, "B 1 T T"]:
        """True where a token (third axis) may look (fourth): back along its own sequence."""
        return may_look(self.parts)

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Counted tokens of each response."""
        return self.owners.bincount(minlength=len(self.ends))

    def counting(self, which: Bool[Tensor, " N"]) -> Packed:
        """The same layout, in which the tokens of some responses count and those of the others do not."""
        kept = which[self.owners]
        return self._replace(predictors=self.predictors[kept], targets=self.targets[kept], owners=self.owners[kept])


def pack(groups: Sequence[Sequence[Example]], fill: int) -> Packed:
    """Lay out each group of examples in one row: their common beginning, then the rest of each, one after another.

    A token attends to the common beginning and to its own sequence, at the positions it would have alone, so that its
    state is the one it would have in a row of its own, at the cost of one prompt instead of K.

    Args:
        groups: B groups of examples, N in all, usually responses to one prompt.
        fill: id for the padding on the right.
    """
    rows, ends = [], []
    of_row, before, targets, owners = [], [], [], []  # of each counted token
    for b, group in enumerate(groups):
        sequences = [example.tokens for example in group]
        # Each keeps a last token of its own, even one with which another goes on.
        differ = (at for at, tokens in enumerate(zip(*sequences)) if len(set(tokens)) > 1)
        shared = next(differ, min(map(len, sequences)) - 1)
        tokens, positions, part = sequences[0][:shared], list(range(shared)), [0] * shared
        for k, (sequence, example) in enumerate(zip(sequences, group), start=1):
            skipped = len(tokens) - shared  # from a token's place in its own sequence to its place in the row
            first, last = max(example.start, 1) - 1, len(sequence) - 1  # nothing predicts a first token
            before += [*range(first, shared), *range(max(first, shared) + skipped, last + skipped)]
            targets += sequence[first + 1 :]
            of_row += [b] * (last - first)
            owners += [len(ends)] * (last - first)
            tokens = tokens + sequence[shared:]
            positions += range(shared, len(sequence))
            part += [k] * (len(sequence) - shared)
            ends.append((b, len(tokens) - 1))
        rows.append((tokens, positions, part))
    width = max(len(tokens) for tokens, _, _ in rows)
    padded = [[*values, *[blank] * (width - len(values))] for row in rows for values, blank in zip(row, (fill, 0, -1))]
    columns = torch.from_numpy(np.array(padded, np.int64)).view(len(rows), 3, width)
    tokens, positions, parts = columns.unbind(1)  # each (B, T)
    ends = torch.tensor([b * width + t for b, t in ends])
    of_row, before, targets, owners = torch.from_numpy(np.array([of_row, before, targets, owners], np.int64))
    return Packed(tokens, positions, parts, ends, of_row * width + before, targets, owners)


def may_look(parts: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True where a token (third axis) may look (fourth) in packed rows: back along its own sequence.

    Padding sees itself, or softmax would be NaN.
    """
    return ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])).tril()[:, None]


def packed_length(group: Sequence[Example]) -> int:
    """Tokens of the row that `pack` makes of responses to one prompt, counting the prompt once: what it costs."""
    return group[0].start + sum(len(example.tokens) - example.start for example in group)
