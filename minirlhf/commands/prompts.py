"""Prompts to sample from: read once, checked once, the same for every policy that is asked."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minirlhf import InputError
from minirlhf.checks import check_at_least, check_positive
from minirlhf.data.records import Demonstration, Prompt, Ranking, Record, Text, expect, read_records
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.kernels.arguments import Kernel
from minirlhf.model.generate import encode_prompt, sample, sample_texts
from minirlhf.model.gpt import GPT
from minirlhf.model.sampling import Sampling
from minirlhf.run.arguments import check_kernel
from minirlhf.run.folder import Run
from minirlhf.run.terminal import console


@dataclass(frozen=True)
class PromptArgs:
    """What every command takes that samples responses to prompts."""

    prompts: str = "helpdesk"
    """helpdesk, or a file of records whose prompts are used, each once; to evaluate on, one that no training read."""
    n: int = 300
    """Prompts; of a longer file, a random choice."""
    prompt_tokens: int = 4
    """Where the file holds plain texts: the first tokens of each that are the prompt."""
    skip_long_prompts: bool = False
    """Leave out prompts that do not fit the context with their response, instead of stopping."""
    max_new_tokens: int = 48
    """The longest response."""
    batch_size: int = 64
    """Responses sampled at a time."""
    seed: int = 0
    """Of the prompts, the samples and the intervals."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernel: Kernel = "auto"
    """Which token_stats: fused (compiled at first use), reference (plain PyTorch) or auto (fused where it can be)."""

    def __post_init__(self):
        check_at_least(2, n=self.n)
        check_positive(prompt_tokens=self.prompt_tokens, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        check_kernel(self.kernel, self.device)


def read_prompts(
    args: PromptArgs, helpdesk_prompts: Callable[[int, int], list[Prompt]], tokenizer: Tokenizer, context: int, who: str
) -> list[TokenText]:
    """The prompts of a command that samples responses to them: at most `args.n`.

    Args:
        args: which.
        helpdesk_prompts: samples (n, seed) prompts of the embedded world.
        tokenizer: the policy's.
        context: tokens that prompt and response may have together.
        who: the command, for an error message.
    """
    if args.prompts == "helpdesk":
        records = helpdesk_prompts(args.n, args.seed)
    else:
        records = expect(read_records(args.prompts), (Prompt, Demonstration, Ranking, Text), args.prompts, who)
        if len(records) < 2:
            raise InputError(f"{args.prompts}: holds one record; give at least 2 prompts")
        if len(records) > args.n:  # by the command's own choice, so that no two commands choose the same ones
            records = random.Random(f"{who.rpartition('.')[2]} {args.seed}").sample(records, args.n)
    limit = ("--max-new-tokens", args.max_new_tokens)
    prompts = fitting_prompts(records, tokenizer, args.prompt_tokens, limit, context, args.skip_long_prompts)
    if len(prompts) < 2:
        raise InputError(
            f"{args.prompts}: {len(prompts)} of {len(records)} prompts fit the context of {context}; give at least 2 "
            "that do, or lower --max-new-tokens"
        )
    return prompts


def fitting_prompts(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    text_tokens: int | None,
    limit: tuple[str, int],
    context: int,
    skip: bool,
    cut: int | None = None,
) -> list[TokenText]:
    """The prompts of records, each once, that leave room for a response.

    Args:
        records: of any kind.
        tokenizer: the policy's.
        text_tokens: of a plain text, so many first tokens are the prompt; None = a text is refused.
        limit: the flag that limits the response, and its tokens.
        context: tokens that prompt and response may have together.
        skip: leave out a prompt that is too long, instead of refusing it.
        cut: of any prompt, so many first tokens are used; None = all.
    """
    flag, response = limit
    prompts, seen = [], set()
    for record in records:
        if isinstance(record, Text):
            if text_tokens is None:
                raise InputError(
                    f"{record.source}: a text has no prompt; --prompt-tokens 2:8 takes its first tokens as one"
                )
            tokens = tokenizer.encode(record.text)[:text_tokens]
            prompt = TokenText(tokenizer.decode(tokens), tokens)
        else:
            prompt = TokenText(record.prompt, encode_prompt(tokenizer, record.prompt))
        if cut is not None and len(prompt.tokens) > cut:
            prompt = TokenText(tokenizer.decode(prompt.tokens[:cut]), prompt.tokens[:cut])
        if tuple(prompt.tokens) in seen:  # asked twice, it would count twice
            continue
        seen.add(tuple(prompt.tokens))
        if len(prompt.tokens) + response <= context:
            prompts.append(prompt)
        elif not skip:
            raise InputError(
                f"{record.source or 'a prompt of the helpdesk'}: a prompt of {len(prompt.tokens)} tokens and "
                f"{flag} {response} exceed the context of {context}; shorten the prompt, lower {flag}, or leave such "
                "prompts out with --skip-long-prompts"
            )
    if len(seen) < len(records):
        console.print(f"{len(records) - len(seen):,} of {len(records):,} prompts came again and were left out")
    if len(prompts) < len(seen):
        left_out = len(seen) - len(prompts)
        console.print(f"{left_out:,} of {len(seen):,} prompts were too long for the context of {context} and left out")
    return prompts


def respond(
    model: GPT, tokenizer: Tokenizer, prompts: list[TokenText], args: PromptArgs, seed: int, temperature: float = 1.0
) -> list[TokenText]:
    """One response to each prompt: the tokens as they were drawn, and their text."""
    tokens, sampling = [prompt.tokens for prompt in prompts], Sampling(temperature=temperature)
    drawn = sample(model, tokens, tokenizer.eot, args.max_new_tokens, seed, sampling, args.batch_size)
    return [TokenText(tokenizer.decode(response.tokens), response.tokens) for response in drawn]


def show_responses(
    run: Run, model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], step: int, seed: int, limit: int = 48
) -> None:
    """Sample a response to the first three different prompts that leave room for it, and show them as the run's."""
    model.eval()
    limit = min(limit, model.config.n_positions - 1)
    fit = [p for p in dict.fromkeys(prompts) if len(encode_prompt(tokenizer, p)) + limit <= model.config.n_positions]
    responses = sample_texts(model, tokenizer, fit[:3], limit, seed)
    run.samples(step, [{"prompt": p, "response": tokenizer.decode(r)} for p, r in zip(fit, responses)])
