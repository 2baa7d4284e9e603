"""Properties of every implementation of the op, against float64 on already-rounded logits.

Each was a real bug in some library: 0·inf where a token is masked, a row that depends on its neighbours, an offset that
wraps at 2³¹, a gradient read back from a rounded buffer, an upstream gradient assumed contiguous.
"""

import gc
import re

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from implementations import (
    ALL,
    CUDA,
    DTYPES,
    HAS_GPU,
    IGNORED,
    INF,
    KERNELS,
    LAYOUTS,
    NAN,
    SEEDS,
    check,
    each,
    each_kernel,
    far_apart,
    float64,
    for_each,
    gradients,
    laid_out,
    moved,
    randint,
    randn,
    upstream_of,
)

from minirlhf.commands.certificate import float64_gradients, float64_stats

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Below and above a vector, a cache line, and what a kernel might take as a block; powers of two, odd ones, primes.
COLUMNS = st.one_of(
    st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 257, 1021, 1024, 1025, 2049, 4093, 4096, 4097, 8191, 9001])
)
TEMPERATURES = st.sampled_from([1.0, 0.3, 0.7, 2.5])


# --- the float64 side itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_float64_gradients_are_autograds(temperature):
    x, y = (randn(4, 6, seed=s, dtype=torch.float64) for s in (1, 2))
    x[1, 2:4] = y[1, 3] = -INF
    x.requires_grad_()
    y.requires_grad_()
    t, g = torch.tensor([0, 1, 5, IGNORED]), randn(4, 4, seed=3, dtype=torch.float64)
    logp, logq = (x / temperature).log_softmax(-1), (y / temperature).log_softmax(-1)
    finite, p = logp.masked_fill(logp.isneginf(), 0), logp.exp()
    values = [
        logp.gather(1, t.clamp(min=0)[:, None])[:, 0],
        -(p * finite).sum(1),
        logq.gather(1, t.clamp(min=0)[:, None])[:, 0],
        (p * (finite - logq.masked_fill(logp.isneginf(), 0))).sum(1),
    ]
    counted = t != IGNORED
    want = torch.autograd.grad([(value * counted) for value in values], (x, y), list(g))
    arguments = x.detach().numpy(), t.numpy(), y.detach().numpy(), temperature
    np.testing.assert_allclose(
        float64_stats(*arguments), torch.stack([v.detach() * counted for v in values]).numpy(), rtol=1e-12, atol=1e-14
    )
    for got, exact in zip(float64_gradients(g.numpy(), *arguments), want):
        np.testing.assert_allclose(got, exact.numpy(), rtol=1e-12, atol=1e-14)


# --- values and gradients ---------------------------------------------------------------------------------------------


