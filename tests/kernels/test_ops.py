"""The fused op inside PyTorch: opcheck, torch.compile, autocast, what it copies and keeps, direct calls, tiles."""

import inspect
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from conftest import HELPERS
from implementations import (
    DEVICES,
    IGNORED,
    INF,
    NAN,
    EmulatedOps,
    each_kernel,
    peak_extra_bytes,
    randint,
    randn,
)
from torch.library import opcheck

from minirlhf.kernels import build as kernels
from minirlhf.kernels import choice
from minirlhf.model import token_stats
from minirlhf.model.token_stats import token_stats  # noqa: F811

unchecked = inspect.unwrap(token_stats)  # without the type checker that the test session wraps around it


@pytest.fixture(scope="module")
def ops():
    """torch.ops.minirlhf, built for every device there is: who calls an op directly finds the CPU's alone."""
    for device in DEVICES:
        token_stats(torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device), kernel="fused")
    return torch.ops.minirlhf


def fused(x, t, y=None, **options):
    return unchecked(x, t, y, kernel="fused", **options)


# --- PyTorch's own checks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("with_reference", [False, True])
def test_opcheck(ops, device, dtype, leading, with_reference):
    x, y = (randn(*leading, 9, seed=s, dtype=dtype).to(device) for s in (1, 2))
    t = randint(9, *leading, seed=3).to(device)
    y = y if with_reference else None
    stats, saved = ops.token_stats(x, t, y, 0.7, IGNORED)
    grad = torch.randn_like(stats)
    opcheck(ops.token_stats_backward.default, (grad, x, t, y, saved, 0.7, IGNORED, True, with_reference))
    x.requires_grad_()
    if with_reference:
        y.requires_grad_()
    opcheck(ops.token_stats.default, (x, t, y, 0.7, IGNORED))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_tiles(ops, device, with_reference, dtype):
    x, y = (randn(3, 9, seed=s, dtype=dtype).to(device) for s in (1, 2))
    t = torch.tensor([0, IGNORED, 8], device=device)
    state = torch.zeros(3, 8, dtype=torch.float64, device=device)
    y = y if with_reference else None
    opcheck(ops.token_stats_update_.default, (state, x, t, y, 0, 0.7, IGNORED))
    ops.token_stats_update_(state, x, t, y, 0, 0.7, IGNORED)
    opcheck(ops.token_stats_finish.default, (state, t, with_reference, 0.7, IGNORED, dtype))
    stats, saved = ops.token_stats_finish(state, t, with_reference, 0.7, IGNORED, dtype)
    grad = torch.randn_like(stats)
    opcheck(ops.token_stats_gradient_.default, (x, y, grad, t, saved, 0, 0.7, IGNORED, True, with_reference))


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile(ops, device):
    """In a process of its own: torch.compile cannot trace through the type checkers of this one."""
    command = [sys.executable, str(HELPERS / "compiled.py"), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


# --- autocast, no gradient, grad of grad ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(device, kernel, dtype):
    x, y, t = randn(3, 33, seed=1, dtype=dtype), randn(3, 33, seed=2, dtype=dtype), torch.tensor([0, 5, 32])
    x, y, t = x.to(device).requires_grad_(), y.to(device).requires_grad_(), t.to(device)
    plain = unchecked(x, t, y, kernel=kernel)
    with torch.autocast(device, torch.bfloat16):
        cast = unchecked(x, t, y, kernel=kernel)
    for a, b in zip(plain, cast):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)
    for a, b in zip(
        torch.autograd.grad(sum(v.sum() for v in plain), (x, y)),
        torch.autograd.grad(sum(v.sum() for v in cast), (x, y)),
    ):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)


@each_kernel
def test_no_grad_and_inference_mode(impl):
    x, y, t = (z.to(impl.device) for z in (randn(3, 33, seed=1), randn(3, 33, seed=2), torch.tensor([0, 5, 32])))
    want = impl(x, t, y)
    x.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for a, b in zip(impl(x, t, y), want):
                assert not a.requires_grad
                assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_of_the_gradient_is_refused_rather_than_wrong(device):
    x, t = randn(3, 7, seed=1).to(device).requires_grad_(), torch.tensor([0, 5, 6], device=device)
    stats = fused(x, t)
    with pytest.raises(RuntimeError, match="first derivatives"):
        (grad,) = torch.autograd.grad(stats.entropy.sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum() + x.sum(), x)  # connected to x even if the gradient is not


