"""DPO: learn from preferences directly, without a reward model and without sampling.

The KL-regularised optimum is π*(y|x) ∝ π_ref(y|x) e^{r(x,y)/β}. Solved for the reward, r = β log π*/π_ref + const(x),
and put into Bradley & Terry's model of preferences, it turns the policy itself into the reward model:

    L = -log σ( β [log π(y_w|x)/π_ref(y_w|x) - log π(y_l|x)/π_ref(y_l|x)] )

Why do the log-probs of chosen *and* rejected responses fall? The loss sees their difference only. Chosen and rejected
responses share most of their words, so that pushing the rejected one down drags the chosen one along, and nothing in
the loss pulls either back up; the probability goes to responses that stand in no pair. A little of it is expected. A
chosen log-prob that keeps falling while the accuracy stands still means that β is too small or training too long.

Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; the fall of both log-probs: Pal et al. 2024,
"Smaug", section 3; Razin et al. 2024, "Unintentional Unalignment".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.data import Example, Ranking, batch_indices, collate, make_example
from minirlhf.model import GPT, adamw, response_stats, scatter_counted
from minirlhf.runs import Run, autocast, check_at_least, check_positive, check_share, console, cosine_lr, set_lr
from minirlhf.tokenizer import Tokenizer

Loss = Literal["sigmoid", "ipo", "hinge"]


@dataclass(frozen=True)
class DPOConfig:
    """How to run DPO."""

    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 32
    """Pairs a step."""
    microbatch_size: int = 16
    """Pairs in memory at a time; gradients accumulate to those of the whole batch. 0 = the whole batch."""
    lr: float = 1.5e-4
    """Peak learning rate."""
    warmup_steps: int = 10
    """Steps until the peak; from there half a cosine down to a tenth."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    beta: float = 0.2
    """β, the price of a nat of KL: smaller moves further from the reference."""
    loss: Loss = "sigmoid"
    """sigmoid (DPO), ipo or hinge."""
    pairs: Literal["all", "best"] = "all"
    """Of a ranking: all its strictly ordered pairs, or the best response against each worse one."""
    label_smoothing: float | None = None
    """The share of labels taken to be wrong (cDPO). For sigmoid, which alone knows of it, 0.1 unless another is given:
    people disagree, and 0 would trust every one of them."""
    average: bool = False
    """Average log-probs over the response's tokens instead of summing them (for IPO)."""
    held_out: float = 0.05
    """Share of the records kept for the held-out accuracy."""
    eval_every: int = 100
    """Steps between held-out accuracies."""

    def __post_init__(self):
        check_at_least(1, steps=self.steps, batch_size=self.batch_size, eval_every=self.eval_every)
        check_at_least(0, microbatch_size=self.microbatch_size, warmup_steps=self.warmup_steps)
        check_at_least(0, weight_decay=self.weight_decay)
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


def sequence_logps(
    model: GPT, tokens: Int[Tensor, "B T"], counted: Bool[Tensor, "B T"], average: bool = False, kernel: str = "auto"
) -> Float[Tensor, " B"]:
    """log π(y|x) = Σ_t log π(y_t|x, y_<t): (B, T) -> (B,), in nats; with `average`, nats a token."""
    logprobs = scatter_counted(response_stats(model, tokens, counted, kernel=kernel).logprobs, counted[:, 1:])
    total = logprobs.sum(-1)
    return total / counted[:, 1:].sum(-1) if average else total


# --- batches ----------------------------------------------------------------------------------------------------------


class PairExamples(NamedTuple):
    """One preference, tokenised; both share their prompt."""

    chosen: Example
    rejected: Example


def pair_length(pair: PairExamples) -> int:
    """Tokens of the longer one: what a row of the pair's batch costs."""
    return max(len(pair.chosen.tokens), len(pair.rejected.tokens))


class Pairs(NamedTuple):
    """B pairs in one batch of 2B rows, so that one forward pass serves both: the chosen, then the rejected."""

    tokens: Int[Tensor, "B2 T"]
    counted: Bool[Tensor, "B2 T"]
    index: list[int]  # which pair of the data each is, for the reference's cached log-probs


def pairs_of(rankings: Sequence[Ranking], which: Literal["all", "best"] = "all") -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of some rankings: all strictly ordered pairs, or the best against each worse one.

    Ties make no pair.
    """
    return [
        (r.prompt, *((r.responses[i], r.responses[j]) if r.ranks[i] < r.ranks[j] else (r.responses[j], r.responses[i])))
        for r in rankings
        for i, j in combinations(range(len(r.ranks)), 2)
        if r.ranks[i] != r.ranks[j] and (which == "all" or min(r.ranks) in (r.ranks[i], r.ranks[j]))
    ]


def tokenise(
    pairs: Sequence[tuple[str, str, str]], tokenizer: Tokenizer, context: int
) -> tuple[list[PairExamples], int]:
    """Token ids of (prompt, chosen, rejected), and how many had to be cut to the context."""
    made, cut_pairs = [], 0
    for prompt, *responses in pairs:
        (chosen, cut), (rejected, cut_too) = (make_example(tokenizer, prompt, r, context) for r in responses)
        made.append(PairExamples(chosen, rejected))
        cut_pairs += cut or cut_too
    return made, cut_pairs


def collate_pairs(pairs: Sequence[PairExamples], index: Sequence[int], fill: int) -> Pairs:
    """Chosen above rejected, right-padded."""
    batch = collate([p.chosen for p in pairs] + [p.rejected for p in pairs], fill)
    return Pairs(batch.tokens, batch.response_mask, list(index))


class PairData(NamedTuple):
    """Pairs to train on, with the reference's log-probs."""

    examples: list[PairExamples]
    ref_logps: Float[Tensor, "pairs 2"]  # of chosen and rejected, summed over the response


