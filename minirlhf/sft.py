"""Next-token prediction: pre-training on text, and supervised fine-tuning (SFT) on prompt–response pairs.

Both minimise the same cross-entropy and differ in what counts only: every token of a text, or the tokens of the
response. This is stage one of RLHF: it makes a model that answers like its demonstrations, the good ones and the bad.

Source: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section 3.5 (SFT);
Radford et al. 2019 (pre-training).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minirlhf import InputError
from minirlhf.data import (
    Batch,
    Demonstration,
    Example,
    Text,
    batch_indices,
    collate,
    examples_from,
    split_held_out,
    stream_batch,
    token_stream,
    upload,
)
from minirlhf.model import GPT, adamw, response_stats
from minirlhf.runs import Run, autocast, check_at_least, check_positive, check_share, console, cosine_lr, read, set_lr
from minirlhf.tokenizer import Tokenizer


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


def sft_loss(model: GPT, batch: Batch, kernel: str = "auto") -> Float[Tensor, ""]:
    """Sum of the cross-entropy over the counted tokens of a batch, in nats.

        L = -Σ_{t counts} log π(y_t | x, y_<t)

    A sum, so that microbatches add up: the caller divides by the counted tokens of the whole batch, which makes the
    accumulated gradient that of one big batch even when responses differ in length.

    Source: Radford et al. 2018, eq. 1.

    Args:
        model: the policy.
        batch: right-padded tokens (B, T) and which of them count; best on the CPU, where it is made.
        kernel: which `token_stats`.
    """
    tokens = upload(batch.tokens, model.wte.weight.device)
    return -response_stats(model, tokens, batch.response_mask, kernel=kernel).logprobs.sum()


def counted(batch: Batch) -> int:
    """Tokens that count; the first of a row is never predicted."""
    return int(batch.response_mask[:, 1:].sum())


def microbatches(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into pieces of at most `size` rows, each without columns that are padding in all its rows."""
    size = size or len(batch.tokens)
    pieces = []
    for start in range(0, len(batch.tokens), size):
        rows = [part[start : start + size] for part in batch]
        width = int(rows[1].sum(-1).max())
        pieces.append(Batch(*(part[:, :width] for part in rows)))
    return pieces


def held_out_loss(model: GPT, batches: Sequence[Batch], kernel: str = "auto") -> float:
    """Mean cross-entropy a counted token over held-out batches, in nats."""
    with torch.no_grad():
        total = sum(sft_loss(model, batch, kernel).double() for batch in batches)
    return float(total) / max(1, sum(counted(batch) for batch in batches))


def batches(
    records: Sequence[Text] | Sequence[Demonstration],
    tokenizer: Tokenizer,
    context: int,
    config: SFTConfig,
    seed: int,
) -> tuple[Callable[[int], Batch], list[Batch]]:
    """What to train on: the batch of a step as a pure function of the step, and the held-out batches.

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
        return (
            lambda step: _whole(stream_batch(stream, size, block, seed, step)),
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
    rest.sort(key=lambda example: len(example.tokens))
    return (
        lambda step: collate([examples[i] for i in batch_indices(lengths, size, seed, step)], tokenizer.eot),
        [collate(rest[i : i + rows], tokenizer.eot) for i in range(0, len(rest), rows)],
    )


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


def train(
    model: GPT,
    batch_at: Callable[[int], Batch],
    held_out: Sequence[Batch],
    config: SFTConfig,
    run: Run,
    *,
    dtype: str = "fp32",
    kernel: str = "auto",
) -> dict[str, float]:
    """Train `model` in place.

    Args:
        model: trained in place.
        batch_at: the batch of a step, a pure function of the step, so that a resumed run sees the same ones.
        held_out: batches for the held-out loss.
        config: see `SFTConfig`.
        run: where metrics and checkpoints go.
        dtype: fp32 or bf16 matrix products.
        kernel: which `token_stats`.

    Returns:
        The last step's metrics: loss and held-out loss in nats a token, perplexity.
    """
    device = model.wte.weight.device
    optimizer = adamw(model, config.lr, config.weight_decay)
    start = run.restore(model=model, optimizer=optimizer)
    metrics: dict[str, float] = {}

    for step in run.range(start):
        batch = batch_at(step)
        tokens = counted(batch)
        lr = cosine_lr(step, config.steps, config.lr, config.warmup_steps)
        set_lr(optimizer, lr)

        total = torch.zeros((), dtype=torch.float64, device=device)
        for piece in microbatches(batch, config.microbatch_size):
            with autocast(device, dtype):
                piece_loss = sft_loss(model, piece, kernel) / tokens
            piece_loss.backward()
            total += piece_loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        metrics = read({"loss": total, "grad_norm": grad_norm})
        run.require_finite(step, loss=metrics["loss"], gradient=metrics["grad_norm"])
        optimizer.step()
        optimizer.zero_grad()

        metrics |= {"lr": lr, "tokens": tokens}
        if held_out and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
            with autocast(device, dtype):
                metrics["held_out_loss"] = held_out_loss(model, held_out, kernel)
            metrics["perplexity"] = math.exp(min(metrics["held_out_loss"], 100.0))
        run.log(step, metrics, show=("loss", "held_out_loss"))
        run.checkpoint(step + 1, model=model, optimizer=optimizer)
    return metrics
