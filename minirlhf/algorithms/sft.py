"""Next-token prediction: pre-training on text, and supervised fine-tuning (SFT) on prompt–response pairs.

Both minimise the same cross-entropy and differ in what counts only: every token of a text, or the tokens of the
response. This is stage one of RLHF: it makes a model that answers like its demonstrations, the good ones and the bad.

Source: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section 3.5 (SFT);
Radford et al. 2019 (pre-training).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minirlhf import InputError
from minirlhf.algorithms.logprobs import response_stats
from minirlhf.algorithms.training import adamw, clip_and_read, is_due, schedule
from minirlhf.checks import check_at_least, check_positive, check_share
from minirlhf.data.batches import (
    Batch,
    Data,
    Example,
    batch_indices,
    collate,
    examples_from,
    in_pieces,
    stream_batch,
    token_stream,
)  # fmt: skip
from minirlhf.data.records import Demonstration, Text, split_held_out
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.devices import upload
from minirlhf.model.gpt import GPT
from minirlhf.run.folder import Run
from minirlhf.run.terminal import console


@dataclass(frozen=True)
class SFTConfig:
    """How to train on next-token prediction."""

    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 16
    """Sequences a step."""
    microbatch_size: int = 0
    """Sequences in memory at a time; gradients accumulate to those of the whole batch. 0 = the whole batch."""
    lr: float = 2e-3
    """Peak learning rate."""
    warmup_steps: int = 20
    """Steps until the peak; from there half a cosine down to a tenth."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    block: int = 0
    """Pre-training: tokens predicted in each sequence; 0 = the whole context."""
    held_out: float = 0.05
    """Share of the records (of one long text: its end) kept for the held-out loss."""
    eval_every: int = 200
    """Steps between held-out losses."""

    def __post_init__(self):
        check_at_least(1, steps=self.steps, batch_size=self.batch_size, eval_every=self.eval_every)
        check_at_least(0, microbatch_size=self.microbatch_size, warmup_steps=self.warmup_steps, block=self.block)
        check_share(held_out=self.held_out)
        check_at_least(0, weight_decay=self.weight_decay)
        check_positive(lr=self.lr, max_grad_norm=self.max_grad_norm)


def sft_loss(model: GPT, batch: Batch) -> Float[Tensor, ""]:
    """Sum of the cross-entropy over the counted tokens of a batch, in nats.

        L = -Σ_{t counts} log π(y_t | x, y_<t)

    A sum, so that microbatches add up: the caller divides by the counted tokens of the whole batch, which makes the
    accumulated gradient that of one big batch even when responses differ in length.

    Source: Radford et al. 2018, eq. 1.

    Args:
        model: the policy.
        batch: right-padded tokens (B, T) and which of them count; best on the CPU, where it is made.
    """
    tokens = upload(batch.tokens, model.wte.weight.device)
    return -response_stats(model, tokens, batch.response_mask).logprobs.sum()


