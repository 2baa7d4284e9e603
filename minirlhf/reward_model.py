"""The reward model: a GPT trunk with a scalar head, learnt from what people prefer.

People cannot say what a response is worth, but they can say which of two is better. The model of their choice is
Bradley & Terry's (1952) for pairs, and Plackett & Luce's (1959, 1975) for rankings: the best is chosen first, with
probability proportional to e^r, then the best of the rest, and so on. Maximum likelihood under it gives the reward r,
up to a constant per prompt that no comparison can see.

Beside it, the trunk goes on learning to write the best response through its language-model head (`sft_coef`): it is
the better judge for it, and bears a higher learning rate.

Source: Christiano et al. 2017, eq. 1; Stiennon et al. 2020, section 3.4; Ouyang et al. 2022, eq. 1; Yang et al. 2024
(`sft_coef`, see `best_nll`).
Differs: Ouyang et al. average over the pairs of a ranking as if they were independent; we use the ranking's own
likelihood, with ties summed over the orders that agree with them. Theirs is the likelihood alone, `sft_coef` 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from minirlhf import InputError
from minirlhf.data import Example, Packed, Ranking, batch_indices, make_example, pack, packed_length, upload
from minirlhf.model import ScalarModel, adamw, packed_layout, packed_logps
from minirlhf.runs import Run, autocast, check_at_least, check_positive, check_share, console, cosine_lr, read, set_lr
from minirlhf.tokenizer import Tokenizer

MAX_TIED = 10  # the likelihood of m tied responses sums over 2^m subsets


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
    """Weight of the cross-entropy of the best response, in nats a token: the trunk stays a language model."""
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


# --- equations --------------------------------------------------------------------------------------------------------


def ranking_loss(scores: Float[Tensor, "B K"], ranks: Sequence[int], margin: float = 0.0) -> Float[Tensor, " B"]:
    """Negative log-likelihood of rankings that share one pattern of ranks, under Plackett–Luce.

        P(y_1 > y_2 > … > y_K) = Π_k e^{r_k} / (e^{r_k} + Σ_{j ranked below k} e^{r_j})

    For a pair this is Bradley–Terry, -log σ(r_chosen - r_rejected). Tied responses mean that their order is not known:
    their probability is the sum over all their orders, found by going through the subsets S of tied responses that are
    yet to be placed, F(S) = Σ_{i∈S} e^{r_i} / (Σ_{j∈S} e^{r_j} + Σ_{j below} e^{r_j}) · F(S∖i). A margin m adds to the
    score of every response ranked below.

    Source: Plackett 1975, eq. 5; Ouyang et al. 2022, eq. 1 (K = 2); Touvron et al. 2023, eq. 2 (the margin).

    Args:
        scores: (B, K), one row a ranking.
        ranks: K ranks, 1 = best, equal = tied; the same for all rows.
        margin: in units of the score.

    Returns:
        (B,) in nats; 0 where all are tied, since that says nothing.

    Raises:
        ValueError: ranks that do not fit the scores, or more than `MAX_TIED` responses tied.
    """
    if len(ranks) != scores.shape[1]:
        raise ValueError(f"{scores.shape[1]} scores a row but {len(ranks)} ranks")
    loss = scores.new_zeros(len(scores))
    for rank in sorted(set(ranks))[:-1]:  # the last to be placed has no rival left
        tied = [k for k, other in enumerate(ranks) if other == rank]
        if len(tied) > MAX_TIED:
            raise ValueError(f"{len(tied)} responses are tied; at most {MAX_TIED} can be")
        below = [k for k, other in enumerate(ranks) if other > rank]
        rivals = torch.logsumexp(columns(scores, below) + margin, dim=-1)  # (B,)
        log_f = {(): scores.new_zeros(len(scores))}
        for size in range(1, len(tied) + 1):
            for left in combinations(tied, size):  # the tied responses yet to be placed
                total = torch.logaddexp(torch.logsumexp(columns(scores, left), dim=-1), rivals)
                orders = [scores[:, i] - total + log_f[tuple(j for j in left if j != i)] for i in left]
                log_f[left] = torch.logsumexp(torch.stack(orders), dim=0)
        loss = loss - log_f[tuple(tied)]
    return loss


def columns(x: Shaped[Tensor, "B K"], which: Sequence[int]) -> Shaped[Tensor, "B k"]:
    """Some columns; a list as an index would have a GPU waited for."""
    return x.index_select(1, upload(torch.tensor(which), x.device))


def centring_loss(scores: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """(Σ_k r_k)²: pulls the scores of a prompt's responses towards mean 0.

    Comparisons leave a constant per prompt free; a policy trained on the scores would see it as noise.
    Source: Eisenstein et al. 2023, "Helping or Herding?", section 2 (K = 2).
    """
    return scores.sum(-1).square()


def best_nll(logps: Float[Tensor, "B K"], lengths: Int[Tensor, "B K"], ranks: Sequence[int]) -> Float[Tensor, " B"]:
    """-log π(y|x) / |y| of the best response, in nats a token: the mean over those that share rank 1, 0 if all do.

    A trunk that only has to sort responses forgets what it knew of language, and what it knew helps to sort them. This
    term beside the ranking's keeps it able to write the best response itself.

    Source: Yang et al. 2024, "Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs", section
    3.2 (their SFT regularisation). Differs: the plain mean over its tokens; their code wraps the sum in -log σ(β ·).

    Args:
        logps: (B, K) log-probs of whole responses, in nats, read for the best only.
        lengths: (B, K) their tokens.
        ranks: K ranks, 1 = best.
    """
    best = best_of(ranks)
    return -(columns(logps, best) / columns(lengths, best)).mean(-1) if best else logps.new_zeros(len(logps))


def best_of(ranks: Sequence[int]) -> list[int]:
    """Places of the responses that share rank 1; none if all do, for then nothing is known to be good."""
    return [k for k, rank in enumerate(ranks) if rank == min(ranks)] if len(set(ranks)) > 1 else []


# --- batches ----------------------------------------------------------------------------------------------------------


class Rankings(NamedTuple):
    """Some rankings in one batch, one a row, its prompt computed once; N = all their responses."""

    packed: Packed
    groups: list[tuple[Int[Tensor, "B K"], tuple[int, ...]]]  # which of the N, and the ranks these rankings share


class RankedExamples(NamedTuple):
    """One ranking, tokenised."""

    examples: list[Example]
    ranks: tuple[int, ...]


def tokenise(rankings: Sequence[Ranking], tokenizer: Tokenizer, context: int) -> tuple[list[RankedExamples], int]:
    """Token ids of rankings, best response first, and how many records had to be cut to the context."""
    made, cut_records = [], 0
    for ranking in rankings:
        order = sorted(range(len(ranking.ranks)), key=lambda k: ranking.ranks[k])
        ranks = tuple(ranking.ranks[k] for k in order)
        dense = {rank: i for i, rank in enumerate(sorted(set(ranks)), start=1)}  # 1, 3, 3 → 1, 2, 2
        if max(ranks.count(rank) for rank in ranks) > MAX_TIED:
            raise InputError(
                f"{ranking.source or 'a ranking'}: more than {MAX_TIED} responses are tied; break some ties"
            )
        pieces = [make_example(tokenizer, ranking.prompt, ranking.responses[k], context) for k in order]
        made.append(RankedExamples([example for example, _ in pieces], tuple(dense[rank] for rank in ranks)))
        cut_records += any(cut for _, cut in pieces)
    return made, cut_records


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


def scores_and_logps(
    model: ScalarModel, batch: Rankings, kernel: str = "auto"
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The score of each response, and the trunk's log-prob of the best of each ranking (0 for the others)."""
    best = torch.zeros(len(batch.packed.ends), dtype=torch.bool)
    for rows, ranks in batch.groups:
        best[rows[:, best_of(ranks)]] = True
    packed = batch.packed.counting(best)
    at = torch.cat([packed.ends, packed.predictors])
    states = model.trunk(**packed_layout(model.trunk, packed), at=at)  # (N + M, D)
    at_ends, before_targets = states.tensor_split([len(packed.ends)])
    return model.head(at_ends), packed_logps(model.trunk, before_targets, packed, kernel)


