"""Train a reward model from rankings, pairs or labelled texts.

    python train_rm.py                                                the embedded help desk
    python train_rm.py --data pairs.jsonl --init runs/mine --out runs/mine-rm

Records: {"prompt", "responses", "ranking"}, {"prompt", "chosen", "rejected"}, whole {"chosen", "rejected"} transcripts,
or {"text", "label"} (every text labelled 1 is preferred to every text labelled 0).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from minirlhf.algorithms.reward_model import RewardModelConfig, batches, train
from minirlhf.checks import check_at_least
from minirlhf.data import helpdesk
from minirlhf.data.records import Ranking, Text, labelled_pairs, read_one_kind, split_held_out
from minirlhf.devices import pick_device
from minirlhf.model.gpt import ScalarModel, init_head
from minirlhf.run import Run, RunArgs, cli, console, ensure_run, load_run, prepare, say_fit
from minirlhf.seeds import seeded


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
    """Rankings sampled from the embedded world; pairs made of labelled texts are twice the larger class."""

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

    data = batches(rankings, held_out, tokenizer, model.config.n_positions, args.config, args.seed)
    console.print(f"{len(rankings):,} rankings of {args.data}, {len(held_out):,} held out")
    prepare(args, model)
    say_fit([model], [], data, args.config.steps)
    metrics = train(model, data, args.config, run)
    if metrics.get("held_out_accuracy", math.nan) >= 0:  # NaN: no pair held out is strictly ordered
        note = f"  held-out pair accuracy {metrics['held_out_accuracy']:.3f}"
        if args.data == "helpdesk":
            note += f"; a perfect judge, given the annotators' noise: {helpdesk.noise_ceiling(held_out):.3f}"
        console.print(note)
    run.finish(model, tokenizer)


def read_data(args: Args) -> tuple[list[Ranking], list[Ranking]]:
    """Rankings to train on and rankings held out, which share no prompt."""
    if args.data == "helpdesk":
        return helpdesk.rankings(args.n, args.seed), helpdesk.rankings(600, args.seed, held_out=True)
    records = read_one_kind(args.data, (Ranking, Text), "train_rm.py")
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
