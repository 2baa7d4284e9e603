"""The implementations of the op that the property tests run on, and what all of them are compared with.

`reference` is the plain PyTorch of `minirlhf/token_stats.py`, `fused` the compiled CPU kernel, `cuda` the compiled CUDA
kernel where there is a GPU, `simt` the CUDA source itself run on the CPU (tests/simt).
"""

import ctypes
import gc
import inspect
import itertools
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import simt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.commands.certificate import float64_gradients, float64_stats, gradient_tolerance, value_tolerance
from minirlhf.model.token_stats import TokenStats, token_stats

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEEDS = st.integers(0, 2**32 - 1)
IGNORED = -100


@dataclass(frozen=True)
class Implementation:
    """One way to compute the op.

    `examples` is for the random tests. `slack` multiplies the tolerances: plain float32 PyTorch sums a row in float32,
    so it is not held to the kernels' own.
    """

    name: str
    call: Callable[..., TokenStats]
    device: str = "cpu"
    examples: int = 250
    slack: float = 1.0

    def __call__(self, x, t, y=None, **options) -> TokenStats:
        return self.call(x, t, y, **options)

    def __repr__(self) -> str:
        return self.name


def by_name(kernel: str) -> Callable[..., TokenStats]:
    unchecked = inspect.unwrap(token_stats)  # jaxtyping's checks cost more than a small kernel; other tests have them
    return lambda x, t, y=None, **options: unchecked(x, t, y, kernel=kernel, **options)


