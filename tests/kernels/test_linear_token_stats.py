"""linear_token_stats: the op on hidden @ weight.T, which is never held whole; against float64 and against itself."""

import contextlib
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import DEVICES, IGNORED, INF, NAN, SEEDS, assert_close, float64, peak_extra_bytes, randint, randn
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minirlhf.commands.certificate import float64_gradients, float64_stats, linear_tolerances
from minirlhf.kernels import build as kernels
from minirlhf.kernels import ops as fused
from minirlhf.model.token_stats import linear_token_stats, token_stats

unchecked = inspect.unwrap(linear_token_stats)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNELS = ["fused", "reference"]


def case(rows, width, vocab, dtype=torch.float32, seed=0, device="cpu"):
    """(hidden, weight, targets, ref_hidden, ref_weight): logits about standard normal, one row in six ignored."""
    hidden, ref_hidden = (randn(rows, width, seed=seed + i, dtype=dtype).to(device) for i in (0, 1))
    weight, ref_weight = (randn(vocab, width, seed=seed + i, dtype=dtype, scale=width**-0.5).to(device) for i in (2, 3))
    t = randint(vocab, rows, seed=seed)
    t[1::6] = IGNORED
    return hidden, weight, t.to(device), ref_hidden, ref_weight


def run(kernel, hidden, weight, t, ref_hidden=None, ref_weight=None, upstream=None, **options):
    """Values (K, ...), their upstream gradient, and the gradients of hidden and weight."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    stats = unchecked(*leaves, t, ref_hidden, ref_weight, kernel=kernel, **options)
    stats = [value for value in stats if value is not None]
    if upstream is None:
        upstream = randn(len(stats), *t.shape, seed=9, dtype=stats[0].dtype).to(hidden.device)
    asked = [(value, g) for value, g in zip(stats, upstream) if value.requires_grad]  # the reference's has no gradient
    grads = torch.autograd.grad([value for value, _ in asked], leaves, [g for _, g in asked])
    return torch.stack(stats).detach(), upstream, grads


def check(kernel, hidden, weight, t, ref_hidden=None, ref_weight=None, *, temperature=1.0, ignore_index=IGNORED):
    """Against float64 on the same rounded hidden states and weights."""
    stats, g, grads = run(
        kernel, hidden, weight, t, ref_hidden, ref_weight, temperature=temperature, ignore_index=ignore_index
    )
    dtype, width, t64 = hidden.dtype, hidden.shape[-1], t.cpu().reshape(-1).numpy()
    assert stats.shape[1:] == t.shape
    assert stats.dtype == torch.promote_types(dtype, torch.float32)
    h, w = float64(hidden).reshape(-1, width), float64(weight)
    x, y, g64 = h @ w.T, None, float64(g).reshape(len(stats), -1)
    if ref_hidden is not None:
        y = float64(ref_hidden).reshape(-1, ref_hidden.shape[-1]) @ float64(ref_weight).T
    want = float64_stats(x, t64, y, temperature, ignore_index)
    d_logits, _ = float64_gradients(g64, x, t64, y, temperature, ignore_index)
    exact = (d_logits @ w).reshape(hidden.shape), d_logits.T @ h
    logits = x if y is None else np.concatenate([x, y])
    value_tolerances, tolerances = linear_tolerances(want, exact, g64, logits, dtype, temperature)
    assert_close(float64(stats).reshape(len(stats), -1), want, value_tolerances, "value")
    for i, (name, leaf) in enumerate((("d_hidden", hidden), ("d_weight", weight))):
        assert grads[i].dtype == dtype
        assert grads[i].shape == leaf.shape
        assert_close(float64(grads[i]), exact[i], tolerances[i] + 2.0**-25 * (dtype == torch.float16), name)
    return stats, grads


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    rows=st.sampled_from([1, 2, 3, 7, 33, 65]),
    width=st.sampled_from([1, 3, 8, 17, 64]),
    vocab=st.one_of(st.integers(1, 70), st.sampled_from([257, 1021, 2048, 4099, 10007])),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    with_reference=st.booleans(),
    kernel=st.sampled_from(KERNELS),
)
def test_equals_float64(seed, rows, width, vocab, dtype, temperature, with_reference, kernel):
    inputs = case(rows, width, vocab, dtype, seed=seed % 2**31)
    check(kernel, *(inputs if with_reference else inputs[:3]), temperature=temperature)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_vocabulary(device, dtype):
    check("fused", *case(40, 24, 50257, dtype, device=device), temperature=0.7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_reference", [False, True])
def test_tiles_of_rows_and_of_columns(monkeypatch, device, dtype, with_reference):
    """Many small tiles, the last of each kind smaller than the others."""
    inputs = case(33, 8, 1021, dtype, device=device)
    inputs = inputs if with_reference else inputs[:3]
    whole, g, grads = run("fused", *inputs)
    monkeypatch.setattr(fused, "TILE_ROWS", {device: 5})
    monkeypatch.setattr(fused, "TILE_ELEMENTS", {device: 5 * 300})
    check("fused", *inputs, temperature=0.7)
    tiled, _, tiled_grads = run("fused", *inputs, upstream=g)
    if dtype.itemsize > 2:
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)
        for a, b in zip(tiled_grads, grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("vocab_size", [None, 29])
def test_opcheck(device, with_reference, rows, vocab_size):
    hidden, weight, t, *reference = case(rows, 8, 33, device=device)
    t = t.clamp(max=28)
    reference = reference if with_reference else [None, None]
    ops = torch.ops.minirlhf
    kernels.load(cuda=device == "cuda")  # who calls an op directly finds the CPU's alone
    stats, saved = ops.linear_token_stats(hidden, weight, t, *reference, 0.7, IGNORED, vocab_size)
    backward = (torch.randn_like(stats), hidden, weight, t, *reference, saved, 0.7, IGNORED, True, True, vocab_size)
    opcheck(ops.linear_token_stats_backward.default, backward)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    opcheck(ops.linear_token_stats.default, (*leaves, t, *reference, 0.7, IGNORED, vocab_size))


def with_padding(weight, rows, fill=NAN):
    """More rows below, which pad the vocabulary; whoever reads them is told by a NaN."""
    return torch.cat([weight, weight.new_full((rows, weight.shape[1]), fill)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("small_tiles", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocab", "padding", "ref_padding"), [(9, 61, 3, 3), (33, 1021, 3, 130), (1, 1, 63, 0)]
)
def test_rows_that_pad_the_vocabulary(
    monkeypatch, device, kernel, dtype, small_tiles, rows, vocab, padding, ref_padding
):
    """To the bit what the weight without them gives; their gradient is exactly 0, whatever stands in them."""
    if small_tiles:  # sums over several tiles of rows; the last tile of columns ends with the vocabulary
        monkeypatch.setattr(fused, "TILE_ROWS", {device: 5})
        monkeypatch.setattr(fused, "TILE_ELEMENTS", {device: 5 * 300})
    hidden, weight, t, ref_hidden, ref_weight = case(rows, 8, vocab, dtype, device=device)
    for reference in ((), (ref_hidden, ref_weight)):
        want, g, (d_hidden, d_weight) = run(kernel, hidden, weight, t, *reference, temperature=0.7)
        padded = [hidden, with_padding(weight, padding), t]
        padded += [ref_hidden, with_padding(ref_weight, ref_padding)] if reference else []
        got, _, grads = run(kernel, *padded, upstream=g, temperature=0.7, vocab_size=vocab)
        assert torch.equal(got, want)
        assert torch.equal(grads[0], d_hidden)
        assert torch.equal(grads[1][:vocab], d_weight)
        assert (grads[1][vocab:] == 0).all()
        assert grads[1].shape == padded[1].shape


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_rows_and_nothing_that_counts(kernel):
    hidden, weight, t, _, _ = case(4, 8, 61)
    for rows in (4, 0):
        ignored = torch.full_like(t[:rows], IGNORED)
        stats, _, grads = run(kernel, hidden[:rows], with_padding(weight, 3), ignored, vocab_size=61)
        assert (stats == 0).all()
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_rows_under_autocast(kernel):
    hidden, weight, t, ref_hidden, ref_weight = case(9, 16, 61)
    with torch.autocast("cpu", torch.bfloat16):
        want, g, grads = run(kernel, hidden, weight, t, ref_hidden, ref_weight)
        padded = hidden, with_padding(weight, 3), t, ref_hidden, with_padding(ref_weight, 3)
        got, _, padded_grads = run(kernel, *padded, upstream=g, vocab_size=61)
    assert torch.equal(got, want)
    assert torch.equal(padded_grads[1][:61], grads[1])
    assert (padded_grads[1][61:] == 0).all()


def test_padding_costs_no_second_gradient_of_the_weight():
    """Slicing the weight would: its backward writes a gradient as large as the weight around the one of the slice."""
    hidden, weight, t, _, _ = case(4, 64, 50000)
    weight, size = with_padding(weight, 48), 50048 * 64 * 4

    def backward(**options):
        w = weight.detach().requires_grad_()
        stats = unchecked(hidden, w if options else w[:50000], t, kernel="fused", **options)
        return torch.autograd.grad(stats.logprobs.sum(), w)[0]

    backward(vocab_size=50000)
    extra, grad = peak_extra_bytes(lambda: backward(vocab_size=50000), "cpu")
    sliced, want = peak_extra_bytes(backward, "cpu")
    assert torch.equal(grad, want)
    assert size <= extra < 1.5 * size < sliced


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 300])
def test_both_kernels_and_the_plain_op_agree(device, dtype, rows):
    """The curves of a training run must not depend on `--kernel`."""
    inputs = case(rows, 32, 5003, dtype, device=device)
    stats, g, grads = run("fused", *inputs, temperature=0.7)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    plain_stats, _, plain_grads = run("reference", *inputs, upstream=g, temperature=0.7)
    torch.testing.assert_close(stats, plain_stats, **close)
    for a, b in zip(grads, plain_grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=float(b.abs().max()) * close["atol"])
    hidden, weight, t, ref_hidden, ref_weight = inputs
    op = token_stats(hidden @ weight.T, t, ref_hidden @ ref_weight.T, temperature=0.7, kernel="fused")
    torch.testing.assert_close(stats, torch.stack(list(op)), **close)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("with_reference", [False, True])
def test_any_leading_shape(kernel, leading, with_reference):
    hidden, ref_hidden = randn(*leading, 8, seed=1), randn(*leading, 8, seed=2)
    weight, ref_weight, t = randn(33, 8, seed=3), randn(33, 8, seed=4), randint(33, *leading, seed=5)
    check(kernel, hidden, weight, t, *((ref_hidden, ref_weight) if with_reference else ()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_references_width_may_differ(kernel):
    """A larger model as reference: its logits have the same columns, its hidden states another width."""
    hidden, weight, t, _, _ = case(9, 8, 101)
    check(kernel, hidden, weight, t, randn(9, 12, seed=5), randn(101, 12, seed=6))


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_inputs(kernel):
    wide, tall = randn(2, 7, 20, seed=1), randn(20, 61, seed=2)
    hidden, weight, t = wide[:, :-1, 3:11], tall.t()[:, 5:13], randint(61, 2, 6, seed=3)
    t[0, 2] = IGNORED
    check(kernel, hidden, weight, t)
    check(kernel, hidden, weight, t, wide[:, 1:, ::3], tall.t()[:, ::3])
    got = run(kernel, hidden, weight, t)
    want = run(kernel, hidden.contiguous(), weight.contiguous(), t, upstream=got[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_ignored_rows(device, kernel, ignore_index):
    """Their hidden states are not read: NaN there reaches neither the values nor the gradient of the weights."""
    hidden, weight, t, ref_hidden, ref_weight = case(9, 8, 101, device=device)
    t = t.clamp(min=1)
    t[[2, 5]] = ignore_index
    stats, g, grads = run(kernel, hidden, weight, t, ref_hidden, ref_weight, ignore_index=ignore_index)
    hidden[2], ref_hidden[5] = NAN, INF
    assert (stats[:, [2, 5]] == 0).all()
    again, _, with_nan = run(kernel, hidden, weight, t, ref_hidden, ref_weight, upstream=g, ignore_index=ignore_index)
    assert torch.equal(again, stats)
    for a, b in zip(with_nan, grads):
        torch.testing.assert_close(a, b)
    assert (with_nan[0][[2, 5]] == 0).all()
    everything = run(kernel, hidden, weight, torch.full_like(t, ignore_index), ignore_index=ignore_index)
    assert (everything[0] == 0).all()
    assert all((grad == 0).all() for grad in everything[2])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_broken_hidden_state_poisons_its_own_row(kernel):
    hidden, weight, t, ref_hidden, ref_weight = case(9, 8, 101)
    t = t.clamp(min=0)
    clean, g, grads = run(kernel, hidden, weight, t, ref_hidden, ref_weight)
    hidden[4, 2] = NAN
    stats, _, broken = run(kernel, hidden, weight, t, ref_hidden, ref_weight, upstream=g)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert stats[[0, 1, 3], 4].isnan().all()
    torch.testing.assert_close(stats[:, others], clean[:, others])
    torch.testing.assert_close(broken[0][others], grads[0][others])
    assert broken[0][4].isnan().all()
    assert broken[1].isnan().all()  # the weights' gradient is a sum over rows


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["logprobs", "entropy", "ref_logprobs", "kl"])
def test_gradcheck(kernel, name):
    hidden, weight, t, ref_hidden, ref_weight = case(3, 2, 5, torch.float64)

    def f(hidden, weight):
        return getattr(unchecked(hidden, weight, t, ref_hidden, ref_weight, temperature=0.8, kernel=kernel), name)

    if name == "ref_logprobs":  # says nothing about the policy
        assert not f(hidden.requires_grad_(), weight.requires_grad_()).requires_grad or kernel == "fused"
        return
    assert torch.autograd.gradcheck(f, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_gradient_of_one_input_alone(kernel, frozen):
    hidden, weight, t, ref_hidden, ref_weight = case(9, 8, 101)
    _, g, (d_hidden, d_weight) = run(kernel, hidden, weight, t, ref_hidden, ref_weight)
    leaf, want = (weight, d_weight) if frozen == "hidden" else (hidden, d_hidden)
    leaf.requires_grad_()
    stats = unchecked(hidden, weight, t, ref_hidden, ref_weight, kernel=kernel)
    outputs = [(value, g_) for value, g_ in zip(stats, g) if value.requires_grad]
    (got,) = torch.autograd.grad([v for v, _ in outputs], leaf, [g_ for _, g_ in outputs])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_twice_and_inputs_left_alone(kernel):
    hidden, weight, t, ref_hidden, ref_weight = case(9, 8, 5003)
    before = [z.clone() for z in (hidden, weight, t, ref_hidden, ref_weight)]
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    stats = unchecked(*leaves, t, ref_hidden, ref_weight, kernel=kernel)
    g = randn(9, seed=4)
    once = torch.autograd.grad(stats.kl, leaves, g, retain_graph=True)
    twice = torch.autograd.grad(stats.kl, leaves, g.expand(1, 9)[0])
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, t, ref_hidden, ref_weight)))
    stats = unchecked(*leaves, t, kernel=kernel)
    expanded = torch.autograd.grad(stats.entropy.sum(), leaves, retain_graph=True)  # an upstream gradient of stride 0
    plain = torch.autograd.grad(stats.entropy, leaves, torch.ones(9))
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain))


def test_a_gradient_of_the_gradient_is_refused_rather_than_wrong():
    hidden, weight, t, _, _ = case(3, 4, 7)
    entropy = unchecked(hidden.requires_grad_(), weight, t, kernel="fused").entropy
    with pytest.raises(RuntimeError, match="first derivatives"):
        (grad,) = torch.autograd.grad(entropy.sum(), hidden, create_graph=True)
        torch.autograd.grad(grad.square().sum() + hidden.sum(), hidden)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_from_run_to_run(device):
    inputs = case(65, 16, 5003, device=device)
    first, g, grads = run("fused", *inputs)
    for _ in range(3):
        stats, _, again = run("fused", *inputs, upstream=g)
        assert torch.equal(stats, first)
        assert all(torch.equal(a, b) for a, b in zip(again, grads))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_never_held(device, with_reference, dtype):
    """At N = 2048 and V = 50257: beyond the gradients, no more than a sixteenth of N·V·4 bytes at any time."""
    rows, vocab, width = 2048, 50257, 4
    hidden, weight, t, *reference = case(rows, width, vocab, dtype, device=device)
    reference = reference if with_reference else []
    run("fused", hidden[:4], weight, t[:4], *(z[:4] if z is reference[0] else z for z in reference))
    g = randn(4 if with_reference else 2, rows, seed=9).to(device)
    extra, (_, _, grads) = peak_extra_bytes(lambda: run("fused", hidden, weight, t, *reference, upstream=g), device)
    gradients = sum(grad.numel() * grad.element_size() for grad in grads)
    assert extra - gradients <= rows * vocab * 4 / 16


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    """Under autocast the products are in its type, as a linear layer's; the gradients come back in the inputs'."""
    inputs = case(9, 16, 501, device=device)
    want, g, grads = run("fused", *inputs)
    with torch.autocast(device, torch.bfloat16):
        stats, _, cast = run("fused", *inputs, upstream=g)
    assert stats.dtype == torch.float32
    torch.testing.assert_close(stats, want, rtol=0, atol=0.05)
    for a, b in zip(cast, grads):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * float(b.abs().max()))


# --- refusals ---------------------------------------------------------------------------------------------------------

H, W, T = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "hidden must have shape (2, 3, 3), got (2, 3, 4)", (H, W[:, :3], T), {}),
        (ValueError, "weight must have shape (V, D), got (4,)", (H, W[0], T), {}),
        (ValueError, "hidden must have shape (3, 2, 4), got (2, 3, 4)", (H, W, T.t()), {}),
        (TypeError, "targets must be integer token ids, got torch.float32", (H, W, T.float()), {}),
        (TypeError, "hidden must be floating point, got torch.int64", (H.long(), W, T), {}),
        (TypeError, "weight must be floating point, got torch.int64", (H, W.long(), T), {}),
        (TypeError, "hidden and weight must have one dtype", (H, W.double(), T), {}),
        (TypeError, "ref_hidden and ref_weight must have one dtype", (H, W, T, H, W.double()), {}),
        (TypeError, "ref_hidden and ref_weight must have one dtype", (H, W, T, H.double(), W.double()), {}),
        (ValueError, "ref_hidden and ref_weight belong together", (H, W, T, H), {}),
        (ValueError, "ref_hidden and ref_weight belong together", (H, W, T, None, W), {}),
        (ValueError, "ref_hidden must have shape (2, 3, 4), got (1, 3, 4)", (H, W, T, H[:1], W), {}),
        (ValueError, "ref_weight must have shape (5, D), got (4, 4)", (H, W, T, H, W[:4]), {}),
        (ValueError, "ref_hidden must have shape (2, 3, 2), got (2, 3, 4)", (H, W, T, H, W[:, :2]), {}),
        (ValueError, "vocab_size must lie in [1, 5], the rows of weight, got 6", (H, W, T), {"vocab_size": 6}),
        (ValueError, "vocab_size must lie in [1, 5], the rows of weight, got 0", (H, W, T), {"vocab_size": 0}),
        (
            ValueError,
            "vocab_size must lie in [1, 3], the rows of ref_weight, got 4",
            (H, W, T, H, W[:3]),
            {"vocab_size": 4},
        ),
        (ValueError, "target 4 is outside the vocabulary [0, 4)", (H, W, T + 4), {"vocab_size": 4}),
        (ValueError, "temperature must be a positive number, got 0", (H, W, T), {"temperature": 0.0}),
        (ValueError, "target 5 is outside the vocabulary [0, 5)", (H, W, T + 5), {}),
        (ValueError, "target -1 is outside the vocabulary [0, 5)", (H, W, T - 1), {}),
        (ValueError, "weight must be on the hidden's device cpu, got meta", (H, W.to("meta"), T), {}),
        (ValueError, "targets must be on the hidden's device cpu, got meta", (H, W, T.to("meta")), {}),
        (ValueError, "ref_hidden must be on the hidden's device cpu, got meta", (H, W, T, H.to("meta"), W), {}),
    ],
)
def test_refusals(kernel, error, message, arguments, options):
    with pytest.raises(error) as caught:
        unchecked(*arguments, kernel=kernel, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_kernel():
    with pytest.raises(ValueError, match="kernel must be one of auto, fused, reference, got 'fast'"):
        unchecked(H, W, T, kernel="fast")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("which", ["ref_hidden", "ref_weight"])
def test_the_references_gradient_is_refused(kernel, which):
    """It comes under no_grad; a gradient that silently is not there would be worse than an error."""
    hidden, weight, t, ref_hidden, ref_weight = case(3, 4, 5)
    (ref_hidden if which == "ref_hidden" else ref_weight).requires_grad_()
    with pytest.raises(ValueError, match="no gradient is taken in the reference"):
        unchecked(hidden, weight, t, ref_hidden, ref_weight, kernel=kernel)
    with torch.no_grad():
        assert unchecked(hidden, weight, t, ref_hidden, ref_weight, kernel=kernel).kl.shape == (3,)


def test_training_goes_on_after_inference():
    """The memory for tiles outlives a call, also in inference mode, which makes tensors that cannot be written to."""
    hidden, weight, t = randn(5, 8, seed=1), randn(4000, 8, seed=2), torch.arange(5)

    fused.forget_workspace()
    with torch.inference_mode():
        unchecked(hidden, weight, t, kernel="fused")
    _, upstream, grads = run("fused", hidden, weight, t)
    for got, want in zip(grads, run("reference", hidden, weight, t, upstream=upstream)[2]):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_narrow_targets_are_not_taken_for_ignored_ones(kernel):
    weight, t = randn(200, 3), torch.tensor([156, 5], dtype=torch.uint8)  # 156 is what -100 becomes in eight bits
    got = unchecked(torch.ones(2, 3), weight, t, kernel=kernel).logprobs
    torch.testing.assert_close(got, unchecked(torch.ones(2, 3), weight, t.long(), kernel=kernel).logprobs)
    assert (got != 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_leaves_doubles_alone(kernel):
    hidden, weight, t = randn(4, 8, dtype=torch.float64), randn(9, 8, dtype=torch.float64, seed=1), torch.arange(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = unchecked(hidden, weight, t, kernel=kernel).logprobs
    assert inside.dtype == torch.float64
    torch.testing.assert_close(inside, unchecked(hidden, weight, t, kernel=kernel).logprobs)


def test_the_gradient_of_strided_states_is_laid_out_as_tracing_expects():
    hidden, weight, t = randn(4, 6).t().requires_grad_(), randn(9, 4, seed=1), torch.tensor([0, IGNORED, 2, 3, 4, 5])
    stats, saved = torch.ops.minirlhf.linear_token_stats(hidden, weight, t, None, None, 1.0, IGNORED)
    arguments = (
        torch.ones_like(stats),
        hidden.detach(),
        weight,
        t,
        None,
        None,
        saved.detach(),
        1.0,
        IGNORED,
        True,
        True,
    )
    opcheck(torch.ops.minirlhf.linear_token_stats_backward.default, arguments, test_utils="test_faketensor")
    assert all(grad.is_contiguous() for grad in torch.ops.minirlhf.linear_token_stats_backward(*arguments))


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_can_be_changed_in_place(kernel):
    x, t = randn(4, 9).requires_grad_(), torch.arange(4)
    token_stats(x, t, kernel=kernel).logprobs.mul_(2).sum().backward()
    twice = x.grad.clone()
    x.grad = None
    token_stats(x, t, kernel=kernel).logprobs.sum().backward()
    torch.testing.assert_close(twice, 2 * x.grad)


# --- as on a GPU, where nothing may depend on the values --------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Names the operations for which the host would wait for a GPU: those whose outcome or shape depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1:])
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "item", "unique"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """CPU tensors take the GPU's way; its products with an fp32 sum are computed in fp32 from the rounded factors."""
    monkeypatch.setattr(fused, "_on_gpu", lambda x: True)
    monkeypatch.setattr(fused, "check_targets", lambda *_: None)  # it leaves a GPU's alone
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", lambda a, b, dtype, *, out: out.copy_(a.to(dtype) @ b.to(dtype)), "CPU")

    def addmm(total, a, b, dtype, *, beta=1, alpha=1, out):
        assert (beta, alpha) == (1, 1)
        return out.copy_(total + a.to(dtype) @ b.to(dtype))

    library.impl("addmm.dtype_out", addmm, "CPU")
    yield
    library._destroy()