# --- what is read, copied and kept ------------------------------------------------------------------------------------

ROWS, VOCAB, PADDED = 300, 50257, 50304


@each_kernel
@pytest.mark.parametrize("view", ["padded to 50304 columns", "logits[:, :-1]", "both, and a reference"])
def test_views_are_not_copied(impl, view):
    """Beyond the gradient itself, forward and backward take less than a twentieth of a copy."""
    base = torch.zeros(3, ROWS // 3 + 1, PADDED, dtype=torch.bfloat16, device=impl.device)
    base[..., ::97] = 1
    x = {
        "padded to 50304 columns": base.view(-1, PADDED)[:, :VOCAB],
        "logits[:, :-1]": base[:, :-1],
        "both, and a reference": base[:, :-1, :VOCAB],
    }[view]
    x = x.detach().requires_grad_()
    t = randint(VOCAB, *x.shape[:-1], seed=1).to(impl.device)
    y = x.detach() if "reference" in view else None
    impl(x[:1], t[:1], y if y is None else y[:1]).logprobs.sum().backward()  # whatever happens only once has happened
    one_copy = x.numel() * x.element_size()
    extra, stats = peak_extra_bytes(lambda: impl(x, t, y), impl.device)
    assert extra < one_copy / 20
    g = torch.ones_like(stats.logprobs)
    x.grad = None
    extra, grads = peak_extra_bytes(
        lambda: torch.autograd.grad([stats.logprobs, stats.entropy], x, [g, g]), impl.device
    )
    assert grads[0].shape == x.shape
    assert extra < one_copy * 1.05 + 2**22  # and what is left of the huge pages at both ends


@each_kernel
def test_a_few_numbers_a_row_are_saved(impl):
    """What waits for the backward besides the logits themselves: no second table of (N, V)."""
    x, y, t = (z.to(impl.device) for z in (randn(5, 4096, seed=1), randn(5, 4096, seed=2), torch.arange(5)))
    x, y, kept = x.requires_grad_(), y.requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):
        impl(x, t, y)
    assert kept
    for z in kept:
        assert z.numel() <= 5 * 8 or z.data_ptr() in (x.data_ptr(), y.data_ptr())


