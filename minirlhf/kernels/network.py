"""The network's attention and GELU where torch's own operators are slow: fused ones on a CPU, blocks on a GPU.

`minirlhf.model.gpt` has the plain versions, which are the definitions; the functions here return None where those run.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from minirlhf.kernels import flex
from minirlhf.kernels.choice import use_fused

ops = torch.ops.minirlhf


def fast_attention(
    qkv: Float[Tensor, "B T E"], n_head: int, attend: Bool[Tensor, "B 1 T T"] | BlockMask | None, kernel: str
) -> Float[Tensor, "B T D"] | None:
    """Attention by a kernel of its own, or None where plain PyTorch's runs.

    Args:
        qkv: (B, T, E = 3D), queries, keys and values, in each of them head after head.
        n_head: heads.
        attend: who looks at whom, a mask or the blocks of `minirlhf.kernels.flex`.
        kernel: auto, fused or reference.
    """
    if runs_fused(qkv, kernel):
        mask = None if attend is None else attend[:, 0]
        return (Attention.apply if torch.is_grad_enabled() else ops.attention)(qkv, n_head, mask)
    if isinstance(attend, BlockMask):
        q, k, v = qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        return flex.attention(q, k, v, attend).transpose(1, 2).flatten(2)
    if qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu":  # its gradient takes up to five times as long there
        with torch.autocast("cpu", enabled=False):  # which would turn it back
            q, k, v = qkv.float().unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=attend is None)
        return mixed.transpose(1, 2).flatten(2).to(qkv.dtype)
    return None


def fast_gelu(x: Float[Tensor, "*n"], kernel: str) -> Float[Tensor, "*n"] | None:
    """GELU by a kernel of its own, or None where plain PyTorch's runs."""
    if not runs_fused(x, kernel):
        return None
    return (Gelu.apply if torch.is_grad_enabled() else ops.gelu)(x)


def runs_fused(x: Tensor, kernel: str) -> bool:
    """Whether the fused kernels take x: float32 and bfloat16 on a CPU, where torch's own operators take up to five
    times as long; and not where torch.compile makes operators of its own.
    """
    here = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()
    return here and use_fused(kernel, "cpu")


class Gelu(torch.autograd.Function):
    """GELU in its tanh form, on the CPU; keeps its input alone."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return ops.gelu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return ops.gelu_backward(grad, *ctx.saved_tensors)


class Attention(torch.autograd.Function):
    """Attention of whole sequences, on the CPU; keeps what it is given alone."""

    @staticmethod
    def forward(ctx, qkv: Tensor, n_head: int, attend: Tensor | None) -> Tensor:
        ctx.save_for_backward(qkv, attend)
        ctx.n_head = n_head
        return ops.attention(qkv, n_head, attend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        qkv, attend = ctx.saved_tensors
        return ops.attention_backward(grad, qkv, ctx.n_head, attend), None, None
