"""The reward model: a GPT trunk with a scalar head, learnt from what people prefer.

People cannot say what a response is worth, but they can say which of two is better. The model of their choice is
Bradley & Terry's (1952) for pairs, and Plackett & Luce's (1959, 1975) for rankings: the best is chosen first, with
probability proportional to e^r, then the best of the rest, and so on. Maximum likelihood under it gives the reward r,
up to a constant per prompt that no comparison can see.

Beside it, the trunk goes on learning to write the best response through its language-model head (`sft_coef`): this
makes it a better judge and lets it tolerate a higher learning rate.

Source: Christiano et al. 2017, eq. 1; Stiennon et al. 2020, section 3.4; Ouyang et al. 2022, eq. 1; Yang et al. 2024
(`sft_coef`, see `best_nll`).
Differs: Ouyang et al. average over the pairs of a ranking as if they were independent; we use the ranking's own
likelihood, with ties summed over the orders that agree with them. Theirs is the likelihood alone, `sft_coef` 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.algorithms.losses import MAX_TIED, best_nll, best_of, centring_loss, ranking_loss
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
from minirlhf.devices import upload
from minirlhf.model.gpt import ScalarModel
from minirlhf.model.packed import packed_layout, packed_logps
from minirlhf.run.folder import Run
from minirlhf.run.terminal import console

COUNTS = ("right", "strict")  # of rankings, among what `ranking_terms` sums


@dataclass(frozen=True)
class RewardModelConfig:
    """How to train a reward model."""

    steps: int = 1100
    """Optimiser steps."""
    batch_size: int = 6
    """Rankings (or pairs) a step."""
    microbatch_size: int = 0
    """Rankings in memory at a time; gradients accumulate to those of the whole batch. 0 = the whole batch."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 20
    """Steps until the peak; from there half a cosine down to a tenth."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    margin: float = 0.0
    """By how much a better response must lead a worse one (Touvron et al. 2023, eq. 2)."""
    centring: float = 0.0
    """Weight of the penalty on (Σ scores)², which fixes the free constant (Eisenstein et al. 2023, section 2)."""
    sft_coef: float = 2.0
    """Weight of the cross-entropy of the best response, in nats per token: the trunk stays a language model."""
    held_out: float = 0.05
    """Share of the records kept for the held-out accuracy."""
    eval_every: int = 1100
    """Steps between held-out accuracies."""

    def __post_init__(self):
        check_at_least(1, steps=self.steps, batch_size=self.batch_size, eval_every=self.eval_every)
        check_at_least(0, microbatch_size=self.microbatch_size, warmup_steps=self.warmup_steps)
        check_at_least(0, weight_decay=self.weight_decay, margin=self.margin, centring=self.centring)
        check_at_least(0, sft_coef=self.sft_coef)
        check_positive(lr=self.lr, max_grad_norm=self.max_grad_norm)
        check_share(held_out=self.held_out)


class Rankings(NamedTuple):
    """Some rankings in one batch, one per row, its prompt computed once; N = all their responses."""

    packed: Packed
    groups: list[tuple[Int[Tensor, "B K"], tuple[int, ...]]]  # which of the N, and the ranks these rankings share

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Packed.shape`: at most every token of a response goes through the head."""
        return self.packed.shape


class RankedExamples(NamedTuple):
    """One ranking, tokenised."""

    examples: list[Example]
    ranks: tuple[int, ...]


def best_first(ranking: Ranking) -> Ranking:
    """The ranking with its best response first and ranks without gaps: 3, 1, 3 → 1, 2, 2."""
    order = sorted(range(len(ranking.ranks)), key=lambda k: ranking.ranks[k])
    ranks = [ranking.ranks[k] for k in order]
    dense = {rank: i for i, rank in enumerate(sorted(set(ranks)), start=1)}
    if max(ranks.count(rank) for rank in ranks) > MAX_TIED:
        raise InputError(f"{ranking.source or 'a ranking'}: more than {MAX_TIED} responses are tied; break some ties")
    responses = tuple(ranking.responses[k] for k in order)
    return Ranking(ranking.prompt, responses, tuple(dense[rank] for rank in ranks), ranking.source)


def collate_rankings(ranked: Sequence[RankedExamples], fill: int) -> Rankings:
    """Rankings in one right-padded batch; those with the same pattern of ranks form a group."""
    rows: dict[tuple[int, ...], list[list[int]]] = {}
    start = 0
    for one in ranked:
        rows.setdefault(one.ranks, []).append(list(range(start, start + len(one.ranks))))
        start += len(one.ranks)
    packed = pack([one.examples for one in ranked], fill)
    return Rankings(packed, [(torch.tensor(r), ranks) for ranks, r in sorted(rows.items())])


def score_batch(model: ScalarModel, batch: Rankings) -> Float[Tensor, " N"]:
    """The score of each response, read at its last token."""
    return model(**packed_layout(model.trunk, batch.packed), at=batch.packed.ends)


def scores_and_logps(model: ScalarModel, batch: Rankings) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The score of each response, and the trunk's log-prob of the best of each ranking (0 for the others)."""
    best = torch.zeros(len(batch.packed.ends), dtype=torch.bool)
    for rows, ranks in batch.groups:
        best[rows[:, best_of(ranks)]] = True
    packed = batch.packed.counting(best)
    at = torch.cat([packed.ends, packed.predictors])
    states = model.trunk(**packed_layout(model.trunk, packed), at=at)  # (N + M, D)
    at_ends, before_targets = states.tensor_split([len(packed.ends)])
    return model.head(at_ends), packed_logps(model.trunk, before_targets, packed)