def without_dispatch(*inputs):
    """The two ops' own code, where a dispatch mode sees each operation."""
    stats, saved = fused.linear_token_stats._init_fn(*inputs, 0.7, IGNORED, 99)
    return fused.linear_token_stats_backward._init_fn(
        torch.ones_like(stats), *inputs, saved, 0.7, IGNORED, True, True, 99
    )


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_host_never_waits(as_on_a_gpu, monkeypatch, with_reference, dtype):
    inputs = case(9, 16, 101, dtype)
    inputs[2].clamp_(max=98)
    inputs = (*inputs[:3], *(inputs[3:] if with_reference else (None, None)))
    with Waits() as gpu:
        without_dispatch(*inputs)
    assert gpu.found == []
    monkeypatch.setattr(fused, "_on_gpu", lambda x: False)
    with Waits() as cpu:
        without_dispatch(*inputs)
    assert "nonzero" in cpu.found  # it would have been seen


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("small_tiles", [False, True])
def test_without_a_look_the_results_are_the_same(monkeypatch, as_on_a_gpu, with_reference, dtype, small_tiles):
    """Ignored rows, NaN in them, upstream gradients that are all 0; sums in fp32 are no further from float64."""
    if small_tiles:
        monkeypatch.setattr(fused, "TILE_ROWS", {"cpu": 5})
        monkeypatch.setattr(fused, "TILE_ELEMENTS", {"cpu": 5 * 300})
    inputs = case(33, 8, 1021, dtype)
    inputs = inputs if with_reference else inputs[:3]
    check("fused", *inputs, temperature=0.7)
    stats, g, grads = run("fused", *inputs)
    inputs[0][inputs[2] == IGNORED] = NAN
    if with_reference:
        inputs[3][inputs[2] == IGNORED] = INF
    again, _, with_nan = run("fused", *inputs, upstream=g)
    assert torch.equal(again, stats)
    assert all(torch.equal(a, b) for a, b in zip(with_nan, grads))
    assert (grads[0][inputs[2] == IGNORED] == 0).all()
    g[2:] = 0  # no KL to be learnt
    without_kl = run("fused", *inputs, upstream=g)[2]
    for a, b in zip(without_kl, run("fused", *inputs[:3], upstream=g[:2])[2]):
        torch.testing.assert_close(a, b)
    nothing = run("fused", inputs[0], inputs[1], torch.full_like(inputs[2], IGNORED))
    assert (nothing[0] == 0).all()
    assert all((grad == 0).all() for grad in nothing[2])


