"""Sampling from a policy with a KV cache: PPO's rollouts, the evaluation's responses, and a command line.

python -m minirlhf.generate runs/ppo --prompt "Customer: My order hasn't arrived. What should I do?\\nAgent:"
python -m minirlhf.generate runs/ppo --prompts prompts.jsonl --out responses.jsonl
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.data import read_records, write_records
from minirlhf.model import GPT, KVCache
from minirlhf.runs import check_at_least, check_kernel, check_positive, cli, load_run, pick_device, seeded
from minirlhf.token_stats import token_stats


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probability reaches p (nucleus sampling); 1 keeps all."""
    min_new_tokens: int = 0
    """No end-of-text before this many tokens."""

    def __post_init__(self):
        check_at_least(0, temperature=self.temperature, top_k=self.top_k, min_new_tokens=self.min_new_tokens)
        if self.temperature == float("inf"):
            raise InputError("--temperature must be a number, got inf")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must lie above 0 and at most at 1, got {self.top_p}")


class Generation(NamedTuple):
    """Responses as they were drawn, right-padded with end-of-text."""

    responses: Int[Tensor, "B R"]
    mask: Bool[Tensor, "B R"]  # True up to and including the end-of-text token that was drawn
    logprobs: Float[Tensor, "B R"]  # of the token drawn, under the temperature, before top-k and top-p; 0 at padding
    truncated: Bool[Tensor, " B"]  # True where the limit came before end-of-text


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    eot: int,
    max_new_tokens: int | Sequence[int],
    generator: torch.Generator,
    sampling: Sampling | None = None,
    kernel: str = "auto",
) -> Generation:
    """Draw one response to each prompt.

    The log-probs are the policy's own at the sampling temperature, log softmax(logits / T) of the token drawn: what
    PPO's ratio divides by. (At temperature 0 the token is the most likely one and T = 1 is used.) They describe the
    distribution sampled from only when nothing is cut away from it, which is why PPO refuses top-k, top-p and a
    minimum length.

    Args:
        model: the policy.
        prompts: B lists of token ids, of any lengths.
        eot: id of end-of-text, which ends a response and belongs to it.
        max_new_tokens: the limit, one for all or one a row.
        generator: where the randomness comes from.
        sampling: temperature, top-k, top-p, minimum length.
        kernel: which `token_stats`.

    Returns:
        `Generation`, with R the longest response.

    Raises:
        InputError: a prompt and its limit exceed the context.
    """
    sampling = Sampling() if sampling is None else sampling
    device, context = model.wte.weight.device, model.config.n_positions
    B, P = len(prompts), max(len(prompt) for prompt in prompts)
    limits = [max_new_tokens] * B if isinstance(max_new_tokens, int) else list(max_new_tokens)
    for prompt, limit in zip(prompts, limits):
        if len(prompt) + limit > context:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {limit} new ones exceed the model's context of {context}; "
                "shorten the prompt or the response"
            )

    # Prompts are padded on the left, so that every row draws its next token in the same column.
    tokens = torch.tensor([[eot] * (P - len(p)) + list(p) for p in prompts], device=device)  # (B, P)
    mask = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompts], device=device)
    limit = torch.tensor(limits, device=device)
    R = int(limit.max())
    responses = torch.full((B, R), eot, device=device)
    response_mask = torch.zeros(B, R, dtype=torch.bool, device=device)
    logprobs = torch.zeros(B, R, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)  # end-of-text was drawn

    cache = KVCache(model.config, B, P + R, device, next(model.parameters()).dtype)
    hidden = model(tokens, mask, cache)[:, -1]  # (B, D)
    for t in range(R):
        logits = model.logits(hidden).float()  # (B, V)
        drawn = draw(logits, sampling, generator, forbid=eot if t < sampling.min_new_tokens else None)  # (B,)
        active = ~ended & (t < limit)
        stats = token_stats(logits, drawn, temperature=sampling.temperature or 1.0, kernel=kernel)
        responses[:, t] = torch.where(active, drawn, eot)
        response_mask[:, t] = active
        logprobs[:, t] = torch.where(active, stats.logprobs, 0.0)
        ended |= active & (drawn == eot)
        goes_on = ~ended & (t + 1 < limit)
        if not goes_on.any():
            break
        # Rows that are done get padding, which takes no position: a long prompt may stand beside a long response.
        hidden = model(responses[:, t : t + 1], goes_on[:, None], cache)[:, -1]
    R = int(response_mask.sum(-1).max())
    return Generation(responses[:, :R], response_mask[:, :R], logprobs[:, :R], ~ended)


