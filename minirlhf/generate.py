"""Sampling from a policy: PPO's rollouts, the evaluation's responses, and a command line.

python -m minirlhf.generate runs/ppo --prompt "Customer: My order hasn't arrived. What should I do?\\nAgent:"
python -m minirlhf.generate runs/ppo --prompts prompts.jsonl --out responses.jsonl
"""

import codecs
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf import InputError, drawing
from minirlhf.beam import beam_search
from minirlhf.data import Demonstration, expect, read_records, upload, write_records
from minirlhf.decode import Decoder, check_context, decoder_for
from minirlhf.model import GPT
from minirlhf.runs import check_compiler, check_kernel, check_positive, cli, load_run, mix, pick_device
from minirlhf.sampling import Sampling
from minirlhf.tokenizer import Tokenizer

LOOK_EVERY = {"cpu": 1, "cuda": 8}  # steps between two looks at who is done

Watch = Callable[[int, list[int]], bool]


class Generation(NamedTuple):
    """Responses as they were drawn, right-padded with end-of-text."""

    responses: Int[Tensor, "B R"]
    mask: Bool[Tensor, "B R"]  # True up to and including the end-of-text token that was drawn
    logprobs: Float[Tensor, "B R"]  # of the token drawn, under the temperature and nothing else; 0 at padding
    truncated: Bool[Tensor, " B"]  # True where the limit came before end-of-text, or before what `watch` waits for
    entropy: Float[Tensor, "B R"] | None = None  # of the distribution that logprobs are of; 0 at padding
    rows: Sequence[list[int]] = ()  # the tokens of each response, on the host, which has read them


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    eot: int,
    max_new_tokens: int | Sequence[int],
    seed: int | Sequence[int],
    sampling: Sampling | None = None,
    kernel: str = "auto",
    *,
    entropy: bool = False,
    watch: Watch | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    compile: bool = False,
) -> Generation:
    """Draw one response to each prompt.

    The log-probs are the policy's own at the sampling temperature, log softmax(logits / T) of the token drawn: what
    PPO's ratio divides by. (At temperature 0 the token is the most likely one and T = 1 is used.) They describe the
    distribution sampled from only when nothing is cut away from it and nothing penalised, which is why PPO takes no
    option but the temperature.

    What a row is answered depends on its prompt, limit and seed; not, but for rounding, on the rows beside it. Where
    our own kernels have packed the weights (`decode.packing_of`), not even rounding depends on them.

    Args:
        model: the policy.
        prompts: B lists of token ids, of any lengths.
        eot: id of end-of-text, which ends a response and belongs to it.
        max_new_tokens: the limit, one for all or one a row.
        seed: one a row; or one for all, of which row i gets mix(seed, i).
        sampling: temperature, penalties, what is cut away.
        kernel: which `token_stats`.
        entropy: whether to return it, too.
        watch: called after each token with the row and its response so far; True ends the response there.
        dtype: of the matrix products: "fp32" takes the weights as they are, "bf16" rounds them.
        compile: whether the steps go through torch.compile on a CPU; on a GPU they are captured anyway.

    Returns:
        `Generation`, with R the longest response.

    Raises:
        InputError: a prompt and its limit exceed the context; or logits are NaN.
    """
    sampling = Sampling() if sampling is None else sampling
    device, B = model.wte.weight.device, len(prompts)
    limits = [max_new_tokens] * B if isinstance(max_new_tokens, int) else list(max_new_tokens)
    seeds = [mix(seed, row) for row in range(B)] if isinstance(seed, int) else list(seed)
    if not B == len(limits) == len(seeds):
        raise ValueError(f"{B} prompts want as many limits and seeds, got {len(limits)} and {len(seeds)}")
    check_context(model, prompts, limits)

    # Those of like length side by side. Row i of the sampler answers prompt live[i], later only those not done.
    live, R = sorted(range(B), key=lambda row: len(prompts[row])), max(limits)
    ordered = [prompts[row] for row in live]
    watched: dict[int, list[int]] = {row: [] for row in live} if watch is not None else {}  # rows not done, by prompt
    stopped: dict[int, int] = {}  # responses that `watch` ended, and their lengths

    with decoder_for(model, dtype, compile) as decoder:
        decoder.begin(model, ordered, [len(prompts[row]) + limits[row] for row in live], kernel)
        drawn = drawing.Drawing(
            ordered, [limits[row] for row in live], [seeds[row] for row in live], live, eot, sampling,
            model.config.vocab_size, capacity=decoder.capacity, columns=decoder.rounded(R), entropy=entropy,
            dtype=torch.float64 if model.wte.weight.dtype == torch.float64 else torch.float32, device=device,
            keep=decoder.keep,
        )  # fmt: skip
        captured, look = drawing.can_capture(device, kernel), drawing.Look()
        if captured:
            decoder.captured.at((*decoder.addresses(), *drawn.addresses()))
        for t in range(R):
            forbid = eot if t < sampling.min_new_tokens else None
            if captured:
                width, reach = decoder.width, decoder.reach
                step = partial(_step, decoder, drawn, width, reach, sampling, forbid, kernel)
                decoder.captured((width, reach, sampling, forbid, kernel, eot), step)
                decoder.steps += 1
            else:
                drawn.pick(decoder.step(drawn.tokens[: decoder.rows]), sampling, forbid, kernel)
            if watch is not None:
                seen_now = (table[: decoder.rows].tolist() for table in (drawn.tokens, drawn.done))
                for i, (token, over) in enumerate(zip(*seen_now)):
                    if live[i] not in watched:
                        continue
                    watched[live[i]].append(token)
                    if watch(live[i], list(watched[live[i]])):
                        stopped[live[i]], over = t + 1, True
                        drawn.done[i] = True
                    if over:
                        del watched[live[i]]
            if t + 1 == R:
                break
            if (t + 1) % LOOK_EVERY[device.type] == 0:
                going = look.read(drawn.done[: decoder.rows])
                if going is not None and not any(going):
                    break
                if going is not None and decoder.too_wide_for(sum(going)):
                    places = _close_ranks(going)
                    moved = [i for i, source in enumerate(places) if i != source]
                    to, source = (upload(torch.tensor(x).long(), device) for x in (moved, [places[i] for i in moved]))
                    decoder.move(to, source, len(places))
                    drawn.move(to, source, len(places))
                    live = [live[i] for i in places]
                look.start(drawn.done[: decoder.rows])

    # A row may have been computed beyond its end. What was drawn is read at once, and whether all of it are numbers.
    broken = drawn.logprobs[:B].isnan().any().long()
    *tokens, broken = torch.cat((drawn.found[:B, :R].flatten(), broken[None])).tolist()
    if broken:
        raise InputError(
            "the model's logits are not numbers (NaN): its weights are damaged, or its training diverged; use an "
            "earlier checkpoint or another model"
        )
    rows, truncated = [], []
    for row in range(B):
        own = tokens[row * R : row * R + stopped.get(row, limits[row])]
        ended = eot in own
        rows.append(own[: own.index(eot) + 1] if ended else own)
        truncated.append(not ended and row not in stopped)
    R = max(map(len, rows))
    mask = upload(torch.arange(R) < torch.tensor([len(row) for row in rows])[:, None], device)
    responses = upload(torch.tensor([[*row, *[eot] * (R - len(row))] for row in rows]), device)
    logprobs = torch.where(mask, drawn.logprobs[:B, :R], 0.0)
    entropies = None if drawn.entropy is None else torch.where(mask, drawn.entropy[:B, :R], 0.0)
    return Generation(responses, mask, logprobs, upload(torch.tensor(truncated), device), entropies, rows)


