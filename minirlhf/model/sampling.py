"""How the next token is chosen from logits: penalties, temperature, what is cut away.

    logits → repetition penalty → minimum length → temperature → top-k → top-p → min-p → one token

The order is that of transformers, so that the same options mean the same there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.checks import check_at_least, check_positive, check_share
from minirlhf.devices import upload


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probability reaches p (nucleus sampling); 1 keeps all."""
    min_p: float = 0.0
    """Keep the tokens at least this share as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1 makes what the prompt and the response hold already less likely, below 1 more likely; 1 = off."""
    min_new_tokens: int = 0
    """No end-of-text before this many tokens."""

    def __post_init__(self):
        check_at_least(0, temperature=self.temperature, top_k=self.top_k, min_new_tokens=self.min_new_tokens)
        check_share(min_p=self.min_p)
        check_positive(repetition_penalty=self.repetition_penalty)
        if self.temperature == float("inf"):
            raise InputError("--temperature must be a number, got inf")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must lie above 0 and at most at 1, got {self.top_p}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise InputError(
                "--temperature 0 takes the most likely token, whatever --top-k, --top-p and --min-p leave of the rest; "
                "drop these, or raise the temperature"
            )


def draw(
    logits: Float[Tensor, "B V"],
    sampling: Sampling,
    u: Float[Tensor, " B"],
    forbid: int | None = None,
    seen: Bool[Tensor, "B V"] | None = None,
) -> Int[Tensor, " B"]:
    """One token a row: the first whose cumulative probability exceeds u. One random number per row, whatever V.

    Args:
        logits: (B, V), as the model gives them.
        sampling: which probabilities.
        u: (B,), float64, uniform on [0, 1), see `uniforms`.
        forbid: a token that may not be drawn.
        seen: (B, V), True for the tokens of the row's prompt and response; read by the repetition penalty.
    """
    logits = adjust(logits, sampling.repetition_penalty, seen, forbid)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    p = torch.softmax(cut(logits, sampling.top_k, sampling.top_p, sampling.min_p), dim=-1)
    total = _running_sums(p)  # (B, V)
    # Its end, not 1, is the scale: rounding can leave no u beyond the last token. Tokens of probability 0 add nothing
    # to the sum, and are passed over.
    token = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)  # beyond the last where the logits are not numbers


def _running_sums(p: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """p_1 + … + p_v for each v, in float64.

    Where a GPU is to give the same bits in every run, torch sums by a table of V² numbers per row. Of several rows it
    also has one block sum each, in one order; so a row is put beside the others, for there might be only one.
    """
    if p.device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return p.cumsum(-1, dtype=torch.float64)
    torch.use_deterministic_algorithms(False)
    try:
        return torch.cat((p, p[:1])).cumsum(-1, dtype=torch.float64)[:-1]
    finally:
        torch.use_deterministic_algorithms(True)


def adjust(
    logits: Float[Tensor, "B V"], penalty: float, seen: Bool[Tensor, "B V"] | None, forbid: int | None
) -> Float[Tensor, "B V"]:
    """Logits with the tokens seen made less likely, and one token ruled out.

        x_i / θ where x_i > 0, x_i · θ where x_i < 0, for the tokens i that the prompt or the response holds

    Source: Keskar et al. 2019, "CTRL", section 4.1. Differs: they divide, which would make a token of negative logit
    more likely; this is transformers' reading.

    Args:
        logits: (B, V); left as they are.
        penalty: θ, 1 = none.
        seen: (B, V), True for the tokens that pay; needed unless θ is 1.
        forbid: a token that gets -inf.
    """
    if penalty != 1:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if forbid is not None:
        logits = logits.clone()
        logits[:, forbid] = -math.inf
    return logits


def cut(logits: Float[Tensor, "B V"], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Float[Tensor, "B V"]:
    """Mask with -inf what top-k, then top-p, then min-p leave out; at least one token stays in each row.

    Source: top-k, Fan et al. 2018, section 3.3; top-p, Holtzman et al. 2020, section 3.1; min-p, Nguyen et al. 2024,
    section 3: the tokens with p ≥ min_p · max p.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(ordered, dim=-1)
        outside = p.cumsum(-1) - p >= top_p  # the mass before a token already reaches p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -math.inf)
    if min_p > 0.0:  # a ratio of probabilities is a difference of logits
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits


def tokens_seen(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Bool[Tensor, "B V"]:
    """True for the tokens of each prompt."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return upload(seen, device)