def draw(
    logits: Float[Tensor, "B V"], sampling: Sampling, generator: torch.Generator, forbid: int | None = None
) -> Int[Tensor, " B"]:
    """Draw one token a row from softmax(logits / T), cut to top-k and top-p: (B, V) -> (B,).

    A draw is the first token whose cumulative probability exceeds u ~ U[0, 1): one random number a row, whatever V.
    Source: top-k, Fan et al. 2018, section 3.3; top-p, Holtzman et al. 2020, section 3.1.

    Args:
        logits: (B, V), before temperature.
        sampling: temperature, top-k, top-p.
        generator: on the logits' device.
        forbid: a token that may not be drawn.
    """
    if forbid is not None:
        logits = logits.index_fill(-1, torch.tensor([forbid], device=logits.device), float("-inf"))
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(cut(logits / sampling.temperature, sampling.top_k, sampling.top_p).double(), dim=-1)
    total = p.cumsum(-1)  # (B, V); its end, not 1, is the scale, so that rounding can leave no u beyond the last token
    u = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=p.dtype) * total[:, -1:]
    return torch.searchsorted(total, u, right=True).squeeze(-1)  # equal sums, tokens of probability 0, are passed over


def cut(logits: Float[Tensor, "B V"], top_k: int = 0, top_p: float = 1.0) -> Float[Tensor, "B V"]:
    """Mask with -inf what top-k and then top-p leave out; at least one token stays in each row."""
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(ordered, dim=-1)
        outside = p.cumsum(-1) - p >= top_p  # the mass before a token already reaches p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))
    return logits


def sample_texts(
    model: GPT,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    kernel: str = "auto",
) -> list[list[int]]:
    """Responses to texts as token ids (end-of-text included where it was drawn), in batches of `batch_size`."""
    responses = []
    for start in range(0, len(prompts), batch_size):
        batch = [encode_prompt(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        generator = seeded(seed, start, device=model.wte.weight.device)
        drawn = generate(model, batch, tokenizer.eot, max_new_tokens, generator, sampling, kernel)
        responses += [row[keep].tolist() for row, keep in zip(drawn.responses.cpu(), drawn.mask.cpu())]
    return responses


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one is end-of-text, which also begins every document of pre-training."""
    return tokenizer.encode(prompt) or [tokenizer.eot]


# --- python -m minirlhf.generate --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Sample responses from a run; one JSON object {"prompt", "response"} a line."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run of train_sft, train_ppo or train_dpo, or any GPT-2 folder."""
    sampling: Sampling = Sampling()
    prompt: str | None = None
    """One prompt; \\n stands for a new line."""
    prompts: Path | None = None
    """A file of records; the prompt of each is used."""
    out: Path | None = None
    """Write here instead of to the terminal."""
    max_new_tokens: int = 48
    """The longest response."""
    batch_size: int = 64
    """Prompts sampled at a time."""
    seed: int = 0
    """The same seed and batch size give the same responses."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernel: str = "auto"
    """Which token_stats: fused (compiled at first use), reference (plain PyTorch) or auto (fused where it can be)."""

    def __post_init__(self):
        check_positive(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        check_kernel(self.kernel, self.device)
        if (self.prompt is None) == (self.prompts is None):
            raise InputError("give either --prompt TEXT or --prompts FILE")
        if self.sampling.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"--min-new-tokens {self.sampling.min_new_tokens} exceeds --max-new-tokens {self.max_new_tokens}"
            )


def main(args: Args) -> None:
    """Sample and write."""
    model, tokenizer = load_run(args.run, device=pick_device(args.device))
    if args.prompts is not None:
        records = read_records(args.prompts)
        named = [(getattr(r, "prompt", None) or getattr(r, "text", ""), r.source) for r in records]
    else:
        named = [(args.prompt.replace("\\n", "\n"), "--prompt")]
    for prompt, source in named:
        length = len(encode_prompt(tokenizer, prompt))
        if length + args.max_new_tokens > model.config.n_positions:
            raise InputError(
                f"{source}: a prompt of {length} tokens and --max-new-tokens {args.max_new_tokens} exceed the context "
                f"of {model.config.n_positions}; shorten one of them"
            )
    prompts = [prompt for prompt, _ in named]
    drawn = sample_texts(
        model, tokenizer, prompts, args.max_new_tokens, args.seed, args.sampling, args.batch_size, args.kernel
    )
    rows = [{"prompt": prompt, "response": tokenizer.decode(response)} for prompt, response in zip(prompts, drawn)]
    if args.out is not None:
        write_records(args.out, rows)
        print(f"{len(rows)} responses in {args.out}", file=sys.stderr)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.generate")
