"""What every training loop shares: the optimiser, its schedule, the end of a step, and when to evaluate.

A loop shows each of its steps: gradients add up over microbatches, `clip_and_read` looks at what came out, and the
optimiser steps.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minirlhf.devices import read
from minirlhf.run.folder import Run


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's two groups: matrices and embeddings decay, biases and layer norms do not (as nanoGPT does)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(weight_decay: float, *networks: tuple[nn.Module, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with GPT-3's β₂ = 0.95 (Brown et al. 2020, appendix B).

    Args:
        weight_decay: of matrices and embeddings.
        networks: each with its own peak learning rate.
    """
    groups = [{**g, "lr": lr, "peak": lr} for network, lr in networks for g in decay_groups(network, weight_decay)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def cosine_lr(step: int, steps: int, peak: float, warmup: int, floor: float = 0.1) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor` · peak (Loshchilov & Hutter 2017, eq. 5).

    Args:
        step: from 0; the first step already moves.
        steps: in the whole run.
        peak: highest learning rate.
        warmup: steps until the peak.
        floor: share of the peak that is left at the end.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def schedule(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int) -> float:
    """Set this step's learning rate, `cosine_lr` of each group's peak; return that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = cosine_lr(step, steps, group["peak"], warmup)
    return optimizer.param_groups[0]["lr"]


def clip_and_read(
    run: Run,
    step: int,
    networks: Sequence[nn.Module],
    max_grad_norm: float,
    numbers: dict[str, Tensor],
) -> dict[str, float]:
    """Scale each network's gradients down to `max_grad_norm`; return the step's numbers as Python's, read at once.

    Args:
        run: stops where a number is not finite, before the weights are touched.
        step: for its message.
        networks: clipped one by one; the first one's norm is returned as "grad_norm".
        max_grad_norm: highest norm that is left.
        numbers: scalars on the device; those that are losses, by their name, must be finite, and so must the gradient.
    """
    norms = [torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm) for network in networks]
    seen = read({**numbers, "grad_norm": norms[0]})
    losses = {name: value for name, value in seen.items() if name.endswith(("loss", "nll"))}
    run.require_finite(step, **losses, gradient=seen["grad_norm"])
    return seen


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether something that comes every so many steps, and after the last, comes after this one."""
    return (step + 1) % every == 0 or step + 1 == steps
