"""Which device, and the way there and back: a GPU is never waited for where it need not be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minirlhf import InputError


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; a GPU asked for and absent is an error."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} such GPUs; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def upload(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for a GPU: it fetches the copy from pinned memory in its own time.

    Elsewhere, and for a tensor that is there, this is `x.to(device)`.
    """
    if device.type != "cuda" or x.device.type != "cpu" or not x.numel():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def read(numbers: dict[str, Any]) -> dict[str, float]:
    """Numbers by name, some of them scalars on a device, as Python's: a GPU is waited for once, for all of them.

    None stays None.
    """
    far = {name: x.detach().double() for name, x in numbers.items() if isinstance(x, Tensor) and x.device.type != "cpu"}
    near = {name: x.item() for name, x in numbers.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    fetched = torch.stack(list(far.values())).tolist() if far else []
    return {**numbers, **near, **dict(zip(far, fetched))}


def products(device: torch.device, dtype: str) -> str:
    """What the matrix products of a run are made of: fp32, tf32 (on a GPU, see --matmul) or bf16."""
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == "fp32" and tf32 else dtype