def microbatches(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into pieces of at most `size` rows, each without columns that are padding in all its rows."""
    size = size or len(batch.tokens)
    pieces = []
    for start in range(0, len(batch.tokens), size):
        rows = [part[start : start + size] for part in batch]
        width = int(rows[1].sum(-1).max())
        pieces.append(Batch(*(part[:, :width] for part in rows)))
    return pieces


def held_out_loss(model: GPT, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy per counted token over held-out batches, in nats."""
    with torch.no_grad():
        total = sum(sft_loss(model, batch).double() for batch in batches)
    return float(total) / max(1, sum(batch.counted for batch in batches))


def batches(
    records: Sequence[Text] | Sequence[Demonstration],
    tokenizer: Tokenizer,
    context: int,
    config: SFTConfig,
    seed: int,
) -> Data:
    """What to train on: texts or demonstrations in microbatches.

    One long text becomes one row of tokens, of which a batch is random windows. Many texts, like demonstrations, stay
    apart, one to a row, in batches of about the same length: a row that runs from one text into the next would have to
    learn first that they have nothing to do with each other.

    Raises:
        InputError: there is less text than one sequence.
    """
    size, block = config.batch_size, min(config.block or context, context)
    rows = config.microbatch_size or size  # held-out batches have to fit in memory, too
    if isinstance(records[0], Text) and len(records) == 1:
        stream = token_stream(tokenizer, [records[0].text])
        stream, rest = stream.tensor_split([len(stream) - int(len(stream) * config.held_out)])
        if len(stream) < block + 1:
            raise InputError(
                f"{records[0].source or 'the data'}: {len(stream)} tokens of text are fewer than one sequence of "
                f"{block + 1}; give more text or a smaller --block"
            )
        windows = rest[: len(rest) // (block + 1) * (block + 1)].view(-1, block + 1)
        return Data(
            lambda step: microbatches(_whole(stream_batch(stream, size, block, seed, step)), config.microbatch_size),
            [_whole(part) for part in windows.split(rows) if len(part)],
        )

    kept, rest = split_held_out(records, config.held_out, seed) if config.held_out > 0 else (records, [])
    if isinstance(records[0], Text):
        examples, rest = (_documents(tokenizer, part, block) for part in (kept, rest))
    else:
        examples, cut = examples_from(tokenizer, kept, context)
        rest, cut_rest = examples_from(tokenizer, rest, context)
        if cut + cut_rest:
            console.print(f"{cut + cut_rest:,} of {len(records):,} records exceed {context} tokens and were cut")
    lengths = [len(example.tokens) for example in examples]

    def at(step: int) -> list[Batch]:
        batch = collate([examples[i] for i in batch_indices(lengths, size, seed, step)], tokenizer.eot)
        return microbatches(batch, config.microbatch_size)

    return Data(at, [collate(part, tokenizer.eot) for part in in_pieces(rest, lambda one: len(one.tokens), rows)])


def _documents(tokenizer: Tokenizer, records: Sequence[Text], block: int) -> list[Example]:
    """Texts between two end-of-texts, in pieces of at most `block` predicted tokens, each token predicted once."""
    examples = []
    for record in records:
        tokens = [tokenizer.eot, *tokenizer.encode(record.text), tokenizer.eot]
        examples += [Example(tokens[i : i + block + 1], 1) for i in range(0, len(tokens) - 1, block)]
    return examples


def _whole(tokens: Tensor) -> Batch:
    """Windows of text (B, T) as a batch in which every token counts but the first, which nothing predicts."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    counts = mask.clone()
    counts[:, 0] = False
    return Batch(tokens, mask, counts)


def train(model: GPT, data: Data, config: SFTConfig, run: Run) -> dict[str, float]:
    """Train `model` in place.

    Args:
        model: trained with its kernel and dtype.
        data: see `batches`.
        config: see `SFTConfig`.
        run: where metrics and checkpoints go.

    Returns:
        The last step's metrics: loss and held-out loss in nats per token, perplexity.
    """
    optimizer = adamw(config.weight_decay, (model, config.lr))
    start = run.restore(model=model, optimizer=optimizer)
    metrics: dict[str, float] = {}

    for step in run.range(start):
        lr = schedule(optimizer, step, config.steps, config.warmup_steps)
        pieces = data.at(step)
        tokens = sum(piece.counted for piece in pieces)

        total = torch.zeros((), dtype=torch.float64, device=model.wte.weight.device)
        for piece in pieces:
            loss = sft_loss(model, piece) / tokens
            loss.backward()
            total += loss.detach()
        metrics = clip_and_read(run, step, [model], config.max_grad_norm, {"loss": total})
        optimizer.step()
        optimizer.zero_grad()

        metrics |= {"lr": lr, "tokens": tokens}
        if data.held_out and is_due(step, config.eval_every, config.steps):
            metrics["held_out_loss"] = held_out_loss(model, data.held_out)
            metrics["perplexity"] = math.exp(min(metrics["held_out_loss"], 100.0))
        run.log(step, metrics, show=("loss", "held_out_loss"))
        run.checkpoint(step + 1, model=model, optimizer=optimizer)
    return metrics
