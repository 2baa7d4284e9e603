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
from itertools import accumulate, combinations
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf import InputError, fits
from minirlhf.data import Example, Packed, Ranking, batch_indices, make_example, pack, packed_length, upload
from minirlhf.model import GPT, adamw, packed_layout, packed_logps
from minirlhf.runs import Run, autocast, check_at_least, check_positive, check_share, console, cosine_lr, read, set_lr
from minirlhf.tokenizer import Tokenizer

Loss = Literal["sigmoid", "ipo", "hinge"]


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
    """Weight of the cross-entropy of the chosen response, in nats a token, in pairs where it is the best of its record:
    it holds that response's log-prob up."""
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


# --- equations --------------------------------------------------------------------------------------------------------


def preference_loss(
    chosen_logps: Float[Tensor, " B"],
    rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    beta: float,
    loss: Loss = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """How far the policy's log-ratios are from ordering each pair as people did.

        h = [log π(y_w) - log π_ref(y_w)] - [log π(y_l) - log π_ref(y_l)]

        sigmoid   -(1-ε) log σ(β h) - ε log σ(-β h)    a share ε of the labels is taken to be flipped
        ipo       (h - 1/(2β))²                        a bounded aim: it does not push certain pairs to infinity
        hinge     max(0, 1 - β h)

    At π = π_ref, h = 0 and the sigmoid loss is ln 2.

    Source: Rafailov et al. 2023, eq. 7; Mitchell 2023, "A note on DPO with noisy preferences" (cDPO, ε); Azar et al.
    2023, eq. 17 (IPO); Zhao et al. 2023, SLiC-HF (hinge).

    Args:
        chosen_logps, rejected_logps: (B,) policy's log-probs summed over the response, in nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the reference's.
        beta: price of a nat of KL.
        loss: which.
        label_smoothing: ε, for the sigmoid loss.

    Returns:
        (B,)
    """
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    if loss == "sigmoid":
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    if loss == "ipo":
        return (h - 1 / (2 * beta)).square()
    return torch.relu(1 - beta * h)


def chosen_nll(chosen_logps: Float[Tensor, " B"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """-log π(y_w|x) / |y_w|: the chosen response's cross-entropy, in nats a token.

    Source: Pang et al. 2024, section 2 (the second term of their loss).

    Args:
        chosen_logps: (B,) summed over the response, in nats.
        lengths: (B,) tokens of the response.
    """
    return -chosen_logps / lengths


def response_logps(model: GPT, packed: Packed, average: bool = False, kernel: str = "auto") -> Float[Tensor, " N"]:
    """log π(y|x) of N packed responses, in nats; with `average`, nats a token."""
    states = model(**packed_layout(model, packed), at=packed.predictors)  # (M, D)
    total = packed_logps(model, states, packed, kernel=kernel)
    return total / upload(packed.lengths, total.device) if average else total


# --- batches ----------------------------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """One record, tokenised: the responses to a prompt, and which of them is preferred to which."""

    examples: list[Example]
    pairs: list[tuple[int, int]]  # (chosen, rejected)


class Comparisons(NamedTuple):
    """Some records in one batch, one a row: each response is computed once, whatever the pairs it stands in."""

    packed: Packed  # N responses
    index: list[int]  # which response of the data each is, for the reference's cached log-probs
    chosen: Int[Tensor, " P"]  # of each pair, its place among the N
    rejected: Int[Tensor, " P"]
    best: Bool[Tensor, " P"]  # whether nothing in the record is preferred to the chosen one


def pairs_of(ranks: Sequence[int], which: Literal["all", "best"] = "all") -> list[tuple[int, int]]:
    """(chosen, rejected) of a ranking: all its strictly ordered pairs, or the best against each worse one.

    Ties make no pair.
    """
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i, j in combinations(range(len(ranks)), 2)
        if ranks[i] != ranks[j] and (which == "all" or min(ranks) in (ranks[i], ranks[j]))
    ]


def tokenise(
    rankings: Sequence[Ranking], tokenizer: Tokenizer, context: int, which: Literal["all", "best"] = "all"
) -> tuple[list[Compared], int]:
    """Token ids and pairs of some rankings, and how many of these had to be cut to the context."""
    made, cut_records = [], 0
    for ranking in rankings:
        pieces = [make_example(tokenizer, ranking.prompt, response, context) for response in ranking.responses]
        made.append(Compared([example for example, _ in pieces], pairs_of(ranking.ranks, which)))
        cut_records += any(cut for _, cut in pieces)
    return made, cut_records


class PreferenceData(NamedTuple):
    """Records to train on, with the reference's log-probs."""

    records: list[Compared]
    starts: list[int]  # of each record, the place of its first response in `ref_logps`
    ref_logps: Float[Tensor, " responses"]  # summed over the response


def collate_records(data: PreferenceData, index: Sequence[int], fill: int) -> Comparisons:
    """Records of the data in one right-padded batch."""
    records, responses, pairs = [data.records[i] for i in index], [], []
    for i, record in zip(index, records):
        pairs += [(len(responses) + better, len(responses) + worse) for better, worse in record.pairs]
        responses += range(data.starts[i], data.starts[i] + len(record.examples))
    chosen, rejected = torch.tensor(pairs).unbind(-1)
    best = ~torch.isin(chosen, rejected)
    return Comparisons(pack([record.examples for record in records], fill), responses, chosen, rejected, best)


def with_reference(
    ref: GPT, records: list[Compared], fill: int, batch_size: int, average: bool, dtype: str, kernel: str
) -> PreferenceData:
    """Run the reference once over all responses; it never changes, so its log-probs are kept."""
    starts = list(accumulate((len(record.examples) for record in records), initial=0))
    data = PreferenceData(records, starts[:-1], torch.zeros(starts[-1], dtype=ref.wte.weight.dtype))
    for index in by_length(records, batch_size):
        batch = collate_records(data, index, fill)
        with torch.no_grad(), autocast(ref.wte.weight.device, dtype):
            data.ref_logps[batch.index] = response_logps(ref, batch.packed, average, kernel).cpu()
    return data


def by_length(records: Sequence[Compared], batch_size: int) -> list[list[int]]:
    """Places of the records, in batches of about equal length."""
    order = sorted(range(len(records)), key=lambda i: packed_length(records[i].examples))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


# --- the loop ---------------------------------------------------------------------------------------------------------


def pair_metrics(
    model: GPT, data: PreferenceData, batch: Comparisons, config: DPOConfig, kernel: str
) -> tuple[Float[Tensor, " P"], dict[str, Float[Tensor, " P"]]]:
    """What is minimised of each pair, and what people look at: its parts, rewards β·logratio, margins, accuracy."""
    device = model.wte.weight.device
    logps = response_logps(model, batch.packed, config.average, kernel)  # (N,)
    ref_logps = upload(data.ref_logps[batch.index], device)
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


def train(
    model: GPT,
    ref: GPT,
    train_rankings: Sequence[Ranking],
    held_out: Sequence[Ranking],
    tokenizer: Tokenizer,
    config: DPOConfig,
    run: Run,
    *,
    seed: int,
    dtype: str = "fp32",
    kernel: str = "auto",
) -> dict[str, float]:
    """Train `model` in place on every strictly ordered pair; return the last step's metrics."""
    device = model.wte.weight.device
    context, size = model.config.n_positions, config.microbatch_size or config.batch_size
    rankings = [ranking for ranking in train_rankings if len(set(ranking.ranks)) > 1]
    held_out = [ranking for ranking in held_out if len(set(ranking.ranks)) > 1]
    if not rankings:
        where = train_rankings[0].source.rpartition(":")[0] if train_rankings else ""
        raise InputError(f"{where or 'the rankings'}: all responses are tied; add some that are better than others")

    def drawn(step: int) -> list[int]:
        """Which records a step sees: any lengths, since batches of only long or only short responses pull one way."""
        return batch_indices([0] * len(rankings), config.batch_size, seed, step)

    # Only the records that this run will see are tokenised and read by the reference.
    seen = sorted({i for step in range(config.steps) for i in drawn(step)})
    place = {record: position for position, record in enumerate(seen)}
    records, cut = tokenise([rankings[i] for i in seen], tokenizer, context, config.pairs)
    rest, cut_rest = tokenise(held_out, tokenizer, context)
    n_pairs = sum(len(record.pairs) for record in records)
    console.print(
        f"{len(rankings):,} records with a preference, of which this run sees {len(seen):,} ({n_pairs:,} pairs); "
        f"{len(rest):,} held out"
    )
    if cut + cut_rest:
        console.print(f"{cut + cut_rest:,} of these were longer than {context} tokens and were cut")
    data = with_reference(ref, records, tokenizer.eot, size, config.average, dtype, kernel)
    rest_data = with_reference(ref, rest, tokenizer.eot, size, config.average, dtype, kernel)
    some = [[place[i] for i in drawn(step)] for step in range(0, config.steps, max(1, config.steps // 16))]
    say_fit(model, ref, records, some, size, dtype, kernel)
    optimizer = adamw(model, config.lr, config.weight_decay)
    start = run.restore(model=model, optimizer=optimizer)
    metrics: dict[str, float] = {}

    for step in run.range(start):
        lr = cosine_lr(step, config.steps, config.lr, config.warmup_steps)
        set_lr(optimizer, lr)
        chosen = [place[i] for i in drawn(step)]
        pairs = sum(len(records[i].pairs) for i in chosen)
        totals: dict[str, Tensor] = {}
        for index in by_length([records[i] for i in chosen], size):
            batch = collate_records(data, [chosen[i] for i in index], tokenizer.eot)
            with autocast(device, dtype):
                losses, seen_now = pair_metrics(model, data, batch, config, kernel)
            (losses.sum() / pairs).backward()
            for name, values in seen_now.items():
                totals[name] = totals.get(name, 0.0) + values.sum().double() / pairs
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        metrics = read({**totals, "grad_norm": grad_norm})
        run.require_finite(step, loss=metrics["loss"], gradient=metrics["grad_norm"])
        optimizer.step()
        optimizer.zero_grad()

        metrics["lr"] = lr
        if rest and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
            with autocast(device, dtype):
                metrics |= held_out_metrics(model, rest_data, config, tokenizer.eot, size, kernel)
        run.log(step, metrics, show=("loss", "accuracy", "margin"))
        run.checkpoint(step + 1, model=model, optimizer=optimizer)
    return metrics


def say_fit(
    model: GPT, ref: GPT, records: Sequence[Compared], steps: list[list[int]], size: int, dtype: str, kernel: str
) -> None:
    """What the run will take, from the records of some of its steps."""
    shapes = []
    for chosen in ([records[i].examples for i in step] for step in steps):
        chosen.sort(key=packed_length)
        for rows in (chosen[i : i + size] for i in range(0, len(chosen), size)):
            responses = sum(len(example.tokens) - example.start for row in rows for example in row)
            shapes.append(fits.Shape(len(rows), max(map(packed_length, rows)), responses))
    tokens = sum(shape.rows * shape.width for shape in shapes) // len(steps)
    fits.say(fits.estimate([model], [ref], shapes, tokens, dtype, kernel), max(s.rows * s.width for s in shapes))


def held_out_metrics(
    model: GPT, data: PreferenceData, config: DPOConfig, fill: int, batch_size: int, kernel: str
) -> dict[str, float]:
    """Loss and accuracy on pairs never trained on."""
    totals = {"loss": 0.0, "accuracy": 0.0}
    pairs = sum(len(record.pairs) for record in data.records)
    for index in by_length(data.records, batch_size):
        with torch.no_grad():
            _, seen = pair_metrics(model, data, collate_records(data, index, fill), config, kernel)
        for name in totals:
            totals[name] = totals[name] + seen[name].sum().double() / pairs
    return {f"held_out_{name}": value for name, value in read(totals).items()}
