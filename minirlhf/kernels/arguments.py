"""What the ops take, checked before any of them runs: types, shapes, devices, temperature, targets."""

from typing import Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["auto", "fused", "reference"]


def autocast_is_on(x: Tensor) -> bool:
    """Whether products of x would run in autocast's type."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def check_kernel_name(kernel: str) -> None:
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel must be one of {', '.join(get_args(Kernel))}, got {kernel!r}")


def check_logits(logits, targets, ref_logits, temperature) -> None:
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
    check_rest("logits'", logits, targets, temperature, ref_logits=ref_logits)


def check_linear(hidden, weight, targets, ref_hidden, ref_weight, vocab_size, temperature) -> None:
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight belong together; give both or neither")
    check_rest("hidden's", hidden, targets, temperature, weight=weight, ref_hidden=ref_hidden, ref_weight=ref_weight)
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
        if mixed and not autocast_is_on(states):
            raise TypeError(
                f"{ref}hidden and {ref}weight must have one dtype, that of weight, {weight.dtype}, "
                f"got {states.dtype} and {head.dtype}"
            )
        if ref and torch.is_grad_enabled() and (states.requires_grad or head.requires_grad):
            raise ValueError("no gradient is taken in the reference; compute ref_hidden under torch.no_grad()")


def check_rest(owner, x, targets, temperature, **others) -> None:
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer token ids, got {targets.dtype}")
    for name, other in {"targets": targets, **others}.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on the {owner} device {x.device}, got {other.device}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature must lie between 1e-30 and 1e30, got {temperature}")


def check_targets(targets, vocabulary, ignore_index) -> None:
    """On the CPU only: on a GPU the look would wait for it, and the fused kernel makes such a target's log-prob NaN."""
    if targets.device.type == "cpu" and targets.numel():
        targets = targets.long()  # in a narrow type the vocabulary's size itself would wrap around
        wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
        if wrong.any():
            raise ValueError(f"target {targets[wrong][0].item()} is outside the vocabulary [0, {vocabulary})")
