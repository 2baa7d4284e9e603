"""Pre-train a small GPT on text, or fine-tune one on demonstrations.

    python train_sft.py                                                   the embedded help desk
    python train_sft.py --data book.txt --out runs/book                   pre-train on your text
    python train_sft.py --data mine.jsonl --init runs/book --out runs/mine    then fine-tune on your demonstrations
    python train_sft.py --data mine.jsonl --init gpt2 --out runs/mine     or fine-tune OpenAI's GPT-2 on them

Records: {"text"} counts every token, {"prompt", "response"} and {"messages"} count the response; of rankings and pairs,
the best response is learnt.
"""

from dataclasses import dataclass
from pathlib import Path

from minirlhf.algorithms.sft import SFTConfig, batches, train
from minirlhf.checks import check_at_least
from minirlhf.commands.prompts import show_responses
from minirlhf.data import helpdesk
from minirlhf.data.records import Demonstration, Ranking, Text, best_demonstrations, read_one_kind
from minirlhf.data.tokenizer import tokenizer_named
from minirlhf.devices import pick_device
from minirlhf.model.gpt import GPT, GPTConfig, init_weights
from minirlhf.run import Run, RunArgs, cli, console, ensure_run, load_run, prepare, say_fit


@dataclass(frozen=True)
class Args(RunArgs):
    """Next-token training: pre-training and supervised fine-tuning."""

    out: Path = Path("runs/sft")
    """The run's folder."""
    data: str = "helpdesk"
    """A file of records; helpdesk (the embedded world's demonstrations) or helpdesk:corpus (its plain text)."""
    init: str | None = None
    """Start from this run, any folder in Hugging Face's GPT-2 format, or a model of their hub: gpt2, gpt2-medium,
    gpt2-large, gpt2-xl, distilgpt2 or ORG/NAME. Without it: fresh weights; for helpdesk, runs/pretrain."""
    config: SFTConfig = SFTConfig()
    n: int = 8000
    """Records sampled from the embedded world."""
    tokenizer: str = "train"
    """For fresh weights: train (on the data), gpt2, or a folder with a tokenizer.json."""
    vocab_size: int = 1024
    """For a trained tokenizer: ids, 256 bytes and end-of-text included."""
    n_positions: int = 128
    """For fresh weights: the context in tokens."""
    n_layer: int = 3
    """For fresh weights: blocks."""
    n_head: int = 6
    """For fresh weights: attention heads."""
    n_embd: int = 96
    """For fresh weights: width."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, n=self.n)


def main(args: Args) -> None:
    """Data → model → one call → samples → save."""
    run = Run(args, "train_sft.py", args.config.steps)
    if run.finished:
        return console.print(f"{args.out} is finished; nothing to resume")
    device = pick_device(args.device)
    records = read_data(args)
    init = args.init
    if init is None and args.data == "helpdesk":
        init = ensure_run(Path("runs/pretrain"), "train_sft.py", "--data", "helpdesk:corpus", "--out", "runs/pretrain",
                          "--lr", "4e-3", "--seed", str(args.seed))  # fmt: skip
    if init is not None:
        model, tokenizer = load_run(init, device=device)
    else:
        texts = (r.text if isinstance(r, Text) else r.prompt + r.response for r in records)
        tokenizer = tokenizer_named(args.tokenizer, texts, args.vocab_size)
        model = GPT(GPTConfig(tokenizer.vocab_size, args.n_positions, args.n_layer, args.n_head, args.n_embd))
        init_weights(model, args.seed)
        model.to(device)
    model.train()

    data = batches(records, tokenizer, model.config.n_positions, args.config, args.seed)
    console.print(f"{len(records):,} records of {args.data}")
    prepare(args, model)
    say_fit([model], [], data, args.config.steps)
    metrics = train(model, data, args.config, run)
    if "held_out_loss" in metrics:
        loss, perplexity = metrics["held_out_loss"], metrics["perplexity"]
        console.print(f"  held-out loss {loss:.3f} nats per token, perplexity {perplexity:.2f}")
    prompts = [r.prompt for r in records] if isinstance(records[0], Demonstration) else [""]
    show_responses(run, model, tokenizer, prompts, args.config.steps, args.seed)
    run.finish(model, tokenizer)


def read_data(args: Args) -> list[Text] | list[Demonstration]:
    """Records of one kind: texts, or demonstrations."""
    if args.data == "helpdesk":
        return helpdesk.demonstrations(args.n, args.seed)
    if args.data == "helpdesk:corpus":
        return [Text(text) for text in helpdesk.corpus(args.n, args.seed)]
    records = read_one_kind(args.data, (Text, Demonstration, Ranking), "train_sft.py")
    return best_demonstrations(records) if isinstance(records[0], Ranking) else records


if __name__ == "__main__":
    cli(main, Args)
