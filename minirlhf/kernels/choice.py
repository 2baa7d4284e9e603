"""Which implementation runs: the compiled kernels of csrc/, or plain PyTorch."""

import sys

from minirlhf.kernels import build

_said: set[str] = set()  # devices whose missing kernel was mentioned


def use_fused(kernel: str, device: str) -> bool:
    """Whether the fused kernel runs; the first call may build it. `torch.compile` asks once, while it traces."""
    if device not in ("cpu", "cuda") and kernel == "fused":
        raise ValueError(f"kernel='fused' runs on cpu and cuda, got tensors on {device}")
    if device not in ("cpu", "cuda") or kernel == "reference":
        return False
    try:
        build.load(cuda=device == "cuda")
        from minirlhf.kernels import ops  # noqa: F401
    except build.KernelUnavailable as reason:
        if kernel == "fused":
            raise
        if device not in _said:
            _said.add(device)
            print(f"the reference kernel is used, the fused one cannot be: {reason}", file=sys.stderr)
        return False
    return True


# What torch.compiler.assume_constant_result does, which would import two seconds of torch for one attribute.
use_fused._dynamo_marked_constant = True