class Emulated(torch.autograd.Function):
    """The CUDA source run on the CPU, as csrc/cuda/token_stats.cu and minirlhf/fused.py would call it.

    Every launch runs its threads in another order: whatever depends on the order shows as different bits.
    """

    schedules = itertools.count()

    @staticmethod
    def forward(ctx, x, t, y, temperature, ignore_index):
        logits = [None if z is None else Emulated.array(z) for z in (x, y)]
        targets = np.ascontiguousarray(t.numpy().astype(np.int64)).reshape(logits[0].shape[:-1])
        stats, saved = simt.token_stats(
            logits[0], targets, logits[1], temperature, ignore_index, seed=next(Emulated.schedules)
        )
        ctx.save_for_backward(x, t, y)
        ctx.rest = logits, targets, saved, temperature, ignore_index
        return torch.from_numpy(stats).reshape(len(stats), *t.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, (logits, targets, saved, temperature, ignore_index) = ctx.saved_tensors[0], ctx.rest
        grads = simt.token_stats_backward(
            g.contiguous().numpy().reshape(len(g), *targets.shape), logits[0], targets, logits[1], saved, temperature,
            ignore_index, *ctx.needs_input_grad[:3:2], seed=next(Emulated.schedules),
        )  # fmt: skip
        dx, dy = (torch.from_numpy(grad).view(x.dtype) for grad in grads)
        wanted = ctx.needs_input_grad
        return dx.reshape(x.shape) if wanted[0] else None, None, dy.reshape(x.shape) if wanted[2] else None, None, None

    @staticmethod
    def array(x):
        """The same memory as numpy, the columns dense, at most two leading dimensions; bfloat16 as its bits."""
        x = x.detach()
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        if x.dim() > 3:
            x = x.flatten(1, -2)
        array = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
        if array.size:
            return array
        # An empty array has strides of 0, unless it is a slice of one that is not.
        return np.empty([max(n, 1) for n in array.shape], array.dtype)[tuple(map(slice, array.shape))]

    @staticmethod
    def stats(x, t, y=None, *, temperature=1.0, ignore_index=IGNORED):
        values = Emulated.apply(x, t, y, temperature, ignore_index).unbind()
        return TokenStats(*values) if y is not None else TokenStats(*values, None, None)


class EmulatedOps:
    """torch.ops.minirlhf, for float32 and float64 tensors, run by the emulator."""

    def __getattr__(self, name):
        def call(*arguments):
            results = getattr(simt, name)(*map(self.converted, arguments), seed=next(Emulated.schedules))
            return results and tuple(map(torch.from_numpy, results))

        return call

    @staticmethod
    def converted(argument):
        if isinstance(argument, torch.dtype):
            return np.float64 if argument == torch.float64 else np.float32
        return Emulated.array(argument) if isinstance(argument, torch.Tensor) else argument


REFERENCE = Implementation("reference", by_name("reference"), examples=25, slack=10)
FUSED = Implementation("fused", by_name("fused"))
CUDA = Implementation("cuda", by_name("fused"), device="cuda")
SIMT = Implementation("simt", Emulated.stats, examples=25)
HAS_GPU = torch.cuda.is_available()
DEVICES = ["cpu", "cuda"] if HAS_GPU else ["cpu"]
no_compiler = pytest.mark.skipif(simt.COMPILER is None, reason="no C++ compiler for the emulated CUDA source")

KERNELS = [FUSED, *([CUDA] if HAS_GPU else []), pytest.param(SIMT, marks=no_compiler)]
ALL = [REFERENCE, *KERNELS]
each = pytest.mark.parametrize("impl", ALL, ids=repr)
each_kernel = pytest.mark.parametrize("impl", KERNELS, ids=repr)


def for_each(_implementations=ALL, **strategies):
    """A random property of every implementation, with as many examples as it is fast."""

    def decorate(law):
        @pytest.mark.parametrize("impl", _implementations, ids=repr)
        def test(impl):
            @settings(deadline=None, max_examples=impl.examples)
            @given(**strategies)
            def holds(**drawn):
                law(impl, **drawn)

            holds()

        test.__doc__ = law.__doc__
        return test

    return decorate


# --- inputs -----------------------------------------------------------------------------------------------------------


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    """Normal logits from a seed."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def randint(high, *shape, seed=0):
    """Targets from a seed."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = ["contiguous", "padded", "sliced", "transposed", "expanded", "every other column"]


def laid_out(x, layout):
    """The same (N, V) logits in memory of another layout; what lies between is NaN, so that reading it shows."""
    n, v = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "padded":  # a vocabulary padded to a multiple of 64
        return torch.full((n, v + 47), NAN, dtype=x.dtype).index_copy(1, torch.arange(v), x)[:, :v]
    if layout == "sliced":  # rows and columns out of the middle: no row starts aligned
        wide = torch.full((2 * n + 1, v + 5), NAN, dtype=x.dtype)
        wide[1::2, 3 : 3 + v] = x
        return wide[1::2, 3 : 3 + v]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "expanded":  # all rows are the first
        return x[:1].expand(n, v)
    wide = torch.full((n, 2 * v), NAN, dtype=x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


def moved(x, device):
    """The same tensor on a device, with its strides and what lies between: `.to` alone would lay it out anew."""
    if x.device.type == torch.device(device).type:
        return x
    everything = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
    return everything.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def far_apart(rows, columns, stride, dtype):
    """(rows, columns) of zeros, `stride` elements from row to row, in memory that is promised and never filled."""
    size = torch.empty((), dtype=dtype).element_size() * ((rows - 1) * stride + columns)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).as_strided((rows, columns), (stride, 1))


# --- comparison -------------------------------------------------------------------------------------------------------


def float64(x):
    return x.detach().cpu().double().numpy()


def upstream_of(stats, seed):
    """A random gradient for each value that is there, one in six of them 0."""
    rng = np.random.default_rng(seed)
    values = [value for value in stats if value is not None]
    g = rng.normal(size=(len(values), *values[0].shape)) * (rng.random((len(values), *values[0].shape)) > 1 / 6)
    return torch.from_numpy(g).to(values[0].device, values[0].dtype)


def gradients(impl, x, t, y=None, upstream=None, seed=0, **options):
    """The values stacked to (K, ...), their upstream gradient, and the gradients of x and y (None without y)."""
    leaves = [moved(z.detach(), impl.device).requires_grad_() for z in (x, y) if z is not None]
    assert [leaf.stride() for leaf in leaves] == [z.stride() for z in (x, y) if z is not None]
    stats = [value for value in impl(leaves[0], t.to(impl.device), *leaves[1:], **options) if value is not None]
    upstream = upstream_of(stats, seed) if upstream is None else moved(upstream, impl.device)
    grads = torch.autograd.grad(stats, leaves, list(upstream))
    return torch.stack(stats).detach().cpu(), upstream.cpu(), [g.cpu() for g in grads]


def assert_close(got, want, tolerance, what):
    """Within tolerance, infinities and NaN in the same places; else the worst place by name."""
    with np.errstate(invalid="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        error = np.where(same, 0.0, np.abs(got - want))
    error = np.where(np.isfinite(error), error, np.inf)
    if (bad := error > tolerance).any():
        worst = np.unravel_index(np.argmax(np.where(bad, error / np.maximum(tolerance, 1e-300), 0)), error.shape)
        where = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{what}{where}: got {got[worst]!r}, want {want[worst]!r}, {bad.sum()} of {bad.size} are off by more than "
            f"the tolerance, here {np.broadcast_to(tolerance, error.shape)[worst]:.2e}"
        )


def check(impl, x, t, y=None, *, temperature=1.0, ignore_index=IGNORED, upstream=None, seed=0):
    """Values and gradients of an implementation against float64 on the same rounded logits.

    No tolerance is loosened for large logits but those of the plain PyTorch, which rounds x / T.
    Returns the values (K, ...) and the gradients for more to be asked of them.
    """
    stats, g, grads = gradients(
        impl, x, t, y, upstream=upstream, seed=seed, temperature=temperature, ignore_index=ignore_index
    )
    v, dtype = x.shape[-1], x.dtype
    assert stats.shape[1:] == t.shape
    assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rows = [None if z is None else float64(z).reshape(-1, v) for z in (x, y)]
    t64, g64 = t.reshape(-1).numpy(), float64(g).reshape(len(stats), -1)
    loose = 0.0
    if impl.slack > 1 and t.numel():
        size = max(np.abs(r[np.isfinite(r)]).max(initial=1) for r in rows if r is not None)
        loose = size / temperature * (2e-7 if dtype != torch.float64 else 1e-15)
    want = float64_stats(rows[0], t64, rows[1], temperature, ignore_index)
    assert_close(
        float64(stats).reshape(len(stats), -1), want, impl.slack * (value_tolerance(want, dtype) + loose), "value"
    )
    for name, got, exact, z in zip(
        ("dx", "dy"), grads, float64_gradients(g64, rows[0], t64, rows[1], temperature, ignore_index), (x, y)
    ):
        assert got.shape == z.shape
        assert got.dtype == z.dtype
        tolerance = gradient_tolerance(exact, g64, want, dtype, temperature)
        if tolerance.size:
            tolerance = impl.slack * (tolerance + loose * np.abs(g64).max(0)[:, None] / temperature)
        assert_close(float64(got).reshape(-1, v), exact, tolerance, name)
    return stats, grads


# --- memory -----------------------------------------------------------------------------------------------------------

CLEAR = Path("/proc/self/clear_refs")


def peak_extra_bytes(function, device="cpu"):
    """The most memory in use at any time during function() beyond what was in use before, and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    if not CLEAR.exists():
        pytest.skip("peak memory is read from Linux's /proc")
    gc.collect()
    if "minirlhf.kernels.ops" in sys.modules:
        sys.modules["minirlhf.kernels.ops"].forget_workspace()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that malloc kept would be used again, and not be seen
    CLEAR.write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    result = function()
    return _status("VmHWM") - before, result


def _status(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