@for_each(
    seed=SEEDS,
    rows=st.integers(1, 5),
    vocab=COLUMNS,
    dtype=st.sampled_from(DTYPES),
    temperature=TEMPERATURES,
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    masked=st.sampled_from([0.0, 0.3, 0.95]),
    with_reference=st.booleans(),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_equals_float64(impl, seed, rows, vocab, dtype, temperature, scale, masked, with_reference, layouts):
    rng = np.random.default_rng(seed)
    x, y = (torch.tensor(rng.normal(size=(rows, vocab)) * scale).to(dtype) for _ in range(2))
    first = torch.arange(vocab) == rng.integers(vocab)  # one token is never masked
    in_policy = torch.tensor(rng.random((rows, vocab)) < masked) & ~first
    x = x.masked_fill(in_policy, -INF)
    y = y.masked_fill(in_policy & torch.tensor(rng.random((rows, vocab)) < 0.9), -INF)
    t = torch.where(torch.tensor(rng.random(rows) < 0.2), IGNORED, torch.tensor(rng.integers(0, vocab, size=rows)))
    if "expanded" in layouts:  # a row of one against another row of the other: the masks would no longer match
        x, y = x.masked_fill(x.isneginf(), -3), y.masked_fill(y.isneginf(), -3)
    x, y = laid_out(x, layouts[0]), laid_out(y, layouts[1])  # last, since what is computed from them is dense again
    check(impl, x, t, y if with_reference else None, temperature=temperature, seed=seed)


@each
@each_dtype
@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 31, 257, 1021, 50257, 128256])
def test_vocabularies(impl, dtype, vocab):
    x, y = randn(3, vocab, seed=1, dtype=dtype), randn(3, vocab, seed=2, dtype=dtype)
    check(impl, x, torch.tensor([0, vocab - 1, vocab // 2]), y)
    check(impl, x, torch.tensor([vocab - 1, IGNORED, 0]), temperature=0.7)


@each
@pytest.mark.parametrize("rows", [0, 1, 70000])
def test_numbers_of_rows(impl, rows):
    x, y, t = randn(rows, 5, seed=1), randn(rows, 5, seed=2), randint(5, rows, seed=3)
    stats, grads = check(impl, x, t, y)
    assert stats.shape == (4, rows)
    assert all(grad.shape == (rows, 5) for grad in grads)


@each
@pytest.mark.parametrize("temperature", [1e-2, 0.1, 0.7, 1.0, 3.0, 1e3])
def test_temperatures(impl, temperature):
    vocab = 2049
    scale = min(temperature, 1) * 3  # the policy stays as uncertain
    x, y = randn(3, vocab, seed=1, scale=scale), randn(3, vocab, seed=2, scale=scale)
    check(impl, x, torch.tensor([0, 77, vocab - 1]), y, temperature=temperature)


@for_each(seed=SEEDS, vocab=COLUMNS, shift=st.sampled_from([100.0, -100.0, 1e4, -1e4]), temperature=TEMPERATURES)
def test_a_shift_changes_nothing(impl, seed, vocab, shift, temperature):
    """No tolerance is loosened for |x| > 1e3 in a kernel: it never forms m + log s."""
    x, y = (randn(3, vocab, seed=seed + i, scale=3) for i in range(2))
    t = randint(vocab, 3, seed=seed)
    for dtype in DTYPES:
        # The same up to where the type rounds the shifted logits; then against float64 on what came out.
        check(impl, (x + shift).to(dtype), t, (y - shift).to(dtype), temperature=temperature, seed=seed)
        if dtype in (torch.float32, torch.float64):
            exact = (x * 512).round() / 512  # these multiples are exact after the shift too
            stats, _, _ = gradients(impl, exact.to(dtype), t, temperature=temperature)
            shifted, _, _ = gradients(impl, (exact + shift).to(dtype), t, temperature=temperature)
            if impl.slack == 1:
                torch.testing.assert_close(shifted, stats, rtol=1e-6, atol=3e-7)


@each
@each_dtype
def test_logits_of_every_size(impl, dtype):
    """One row a scale, from all alike to far past where the exponential underflows."""
    vocab = 1025
    scales = torch.tensor([0.0, 1e-6, 1e-2, 1.0, 10.0, 40.0])[:, None]
    x = (randn(6, vocab, seed=1) * scales).to(dtype)
    check(impl, x, x.argmax(-1))
    check(impl, x, x.argmin(-1))
    y = (x.float() + randn(6, vocab, seed=2)).to(dtype)  # near the policy, as a reference is
    check(impl, x, x.argmax(-1), y)
    stats, _ = check(impl, x, x.argmax(-1), x)
    assert (stats[3] == 0).all()


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_certain_target_keeps_its_small_gradient(impl, dtype, temperature):
    """p = 0.999: the target's gradient g·(1 - p) is lost where it is g added to -g·p that was rounded to the type."""
    vocab = 1000
    x, t = randn(4, vocab, seed=1) * 0.1, torch.tensor([0, 3, 500, vocab - 1])
    x[torch.arange(4), t] = temperature * (x / temperature).logsumexp(-1) + temperature * np.log(999)
    y = x.flip(1).clone()
    y[torch.arange(4), t] = x[torch.arange(4), t]
    x, y = x.to(dtype), y.to(dtype)
    _, grads = check(impl, x, t, y, temperature=temperature, seed=2)
    upstream = torch.tensor([[1.0, -0.7, 3.0, -2.0], [0] * 4, [0.5, 2.0, -1.0, 1.0], [0] * 4]).to(
        torch.promote_types(dtype, torch.float32)
    )
    _, grads = check(impl, x, t, y, temperature=temperature, upstream=upstream)
    want = float64_gradients(float64(upstream), float64(x), t.numpy(), float64(y), temperature)
    rtol = impl.slack * {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-4, torch.float64: 1e-10}[dtype]
    for got, exact in zip(grads, want):  # relative to the gradient alone: 1e-6 of the upstream would hide a thousandth
        at = np.arange(4), t.numpy()
        np.testing.assert_allclose(float64(got)[at], exact[at], rtol=rtol, atol=0)


@for_each(seed=SEEDS, vocab=COLUMNS, dtype=st.sampled_from(DTYPES), temperature=TEMPERATURES, masked=st.booleans())
def test_gradient_rows_sum_to_zero(impl, seed, vocab, dtype, temperature, masked):
    x, y, t = randn(3, vocab, seed=seed), randn(3, vocab, seed=seed + 1), randint(vocab, 3, seed=seed)
    if masked:
        mask = (randn(vocab, seed=seed) > 0.5) & (torch.arange(vocab) > 0)
        x, y = x.masked_fill(mask, -INF), y.masked_fill(mask, -INF)
        t[:] = 0
    _, upstream, grads = gradients(impl, x.to(dtype), t, y.to(dtype), temperature=temperature, seed=seed)
    half_unit = torch.finfo(dtype).eps / 2
    for grad in grads:
        rounded = half_unit * grad.double().abs().sum(-1) + vocab * 2.0**-25 * (dtype == torch.float16)
        computed = 1e-5 * (1 + upstream.double().abs().sum(0)) / temperature
        assert (grad.double().sum(-1).abs() <= impl.slack * (rounded + computed)).all()


@each
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(impl, temperature):
    if impl.name == "cuda":
        pytest.skip("gradcheck wants to nudge one element at a time; float64 gradients are compared in other tests")
    x, y = (randn(3, 7, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    t = torch.tensor([0, IGNORED, 6])

    def f(x, y):
        return tuple(impl(x, t, y, temperature=temperature))

    assert torch.autograd.gradcheck(f, (x, y), fast_mode=impl.name == "simt")
    assert torch.autograd.gradcheck(lambda x: impl(x, t, temperature=temperature)[:2], (x,))


# --- masked tokens ----------------------------------------------------------------------------------------------------


@each
@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("both", [False, True])
def test_the_lowest_number_is_as_good_as_masked(impl, dtype, temperature, both):
    """Many mask with the type's lowest number instead of -inf; times 1 / T, or in bits, it overflows."""
    masked = torch.arange(37) % 4 == 1
    x, y = (randn(3, 37, seed=s, dtype=dtype) for s in (1, 2))
    t = torch.tensor([0, 12, 36])
    results = []
    for low in (torch.finfo(dtype).min, -INF):
        z = (x.masked_fill(masked, low), t, y.masked_fill(masked, low) if both else None)
        results.append(gradients(impl, *z, temperature=temperature))
    (values, _, grads), (want, _, exact) = results
    torch.testing.assert_close(values, want)
    for grad, expected in zip(grads, exact):
        torch.testing.assert_close(grad, expected)


@each
def test_a_reference_that_is_as_good_as_masked_leaves_the_kl_finite(impl):
    x, y = torch.tensor([[0.0, 1.0, -200.0]]), torch.tensor([[0.0, 2.0, torch.finfo(torch.float32).min]])
    stats = impl(x.to(impl.device), torch.tensor([0]).to(impl.device), y.to(impl.device))
    p, q = x[0, :2].softmax(0), y[0, :2].softmax(0)
    torch.testing.assert_close(stats.kl[0].cpu(), (p * (p / q).log()).sum())


@each
@each_dtype
def test_leading_masked_columns(impl, dtype):
    """Whole vectors, blocks and splits of -inf before the first finite logit."""
    vocab = 9001
    leading = [k for k in (0, 1, 7, 8, 15, 16, 17, 31, 64, 255, 512, 1023, 1024, 2048, 4096, 4099, 8192) if k < vocab]
    leading.append(vocab - 1)
    x, y = (randn(len(leading), vocab, seed=s, dtype=dtype) for s in (1, 2))
    for row, k in enumerate(leading):
        x[row, :k] = y[row, :k] = -INF
    t = torch.tensor([min(k + 3, vocab - 1) for k in leading])
    check(impl, x, t, y)
    check(impl, x, t, temperature=0.7)
    check(impl, x.flip(1), vocab - 1 - t, y.flip(1))  # and trailing ones
    # Masked in the policy alone the KL is finite; in other places of the reference it is +inf.
    check(impl, x, t, y.nan_to_num(neginf=0.5))
    stats, _ = check(impl, x, t, y.flip(1))
    assert stats[3, 1:].isposinf().all()


@each
@each_dtype
@pytest.mark.parametrize("vocab", [1, 2, 33, 1031, 50257])
def test_a_single_finite_logit_anywhere(impl, dtype, vocab):
    some = {
        0,
        1,
        7,
        8,
        15,
        16,
        17,
        31,
        32,
        63,
        64,
        1023,
        1024,
        4095,
        4096,
        8192,
        32768,
        vocab // 2,
        vocab - 2,
        vocab - 1,
    }
    where = torch.arange(vocab) if vocab <= 33 else torch.tensor(sorted(p for p in some if 0 <= p < vocab))
    n = len(where)
    x = torch.full((n, vocab), -INF, dtype=dtype)
    x[torch.arange(n), where] = randn(n, seed=1, scale=20).to(dtype)
    stats, grads = check(impl, x, where, x)
    assert (stats[[0, 2, 3]] == 0).all()
    assert all(z.abs().max() <= 1e-12 for z in (stats, *grads))
    stats, _ = check(impl, x, where, randn(n, vocab, seed=2, dtype=dtype))
    torch.testing.assert_close(stats[3], -stats[2], rtol=1e-6, atol=1e-6)  # KL of a certain policy
    stats, _ = check(impl, randn(n, vocab, seed=2, dtype=dtype), where, x)
    assert vocab == 1 or stats[3].isposinf().all()


@for_each(seed=SEEDS, vocab=COLUMNS, dtype=st.sampled_from(DTYPES), temperature=TEMPERATURES)
def test_masks(impl, seed, vocab, dtype, temperature):
    """Masked in both, in the policy alone, in the reference alone: one row each, and all three in one."""
    rng = np.random.default_rng(seed)
    x, y = (torch.tensor(rng.normal(size=(5, vocab)) * 2).to(dtype) for _ in range(2))
    mask = torch.tensor(rng.random((5, vocab)) < 0.4)
    mask[:, rng.integers(vocab)] = False
    x[0, mask[0]] = y[0, mask[0]] = -INF
    x[1, mask[1]] = -INF
    y[2, mask[2]] = -INF
    x[3, mask[3]] = y[3, mask[4]] = -INF
    x[4], y[4] = x[4].masked_fill(mask[4], -INF), x[4].masked_fill(mask[4], -INF)
    stats, grads = check(impl, x, torch.tensor(rng.integers(0, vocab, size=5)), y, temperature=temperature, seed=seed)
    assert stats[:2].isfinite().all() or stats[0].isneginf().any()  # a masked target alone is not finite
    assert stats[1].isfinite().all()
    assert stats[3, [0, 1, 4]].isfinite().all()
    assert stats[3, 4] == 0
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][x.isneginf()] == 0).all() or (stats[0].isneginf()).any()


@each
@each_dtype
@pytest.mark.parametrize("vocab", [300, 320])  # with a scalar tail and without
def test_kl_is_infinite_where_the_policy_underflows_too(impl, dtype, vocab):
    x, y = torch.zeros(2, vocab, dtype=dtype), torch.zeros(2, vocab, dtype=dtype)
    x[:, 33] = -20000.0
    y[0, 33] = -INF
    stats, grads = check(impl, x, torch.tensor([0, 1]), y)
    assert stats[3, 0] == INF
    assert stats[3, 1].isfinite()
    # No gradient goes through an infinite KL, in either direction.
    upstream = torch.zeros(4, 2, dtype=stats.dtype)
    upstream[3, 0] = 1.0
    _, grads = check(impl, x, torch.tensor([0, 1]), y, upstream=upstream)
    assert all((grad == 0).all() for grad in grads)


@each
def test_a_masked_target(impl):
    x = randn(2, 40, seed=1)
    x[:, 7] = -INF
    stats, _ = check(impl, x, torch.tensor([7, 8]), x.flip(0))
    assert stats[0].tolist()[0] == -INF
    assert stats[2].tolist()[0] == -INF
    assert stats[:, 1].isfinite().all()


# --- broken rows ------------------------------------------------------------------------------------------------------

BREAKAGES = {"all -inf": -INF, "NaN": NAN, "+inf": INF}


@each
@each_dtype
@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("which", ["policy", "reference", "both"])
def test_a_broken_row_poisons_itself_alone(impl, dtype, breakage, which):
    vocab = 1100
    x, y, t = randn(5, vocab, seed=1, dtype=dtype), randn(5, vocab, seed=2, dtype=dtype), torch.arange(5)
    clean, upstream, clean_grads = gradients(impl, x, t, y)
    others = [0, 1, 3, 4]
    # In the first column, in a vector's last lane, in the scalar tail, as the target, after the largest logit.
    for column in (0, 2, 15, 16, 1023, 1024, vocab - 1):
        bad_x, bad_y = x.clone(), y.clone()
        for bad in [z for z, name in ((bad_x, "reference"), (bad_y, "policy")) if name != which]:
            bad[2, slice(None) if breakage == "all -inf" else column] = BREAKAGES[breakage]
        stats, _, grads = gradients(impl, bad_x, t, bad_y, upstream=upstream)
        assert torch.equal(stats[:, others], clean[:, others])
        for grad, before in zip(grads, clean_grads):
            assert torch.equal(grad[others], before[others])
        assert stats[:2, 2].isnan().tolist() == [which != "reference"] * 2
        assert stats[2, 2].isnan().item() == (which != "policy")
        assert stats[3, 2].isnan()
        assert grads[0][2].isnan().all()
        assert grads[1][2].isnan().all()
        if impl.name == "reference":  # autograd multiplies: an upstream 0 does not switch a NaN off
            continue
        # One value at a time: what does not ask for a broken number has a gradient as if it were not there.
        for value in range(4):
            only = torch.zeros_like(upstream)
            only[value, 2] = -1.3
            of_policy = value == 3 or (value < 2 and which != "reference")
            of_reference = value == 3 or (value == 2 and which != "policy")
            _, _, grads = gradients(impl, bad_x, t, bad_y, upstream=only)
            for grad, broken in zip(grads, (of_policy, of_reference)):
                assert grad[2].isnan().all() if broken else grad[2].isfinite().all()
                assert (grad[others] == 0).all()
            if not (of_policy or of_reference):
                check(impl, bad_x, t, bad_y, upstream=only)
        if breakage == "all -inf":
            break


@each
@each_dtype
def test_nan_wins_over_an_infinite_kl(impl, dtype):
    """The reference masks a token, and the row is broken besides: before that token, after it, far from it."""
    vocab = 700
    for where in (0, 3, vocab - 1):
        for bad in ("x", "y"):
            x, y = randn(1, vocab, seed=1, dtype=dtype), randn(1, vocab, seed=2, dtype=dtype)
            y[0, 2] = -INF
            (x if bad == "x" else y)[0, where] = NAN
            stats, _, _ = gradients(impl, x, torch.tensor([1]), y)
            assert stats[3].isnan().all()


@each
@each_dtype
@pytest.mark.parametrize("ignore_index", [-100, 0, 3, -1])
def test_ignored_rows_are_not_read(impl, dtype, ignore_index):
    vocab = 70
    x, y = randn(6, vocab, seed=1, dtype=dtype), randn(6, vocab, seed=2, dtype=dtype)
    t = torch.tensor([1, ignore_index, 2, ignore_index, ignore_index, 4])
    x[1], y[1] = NAN, INF
    x[3], y[3] = -INF, NAN
    x[4, 5] = NAN
    upstream = randn(4, 6, seed=3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    upstream[:, 3] = NAN  # what nobody reads has no gradient, whatever is asked of it
    stats, _, grads = gradients(impl, x, t, y, upstream=upstream, ignore_index=ignore_index)
    ignored = t == ignore_index
    assert (stats[:, ignored] == 0).all()
    assert all((grad[ignored] == 0).all() for grad in grads)
    check(impl, x, t, y, ignore_index=ignore_index)
    check(impl, x, t, ignore_index=ignore_index)


@each
@pytest.mark.parametrize("target", [5, 6, -1, -101, 2**31, 2**40 + 1, -(2**62)])
def test_a_target_out_of_range(impl, target):
    """On the CPU an error that names it. On a GPU, where an error would mean waiting, a row of NaN and no access."""
    x, y, t = randn(3, 5, seed=1), randn(3, 5, seed=2), torch.tensor([1, target, 2])
    if impl.name in ("reference", "fused"):
        with pytest.raises(ValueError, match=re.escape(f"target {target} is outside the vocabulary [0, 5)")):
            impl(x, t, y)
        return
    clean, upstream, before = gradients(impl, x, torch.tensor([1, 1, 2]), y, upstream=randn(4, 3, seed=3))
    stats, _, grads = gradients(impl, x, t, y, upstream=upstream)
    assert stats[[0, 2], 1].isnan().all()
    assert torch.equal(stats[[1, 3]], clean[[1, 3]])  # entropy and KL need no target
    assert torch.equal(stats[:, [0, 2]], clean[:, [0, 2]])
    for grad, good in zip(grads, before):
        assert grad[1].isnan().all()
        assert torch.equal(grad[[0, 2]], good[[0, 2]])


# --- memory -----------------------------------------------------------------------------------------------------------


@each
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, dtype, layout):
    vocab = 1031
    x, y, t = randn(4, vocab, seed=1, dtype=dtype), randn(4, vocab, seed=2, dtype=dtype), torch.tensor([0, 5, 99, 1030])
    contiguous = laid_out(x, layout).contiguous()
    want, upstream, want_grads = gradients(impl, contiguous, t, y)
    for view, ref in ((laid_out(x, layout), y), (laid_out(x, layout), laid_out(y, "sliced"))):
        stats, _, grads = gradients(impl, view, t, ref, upstream=upstream)
        assert torch.equal(stats, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, want_grads))
    check(impl, laid_out(x, layout), t, laid_out(y, layout))


@each
def test_leading_shapes_and_their_strides(impl):
    """logits[:, :-1] and stranger: the rows come out in order."""
    vocab = 37
    base = randn(4, 5, 3, vocab + 3, seed=1)
    views = [
        base[:, :-1, 0, 1 : vocab + 1],
        base[:, 1:, :, :vocab],
        base[::2, :, 1:, 2 : vocab + 2],
        base.transpose(0, 1)[..., :vocab],
        base.permute(2, 0, 1, 3)[:, ::2, ::3, 3:],
        base[:1, :1, :, :vocab],
        base[:, :0, :, :vocab],
        base[0, 0, :1, :vocab].expand(2, 3, -1, -1),
        base[1, 2, 0, :vocab],
        randn(1, vocab, seed=2).expand(6, vocab).unflatten(0, (2, 3)),
    ]
    for i, x in enumerate(views):
        t = randint(vocab, *x.shape[:-1], seed=i)
        for y in (None, x.flip(-1), views[i]):
            want, upstream, want_grads = gradients(impl, x.contiguous(), t, None if y is None else y.contiguous())
            stats, _, grads = gradients(impl, x, t, y, upstream=upstream)
            assert torch.equal(stats, want)
            assert all(torch.equal(a, b) for a, b in zip(grads, want_grads))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_survives_the_way_to_a_device(layout):
    """A device without memory shows it as well as a GPU: strides are kept, where `.to` gives most of them up."""
    x = laid_out(randn(5, 33), layout)
    there = moved(x, "meta")
    assert (there.device.type, there.shape) == ("meta", x.shape)
    assert (there.stride(), there.storage_offset()) == (x.stride(), x.storage_offset())
    assert (x.to("meta").stride() == x.stride()) == (layout in ("contiguous", "transposed"))


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_offsets_past_two_to_the_31(impl, dtype):
    """Three rows 2³¹ + 64 elements apart: the third starts past 2³², where 32 bits, signed or not, have wrapped."""
    vocab, stride = 1031, 2**31 + 64
    if impl.device == "cuda":
        needed = 2 * torch.empty((), dtype=dtype).element_size() * (2 * stride + vocab)
        if torch.cuda.mem_get_info()[0] < needed:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
        far = [torch.empty(2 * stride + vocab, dtype=dtype, device="cuda").as_strided((3, vocab), (stride, 1))] * 2
    else:
        far = [far_apart(3, vocab, stride, dtype) for _ in range(2)]
    near = [randn(3, vocab, seed=s, dtype=dtype) for s in (1, 1 if far[0] is far[1] else 2)]
    for there, here in zip(far, near):
        there.copy_(here)
    t = torch.tensor([0, 500, vocab - 1])
    want, upstream, want_grads = gradients(impl, near[0], t, near[1])
    stats, _, grads = gradients(impl, far[0], t, far[1], upstream=upstream)
    assert torch.equal(stats, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads))
    del far, there
    gc.collect()
    if impl.device == "cuda":
        torch.cuda.empty_cache()  # for the tests that run beside this one


@each
@each_dtype
def test_inputs_are_left_as_they_were_and_backward_runs_twice(impl, dtype):
    vocab = 1031
    x, y, t = (
        randn(4, vocab, seed=1, dtype=dtype),
        randn(4, vocab, seed=2, dtype=dtype),
        torch.tensor([0, IGNORED, 2, 3]),
    )
    x[0, 1] = y[0, 1] = -INF
    x[3, 7] = NAN
    x, y, t = (z.to(impl.device) for z in (x, y, t))
    x.requires_grad_()
    y.requires_grad_()
    bits = [z.detach().clone().view(torch.uint8) for z in (x, y, t)]
    stats = impl(x, t, y, temperature=0.7)
    upstream = list(upstream_of(stats, 5))
    before = [g.clone() for g in upstream]
    once = torch.autograd.grad(stats, (x, y), upstream, retain_graph=True)
    kept = [g.clone() for g in once]
    twice = torch.autograd.grad(stats, (x, y), upstream)
    for a, b, c in zip(once, twice, kept):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert torch.equal(a.nan_to_num(), c.nan_to_num())
    assert all(torch.equal(z.detach().view(torch.uint8), was) for z, was in zip((x, y, t), bits))
    assert all(torch.equal(a, b) for a, b in zip(upstream, before))


@each
def test_upstream_gradients_of_every_layout(impl):
    vocab, shape = 1031, (3, 4)
    x, y, t = randn(*shape, vocab, seed=1), randn(*shape, vocab, seed=2), randint(vocab, *shape, seed=3)
    layouts = {
        "stride 0": torch.tensor(-0.7).expand(shape),
        "stride 0 in a row": randn(1, 4, seed=4).expand(shape),
        "stride 0 in a column": randn(3, 1, seed=4).expand(shape),
        "transposed": randn(4, 3, seed=4).t(),
        "every other": randn(3, 8, seed=4)[:, ::2],
        "a column of five": randn(3, 4, 5, seed=4)[..., 2],
    }
    for g in layouts.values():
        want = gradients(impl, x, t, y, upstream=torch.stack([g.contiguous()] * 4))[2]
        leaves = [z.to(impl.device).requires_grad_() for z in (x, y)]
        stats = impl(leaves[0], t.to(impl.device), leaves[1])
        got = torch.autograd.grad(stats, leaves, [moved(g, impl.device)] * 4)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want))
    check(impl, x, t, y, upstream=torch.stack([*layouts.values()][:4]))


