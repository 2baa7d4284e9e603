"""The compiled kernels of csrc/ seen from Python: shapes for tracing, gradients, and logits that are never held whole.

Importing this builds or loads the kernels and registers torch.ops.minirlhf; `minirlhf.model.token_stats` does so when a
caller wants them, and explains the arguments, which `minirlhf.kernels.arguments` checks.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.kernels import build
from minirlhf.kernels.arguments import check_targets
from minirlhf.kernels.tiles import TILE_ELEMENTS, TILE_LEAST, TILE_ROWS, TILE_SHARE

build.load()
ops = torch.ops.minirlhf

SAVED = 6  # numbers a row keeps for its gradient
STATE = 8  # numbers that describe a row after some of its columns


def _stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on_gpu(x: Tensor) -> bool:
    """There nothing may depend on the values: to look at one, the host would wait for all that is queued before it."""
    return x.device.type == "cuda"


# --- token_stats -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("minirlhf::token_stats")
def _(logits, targets, ref_logits, temperature, ignore_index):
    dtype = _stats_dtype(logits.dtype)
    stats = logits.new_empty((2 if ref_logits is None else 4, *targets.shape), dtype=dtype)
    return stats, logits.new_empty((targets.numel(), SAVED), dtype=dtype)


@torch.library.register_fake("minirlhf::token_stats_backward")
def _(grad_stats, logits, targets, ref_logits, saved, temperature, ignore_index, policy_grad, ref_grad):
    shape = tuple(logits.shape)
    return logits.new_empty(shape if policy_grad else (0,)), logits.new_empty(shape if ref_grad else (0,))


@torch.library.register_fake("minirlhf::token_stats_update_")
def _(state, logits, targets, ref_logits, first_column, temperature, ignore_index):
    return None


@torch.library.register_fake("minirlhf::token_stats_finish")
def _(state, targets, with_ref, temperature, ignore_index, dtype):
    stats = state.new_empty((4 if with_ref else 2, *targets.shape), dtype=dtype)
    return stats, state.new_empty((targets.numel(), SAVED), dtype=dtype)


@torch.library.register_fake("minirlhf::token_stats_gradient_")
def _(
    logits, ref_logits, grad_stats, targets, saved, first_column, temperature, ignore_index, policy_grad, ref_grad
):  # fmt: skip
    return None


def _setup(ctx, inputs, output):
    logits, targets, ref_logits, ctx.temperature, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, ref_logits, output[1])


def _backward(ctx, grad_stats, _):
    logits, targets, ref_logits, saved = ctx.saved_tensors
    wanted, ref_wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    grad, ref_grad = ops.token_stats_backward(
        grad_stats.contiguous(), logits, targets, ref_logits, saved, ctx.temperature, ctx.ignore_index,
        wanted, ref_wanted,
    )  # fmt: skip
    return grad if wanted else None, None, ref_grad if ref_wanted else None, None, None


def _once(ctx, *grads):
    raise RuntimeError("the fused kernel gives first derivatives only; for second ones use kernel='reference'")


torch.library.register_autograd("minirlhf::token_stats", _backward, setup_context=_setup)
torch.library.register_autograd("minirlhf::token_stats_backward", _once)


# --- logits that are never held whole --------------------------------------------------------------------------------


def tiles(rows: int, columns: int, device: str, models: int = 1) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile, row tile after row tile, columns from left to right."""
    height, elements = min(max(rows, 1), TILE_ROWS[device]), TILE_ELEMENTS[device]
    if device != "cpu":
        elements = min(elements, max(rows * columns // TILE_SHARE, TILE_LEAST))
    width = max(elements // height // models, 256)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


_kept = threading.local()


def _workspace(like: Tensor, elements: int) -> Tensor:
    """Memory for tiles. On the CPU a thread keeps its own: fresh pages cost more than the kernel that fills them."""
    if like.device.type != "cpu":
        return like.new_empty(elements)
    kept = getattr(_kept, "workspace", None)
    if kept is None or kept.numel() < elements * like.element_size():
        with torch.inference_mode(False):  # else it could not be written to after inference
            kept = _kept.workspace = torch.empty(elements * like.element_size(), dtype=torch.uint8)
    return kept[: elements * like.element_size()].view(like.dtype)


def forget_workspace() -> None:
    """Give the workspace that this thread keeps back; the next call takes another."""
    _kept.__dict__.clear()


def _step(columns: slice) -> int:
    """From one row of a tile to the next: a multiple of 64, since products are slower into rows that are not aligned.

    With 50257 columns, on a CPU and in fp32, a quarter slower.
    """
    return -(-(columns.stop - columns.start) // 64) * 64


class _Head:
    """hidden @ weight.T, a tile at a time, each in the place of the one before."""

    def __init__(self, hidden: Tensor, weight: Tensor, workspace: Tensor):
        self.hidden, self.weight, self.workspace = hidden, weight, workspace

    def logits(self, rows: slice, columns: slice) -> Tensor:
        height, width, step = rows.stop - rows.start, columns.stop - columns.start, _step(columns)
        tile = self.workspace[: height * step].view(height, step)[:, :width]
        return torch.mm(self.hidden[rows], self.weight[columns].t(), out=tile)


def _heads(hidden, weight, ref_hidden, ref_weight, vocab_size) -> tuple[list[tuple[slice, slice]], _Head, _Head | None]:
    """The tiles of the columns that count, and what computes them; policy and reference share the workspace."""
    models = 1 if ref_hidden is None else 2
    columns = len(weight) if vocab_size is None else vocab_size
    every = list(tiles(len(hidden), columns, hidden.device.type, models))
    largest = max(((r.stop - r.start) * _step(c) for r, c in every), default=0)
    workspace = _workspace(hidden, models * largest)
    ref = None if ref_hidden is None else _Head(ref_hidden, ref_weight, workspace[largest:])
    return every, _Head(hidden, weight, workspace[:largest]), ref


@torch.library.custom_op("minirlhf::linear_token_stats", mutates_args=())
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(N, D), (V, D), (N,) -> stats (K, N) and saved (N, 6)."""
    check_targets(targets, len(weight) if vocab_size is None else vocab_size, ignore_index)
    counted = _counted_rows(targets, ignore_index)
    if counted is not None:
        some = linear_token_stats(
            hidden[counted], weight, targets[counted], None if ref_hidden is None else ref_hidden[counted], ref_weight,
            temperature, ignore_index, vocab_size,
        )  # fmt: skip
        stats = some[0].new_zeros(len(some[0]), len(targets)).index_copy_(1, counted, some[0])
        return stats, some[1].new_zeros(len(targets), SAVED).index_copy_(0, counted, some[1])
    with_ref = ref_hidden is not None
    state = hidden.new_empty((len(targets), STATE), dtype=torch.float64)
    with torch.autocast(hidden.device.type, enabled=False):
        every, policy, ref = _heads(hidden, weight, ref_hidden, ref_weight, vocab_size)
        for rows, columns in every:
            ref_tile = None if ref is None else ref.logits(rows, columns)
            ops.token_stats_update_(
                state[rows], policy.logits(rows, columns), targets[rows], ref_tile, columns.start,
                temperature, ignore_index,
            )  # fmt: skip
    return ops.token_stats_finish(state, targets, with_ref, temperature, ignore_index, _stats_dtype(hidden.dtype))


@linear_token_stats.register_fake
def _(hidden, weight, targets, ref_hidden, ref_weight, temperature, ignore_index, vocab_size=None):
    dtype = _stats_dtype(hidden.dtype)
    stats = hidden.new_empty((2 if ref_hidden is None else 4, targets.shape[0]), dtype=dtype)
    return stats, hidden.new_empty((targets.shape[0], SAVED), dtype=dtype)


@torch.library.custom_op("minirlhf::linear_token_stats_backward", mutates_args=())
def linear_token_stats_backward(
    grad_stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    saved: Tensor,
    temperature: float,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients (N, D) and (V, D). Each tile of logits is computed again and becomes its own gradient in place.

    With G = ∂loss/∂logits: ∂loss/∂hidden = G · weight, ∂loss/∂weight = Gᵀ · hidden; sums over tiles are fp32 or wider.
    Only the KL needs the reference's logits. On a CPU they are left out where no KL has a gradient; on a GPU, where
    this cannot be looked at, they are computed whenever a reference was given.
    """
    counted = _counted_rows(targets, ignore_index)
    if counted is not None:
        d_some, d_weight = linear_token_stats_backward(
            grad_stats[:, counted], hidden[counted], weight, targets[counted],
            None if ref_hidden is None else ref_hidden[counted], ref_weight, saved[counted], temperature, ignore_index,
            hidden_grad, weight_grad, vocab_size,
        )  # fmt: skip
        return (hidden.new_zeros(hidden.shape).index_copy_(0, counted, d_some) if hidden_grad else d_some), d_weight
    wide = _stats_dtype(hidden.dtype)
    if ref_hidden is not None and not _on_gpu(hidden) and not bool(grad_stats[3].any()):
        grad_stats, ref_hidden = grad_stats[:2], None
    ignored = (targets == ignore_index)[:, None] if _on_gpu(hidden) else None
    if ignored is not None:
        hidden = hidden.masked_fill(ignored, 0.0)  # all rows are in the product, and NaN times a gradient of 0 is NaN
    one_row_tile = len(targets) <= TILE_ROWS[hidden.device.type]
    make = torch.empty if len(targets) else torch.zeros  # the first tile of a sum is written, the others are added
    d_hidden = make(hidden.shape if hidden_grad else (0,), dtype=wide, device=hidden.device)
    d_weight = make(
        weight.shape if weight_grad else (0,), dtype=weight.dtype if one_row_tile else wide, device=weight.device
    )
    if weight_grad and vocab_size is not None:
        d_weight[vocab_size:] = 0  # no tile reaches what pads the vocabulary
    with torch.autocast(hidden.device.type, enabled=False):
        every, policy, ref = _heads(hidden, weight, ref_hidden, ref_weight, vocab_size)
        for rows, columns in every:
            ref_tile = None if ref is None else ref.logits(rows, columns)
            tile = policy.logits(rows, columns)
            ops.token_stats_gradient_(
                tile, ref_tile, grad_stats[:, rows].contiguous(), targets[rows], saved[rows], columns.start,
                temperature, ignore_index, True, False,
            )  # fmt: skip
            if hidden_grad:
                _accumulate(d_hidden[rows], tile, weight[columns], first=columns.start == 0)
            if weight_grad:
                _accumulate(d_weight[columns], tile.t(), hidden[rows], first=rows.start == 0)
    if ignored is not None and hidden_grad:
        d_hidden.masked_fill_(ignored, 0.0)  # whatever stands in the weight
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype)


def _counted_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Which rows count, or None for all. The others stay out of the products: NaN times a gradient of 0 is NaN.

    On a GPU all rows go through them, since it would have to be waited for to count: the kernels read no ignored row.
    """
    if _on_gpu(targets):
        return None
    counted = targets != ignore_index
    return None if bool(counted.all()) else counted.nonzero().squeeze(1)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b. Where the total is wider than the factors, a GPU adds up in its type; on a CPU each product is
    rounded once before it is added.
    """
    if total.dtype != a.dtype and _on_gpu(a):
        if first:
            torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    elif total.dtype != a.dtype:
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


@linear_token_stats_backward.register_fake
def _(
    grad_stats, hidden, weight, targets, ref_hidden, ref_weight, saved, temperature, ignore_index, hidden_grad,
    weight_grad, vocab_size=None,
):  # fmt: skip
    return (
        hidden.new_empty(tuple(hidden.shape) if hidden_grad else (0,)),
        weight.new_empty(tuple(weight.shape) if weight_grad else (0,)),
    )


def _linear_setup(ctx, inputs, output):
    hidden, weight, targets, ref_hidden, ref_weight, ctx.temperature, ctx.ignore_index, ctx.vocab_size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, targets, ref_hidden, ref_weight, output[1])


def _linear_backward(ctx, grad_stats, _):
    hidden, weight, targets, ref_hidden, ref_weight, saved = ctx.saved_tensors
    wanted, weight_wanted = ctx.needs_input_grad[:2]
    d_hidden, d_weight = linear_token_stats_backward(
        grad_stats.contiguous(), hidden, weight, targets, ref_hidden, ref_weight, saved, ctx.temperature,
        ctx.ignore_index, wanted, weight_wanted, ctx.vocab_size,
    )  # fmt: skip
    return d_hidden if wanted else None, d_weight if weight_wanted else None, *[None] * 6


linear_token_stats.register_autograd(_linear_backward, setup_context=_linear_setup)
linear_token_stats_backward.register_autograd(_once)
