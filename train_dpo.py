"""Learn from preferences directly with DPO: no reward model, no sampling.

    python train_dpo.py                                                the embedded help desk
    python train_dpo.py --data pairs.jsonl --init runs/mine --out runs/mine-dpo --beta 0.1

Records: as for train_rm.py, except labelled texts; a ranking gives all its strictly ordered pairs.
"""

from dataclasses import dataclass
from pathlib import Path

from minirlhf.algorithms.dpo import DPOConfig, batches, train
from minirlhf.checks import check_at_least
from minirlhf.commands.prompts import show_responses
from minirlhf.data import helpdesk
from minirlhf.data.records import Ranking, expect, read_records, split_held_out
from minirlhf.devices import pick_device
from minirlhf.model.gpt import clone
from minirlhf.run import Run, RunArgs, cli, console, ensure_run, load_run, prepare, say_fit


@dataclass(frozen=True)
class Args(RunArgs):
    """Direct preference optimisation."""

    out: Path = Path("runs/dpo")
    """The run's folder."""
    data: str = "helpdesk"
    """A file of records, or helpdesk (the embedded world's rankings)."""
    init: str = "runs/sft"
    """The policy to start from, which is also the reference: a run, or GPT-2 (a folder, gpt2, ORG/NAME)."""
    config: DPOConfig = DPOConfig()
    n: int = 5000
    """Rankings sampled from the embedded world."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, n=self.n)


def main(args: Args) -> None:
    """Data → policy and reference → one call → samples → save."""
    run = Run(args, "train_dpo.py", args.config.steps)
    if run.finished:
        return console.print(f"{args.out} is finished; nothing to resume")
    rankings, held_out = read_data(args)
    if args.init == "runs/sft" and args.data == "helpdesk":
        ensure_run(Path("runs/sft"), "train_sft.py", "--seed", str(args.seed))
    policy, tokenizer = load_run(args.init, device=pick_device(args.device))
    ref = clone(policy)
    policy.train()
    prepare(args, policy, ref)

    data = batches(rankings, held_out, tokenizer, ref, args.config, args.seed)
    say_fit([policy], [ref], data, args.config.steps)
    metrics = train(policy, data, args.config, run)
    if "held_out_accuracy" in metrics:
        console.print(f"  held-out accuracy {metrics['held_out_accuracy']:.3f}, loss {metrics['held_out_loss']:.3f}")

    show_responses(run, policy, tokenizer, [r.prompt for r in held_out], args.config.steps, args.seed)
    run.finish(policy, tokenizer)


def read_data(args: Args) -> tuple[list[Ranking], list[Ranking]]:
    """Rankings to train on and rankings held out, which share no prompt."""
    if args.data == "helpdesk":
        return helpdesk.rankings(args.n, args.seed), helpdesk.rankings(100, args.seed, held_out=True)
    records = expect(read_records(args.data), (Ranking,), args.data, "train_dpo.py")
    return split_held_out(records, args.config.held_out, args.seed)


if __name__ == "__main__":
    cli(main, Args)