def test_on_a_gpu_products_are_not_rounded_before_they_are_added(as_on_a_gpu, monkeypatch):
    factors = [(randn(9, 30, seed=i, dtype=torch.bfloat16), randn(30, 8, seed=i + 1)) for i in range(20)]
    factors = [(a, b.bfloat16()) for a, b in factors]
    want = sum(a.double() @ b.double() for a, b in factors)

    def error():
        total = torch.full((9, 8), NAN)
        for i, (a, b) in enumerate(factors):
            fused._accumulate(total, a, b, first=i == 0)
        return float((total - want).abs().max())

    gpu = error()
    monkeypatch.setattr(fused, "_on_gpu", lambda x: False)
    assert gpu < 1e-4 < 1e-2 < error()


class Live(TorchDispatchMode):
    """The most bytes that what was allocated inside held at any time."""

    def __init__(self):
        super().__init__()
        self.alive, self.highest = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in known:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.highest = max(self.highest, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"), [(8192, 768, torch.bfloat16), (8192, 768, torch.float32), (2048, 256, torch.float32)]
)
def test_on_a_gpu_the_logits_are_never_held(monkeypatch, with_reference, rows, width, dtype):
    """With a GPU's tiles, counted on tensors without memory: beyond the gradients a sixteenth of N·V·4 bytes at most.

    What the kernels take for themselves is not seen here: the parts of rows that are cut, of which a tile has none.
    """
    monkeypatch.setattr(fused, "_on_gpu", lambda x: True)
    monkeypatch.setattr(fused, "TILE_ROWS", {"meta": fused.TILE_ROWS["cuda"]})
    monkeypatch.setattr(fused, "TILE_ELEMENTS", {"meta": fused.TILE_ELEMENTS["cuda"]})
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know this device
    library = torch.library.Library("aten", "IMPL")
    for name in ("mm.dtype_out", "addmm.dtype_out"):
        library.impl(name, lambda *_, out, **__: out, "Meta", allow_override=True)
    hidden, weight = (torch.empty(n, width, dtype=dtype, device="meta") for n in (rows, 50257))
    targets = torch.empty(rows, dtype=torch.long, device="meta")
    inputs = hidden, weight, targets, *((hidden, weight) if with_reference else (None, None))
    try:
        with Live() as forward:
            stats, saved = fused.linear_token_stats._init_fn(*inputs, 1.0, IGNORED)
        with Live() as backward:
            grads = fused.linear_token_stats_backward._init_fn(stats, *inputs, saved, 1.0, IGNORED, True, True)
    finally:
        library._destroy()
    bound = rows * 50257 * 4 / 16
    tiles = 0.9 * min(fused.TILE_ELEMENTS["meta"], rows * 50257 // fused.TILE_SHARE) * dtype.itemsize
    assert tiles <= forward.highest <= bound
    assert tiles <= backward.highest - sum(grad.nbytes for grad in grads) <= bound
