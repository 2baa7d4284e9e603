"""Sample responses from a run, on the command line.

python -m minirlhf.generate runs/ppo --prompt "Customer: My order hasn't arrived. What should I do?\\nAgent:"
python -m minirlhf.generate runs/ppo --prompts prompts.jsonl --out responses.jsonl
"""

import codecs
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minirlhf import InputError
from minirlhf.checks import check_positive
from minirlhf.data.records import Demonstration, expect, read_records, write_records
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.devices import pick_device
from minirlhf.model.beam import beam_search
from minirlhf.model.generate import Watch, encode_prompt, generate, sample
from minirlhf.model.gpt import GPT
from minirlhf.model.sampling import Sampling
from minirlhf.run.arguments import check_compiler, check_kernel
from minirlhf.run.folder import load_run


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def stop_watch(tokenizer: Tokenizer, stops: Sequence[str]) -> Watch:
    """Ends a response once its text holds one of these, whatever tokens it is spelled with."""
    spelled = [stop.encode() for stop in stops]  # bytes: half a character is not yet the sign for a broken one
    tail = max(map(len, spelled))  # a token has a byte or more: no stop string starts further back

    def watch(row: int, tokens: list[int]) -> bool:
        text = tokenizer.encoding.decode_bytes([token for token in tokens[-tail:] if token != tokenizer.eot])
        return any(stop in text for stop in spelled)

    return watch


class Stream:
    """Writes a response while it is drawn: whole characters, and nothing that may yet become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], write: Callable[[str], Any]):
        self.tokenizer, self.stops, self.write = tokenizer, stops, write
        self.characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # decoded and not written

    def __call__(self, row: int, tokens: list[int]) -> bool:
        if tokens[-1] != self.tokenizer.eot:
            new = self.tokenizer.encoding.decode_single_token_bytes(tokens[-1])
            self.held += self.characters.decode(new)
        before = cut_at(self.held, self.stops)
        stop = before != self.held
        if not stop:  # the longest end that begins a stop string is held back
            held = (n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n]))
            before = self.held[: len(self.held) - max(held, default=0)]
        self.write(before)
        self.held = "" if stop else self.held[len(before) :]
        if stop:
            self.characters.reset()
        return stop

    def end(self) -> None:
        """Write what was held back: no more tokens come."""
        self.write(self.held + self.characters.decode(b"", final=True))
        self.held = ""


@dataclass(frozen=True)
class Args:
    """Sample responses from a run; one JSON object {"prompt", "response"} a line."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run of train_sft, train_ppo or train_dpo, or any GPT-2: a folder, or a name of the hub (gpt2, ORG/NAME)."""
    sampling: Sampling = Sampling()
    prompt: str | None = None
    """One prompt; \\n stands for a new line."""
    prompts: Path | None = None
    """A file of records; the prompt of each is used."""
    few_shot: Path | None = None
    """Put this before every prompt: a .txt as it stands, or demonstrations, each with its response and a blank line."""
    out: Path | None = None
    """Write here instead of to the terminal."""
    stream: bool = False
    """Write the response to one prompt as plain text while it is drawn."""
    stop: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """End a response before this text, or the first of several; \\n stands for a new line."""
    beams: int | None = None
    """Search for the most likely responses with so many beams instead of sampling."""
    length_penalty: float | None = None
    """With --beams: log-probs are divided by length to this power, 1 by default; higher = longer responses."""
    returned: Annotated[int | None, tyro.conf.arg(name="return")] = None
    """With --beams: write this many of the best responses to each prompt, 1 by default."""
    max_new_tokens: int = 48
    """The longest response."""
    logprobs: bool = False
    """Add "logprobs", those of the tokens drawn, the end of the response or what it stopped at among them; with
    --beams "score", what the search maximises."""
    batch_size: int = 64
    """Prompts at a time; changes no response. But for rounding, where weights are not packed (a large model, a GPU,
    --compile, --kernel reference): in bf16 it tips a few in a hundred."""
    seed: int = 0
    """The same seed gives the same responses."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products."""
    compile: bool = False
    """On a CPU, compile the steps with torch.compile: a minute or two at the start, which only long jobs earn back. On
    a GPU they are captured anyway."""
    kernel: str = "auto"
    """Which token_stats: fused (compiled at first use), reference (plain PyTorch) or auto (fused where it can be)."""

    def __post_init__(self):
        check_positive(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        check_kernel(self.kernel, self.device)
        if self.compile:
            check_compiler("--compile", self.device)
        if (self.prompt is None) == (self.prompts is None):
            raise InputError("give either --prompt TEXT or --prompts FILE")
        if self.sampling.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"--min-new-tokens {self.sampling.min_new_tokens} exceeds --max-new-tokens {self.max_new_tokens}"
            )
        if "" in self.stops:
            raise InputError("--stop is empty, which every response begins with; give some text")
        if self.beams is None:
            for flag, value in (("--length-penalty", self.length_penalty), ("--return", self.returned)):
                if value is not None:
                    raise InputError(f"{flag} {value} goes with --beams; add --beams, or leave it out")
        else:
            self._check_beams()
        if self.stream:
            others = {"--prompts": self.prompts, "--out": self.out, "--beams": self.beams, "--logprobs": self.logprobs}
            for flag, value in others.items():
                if value not in (None, False):
                    raise InputError(f"--stream writes one response to the terminal as it is drawn; leave out {flag}")

    def _check_beams(self) -> None:
        check_positive(beams=self.beams)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            value = getattr(self.sampling, name)
            if value != getattr(Sampling(), name):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"--beams draws nothing, so {flag} {value} has no meaning; give one of the two")
        if self.stop:
            raise InputError("--beams has no --stop: its beams end at end-of-text; give one of the two")
        if self.length_penalty is not None and not -10 <= self.length_penalty <= 10:  # a power of the length
            raise InputError(f"--length-penalty must lie between -10 and 10, got {self.length_penalty}")
        if self.returned is not None:
            check_positive(**{"return": self.returned})
            if self.returned > self.beams:
                raise InputError(f"--return {self.returned} exceeds --beams {self.beams}; lower it, or search wider")

    @property
    def stops(self) -> list[str]:
        """Stop strings as they are looked for."""
        return [_unescaped(stop) for stops in self.stop for stop in stops]


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n")


