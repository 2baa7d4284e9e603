"""DPO: learn from preferences directly, without a reward model and without sampling.

The KL-regularised optimum is π*(y|x) ∝ π_ref(y|x) e^{r(x,y)/β}. Solved for the reward, r = β log π*/π_ref + const(x),
and put into Bradley & Terry's model of preferences, it turns the policy itself into the reward model:

    L = -log σ( β [log π(y_w|x)/π_ref(y_w|x) - log π(y_l|x)/π_ref(y_l|x)] )

Why do the log-probs of chosen *and* rejected responses fall? The loss sees their difference only. Chosen and rejected
responses share most of their words, so that pushing the rejected one down drags the chosen one along, and nothing in
the loss pulls either back up; the probability goes to responses that stand in no pair, garbled ones among them. A
little of it is expected. The cure is to learn the chosen response beside it, L + α · (-log π(y_w|x) / |y_w|), which we
do (`sft_coef`, α) where y_w is the best response of its record; a chosen log-prob that keeps falling all the same means
that β is too small or training too long.

Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; the fall of both log-probs: Pal et al. 2024,
"Smaug", section 3; Razin et al. 2024, "Unintentional Unalignment"; α: Pang et al. 2024, "Iterative Reasoning
Preference Optimization", section 2.
Differs: α = 0 is the loss of Rafailov et al.; here it is 1 and the labels are smoothed by 0.1 unless told otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.algorithms.losses import Loss, chosen_nll, preference_loss
from minirlhf.algorithms.training import adamw, clip_and_read, is_due, schedule
from minirlhf.checks import check_at_least, check_positive, check_share
from minirlhf.data.batches import (
    Data,
    Example,
    Packed,
    batch_indices,
    examples_of_rankings,
    in_pieces,
    pack,
    packed_length,
)  # fmt: skip
from minirlhf.data.records import Ranking, require_preference
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.devices import read, upload
from minirlhf.model.gpt import GPT
from minirlhf.model.packed import packed_layout, packed_logps
from minirlhf.run.folder import Run
from minirlhf.run.terminal import console


@dataclass(frozen=True)
class DPOConfig:
    """How to run DPO."""

    steps: int = 400
    """Optimiser steps."""
    batch_size: int = 12
    """Records (rankings or pairs) a step; a ranking brings several pairs, and each response is computed once."""
    microbatch_size: int = 0
    """Records in memory at a time; gradients accumulate to those of the whole batch. 0 = the whole batch."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 10
    """Steps until the peak; from there half a cosine down to a tenth."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    beta: float = 0.1
    """β, the price of a nat of KL: smaller moves further from the reference."""
    loss: Loss = "sigmoid"
    """sigmoid (DPO), ipo or hinge."""
    pairs: Literal["all", "best"] = "all"
    """Of a ranking: all its strictly ordered pairs, or the best response against each worse one."""
    label_smoothing: float | None = None
    """The share of labels taken to be wrong (cDPO). For sigmoid, which alone knows of it, 0.1 unless another is given:
    people disagree, and 0 would trust every one of them."""
    sft_coef: float = 1.0
    """Weight of the cross-entropy of the chosen response, in nats per token, in pairs where it is the best of its
    record: it holds that response's log-prob up."""
    average: bool = False
    """Average log-probs over the response's tokens instead of summing them (for IPO)."""
    held_out: float = 0.05
    """Share of the records kept for the held-out accuracy."""
    eval_every: int = 200
    """Steps between held-out accuracies."""

    def __post_init__(self):
        check_at_least(1, steps=self.steps, batch_size=self.batch_size, eval_every=self.eval_every)
        check_at_least(0, microbatch_size=self.microbatch_size, warmup_steps=self.warmup_steps)
        check_at_least(0, weight_decay=self.weight_decay, sft_coef=self.sft_coef)
        check_positive(lr=self.lr, max_grad_norm=self.max_grad_norm, beta=self.beta)
        check_share(held_out=self.held_out)
        if not 0 <= self.smoothing <= 0.5:
            raise InputError(f"--label-smoothing must lie between 0 and 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.loss != "sigmoid":
            raise InputError(f"--label-smoothing is not for --loss {self.loss}; use --loss sigmoid or leave it out")

    @property
    def smoothing(self) -> float:
        """ε of the loss."""
        if self.label_smoothing is None:
            return 0.1 if self.loss == "sigmoid" else 0.0
        return self.label_smoothing


def response_logps(model: GPT, packed: Packed, average: bool = False) -> Float[Tensor, " N"]:
    """log π(y|x) of N packed responses, in nats; with `average`, nats per token."""
    states = model(**packed_layout(model, packed), at=packed.predictors)  # (M, D)
    total = packed_logps(model, states, packed)
    return total / upload(packed.lengths, total.device) if average else total


# --- batches ----------------------------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """One record, tokenised: the responses to a prompt, and which of them is preferred to which."""

    examples: list[Example]
    pairs: list[tuple[int, int]]  # (chosen, rejected)
    ref_logps: Float[Tensor, " K"] | None = None  # the reference's, summed over each response


class Comparisons(NamedTuple):
    """Some records in one batch, one per row: each response is computed once, whatever the pairs it stands in."""

    packed: Packed  # N responses
    ref_logps: Float[Tensor, " N"] | None  # the reference's, which never changes
    chosen: Int[Tensor, " P"]  # of each pair, its place among the N
    rejected: Int[Tensor, " P"]
    best: Bool[Tensor, " P"]  # whether nothing in the record is preferred to the chosen one

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Packed.shape`."""
        return self.packed.shape


def pairs_of(ranks: Sequence[int], which: Literal["all", "best"] = "all") -> list[tuple[int, int]]:
    """(chosen, rejected) of a ranking: all its strictly ordered pairs, or the best against each worse one.

    Ties make no pair.
    """
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i, j in combinations(range(len(ranks)), 2)
        if ranks[i] != ranks[j] and (which == "all" or min(ranks) in (ranks[i], ranks[j]))
    ]


def collate_records(records: Sequence[Compared], fill: int) -> Comparisons:
    """Records in one right-padded batch."""
    pairs, n = [], 0
    for record in records:
        pairs += [(n + better, n + worse) for better, worse in record.pairs]
        n += len(record.examples)
    chosen, rejected = torch.tensor(pairs).unbind(-1)
    best = ~torch.isin(chosen, rejected)
    known = None if records[0].ref_logps is None else torch.cat([record.ref_logps for record in records])
    return Comparisons(pack([record.examples for record in records], fill), known, chosen, rejected, best)


def with_reference(ref: GPT, records: list[Compared], fill: int, size: int, average: bool) -> list[Compared]:
    """Run the reference once over all responses; it never changes, so its log-probs are kept."""
    known: list[Compared] = list(records)
    for places in in_pieces(range(len(records)), lambda i: packed_length(records[i].examples), size):
        batch = collate_records([records[i] for i in places], fill)
        with torch.no_grad():
            logps = response_logps(ref, batch.packed, average).cpu()
        for i, own in zip(places, logps.split([len(records[i].examples) for i in places])):
            known[i] = records[i]._replace(ref_logps=own)
    return known


def batches(
    rankings: Sequence[Ranking],
    held_out: Sequence[Ranking],
    tokenizer: Tokenizer,
    ref: GPT,
    config: DPOConfig,
    seed: int,
) -> Data:
    """What to train on: every strictly ordered pair, in microbatches of records, with the reference's log-probs.

    Only the records that this run will see are tokenised and read by the reference.
    """
    require_preference(rankings)
    context, size = ref.config.n_positions, config.microbatch_size or config.batch_size
    rankings, held_out = ([one for one in part if len(set(one.ranks)) > 1] for part in (rankings, held_out))
    lengths = [0] * len(rankings)  # any: batches of only long or only short responses pull one way
    chosen = [batch_indices(lengths, config.batch_size, seed, step) for step in range(config.steps)]
    seen = sorted({i for own in chosen for i in own})
    parts, cut = [], 0
    for part, which in (([rankings[i] for i in seen], config.pairs), (held_out, "all")):
        examples, cut_here = examples_of_rankings(tokenizer, part, context)
        records = [Compared(own, pairs_of(ranking.ranks, which)) for own, ranking in zip(examples, part)]
        parts.append(with_reference(ref, records, tokenizer.eot, size, config.average))
        cut += cut_here
    records, rest = dict(zip(seen, parts[0])), parts[1]
    n_pairs = sum(len(record.pairs) for record in records.values())
    console.print(
        f"{len(rankings):,} records with a preference, of which this run sees {len(seen):,} ({n_pairs:,} pairs); "
        f"{len(rest):,} held out"
    )
    if cut:
        console.print(f"{cut:,} of these were longer than {context} tokens and were cut")

    def pieces(rows: Sequence[Compared]) -> list[Comparisons]:
        ordered = in_pieces(rows, lambda record: packed_length(record.examples), size)
        return [collate_records(part, tokenizer.eot) for part in ordered]

    return Data(lambda step: pieces([records[i] for i in chosen[step]]), pieces(rest))


# --- the loop ---------------------------------------------------------------------------------------------------------


def pair_metrics(
    model: GPT, batch: Comparisons, config: DPOConfig
) -> tuple[Float[Tensor, " P"], dict[str, Float[Tensor, " P"]]]:
    """What is minimised of each pair, and what people look at: its parts, rewards β·logratio, margins, accuracy."""
    device = model.wte.weight.device
    logps = response_logps(model, batch.packed, config.average)  # (N,)
    ref_logps = upload(batch.ref_logps, device)
    # index_select adds up the gradients of a response's pairs in one order, always.
    pick = [upload(places, device) for places in (batch.chosen, batch.rejected)]
    chosen, rejected = (logps.index_select(0, places) for places in pick)  # (P,)
    ref_chosen, ref_rejected = (ref_logps[places] for places in pick)
    losses = preference_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.loss, config.smoothing)
    lengths = torch.ones_like(batch.packed.ends) if config.average else batch.packed.lengths
    nll = chosen_nll(chosen, upload(lengths[batch.chosen], device))
    chosen_reward, rejected_reward = config.beta * (chosen - ref_chosen), config.beta * (rejected - ref_rejected)
    margin = (chosen_reward - rejected_reward).detach()
    return losses + config.sft_coef * upload(batch.best, device) * nll, {
        "loss": losses.detach(),
        "chosen_nll": nll.detach(),
        "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
        "margin": margin,
        "chosen_reward": chosen_reward.detach(),
        "rejected_reward": rejected_reward.detach(),
        "chosen_logps": chosen.detach(),
        "rejected_logps": rejected.detach(),
    }


def train(model: GPT, data: Data, config: DPOConfig, run: Run) -> dict[str, float]:
    """Train `model` in place, with its kernel and dtype, on what `batches` gives; return the last step's metrics."""
    optimizer = adamw(config.weight_decay, (model, config.lr))
    start = run.restore(model=model, optimizer=optimizer)
    metrics: dict[str, float] = {}

    for step in run.range(start):
        lr = schedule(optimizer, step, config.steps, config.warmup_steps)
        pieces = data.at(step)
        pairs = sum(len(piece.chosen) for piece in pieces)

        totals: dict[str, Tensor] = {}
        for piece in pieces:
            losses, seen = pair_metrics(model, piece, config)
            (losses.sum() / pairs).backward()
            for name, values in seen.items():
                totals[name] = totals.get(name, 0.0) + values.sum().double() / pairs
        metrics = clip_and_read(run, step, [model], config.max_grad_norm, totals)
        optimizer.step()
        optimizer.zero_grad()

        metrics["lr"] = lr
        if data.held_out and is_due(step, config.eval_every, config.steps):
            metrics |= held_out_metrics(model, data.held_out, config)
        run.log(step, metrics, show=("loss", "accuracy", "margin"))
        run.checkpoint(step + 1, model=model, optimizer=optimizer)
    return metrics


@torch.no_grad()
def held_out_metrics(model: GPT, pieces: Sequence[Comparisons], config: DPOConfig) -> dict[str, float]:
    """Loss and accuracy on pairs never trained on."""
    totals = {"loss": 0.0, "accuracy": 0.0}
    pairs = sum(len(piece.chosen) for piece in pieces)
    for piece in pieces:
        _, seen = pair_metrics(model, piece, config)
        for name in totals:
            totals[name] = totals[name] + seen[name].sum().double() / pairs
    return {f"held_out_{name}": value for name, value in read(totals).items()}