@each
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (3,), (0, 1), (0, 3), (1, 2), (2, 3)])
def test_a_gradient_of_some_values_alone(impl, asked):
    """Values nobody differentiates send no gradient: as if theirs were 0."""
    vocab = 257
    x, y, t = randn(3, vocab, seed=1), randn(3, vocab, seed=2), torch.tensor([0, 100, 256])
    upstream = torch.zeros(4, 3)
    upstream[list(asked)] = randn(len(asked), 3, seed=3)
    _, want = check(impl, x, t, y, upstream=upstream)
    leaves = [z.to(impl.device).requires_grad_() for z in (x, y)]
    stats = impl(leaves[0], t.to(impl.device), leaves[1])
    g = [upstream[i].to(impl.device) for i in asked]
    got = torch.autograd.grad([stats[i] for i in asked], leaves, g, allow_unused=True)
    for a, b in zip(got, want):
        assert torch.equal(torch.zeros_like(b) if a is None else a.cpu(), b)


@each
@pytest.mark.parametrize("wanted", ["policy", "reference", "neither"])
def test_a_gradient_for_some_logits_alone(impl, wanted):
    vocab = 257
    x, y, t = randn(3, vocab, seed=1), randn(3, vocab, seed=2), torch.tensor([0, 100, 256])
    want, upstream, grads = gradients(impl, x, t, y)
    x, y, t = (z.to(impl.device) for z in (x, y, t))
    leaf = {"policy": x, "reference": y, "neither": None}[wanted]
    if leaf is not None:
        leaf.requires_grad_()
    stats = impl(x, t, y)
    assert torch.equal(torch.stack(list(stats)).detach().cpu(), want)
    assert [value.requires_grad for value in stats][:2] == [wanted == "policy"] * 2 or impl.name != "reference"
    if leaf is None:
        assert not any(value.requires_grad for value in stats)
        return
    outputs = [(v, g) for v, g in zip(stats, upstream.to(impl.device)) if v.requires_grad]
    (got,) = torch.autograd.grad([v for v, _ in outputs], leaf, [g for _, g in outputs])
    assert torch.equal(got.cpu(), grads[wanted == "reference"])


