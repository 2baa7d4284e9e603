"""Attention of packed rows on a GPU, by FlexAttention: blocks in which no token looks at another are not computed.

`data.batches.may_look` is the definition. As a dense mask it takes B·T² bytes, and attention under it all the
arithmetic of looking everywhere; here the mask is a function that the kernel evaluates, and a list of blocks, made on
the device.

Source: Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels".
"""

import functools
import importlib.util
import sys
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

FROM = 256  # tokens per row: below, two blocks each way, a dense mask costs nothing that compiling would earn back
HEAD = 16  # numbers per head, at least: what the kernel's products take


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """FlexAttention through torch.compile, which is imported here: it takes two seconds."""
    return torch.compile(flex_attention)


def blocks_of(parts: Int[Tensor, "B T"]) -> BlockMask:
    """Which blocks of 128 × 128 tokens hold a token that may look at another, in rows laid out by `batches.pack`."""
    B, T = parts.shape
    return create_block_mask(
        lambda b, head, query, key: (key <= query) & ((parts[b, key] == 0) | (parts[b, key] == parts[b, query])),
        B, None, T, T, device=parts.device,
    )  # fmt: skip


def attention(
    q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H T d"], v: Float[Tensor, "B H T d"], blocks: BlockMask
) -> Float[Tensor, "B H T d"]:
    """softmax(q kᵀ / √d) v over the tokens that a query may look at."""
    return compiled()(q, k, v, block_mask=blocks)


def usable(T: int, d: int, trial: Callable[[], None]) -> bool:
    """Whether rows of T tokens under heads of d numbers go this way; where they cannot, one line says why.

    Args:
        T, d: see above.
        trial: attention of such rows, forward and backward: it compiles what comes after, or raises.
    """
    return T >= FROM and d >= HEAD and d & (d - 1) == 0 and _compiles(d, trial)


_verdicts: dict[int, bool] = {}


def _compiles(d: int, trial: Callable[[], None]) -> bool:
    if d not in _verdicts:
        reason = None if importlib.util.find_spec("triton") else "triton is not installed"
        try:
            if reason is None:
                trial()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever compiling may end with
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        _verdicts[d] = reason is None
        if reason is not None:
            print(f"packed rows take dense masks, FlexAttention cannot be compiled: {reason}", file=sys.stderr)
    return _verdicts[d]