# --- direct calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_op_itself_refuses_what_would_read_out_of_bounds(ops, device):
    """As safe when called past `token_stats`: nothing reaches a kernel that does not fit."""
    x, t = randn(3, 5).to(device), torch.tensor([0, 1, 2], device=device)
    stats, saved = ops.token_stats(x, t, x, 1.0, IGNORED)

    def forward(x=x, t=t, y=x, temperature=1.0):
        return ops.token_stats(x, t, y, temperature, IGNORED)

    def backward(g=stats, x=x, t=t, y=x, saved=saved):
        return ops.token_stats_backward(g, x, t, y, saved, 1.0, IGNORED, True, True)

    wrong = [
        lambda: forward(x=x.long()),
        lambda: forward(t=t.int()),
        lambda: forward(t=t.float()),
        lambda: forward(t=t[:2]),
        lambda: forward(t=t[:, None]),
        lambda: forward(y=x[:2]),
        lambda: forward(y=x[:, :4]),
        lambda: forward(y=x.double()),
        lambda: forward(y=x.bfloat16()),
        lambda: forward(temperature=0.0),
        lambda: forward(temperature=-1.0),
        lambda: forward(temperature=NAN),
        lambda: forward(x=torch.tensor(1.0, device=device), t=t[0], y=None),
        lambda: backward(g=stats[:2]),
        lambda: backward(g=stats[:, :2]),
        lambda: backward(g=stats.double()),
        lambda: backward(saved=saved[:2]),
        lambda: backward(saved=saved[:, :5]),
        lambda: backward(saved=saved.double()),
        lambda: backward(t=t[:2]),
        lambda: backward(y=x[:2]),
        # Of the right shape, but spread out in memory.
        lambda: forward(t=torch.stack([t, t], 1)[:, 0]),
        lambda: backward(g=stats.t().contiguous().t()),
        lambda: backward(g=torch.zeros((), device=device).expand(4, 3)),
        lambda: backward(saved=saved.t().contiguous().t()),
        lambda: backward(saved=torch.cat([saved, saved], 1)[:, :6]),
    ]
    if device == "cpu":
        wrong += [lambda: forward(t=t + 3), lambda: forward(t=t - 1), lambda: backward(t=t + 3)]
    for i, call in enumerate(wrong):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            call()
        assert "INTERNAL ASSERT" not in str(caught.value), i


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_are_checked_too(ops, device):
    x, t = randn(3, 5).to(device), torch.tensor([0, 1, 2], device=device)
    state = torch.zeros(3, 8, dtype=torch.float64, device=device)
    ops.token_stats_update_(state, x, t, x, 0, 1.0, IGNORED)
    stats, saved = ops.token_stats_finish(state, t, True, 1.0, IGNORED, torch.float32)
    other = x.clone()

    def gradient(x=x, y=other, g=stats, t=t, saved=saved, column=0):
        return ops.token_stats_gradient_(x, y, g, t, saved, column, 1.0, IGNORED, True, True)

    wrong = [
        lambda: ops.token_stats_update_(state[:2], x, t, x, 0, 1.0, IGNORED),
        lambda: ops.token_stats_update_(state[:, :7], x, t, x, 0, 1.0, IGNORED),
        lambda: ops.token_stats_update_(state.float(), x, t, x, 0, 1.0, IGNORED),
        lambda: ops.token_stats_update_(state, x, t[:2], x, 0, 1.0, IGNORED),
        lambda: ops.token_stats_update_(state, x, t, x[:, :4], 0, 1.0, IGNORED),
        lambda: ops.token_stats_update_(state, x, t, x.double(), 0, 1.0, IGNORED),
        lambda: ops.token_stats_update_(state, x, t, x, -1, 1.0, IGNORED),
        lambda: ops.token_stats_finish(state[:2], t, True, 1.0, IGNORED, torch.float32),
        lambda: ops.token_stats_finish(state.float(), t, True, 1.0, IGNORED, torch.float32),
        lambda: ops.token_stats_finish(state, t, True, 1.0, IGNORED, torch.bfloat16),
        lambda: gradient(g=stats[:2]),
        lambda: gradient(g=stats[:, :2]),
        lambda: gradient(saved=saved[:2]),
        lambda: gradient(saved=saved[:, :4]),
        lambda: gradient(t=t[:2]),
        lambda: gradient(y=x[:, :4].clone()),
        lambda: gradient(x=x.bfloat16()),
        lambda: gradient(column=-1),
    ]
    for i, call in enumerate(wrong):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            call()
        assert "INTERNAL ASSERT" not in str(caught.value), i


# --- tiles of columns -------------------------------------------------------------------------------------------------

