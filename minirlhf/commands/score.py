"""Score a file: `python -m minirlhf.rewards runs/rm pairs.jsonl --out scores.jsonl`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from minirlhf.algorithms.reward_model import pair_accuracy
from minirlhf.algorithms.rewards import RewardModelScorer, load_reward, score
from minirlhf.checks import check_positive
from minirlhf.data.batches import make_example
from minirlhf.data.records import Demonstration, Ranking, Text, expect, read_records, write_records
from minirlhf.data.tokenizer import TokenText
from minirlhf.devices import pick_device


def label_accuracy(scores: Float[Tensor, " B"], labels: Sequence[int]) -> tuple[float, int]:
    """Share of all pairs of a text with label 1 and one with label 0 that the scores order right, ties counting half.

    This is the area under the ROC curve, and Mann and Whitney's U: from the ranks R of the scores, without a look at
    any pair, AUC = (Σ_{label 1} R_i - n₁(n₁ + 1) / 2) / (n₁ n₀).
    Source: Hanley & McNeil 1982, "The meaning and use of the area under a ROC curve".

    Returns:
        The share (NaN if one of the labels does not occur), and the number of pairs.
    """
    wanted = torch.tensor(labels) == 1
    n1, n0 = int(wanted.sum()), int((~wanted).sum())
    if not n1 or not n0:
        return float("nan"), 0
    _, group, size = scores.unique(return_inverse=True, return_counts=True)  # sorted; equal scores are one group
    ranks = (size.cumsum(0) - (size - 1) / 2.0).double()[group]  # 1 = lowest; equal scores share their mean rank
    return float((ranks[wanted].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)), n1 * n0


@dataclass(frozen=True)
class Args:
    """Score a file: one JSON object per line, {"score"}, or {"chosen", "rejected"} for a pair."""

    reward: Annotated[str, tyro.conf.Positional]
    """A folder of train_rm, gold, pkg.module:function, or hf:DIR."""
    file: Annotated[Path, tyro.conf.Positional]
    """Texts, prompts with responses, pairs or rankings."""
    out: Path | None = None
    """Write here instead of to the terminal."""
    batch_size: int = 64
    """Sequences scored at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self):
        check_positive(batch_size=self.batch_size)


def main(args: Args) -> None:
    """Read, score, write, and say how often the scores agree with the file."""
    records = expect(read_records(args.file), (Text, Demonstration, Ranking), args.file, "minirlhf.rewards")
    reward = load_reward(args.reward, pick_device(args.device), batch_size=args.batch_size)
    prompts, responses = [], []
    for record in records:
        own = _responses(record)
        prompts += [getattr(record, "prompt", "")] * len(own)
        responses += own
    notes = sys.stdout if args.out is not None else sys.stderr
    if isinstance(reward, RewardModelScorer):
        prompts, responses, cut = cut_to_context(reward, prompts, responses)
        if cut:
            context = reward.model.config.n_positions
            print(f"{cut} of {len(responses)} texts were cut to the context of {context} tokens", file=notes)

    flat = iter(score(reward, prompts, responses).tolist())
    scores = [[next(flat) for _ in _responses(record)] for record in records]
    rows = [_row(record, own) for record, own in zip(records, scores)]
    if args.out is not None:
        write_records(args.out, rows)
        print(f"{len(rows)} records scored in {args.out}", file=notes)
    else:
        for row in rows:
            print(json.dumps(row))

    ranked = [(own, record.ranks) for record, own in zip(records, scores) if isinstance(record, Ranking)]
    accuracy, pairs = pair_accuracy([own for own, _ in ranked], [ranks for _, ranks in ranked])
    if pairs:
        print(f"pair accuracy {accuracy:.4f} over {pairs} pairs", file=notes)
    labelled = [(own[0], r.label) for r, own in zip(records, scores) if isinstance(r, Text) and r.label is not None]
    accuracy, pairs = label_accuracy(torch.tensor([s for s, _ in labelled]), [label for _, label in labelled])
    if pairs:
        print(f"label accuracy {accuracy:.4f} over {pairs} pairs of a text with label 1 and one with 0", file=notes)


def _responses(record: Text | Demonstration | Ranking) -> list[str]:
    if isinstance(record, Ranking):
        return list(record.responses)
    return [record.text if isinstance(record, Text) else record.response]


def cut_to_context(
    reward: RewardModelScorer, prompts: list[str], responses: list[str]
) -> tuple[list[str], list[str], int]:
    """What the model is too short for, cut as its training data were; and how many that were."""
    made = [
        make_example(reward.tokenizer, prompt, response, reward.model.config.n_positions)
        for prompt, response in zip(prompts, responses)
    ]
    prompts = [TokenText(prompt, e.tokens[: e.start]) for prompt, (e, _) in zip(prompts, made)]
    responses = [TokenText(response, e.tokens[e.start :]) for response, (e, _) in zip(responses, made)]
    return prompts, responses, sum(cut for _, cut in made)


def _row(record: Text | Demonstration | Ranking, scores: list[float]) -> dict[str, Any]:
    if not isinstance(record, Ranking):
        return {"score": scores[0]}
    if len(scores) == 2 and record.ranks[0] != record.ranks[1]:
        chosen, rejected = sorted(zip(record.ranks, scores), key=lambda pair: pair[0])
        return {"chosen": chosen[1], "rejected": rejected[1]}
    return {"scores": scores}
