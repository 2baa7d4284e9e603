"""Log-prob, entropy and exact KL of every token, from logits: the one place where they are computed.

Every loss of the project (SFT, DPO, PPO), the log-probs of every sample and the evaluation go through `token_stats`, so
that there is a single answer to what a log-prob is: which temperature, which masked tokens, which precision.

    p = softmax(x / T),  q = softmax(y / T)            x: policy logits, y: reference logits, T: temperature

    logprob = log p_t                                  t: the target
    entropy = -Σ_i p_i log p_i
    KL(p‖q) =  Σ_i p_i (log p_i - log q_i)             summed over the whole vocabulary: exact, no sampling noise
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minirlhf.kernels.arguments import autocast_is_on, check_kernel_name, check_linear, check_logits, check_targets
from minirlhf.kernels.choice import use_fused


class TokenStats(NamedTuple):
    """What `token_stats` returns, each of shape (...), in nats; the last two are None without reference logits."""

    logprobs: Float[Tensor, "..."]
    entropy: Float[Tensor, "..."]
    ref_logprobs: Float[Tensor, "..."] | None
    kl: Float[Tensor, "..."] | None


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
        # A token that the reference alone rules out costs infinitely much, even where its p underflows to 0. Such a KL
        # has no gradient to give, so the sum is kept finite and the infinity put in afterwards.
        ruled_out = logq.isneginf() & ~logp.isneginf()
        impossible = (p == 0) | ruled_out
        kl = (p * (logp.masked_fill(impossible, 0.0) - logq.masked_fill(impossible, 0.0))).sum(-1)
        kl = kl.masked_fill(ruled_out.any(-1) & ~kl.isnan(), float("inf"))

    def in_place(values: Tensor | None) -> Tensor | None:
        """(N,) counted values back into the shape of the targets, 0 where nothing counts."""
        if values is None or everything:
            return values if values is None else values.reshape(targets.shape)
        return values.new_zeros(targets.shape).masked_scatter(counted, values)

    return TokenStats(in_place(logprobs), in_place(entropy), in_place(ref_logprobs), in_place(kl))


def _log_softmax(x: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.log_softmax(x if temperature == 1.0 else x / temperature, dim=-1)


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
        kernel: "fused" is the compiled one of csrc/, "reference" the plain PyTorch above; "auto" is "fused" where it
            can be built, and otherwise "reference", which it says once, with the reason.

    Returns:
        `TokenStats` of tensors of shape (...), in nats.

    Raises:
        TypeError: logits that are not floating point, or of two types; targets that are not integers.
        ValueError: shapes that do not match, a temperature that is not positive, an unknown kernel, tensors on
            different devices; on the CPU a target outside [0, V), whose log-prob is NaN on a GPU.
        KernelUnavailable: kernel="fused" and it cannot be built.
    """
    check_kernel_name(kernel)
    check_logits(logits, targets, ref_logits, temperature)
    if not use_fused(kernel, logits.device.type):
        check_targets(targets, logits.shape[-1], ignore_index)
        return token_stats_reference(logits, targets, ref_logits, temperature=temperature, ignore_index=ignore_index)
    stats, _ = torch.ops.minirlhf.token_stats(
        logits, targets.long().contiguous(), ref_logits, float(temperature), ignore_index
    )
    return _unpack(stats)


def _linear_reference(hidden, weight, targets, ref_hidden, ref_weight, temperature, ignore_index) -> TokenStats:
    targets = targets.long()  # in a narrow type ignore_index itself would wrap around
    counted = targets != ignore_index
    if bool(counted.all()):
        ref_logits = None if ref_hidden is None else F.linear(ref_hidden, ref_weight)
        return token_stats_reference(F.linear(hidden, weight), targets, ref_logits, temperature=temperature)
    # Ignored rows stay out of the product: NaN there times a gradient of 0 would still be NaN.
    ref_hidden = None if ref_hidden is None else ref_hidden[counted]
    stats = _linear_reference(hidden[counted], weight, targets[counted], ref_hidden, ref_weight, temperature, -100)
    return TokenStats(*(s if s is None else s.new_zeros(targets.shape).masked_scatter(counted, s) for s in stats))


def linear_token_stats(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "..."],
    ref_hidden: Float[Tensor, "... E"] | None = None,
    ref_weight: Float[Tensor, "W E"] | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    kernel: str = "auto",
) -> TokenStats:
    """`token_stats` of the logits hidden · weightᵀ, which the fused kernel never holds whole, but tile by tile.

    Differentiable in `hidden` and `weight`; the gradients come from logits that are computed again. Under autocast the
    products are in autocast's type, as those of a linear layer.
    Source: the idea of a head that is fused with its loss, Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary
    Language Models"; Differs: all four statistics, and tiles that a plain matrix product fills.

    Args:
        hidden: (..., D), the states that predict the targets.
        weight: (V, D), the output head, without a bias.
        targets: (...), token ids in [0, V), or `ignore_index`.
        ref_hidden, ref_weight: (..., E) and (V, E), the reference's, both or neither; no gradient is taken in them.
        vocab_size: only so many first rows of each weight are tokens; those beyond, which pad a vocabulary, are not
            read and get a gradient of 0, without the second gradient of the whole weight that slicing it would cost.
            The reference's may have another number of them. None = all rows are tokens.
        temperature, ignore_index, kernel: as for `token_stats`.

    Returns:
        `TokenStats` of tensors of shape (...), in nats.

    Raises:
        As `token_stats`; ValueError also where the reference asks for a gradient.
    """
    check_kernel_name(kernel)
    check_linear(hidden, weight, targets, ref_hidden, ref_weight, vocab_size, temperature)
    if not use_fused(kernel, hidden.device.type):
        weight, ref_weight = (w if w is None else w[:vocab_size] for w in (weight, ref_weight))
        check_targets(targets, weight.shape[0], ignore_index)
        return _linear_reference(hidden, weight, targets, ref_hidden, ref_weight, temperature, ignore_index)
    if autocast_is_on(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        given = hidden, weight, ref_hidden, ref_weight
        double = torch.float64  # which autocast leaves alone
        hidden, weight, ref_hidden, ref_weight = (x if x is None or x.dtype == double else x.to(dtype) for x in given)
    rows = targets.numel()
    hidden, ref_hidden = (None if x is None else x.reshape(rows, x.shape[-1]) for x in (hidden, ref_hidden))
    stats, _ = torch.ops.minirlhf.linear_token_stats(
        hidden,
        weight,
        targets.reshape(-1).long().contiguous(),
        ref_hidden,
        ref_weight,
        float(temperature),
        ignore_index,
        vocab_size,
    )
    return _unpack(stats.reshape(len(stats), *targets.shape))


def _unpack(stats: Float[Tensor, "K ..."]) -> TokenStats:
    parts = [stats[k] for k in range(len(stats))]  # not unbind, whose results cannot be changed in place
    return TokenStats(*parts) if len(parts) == 4 else TokenStats(*parts, None, None)