CUTS = [[], [1], [5], [16], [17, 18], [64, 128, 1000], [1024], [333, 334, 4096], [4098]]


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("with_reference", [False, True])
def test_tiles_give_what_whole_rows_give(ops, impl, dtype, cuts, with_reference):
    """Rows of every kind, cut anywhere: values and gradients to rounding, and the gradients never beside the tile."""
    ops, device = EmulatedOps() if impl.name == "simt" else ops, impl.device
    vocab, rows, temperature = 4099, 9, 0.7
    x, y = (randn(rows, vocab, seed=s, dtype=dtype) * 2 for s in (1, 2))
    t = torch.tensor([0, 1, 16, 1000, 4098, IGNORED, 5, 333, 4097])
    x[1] += torch.arange(vocab) / 100  # the maximum moves with every tile
    y[1] -= torch.arange(vocab) / 50
    x[2, :4000] = y[2, :4000] = -INF  # tiles of nothing but masked tokens
    x[2, 16] = -1
    x[3, 5:] = -INF
    y[4, 77] = -INF  # KL +inf
    x[5] = y[5] = NAN  # ignored
    x[6, 4098] = NAN
    y[7, 0] = INF
    x[8], y[8] = x[8] + 1e4, y[8] - 1e4
    x, y, t = x.to(device), y.to(device) if with_reference else None, t.to(device)
    want, want_saved = ops.token_stats(x, t, y, temperature, IGNORED)
    g = randn(*want.shape, seed=3, dtype=dtype).to(device)
    want_grads = ops.token_stats_backward(g, x, t, y, want_saved, temperature, IGNORED, True, with_reference)

    edges = [0, *cuts, vocab]
    state = torch.full((rows, 8), NAN, dtype=torch.float64, device=device)  # column 0 begins anew
    for first, end in pairwise(edges):
        tile = x[:, first:end].contiguous()
        ref = y[:, first:end].contiguous() if with_reference else None
        before = tile.clone()
        ops.token_stats_update_(state, tile, t, ref, first, temperature, IGNORED)
        assert torch.equal(tile.nan_to_num(7), before.nan_to_num(7))
    stats, saved = ops.token_stats_finish(state, t, with_reference, temperature, IGNORED, dtype)
    close = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(stats, want, equal_nan=True, **close)
    torch.testing.assert_close(saved, want_saved, equal_nan=True, **close)
    for policy_grad, ref_grad in ((True, with_reference), (True, False), (False, with_reference)):
        for first, end in pairwise(edges):
            # In place, within wider tables, one aligned unlike the other: what lies beside the tiles stays.
            width = end - first
            room = [torch.full((rows, width + 3), 5.0, dtype=dtype, device=device) for _ in range(2)]
            tile, ref = (z[:, i : i + width] for i, z in enumerate(room, start=1))
            tile.copy_(x[:, first:end])
            if with_reference:
                ref.copy_(y[:, first:end])
            ops.token_stats_gradient_(
                tile, ref if with_reference else None, g, t, saved, first, temperature, IGNORED, policy_grad, ref_grad
            )
            expected = want_grads[0][:, first:end] if policy_grad else x[:, first:end]
            torch.testing.assert_close(tile, expected, equal_nan=True, **close)
            if with_reference:  # not asked for, it is left as it was
                expected = want_grads[1][:, first:end] if ref_grad else y[:, first:end]
                torch.testing.assert_close(ref, expected, equal_nan=True, **close)
            for i, z in enumerate(room, start=1):
                assert (z[:, :i] == 5).all()
                assert (z[:, i + width :] == 5).all()


# --- kernel names -----------------------------------------------------------------------------------------------------


def test_auto_is_fused_where_it_can_be_built():
    x, t = randn(3, 5003), torch.tensor([0, 1, 2])
    stats = {kernel: torch.stack(token_stats(x, t, kernel=kernel)[:2]) for kernel in ("auto", "fused", "reference")}
    assert torch.equal(stats["auto"], stats["fused"])
    assert not torch.equal(stats["auto"], stats["reference"])  # another order of summation
    torch.testing.assert_close(stats["fused"], stats["reference"], rtol=1e-5, atol=1e-5)


def test_without_a_kernel_auto_says_so_once_and_fused_fails(monkeypatch, capsys):
    def unavailable(cuda=False):
        raise kernels.KernelUnavailable("no C++ compiler was found")

    monkeypatch.setattr(kernels, "load", unavailable)
    monkeypatch.setattr(choice, "_said", set())
    x, t = randn(3, 5), torch.tensor([0, 1, 2])
    for _ in range(3):
        stats = token_stats(x, t, kernel="auto")
    assert torch.equal(stats.entropy, token_stats(x, t, kernel="reference").entropy)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "no C++ compiler was found" in printed
    with pytest.raises(kernels.KernelUnavailable, match=r"no C\+\+ compiler was found"):
        token_stats(x, t, kernel="fused")


def test_fused_is_refused_on_a_device_it_does_not_run_on():
    x, t = torch.zeros(3, 5, device="meta"), torch.zeros(3, dtype=torch.long, device="meta")
    with pytest.raises((ValueError, kernels.KernelUnavailable), match="meta"):
        unchecked(x, t, kernel="fused")