def _step(
    decoder: Decoder,
    drawn: drawing.Drawing,
    width: int,
    reach: int,
    sampling: Sampling,
    forbid: int | None,
    kernel: str,
) -> None:
    """All that a step is on the device, and nothing else: it may be captured."""
    drawn.pick(decoder.logits(drawn.tokens[:width], reach), sampling, forbid, kernel)


def _close_ranks(going: Sequence[bool]) -> list[int]:
    """Which row comes to each place: whoever goes on stays, and the last ones fill the gaps."""
    n = sum(going)
    last = (i for i in range(n, len(going)) if going[i])
    return [i if going[i] else next(last) for i in range(n)]


# --- texts ------------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """One response as it was drawn."""

    tokens: list[int]  # with end-of-text, where it was drawn
    logprobs: list[float]


def sample(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    eot: int,
    max_new_tokens: int,
    seed: int,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    kernel: str = "auto",
    **options: Any,
) -> list[Drawn]:
    """`generate` in batches, whose size changes nothing but rounding: prompt i is answered with mix(seed, i)."""
    responses = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        seeds = [mix(seed, start + row) for row in range(len(batch))]
        drawn = generate(model, batch, eot, max_new_tokens, seeds, sampling, kernel, **options)
        for tokens, logprobs in zip(drawn.rows, drawn.logprobs.tolist()):
            responses.append(Drawn(tokens, logprobs[: len(tokens)]))
    return responses


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    kernel: str = "auto",
) -> list[list[int]]:
    """Responses to texts as token ids (end-of-text included where it was drawn)."""
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    drawn = sample(model, tokens, tokenizer.eot, max_new_tokens, seed, sampling, batch_size, kernel)
    return [response.tokens for response in drawn]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one is end-of-text, which also begins every document of pre-training."""
    return tokenizer.encode(prompt) or [tokenizer.eot]


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


# --- python -m minirlhf.generate --------------------------------------------------------------------------------------


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
        options = {"watch": watch, "dtype": args.dtype, "compile": args.compile}
        for drawn in sample(
            model, prompts, tokenizer.eot, args.max_new_tokens, args.seed, args.sampling, args.batch_size, args.kernel,
            **options,
        ):  # fmt: skip
            row = {"response": cut_at(tokenizer.decode(drawn.tokens), args.stops)}
            found.append([row | ({"logprobs": drawn.logprobs} if args.logprobs else {})])
        return found
    for start in range(0, len(prompts), args.batch_size):
        beams = beam_search(
            model, prompts[start : start + args.batch_size], tokenizer.eot, args.max_new_tokens, args.beams,
            length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
            returned=args.returned or 1, min_new_tokens=args.sampling.min_new_tokens,
            repetition_penalty=args.sampling.repetition_penalty, kernel=args.kernel, dtype=args.dtype,
            compile=args.compile,
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
        model, [prompt], tokenizer.eot, args.max_new_tokens, args.seed, args.sampling, args.kernel,
        watch=stream, dtype=args.dtype, compile=args.compile,
    )  # fmt: skip
    stream.end()
    write("\n")


if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.generate")
