"""Prompts to sample from: read once, checked once, the same for every policy that is asked."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from minirlhf import InputError
from minirlhf.data import Demonstration, Prompt, Ranking, Text, expect, read_records
from minirlhf.generate import encode_prompt, sample
from minirlhf.model import GPT
from minirlhf.rewards import TokenText
from minirlhf.runs import check_at_least, check_kernel, check_positive, console
from minirlhf.sampling import Sampling
from minirlhf.token_stats import Kernel
from minirlhf.tokenizer import Tokenizer


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
    """The prompts as text and tokens.

    Args:
        args: which.
        helpdesk_prompts: draws (n, seed) prompts of the embedded world.
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
        if len(records) > args.n:  # by the command's own draw, so that no two commands choose the same ones
            records = random.Random(f"{who.rpartition('.')[2]} {args.seed}").sample(records, args.n)
    prompts, seen = [], set()
    for record in records:
        if isinstance(record, Text):
            tokens = tokenizer.encode(record.text)[: args.prompt_tokens]
            prompt = TokenText(tokenizer.decode(tokens), tokens)
        else:
            prompt = TokenText(record.prompt, encode_prompt(tokenizer, record.prompt))
        if tuple(prompt.tokens) in seen:  # asked twice, it would count twice
            continue
        seen.add(tuple(prompt.tokens))
        if len(prompt.tokens) + args.max_new_tokens <= context:
            prompts.append(prompt)
        elif not args.skip_long_prompts:
            raise InputError(
                f"{record.source or 'a prompt of the helpdesk'}: a prompt of {len(prompt.tokens)} tokens and "
                f"--max-new-tokens {args.max_new_tokens} exceed the context of {context}; shorten one of them, or "
                "leave such prompts out with --skip-long-prompts"
            )
    if len(seen) < len(records):
        console.print(f"{len(records) - len(seen):,} of {len(records):,} prompts came again and were left out")
    if len(prompts) < len(seen):
        left_out = len(seen) - len(prompts)
        console.print(f"{left_out:,} of {len(seen):,} prompts were too long for the context of {context} and left out")
    if len(prompts) < 2:
        raise InputError(
            f"{args.prompts}: {len(prompts)} of {len(seen)} prompts fit the context of {context}; give at least 2 "
            "that do, or lower --max-new-tokens"
        )
    return prompts


def respond(
    model: GPT, tokenizer: Tokenizer, prompts: list[TokenText], args: PromptArgs, seed: int, temperature: float = 1.0
) -> list[TokenText]:
    """One response to each prompt: the tokens as they were drawn, and their text."""
    tokens, sampling = [prompt.tokens for prompt in prompts], Sampling(temperature=temperature)
    drawn = sample(model, tokens, tokenizer.eot, args.max_new_tokens, seed, sampling, args.batch_size, args.kernel)
    return [TokenText(tokenizer.decode(response.tokens), response.tokens) for response in drawn]