def pair_accuracy(scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Share of pairs that the scores order as the ranks do, over all pairs in each ranking; equal scores count half.

    Args:
        scores: of the responses of each ranking.
        ranks: of the same responses, 1 = best. Pairs of equal rank are left out.

    Returns:
        The share (NaN if no pair is left), and the number of pairs.
    """
    right, pairs = 0.0, 0
    for own_scores, own_ranks in zip(scores, ranks):
        for better, its_rank in zip(own_scores, own_ranks):
            for worse, other_rank in zip(own_scores, own_ranks):
                if its_rank < other_rank:
                    right += 1.0 if better > worse else 0.5 if better == worse else 0.0
                    pairs += 1
    return (right / pairs if pairs else float("nan")), pairs


def held_out_accuracy(model: ScalarModel, batches: Sequence[Rankings]) -> float:
    """Share of strictly ordered pairs that the scores order as the annotators did; equal scores count half.

    NaN where no pair is strictly ordered.
    """
    scores, ranks = [], []
    with torch.no_grad():
        for batch in batches:
            own = score_batch(model, batch).tolist()
            for rows, shared in batch.groups:
                scores += [[own[i] for i in row] for row in rows.tolist()]
                ranks += [shared] * len(rows)
    return pair_accuracy(scores, ranks)[0]


# --- the loop ---------------------------------------------------------------------------------------------------------


def batches(
    rankings: Sequence[Ranking],
    held_out: Sequence[Ranking],
    tokenizer: Tokenizer,
    context: int,
    config: RewardModelConfig,
    seed: int,
) -> Data:
    """What to train on: rankings in microbatches."""
    require_preference(rankings)
    size = config.microbatch_size or config.batch_size
    parts, cut = [], 0
    for part in (rankings, held_out):
        ordered = [best_first(ranking) for ranking in part]
        examples, cut_here = examples_of_rankings(tokenizer, ordered, context)
        parts.append([RankedExamples(own, ranking.ranks) for own, ranking in zip(examples, ordered)])
        cut += cut_here
    ranked, rest = parts
    if cut:
        total = len(ranked) + len(rest)
        console.print(f"{cut:,} of {total:,} records were longer than {context} tokens and were cut")

    def pieces(rows: Sequence[RankedExamples]) -> list[Rankings]:
        return [
            collate_rankings(p, tokenizer.eot) for p in in_pieces(rows, lambda one: packed_length(one.examples), size)
        ]

    # A batch is chosen whatever the lengths, and sorted inside: batches of only long or only short rankings cost about
    # 1.5 points of held-out accuracy on the help desk.
    lengths = [0] * len(ranked)
    return Data(
        lambda step: pieces([ranked[i] for i in batch_indices(lengths, config.batch_size, seed, step)]), pieces(rest)
    )


def train(model: ScalarModel, data: Data, config: RewardModelConfig, run: Run) -> dict[str, float]:
    """Train `model` in place, with its kernel and dtype; return the last step's metrics.

    `loss` is that of the rankings alone, in nats per ranking; what is minimised is loss + sft_coef · best_nll.
    """
    optimizer = adamw(config.weight_decay, (model, config.lr))
    start = run.restore(model=model, optimizer=optimizer)
    metrics: dict[str, float] = {}

    for step in run.range(start):
        lr = schedule(optimizer, step, config.steps, config.warmup_steps)
        pieces = data.at(step)
        rankings = sum(len(rows) for piece in pieces for rows, _ in piece.groups)

        totals: dict[str, Tensor] = {}
        for piece in pieces:
            terms = ranking_terms(model, piece, config)
            ((terms["loss"] + config.sft_coef * terms["best_nll"]) / rankings).backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double() / (1 if name in COUNTS else rankings)
        seen = clip_and_read(run, step, [model], config.max_grad_norm, totals)
        optimizer.step()
        optimizer.zero_grad()

        metrics = {"loss": seen["loss"], "best_over_worst": seen["right"] / max(1, seen["strict"])}
        metrics |= {"grad_norm": seen["grad_norm"], "lr": lr}
        if config.sft_coef:
            metrics["best_nll"] = seen["best_nll"]
        if data.held_out and is_due(step, config.eval_every, config.steps):
            metrics["held_out_accuracy"] = held_out_accuracy(model, data.held_out)
        run.log(step, metrics, show=("loss", "best_over_worst", "held_out_accuracy"))
        run.checkpoint(step + 1, model=model, optimizer=optimizer)
    return metrics


def ranking_terms(model: ScalarModel, piece: Rankings, config: RewardModelConfig) -> dict[str, Float[Tensor, ""]]:
    """Sums over a microbatch: the rankings' loss, the best response's cross-entropy, how many rankings have a best
    response above a worst one (`strict`), and in how many of these the scores say so too (`right`)."""
    device = model.score.weight.device
    logps = lengths = None
    if config.sft_coef:
        scores, logps = scores_and_logps(model, piece)
        lengths = upload(piece.packed.lengths, device)
    else:
        scores = score_batch(model, piece)
    scores = scores.float()  # (N,)
    loss, nll, right = (scores.new_zeros(()) for _ in range(3))
    strict = 0
    for rows, ranks in piece.groups:
        rows = upload(rows, device)
        own = scores[rows]  # (B, K), best first
        loss = loss + ranking_loss(own, ranks, config.margin).sum()
        loss = loss + config.centring * centring_loss(own).sum()
        if logps is not None:
            nll = nll + best_nll(logps[rows], lengths[rows], ranks).sum()
        if ranks[0] != ranks[-1]:
            right = right + (own[:, 0] > own[:, -1]).sum()
            strict += len(rows)
    return {"loss": loss, "best_nll": nll, "right": right, "strict": torch.tensor(float(strict))}