def main(args: Args) -> None:
    """Sample and write."""
    model, tokenizer = load_run(args.run, device=pick_device(args.device))
    model.run_with(args.kernel, args.dtype)
    model.compiled = args.compile
    if args.prompts is not None:
        records = read_records(args.prompts)
        named = [(getattr(r, "prompt", None) or getattr(r, "text", ""), r.source) for r in records]
    else:
        named = [(_unescaped(args.prompt), "--prompt")]
    before = "" if args.few_shot is None else read_few_shot(args.few_shot)
    prompts = [encode_prompt(tokenizer, before + prompt) for prompt, _ in named]
    for tokens, (_, source) in zip(prompts, named):
        if len(tokens) + args.max_new_tokens > model.config.n_positions:
            what = "a prompt" if args.few_shot is None else f"a prompt behind {args.few_shot}"
            raise InputError(
                f"{source}: {what} of {len(tokens)} tokens and --max-new-tokens {args.max_new_tokens} exceed the "
                f"context of {model.config.n_positions}; shorten one of them"
            )
    if args.stream:
        stream_one(model, tokenizer, prompts[0], args)
        return
    rows = []
    for (prompt, _), responses in zip(named, respond(model, tokenizer, prompts, args)):
        rows += [{"prompt": prompt, **response} for response in responses]
    if args.out is not None:
        write_records(args.out, rows)
        print(f"{len(rows)} responses in {args.out}", file=sys.stderr)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))


def read_few_shot(path: Path) -> str:
    """What stands before every prompt: a .txt as it is; of demonstrations each one, and two new lines behind it."""
    records = read_records(path)
    if path.name.endswith(".txt"):
        return records[0].text
    expect(records, (Demonstration,), path, "--few-shot")
    return "".join(f"{record.prompt}{record.response}\n\n" for record in records)


def respond(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], args: Args) -> list[list[dict[str, Any]]]:
    """The responses to each prompt, as the rows that are written."""
    found: list[list[dict[str, Any]]] = []
    if args.beams is None:
        watch = stop_watch(tokenizer, args.stops) if args.stops else None
        for drawn in sample(
            model, prompts, tokenizer.eot, args.max_new_tokens, args.seed, args.sampling, args.batch_size, watch,
        ):  # fmt: skip
            row = {"response": cut_at(tokenizer.decode(drawn.tokens), args.stops)}
            found.append([row | ({"logprobs": drawn.logprobs} if args.logprobs else {})])
        return found
    for start in range(0, len(prompts), args.batch_size):
        beams = beam_search(
            model, prompts[start : start + args.batch_size], tokenizer.eot, args.max_new_tokens, args.beams,
            length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
            returned=args.returned or 1, min_new_tokens=args.sampling.min_new_tokens,
            repetition_penalty=args.sampling.repetition_penalty,
        )  # fmt: skip
        for tokens, masks, scores in zip(beams.responses, beams.mask, beams.scores.tolist()):
            rows = [{"response": tokenizer.decode(own[keep].tolist())} for own, keep in zip(tokens, masks)]
            found.append([row | ({"score": s} if args.logprobs else {}) for row, s in zip(rows, scores)])
    return found


def stream_one(model: GPT, tokenizer: Tokenizer, prompt: list[int], args: Args) -> None:
    """Write one response while it is drawn."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    stream = Stream(tokenizer, args.stops, write)
    generate(
        model, [prompt], tokenizer.eot, args.max_new_tokens, args.seed, args.sampling, watch=stream,
    )  # fmt: skip
    stream.end()
    write("\n")