def pair_accuracy(model: ScalarModel, batches: Sequence[Rankings]) -> float:
    """Share of strictly ordered pairs that the scores order as the annotators did; equal scores count half.

    NaN where no pair is strictly ordered.
    """
    right = total = 0.0
    with torch.no_grad():
        for batch in batches:
            scores = score_batch(model, batch).float().cpu()
            for rows, ranks in batch.groups:
                for better, worse in combinations(range(len(ranks)), 2):
                    if ranks[better] != ranks[worse]:
                        lead = scores[rows[:, better]] - scores[rows[:, worse]]
                        right += float((lead > 0).sum() + 0.5 * (lead == 0).sum())
                        total += len(rows)
    return right / total if total else math.nan


# --- the loop ---------------------------------------------------------------------------------------------------------


def batches(
    train_rankings: Sequence[Ranking],
    held_out: Sequence[Ranking],
    tokenizer: Tokenizer,
    context: int,
    config: RewardModelConfig,
    seed: int,
) -> tuple[Callable[[int], list[Rankings]], list[Rankings]]:
    """What to train on: the microbatches of a step as a pure function of the step, and the held-out batches."""
    if all(len(set(ranking.ranks)) == 1 for ranking in train_rankings):
        where = train_rankings[0].source.rpartition(":")[0] if train_rankings else ""
        raise InputError(f"{where or 'the rankings'}: all responses are tied; add some that are better than others")
    ranked, cut = tokenise(train_rankings, tokenizer, context)
    rest, cut_rest = tokenise(held_out, tokenizer, context)
    if cut + cut_rest:
        total = len(ranked) + len(rest)
        console.print(f"{cut + cut_rest:,} of {total:,} records were longer than {context} tokens and were cut")
    size = config.microbatch_size or config.batch_size

    def batch_at(step: int) -> list[Rankings]:
        # A batch is drawn whatever the lengths, and sorted inside: batches of only long or only short rankings cost
        # about 1.5 points of held-out accuracy on the help desk.
        drawn = batch_indices([0] * len(ranked), config.batch_size, seed, step)
        chosen = sorted((ranked[i] for i in drawn), key=lambda one: packed_length(one.examples))
        return [collate_rankings(chosen[i : i + size], tokenizer.eot) for i in range(0, len(chosen), size)]

    rest.sort(key=lambda one: packed_length(one.examples))
    return batch_at, [collate_rankings(rest[i : i + size], tokenizer.eot) for i in range(0, len(rest), size)]


