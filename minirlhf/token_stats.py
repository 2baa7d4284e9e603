"""Log-prob, entropy and exact KL of every token, from logits: the one place where they are computed.

Every loss of the project (SFT, DPO, PPO), the log-probs of every sample and the evaluation go through `token_stats`, so
that there is a single answer to what a log-prob is: which temperature, which masked tokens, which precision.

    p = softmax(x / T),  q = softmax(y / T)            x: policy logits, y: reference logits, T: temperature

    logprob = log p_t                                  t: the target
    entropy = -Σ_i p_i log p_i
    KL(p‖q) =  Σ_i p_i (log p_i - log q_i)             summed over the whole vocabulary: exact, no sampling noise
"""

import sys
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Kernel = Literal["auto", "fused", "reference"]


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

    def spread(values: Tensor | None) -> Tensor | None:
        """(N,) counted values back into the shape of the targets, 0 where nothing counts."""
        if values is None or everything:
            return values if values is None else values.reshape(targets.shape)
        return values.new_zeros(targets.shape).masked_scatter(counted, values)

    return TokenStats(spread(logprobs), spread(entropy), spread(ref_logprobs), spread(kl))


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
    _check_kernel(kernel)
    _check(logits, targets, ref_logits, temperature)
    if not _use_fused(kernel, logits.device.type):
        _check_targets(targets, logits.shape[-1], ignore_index)
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
    _check_kernel(kernel)
    _check_linear(hidden, weight, targets, ref_hidden, ref_weight, vocab_size, temperature)
    if not _use_fused(kernel, hidden.device.type):
        weight, ref_weight = (w if w is None else w[:vocab_size] for w in (weight, ref_weight))
        _check_targets(targets, weight.shape[0], ignore_index)
        return _linear_reference(hidden, weight, targets, ref_hidden, ref_weight, temperature, ignore_index)
    if _autocast(hidden):
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


# --- which kernel -----------------------------------------------------------------------------------------------------


@torch._dynamo.assume_constant_result
def _use_fused(kernel: str, device: str) -> bool:
    """Whether the fused kernel runs; the first call may build it. `torch.compile` asks once, while it traces."""
    if device not in ("cpu", "cuda") and kernel == "fused":
        raise ValueError(f"kernel='fused' runs on cpu and cuda, got tensors on {device}")
    if device not in ("cpu", "cuda") or kernel == "reference":
        return False
    from minirlhf import kernels  # here: who asks for the reference needs no compiler

    try:
        kernels.load(cuda=device == "cuda")
        from minirlhf import fused  # noqa: F401  registers the ops
    except kernels.KernelUnavailable as reason:
        if kernel == "fused":
            raise
        if device not in _said:
            _said.add(device)
            print(f"the reference kernel is used, the fused one cannot be: {reason}", file=sys.stderr)
        return False
    return True


_said: set[str] = set()  # devices whose missing kernel was mentioned


def _autocast(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def _unpack(stats: Float[Tensor, "K ..."]) -> TokenStats:
    parts = [stats[k] for k in range(len(stats))]  # not unbind, whose results cannot be changed in place
    return TokenStats(*parts) if len(parts) == 4 else TokenStats(*parts, None, None)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_kernel(kernel: str) -> None:
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel must be one of {', '.join(get_args(Kernel))}, got {kernel!r}")


def _check(logits, targets, ref_logits, temperature) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if ref_logits is not None and not ref_logits.is_floating_point():
        raise TypeError(f"ref_logits must be floating point, got {ref_logits.dtype}")
    if ref_logits is not None and ref_logits.dtype != logits.dtype:
        raise TypeError(f"ref_logits must have the logits' dtype {logits.dtype}, got {ref_logits.dtype}")
    if logits.dim() < 1 or targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must have shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise ValueError(f"ref_logits must have shape {tuple(logits.shape)}, got {tuple(ref_logits.shape)}")
    _check_rest("logits'", logits, targets, temperature, ref_logits=ref_logits)


def _check_linear(hidden, weight, targets, ref_hidden, ref_weight, vocab_size, temperature) -> None:
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight belong together; give both or neither")
    _check_rest("hidden's", hidden, targets, temperature, weight=weight, ref_hidden=ref_hidden, ref_weight=ref_weight)
    for states, head, ref in ((hidden, weight, ""), (ref_hidden, ref_weight, "ref_")):
        if states is None:
            continue
        for name, x in (("hidden", states), ("weight", head)):
            if not x.is_floating_point():
                raise TypeError(f"{ref}{name} must be floating point, got {x.dtype}")
        if vocab_size is not None and head.dim() == 2 and not 1 <= vocab_size <= head.shape[0]:
            raise ValueError(f"vocab_size must lie in [1, {head.shape[0]}], the rows of {ref}weight, got {vocab_size}")
        if head.dim() != 2 or (vocab_size is None and head.shape[0] != weight.shape[0]):
            rows = "V" if head is weight else weight.shape[0]
            raise ValueError(f"{ref}weight must have shape ({rows}, D), got {tuple(head.shape)}")
        want = (*targets.shape, head.shape[1])
        if tuple(states.shape) != want:
            raise ValueError(f"{ref}hidden must have shape {want}, got {tuple(states.shape)}")
        mixed = states.dtype != head.dtype or head.dtype != weight.dtype
        if mixed and not _autocast(states):
            raise TypeError(
                f"{ref}hidden and {ref}weight must have one dtype, that of weight, {weight.dtype}, "
                f"got {states.dtype} and {head.dtype}"
            )
        if ref and torch.is_grad_enabled() and (states.requires_grad or head.requires_grad):
            raise ValueError("no gradient is taken in the reference; compute ref_hidden under torch.no_grad()")


def _check_rest(owner, x, targets, temperature, **others) -> None:
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer token ids, got {targets.dtype}")
    for name, other in {"targets": targets, **others}.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on the {owner} device {x.device}, got {other.device}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature must lie between 1e-30 and 1e30, got {temperature}")


def _check_targets(targets, vocabulary, ignore_index) -> None:
    """On the CPU only: on a GPU the look would wait for it, and the fused kernel makes such a target's log-prob NaN."""
    if targets.device.type == "cpu" and targets.numel():
        targets = targets.long()  # in a narrow type the vocabulary's size itself would wrap around
        wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
        if wrong.any():
            raise ValueError(f"target {targets[wrong][0].item()} is outside the vocabulary [0, {vocabulary})")


if __name__ == "__main__":
    from minirlhf.certificate import main

    main()
