"""Log-prob, entropy and exact KL of every token, from logits: the one place where a softmax is taken.

Every loss of the project (SFT, DPO, PPO), every sampler and the evaluation go through `token_stats`, so that there is
a single answer to what a log-prob is: which temperature, which masked tokens, which precision.

    p = softmax(x / T),  q = softmax(y / T)            x: policy logits, y: reference logits, T: temperature

    logprob = log p_t                                  t: the target
    entropy = -Σ_i p_i log p_i
    KL(p‖q) =  Σ_i p_i (log p_i - log q_i)             summed over the whole vocabulary: exact, no sampling noise
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kernel = Literal["auto", "reference"]


class TokenStats(NamedTuple):
    """What `token_stats` returns, each of shape (...), in nats; the last two are None without reference logits."""

    logprobs: Float[Tensor, "..."]
    entropy: Float[Tensor, "..."]
    ref_logprobs: Float[Tensor, "..."] | None
    kl: Float[Tensor, "..."] | None


def token_stats(
    logits: Float[Tensor, "... V"],
    targets: Int[Tensor, "..."],
    ref_logits: Float[Tensor, "... V"] | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    kernel: str = "auto",
) -> TokenStats:
    """Log-prob of the target, entropy and exact KL(policy‖reference) of each row of logits.

    Differentiable in `logits`, and through `kl` and `ref_logprobs` in `ref_logits`. float16 and bfloat16 logits are
    read exactly and everything after is float32; float64 stays float64.

    A row whose target is `ignore_index` gives 0 with zero gradient and its logits are not read. A token masked with
    -inf has probability 0: as a target its log-prob is -inf; masked in both distributions it adds 0 to the KL; masked
    in the reference alone it makes the KL +inf. A row that is all -inf, or holds NaN or +inf, gives NaN in that row
    alone.

    Args:
        logits: (..., V), the policy's, before temperature.
        targets: (...), token ids in [0, V), or `ignore_index`.
        ref_logits: (..., V), the reference's, on the same device; optional.
        temperature: divides both sets of logits; the same one the tokens were sampled with.
        ignore_index: the target that marks a row as not counted.
        kernel: "reference" is the plain PyTorch below; "auto" is the fastest there is (today the same).

    Returns:
        `TokenStats` of tensors of shape (...), in nats.

    Raises:
        TypeError: logits that are not floating point, targets that are not integers.
        ValueError: shapes that do not match, a temperature that is not positive, a target outside [0, V), an unknown
            kernel, tensors on different devices.
    """
    _check(logits, targets, ref_logits, temperature, ignore_index, kernel)
    return token_stats_reference(logits, targets, ref_logits, temperature=temperature, ignore_index=ignore_index)


def token_stats_reference(
    logits: Float[Tensor, "... V"],
    targets: Int[Tensor, "..."],
    ref_logits: Float[Tensor, "... V"] | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TokenStats:
    """`token_stats` in plain PyTorch: the definition that every faster kernel is tested against."""
    targets = targets.long()
    counted = targets != ignore_index
    everything = bool(counted.all())
    rows = (lambda x: x.reshape(-1, x.shape[-1])) if everything else (lambda x: x[counted])
    t = (targets if everything else targets[counted]).reshape(-1, 1)

    logp = _log_softmax(rows(logits), temperature)  # (N, V)
    p = logp.exp()
    logprobs = logp.gather(-1, t).squeeze(-1)  # (N,)
    # Where p = 0 the product 0 · -inf must be 0, and so must its gradient: the -inf is replaced before the product.
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)

    ref_logprobs = kl = None
    if ref_logits is not None:
        logq = _log_softmax(rows(ref_logits), temperature)
        ref_logprobs = logq.gather(-1, t).squeeze(-1)
        impossible = p == 0
        kl = (p * (logp.masked_fill(impossible, 0.0) - logq.masked_fill(impossible, 0.0))).sum(-1)
        # A token that the reference alone rules out costs infinitely much, even where its p underflows to 0.
        kl = kl.masked_fill((logq.isneginf() & ~logp.isneginf()).any(-1) & ~kl.isnan(), float("inf"))

    def spread(values: Tensor | None) -> Tensor | None:
        """(N,) counted values back into the shape of the targets, 0 where nothing counts."""
        if values is None or everything:
            return values if values is None else values.reshape(targets.shape)
        return values.new_zeros(targets.shape).masked_scatter(counted, values)

    return TokenStats(spread(logprobs), spread(entropy), spread(ref_logprobs), spread(kl))


def _log_softmax(x: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.log_softmax(x if temperature == 1.0 else x / temperature, dim=-1)


def _check(logits, targets, ref_logits, temperature, ignore_index, kernel) -> None:
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel must be one of {', '.join(get_args(Kernel))}, got {kernel!r}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if ref_logits is not None and not ref_logits.is_floating_point():
        raise TypeError(f"ref_logits must be floating point, got {ref_logits.dtype}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer token ids, got {targets.dtype}")
    if logits.dim() < 1 or targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must have shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise ValueError(f"ref_logits must have shape {tuple(logits.shape)}, got {tuple(ref_logits.shape)}")
    for name, other in (("targets", targets), ("ref_logits", ref_logits)):
        if other is not None and other.device != logits.device:
            raise ValueError(f"{name} must be on the logits' device {logits.device}, got {other.device}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if targets.device.type == "cpu" and targets.numel():
        targets = targets.long()  # in a narrow type the vocabulary's size itself would wrap around
        wrong = ((targets < 0) | (targets >= logits.shape[-1])) & (targets != ignore_index)
        if wrong.any():
            raise ValueError(f"target {targets[wrong][0].item()} is outside the vocabulary [0, {logits.shape[-1]})")
