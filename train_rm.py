"""Train a reward model from rankings, pairs or labelled texts.

    python train_rm.py                                                the embedded help desk
    python train_rm.py --data pairs.jsonl --init runs/mine --out runs/mine-rm

Records: {"prompt", "responses", "ranking"}, {"prompt", "chosen", "rejected"}, whole {"chosen", "rejected"} transcripts,
or {"text", "label"} (every text labelled 1 is preferred to every text labelled 0).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minirlhf import fits, helpdesk
from minirlhf.data import Ranking, Text, expect, labelled_pairs, read_records, split_held_out
from minirlhf.model import ScalarModel, init_head
from minirlhf.reward_model import Rankings, RewardModelConfig, batches, train
from minirlhf.runs import Run, RunArgs, check_at_least, cli, console, ensure_run, load_run, pick_device, prepare, seeded


@dataclass(frozen=True)
class Args(RunArgs):
    """Learn a reward model from what people prefer."""

    out: Path = Path("runs/rm")
    """The run's folder."""
    data: str = "helpdesk"
    """A file of records, or helpdesk (the embedded world's rankings)."""
    init: str = "runs/sft"
    """The run, or GPT-2 (a folder, gpt2, ORG/NAME), whose trunk is trained on."""
    config: RewardModelConfig = RewardModelConfig()
    n: int = 6600
    """Rankings drawn from the embedded world; pairs drawn from labelled texts are twice the larger class."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, n=self.n)


def main(args: Args) -> None:
    """Data → model → one call → save."""
    run = Run(args, "train_rm.py", args.config.steps)
    if run.finished:
        return console.print(f"{args.out} is finished; nothing to resume")
    rankings, held_out = read_data(args)
    if args.init == "runs/sft" and args.data == "helpdesk":
        ensure_run(Path("runs/sft"), "train_sft.py", "--seed", str(args.seed))
    policy, tokenizer = load_run(args.init, device=pick_device(args.device))
    model = ScalarModel(policy.config, trunk=policy)
    init_head(model, seeded(args.seed))
    model.to(pick_device(args.device)).train()

    batch_at, held_out_batches = batches(
        rankings, held_out, tokenizer, model.config.n_positions, args.config, args.seed
    )
    console.print(f"{len(rankings):,} rankings of {args.data}, {len(held_out):,} held out")
    prepare(args, model)
    say_fit(args, model, batch_at)
    metrics = train(model, batch_at, held_out_batches, args.config, run, dtype=args.dtype, kernel=args.kernel)
    if metrics.get("held_out_accuracy", math.nan) >= 0:  # NaN: no pair held out is strictly ordered
        note = f"  held-out pair accuracy {metrics['held_out_accuracy']:.3f}"
        if args.data == "helpdesk":
            note += f"; a perfect judge, given the annotators' noise: {helpdesk.noise_ceiling(held_out):.3f}"
        console.print(note)
    run.finish(model, tokenizer)


def say_fit(args: Args, model: ScalarModel, batch_at: Callable[[int], list[Rankings]]) -> None:
    """What the run will take, from some of its batches."""
    steps = range(0, args.config.steps, max(1, args.config.steps // 16))
    pieces = [piece.packed for step in steps for piece in batch_at(step)]
    head = bool(args.config.sft_coef)  # at most every token of a response goes through it
    shapes = [fits.Shape(*packed.tokens.shape, head * len(packed.targets)) for packed in pieces]
    tokens = sum(packed.tokens.numel() for packed in pieces) // len(steps)
    fits.say(fits.estimate([model], [], shapes, tokens, args.dtype, args.kernel), max(s.rows * s.width for s in shapes))


def read_data(args: Args) -> tuple[list[Ranking], list[Ranking]]:
    """Rankings to train on and rankings held out, which share no prompt."""
    if args.data == "helpdesk":
        return helpdesk.rankings(args.n, args.seed), helpdesk.rankings(600, args.seed, held_out=True)
    records = read_records(args.data)
    expect(records, (type(records[0]),), args.data, "train_rm.py (which takes one kind of record at a time)")
    expect(records, (Ranking, Text), args.data, "train_rm.py")
    if isinstance(records[0], Text):
        labelled_pairs(records, args.seed, 1)  # names what lacks a label, and a label that does not occur
        by_label = ([record for record in records if record.label == label] for label in (1, 0))
        parts = [split_held_out(texts, args.config.held_out, args.seed) for texts in by_label]  # both have both labels
        kept, rest = ([*wanted, *unwanted] for wanted, unwanted in zip(*parts))
        n = 2 * max(len(own_kept) for own_kept, _ in parts)
        return labelled_pairs(kept, args.seed, n), labelled_pairs(rest, args.seed)
    return split_held_out(records, args.config.held_out, args.seed)


if __name__ == "__main__":
    cli(main, Args)