def train(
    model: ScalarModel,
    batch_at: Callable[[int], list[Rankings]],
    held_out: Sequence[Rankings],
    config: RewardModelConfig,
    run: Run,
    *,
    dtype: str = "fp32",
    kernel: str = "auto",
) -> dict[str, float]:
    """Train `model` in place; return the last step's metrics.

    `loss` is that of the rankings alone, in nats a ranking; what is minimised is loss + sft_coef · best_nll.
    """
    device = model.score.weight.device
    optimizer = adamw(model, config.lr, config.weight_decay)
    start = run.restore(model=model, optimizer=optimizer)
    metrics: dict[str, float] = {}

    for step in run.range(start):
        pieces = batch_at(step)
        rankings = sum(len(rows) for piece in pieces for rows, _ in piece.groups)
        lr = cosine_lr(step, config.steps, config.lr, config.warmup_steps)
        set_lr(optimizer, lr)

        totals = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("loss", "best_nll", "right")}
        pairs = 0
        for piece in pieces:
            logps = lengths = None
            with autocast(device, dtype):
                if config.sft_coef:
                    scores, logps = scores_and_logps(model, piece, kernel)
                    lengths = upload(piece.packed.lengths, device)
                else:
                    scores = score_batch(model, piece)
            scores = scores.float()  # (N,)
            piece_loss, piece_nll = scores.new_zeros(()), scores.new_zeros(())
            for rows, ranks in piece.groups:
                rows = upload(rows, device)
                ours = scores[rows]  # (B, K)
                piece_loss = piece_loss + ranking_loss(ours, ranks, config.margin).sum()
                piece_loss = piece_loss + config.centring * centring_loss(ours).sum()
                if logps is not None:
                    piece_nll = piece_nll + best_nll(logps[rows], lengths[rows], ranks).sum()
                if ranks[0] != ranks[-1]:
                    totals["right"] += (ours[:, 0] > ours[:, -1]).sum()
                    pairs += len(rows)
            ((piece_loss + config.sft_coef * piece_nll) / rankings).backward()
            totals["loss"] += piece_loss.detach().double() / rankings
            totals["best_nll"] += piece_nll.detach().double() / rankings
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        seen = read({**totals, "grad_norm": grad_norm})
        run.require_finite(step, loss=seen["loss"], best_nll=seen["best_nll"], gradient=seen["grad_norm"])
        optimizer.step()
        optimizer.zero_grad()

        metrics = {"loss": seen["loss"], "best_over_worst": seen["right"] / max(1, pairs)}
        metrics |= {"grad_norm": seen["grad_norm"], "lr": lr}
        if config.sft_coef:
            metrics["best_nll"] = seen["best_nll"]
        if held_out and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
            metrics["held_out_accuracy"] = pair_accuracy(model, held_out)
        run.log(step, metrics, show=("loss", "best_over_worst", "held_out_accuracy"))
        run.checkpoint(step + 1, model=model, optimizer=optimizer)
    return metrics