# --- the same bits ----------------------------------------------------------------------------------------------------


@for_each(
    ALL[1:],
    seed=SEEDS,
    vocab=COLUMNS,
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 17),
    place=st.integers(0, 6),
    temperature=TEMPERATURES,
    with_reference=st.booleans(),
)
def test_a_row_is_the_same_bits_wherever_it_is(impl, seed, vocab, dtype, offset, place, temperature, with_reference):
    """Alone; among others, broken ones too; at any alignment; in a table with gaps; run again."""
    row, ref = randn(1, vocab, seed=seed, dtype=dtype), randn(1, vocab, seed=seed + 1, dtype=dtype)
    t = randint(vocab, 1, seed=seed)
    y = ref if with_reference else None
    alone, g, alone_grads = gradients(impl, row, t, y, seed=seed, temperature=temperature)

    def placed(row, among):
        memory = torch.full((7 * (vocab + 5) + 17,), among, dtype=dtype)
        table = memory[offset:].as_strided((7, vocab), (vocab + 5, 1))
        table.copy_(randn(7, vocab, seed=seed + 2).to(dtype) * among)
        table[place] = row
        return table

    for among in (1.0, NAN, INF, -INF, 1e4):
        upstream = torch.full((len(g), 7), among, dtype=g.dtype)
        upstream[:, place] = g[:, 0]
        targets = randint(vocab, 7, seed=seed + 3)
        targets[place] = t[0]
        tables = placed(row, among), placed(ref, among) if with_reference else None
        stats, _, grads = gradients(impl, tables[0], targets, tables[1], upstream=upstream, temperature=temperature)
        assert torch.equal(stats[:, place], alone[:, 0])
        assert all(torch.equal(a[place], b[0]) for a, b in zip(grads, alone_grads))
    again = gradients(impl, row, t, y, seed=seed, temperature=temperature)
    assert torch.equal(again[0], alone)
    assert all(torch.equal(a, b) for a, b in zip(again[2], alone_grads))


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 64, 700])
def test_the_same_bits_for_any_number_of_rows_and_threads(impl, dtype, rows):
    vocab = 5003
    one, t = randn(1, vocab, seed=1, dtype=dtype), torch.tensor([vocab // 3])
    ref = randn(1, vocab, seed=2, dtype=dtype)
    want, g, want_grads = gradients(impl, one, t, ref)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            stats, _, grads = gradients(
                impl, one.repeat(rows, 1), t.repeat(rows), ref.repeat(rows, 1), upstream=g.repeat(1, rows)
            )
            assert torch.equal(stats, want.expand(4, rows))
            assert all(torch.equal(a, b.expand(rows, -1)) for a, b in zip(grads, want_grads))
    finally:
        torch.set_num_threads(before)


@each_kernel
def test_the_policys_numbers_do_not_depend_on_the_reference(impl):
    vocab = 5003
    x, t = randn(3, vocab, seed=1), torch.tensor([0, 50, vocab - 1])
    alone, _, _ = gradients(impl, x, t)
    for y in (randn(3, vocab, seed=2), x, x.masked_fill(x < 0, -INF), x * NAN):
        stats, _, _ = gradients(impl, x, t, y)
        if impl.name == "fused":
            assert torch.equal(stats[:2], alone)
        torch.testing.assert_close(stats[:2], alone, rtol=1e-6, atol=1e-6)  # on a GPU other threads add other columns


# --- laws -------------------------------------------------------------------------------------------------------------


@for_each(seed=SEEDS, vocab=COLUMNS, dtype=st.sampled_from(DTYPES), temperature=TEMPERATURES, scale=st.floats(0.01, 8))
def test_bounds(impl, seed, vocab, dtype, temperature, scale):
    x, t = randn(3, vocab, seed=seed, dtype=dtype, scale=scale), randint(vocab, 3, seed=seed)
    near = (x.float() + randn(3, vocab, seed=seed + 1, scale=1e-3)).to(dtype)  # a KL of almost nothing
    for y in (near, randn(3, vocab, seed=seed + 1, dtype=dtype)):
        stats, _, _ = gradients(impl, x, t, y, temperature=temperature)
        assert (stats[[0, 2]] <= impl.slack * 1e-6).all()
        assert (stats[1] >= -impl.slack * 1e-6).all()
        assert (stats[1] <= np.log(vocab) + 1e-5).all()
        assert (stats[3] >= -impl.slack * 5e-6).all()


@pytest.mark.skipif(not HAS_GPU, reason="no GPU: the CUDA kernel is compiled and emulated here, but not run")
def test_the_cuda_kernel_is_among_those_tested():
    assert CUDA in KERNELS
    assert torch.equal(
        CUDA(randn(2, 5).cuda(), torch.tensor([1, 2]).cuda()).logprobs.isfinite().cpu(), torch.ones(2) > 0
    )


@each
def test_empty_and_strided(impl):
    x = randn(6, 5, 4, 9)[:0, ::2, ::2]
    stats = impl(moved(x, impl.device), torch.zeros(0, 3, 2, dtype=torch.long, device=impl.device))
    assert stats.logprobs.shape == (0, 3, 2)
