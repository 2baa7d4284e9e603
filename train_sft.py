"""Pre-train a small GPT on text, or fine-tune one on demonstrations.

    python train_sft.py                                                   the embedded help desk
    python train_sft.py --data book.txt --out runs/book                   pre-train on your text
    python train_sft.py --data mine.jsonl --init runs/book --out runs/mine    then fine-tune on your demonstrations
    python train_sft.py --data mine.jsonl --init gpt2 --out runs/mine     or fine-tune OpenAI's GPT-2 on them

Records: {"text"} counts every token, {"prompt", "response"} and {"messages"} count the response; of rankings and pairs,
the best response is learnt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minirlhf import fits, helpdesk
from minirlhf.data import Batch, Demonstration, Ranking, Text, expect, read_records
from minirlhf.generate import encode_prompt, sample_texts
from minirlhf.model import GPT, GPTConfig, init_weights
from minirlhf.runs import Run, RunArgs, check_at_least, cli, console, ensure_run, load_run, pick_device, prepare
from minirlhf.sft import SFTConfig, batches, counted, microbatches, train
from minirlhf.tokenizer import Tokenizer


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
    """Records drawn from the embedded world."""
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
    if args.init is None and args.data == "helpdesk":
        init = ensure_run(Path("runs/pretrain"), "train_sft.py", "--data", "helpdesk:corpus", "--out", "runs/pretrain",
                          "--lr", "4e-3", "--seed", str(args.seed))  # fmt: skip
    else:
        init = args.init
    if init is not None:
        model, tokenizer = load_run(init, device=device)
    else:
        tokenizer = make_tokenizer(args, records)
        model = GPT(GPTConfig(tokenizer.vocab_size, args.n_positions, args.n_layer, args.n_head, args.n_embd))
        init_weights(model, args.seed)
        model.to(device)
    model.train()

    batch_at, held_out = batches(records, tokenizer, model.config.n_positions, args.config, args.seed)
    console.print(f"{len(records):,} records of {args.data}")
    prepare(args, model)
    say_fit(args, model, batch_at)
    metrics = train(model, batch_at, held_out, args.config, run, dtype=args.dtype, kernel=args.kernel)
    if "held_out_loss" in metrics:
        console.print(
            f"  held-out loss {metrics['held_out_loss']:.3f} nats a token, perplexity {metrics['perplexity']:.2f}"
        )

    model.eval()
    if isinstance(records[0], Demonstration):
        prompts = list(dict.fromkeys(r.prompt for r in records))[:3]
        prompts = [p for p in prompts if len(encode_prompt(tokenizer, p)) + 48 <= model.config.n_positions]
    else:
        prompts = [""]
    drawn = sample_texts(
        model, tokenizer, prompts, min(48, model.config.n_positions - 1), args.seed, kernel=args.kernel
    )
    run.samples(args.config.steps, [{"prompt": p, "response": tokenizer.decode(r)} for p, r in zip(prompts, drawn)])
    run.finish(model, tokenizer)


def say_fit(args: Args, model: GPT, batch_at: Callable[[int], Batch]) -> None:
    """What the run will take, from some of its batches."""
    some = [batch_at(step) for step in range(0, args.config.steps, max(1, args.config.steps // 16))]
    shapes = [
        fits.Shape(*piece.tokens.shape, counted(piece))
        for batch in some
        for piece in microbatches(batch, args.config.microbatch_size)
    ]
    tokens = sum(batch.tokens.numel() for batch in some) // len(some)
    fits.say(fits.estimate([model], [], shapes, tokens, args.dtype, args.kernel), max(s.rows * s.width for s in shapes))


def read_data(args: Args) -> list[Text] | list[Demonstration]:
    """Records of one kind: texts, or demonstrations."""
    if args.data == "helpdesk":
        return helpdesk.demonstrations(args.n, args.seed)
    if args.data == "helpdesk:corpus":
        return [Text(text) for text in helpdesk.corpus(args.n, args.seed)]
    records = read_records(args.data)
    expect(records, (type(records[0]),), args.data, "train_sft.py (which takes one kind of record at a time)")
    expect(records, (Text, Demonstration, Ranking), args.data, "train_sft.py")
    if isinstance(records[0], Ranking):  # of what people compared, learn the response they liked best
        return [Demonstration(r.prompt, r.responses[r.ranks.index(min(r.ranks))], r.source) for r in records]
    return records


def make_tokenizer(args: Args, records: list) -> Tokenizer:
    """A tokenizer for fresh weights."""
    if args.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if args.tokenizer == "train":
        texts = (r.text if isinstance(r, Text) else r.prompt + r.response for r in records)
        return Tokenizer.train(texts, args.vocab_size)
    return Tokenizer.load(Path(args.tokenizer))


if __name__ == "__main__":
    cli(main, Args)