def with_reference(
    ref: GPT, examples: list[PairExamples], fill: int, batch_size: int, average: bool, dtype: str, kernel: str
) -> PairData:
    """Run the reference once over all pairs; it never changes, so its log-probs are kept."""
    device = ref.wte.weight.device
    order = sorted(range(len(examples)), key=lambda i: pair_length(examples[i]))
    logps = torch.zeros(len(examples), 2)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = collate_pairs([examples[i] for i in index], index, fill)
        with torch.no_grad(), autocast(device, dtype):
            both = sequence_logps(ref, batch.tokens.to(device), batch.counted.to(device), average, kernel)
        logps[index] = both.float().cpu().view(2, -1).t()
    return PairData(examples, logps)


# --- the loop ---------------------------------------------------------------------------------------------------------


def pair_metrics(
    model: GPT, data: PairData, batch: Pairs, config: DPOConfig, kernel: str
) -> tuple[Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]:
    """The loss of each pair, and what people look at: rewards β·logratio, margins, accuracy, log-probs apart."""
    device = model.wte.weight.device
    both = sequence_logps(model, batch.tokens.to(device), batch.counted.to(device), config.average, kernel).float()
    chosen, rejected = both.chunk(2)  # (B,)
    ref_chosen, ref_rejected = data.ref_logps[batch.index].to(device).unbind(1)
    losses = preference_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.loss, config.smoothing)
    chosen_reward, rejected_reward = config.beta * (chosen - ref_chosen), config.beta * (rejected - ref_rejected)
    margin = (chosen_reward - rejected_reward).detach()
    return losses, {
        "loss": losses.detach(),
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
    pairs, held_out_pairs = pairs_of(train_rankings, config.pairs), pairs_of(held_out)
    if not pairs:
        where = train_rankings[0].source.rpartition(":")[0] if train_rankings else ""
        raise InputError(f"{where or 'the rankings'}: all responses are tied; add some that are better than others")

    def drawn(step: int) -> list[int]:
        """Which pairs a step sees: any lengths, since batches of only long or only short responses pull one way."""
        return batch_indices([0] * len(pairs), config.batch_size, seed, step)

    # Only the pairs that this run will see are tokenised and read by the reference.
    seen = sorted({i for step in range(config.steps) for i in drawn(step)})
    place = {pair: position for position, pair in enumerate(seen)}
    examples, cut = tokenise([pairs[i] for i in seen], tokenizer, context)
    rest, cut_rest = tokenise(held_out_pairs, tokenizer, context)
    console.print(f"{len(pairs):,} pairs, of which this run sees {len(seen):,}; {len(rest):,} held out")
    if cut + cut_rest:
        console.print(f"{cut + cut_rest:,} of these were longer than {context} tokens and were cut")
    data = with_reference(ref, examples, tokenizer.eot, size, config.average, dtype, kernel)
    rest_data = with_reference(ref, rest, tokenizer.eot, size, config.average, dtype, kernel)
    optimizer = adamw(model, config.lr, config.weight_decay)
    start = run.restore(model=model, optimizer=optimizer)
    metrics: dict[str, float] = {}

    for step in run.range(start):
        lr = cosine_lr(step, config.steps, config.lr, config.warmup_steps)
        set_lr(optimizer, lr)
        chosen = sorted((place[i] for i in drawn(step)), key=lambda i: pair_length(examples[i]))
        metrics = {}
        for begin in range(0, len(chosen), size):
            index = chosen[begin : begin + size]
            batch = collate_pairs([data.examples[i] for i in index], index, tokenizer.eot)
            with autocast(device, dtype):
                losses, seen_now = pair_metrics(model, data, batch, config, kernel)
            (losses.sum() / len(chosen)).backward()
            for name, values in seen_now.items():
                metrics[name] = metrics.get(name, 0.0) + values.sum().item() / len(chosen)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        run.require_finite(step, loss=metrics["loss"], gradient=grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        metrics |= {"grad_norm": float(grad_norm), "lr": lr}
        if rest and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
            with autocast(device, dtype):
                metrics |= held_out_metrics(model, rest_data, config, tokenizer.eot, size, kernel)
        run.log(step, metrics, show=("loss", "accuracy", "margin"))
        run.checkpoint(step + 1, model=model, optimizer=optimizer)
    return metrics


def held_out_metrics(
    model: GPT, data: PairData, config: DPOConfig, fill: int, batch_size: int, kernel: str
) -> dict[str, float]:
    """Loss and accuracy on pairs never trained on."""
    order = sorted(range(len(data.examples)), key=lambda i: pair_length(data.examples[i]))
    totals = {"loss": 0.0, "accuracy": 0.0}
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = collate_pairs([data.examples[i] for i in index], index, fill)
        with torch.no_grad():
            _, seen = pair_metrics(model, data, batch, config, kernel)
        for name in totals:
            totals[name] += seen[name].sum().item() / len(order)
    return {f"held_out_{name}": value for name, value in totals.items()}
