"""token_stats: against float64, the laws it must keep, masked and broken rows, gradients, refusals."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.model import token_stats as module
from minirlhf.model.token_stats import token_stats_reference

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LEADING = [(), (1,), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)]
SEEDS = st.integers(0, 2**32 - 1)
# The refusals are the function's own: a type checker wrapped around it by the test session must not answer first.
unchecked = inspect.unwrap(module.token_stats)
few = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="session", params=["reference", "fused"])
def token_stats(request):
    """The function with each kernel in turn."""
    return partial(module.token_stats, kernel=request.param)


def randn(*shape, seed=0, dtype=torch.float32):
    """Normal logits from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def float64_stats(logits, targets, ref_logits, temperature, ignore_index=-100):
    """The definitions again, row by row, in numpy's float64: (logprob, entropy, ref_logprob, kl) of each row."""

    def log_softmax(x):
        x = x / temperature
        x = x - x.max()
        return x - np.log(np.exp(x).sum())

    out = []
    for x, y, t in zip(logits, ref_logits, targets):
        if t == ignore_index:
            out.append((0.0, 0.0, 0.0, 0.0))
            continue
        logp, logq = log_softmax(x), log_softmax(y)
        possible = logp > -np.inf
        p, lp, lq = np.exp(logp[possible]), logp[possible], logq[possible]
        out.append((logp[t], -(p * lp).sum(), logq[t], np.inf if np.isneginf(lq).any() else (p * (lp - lq)).sum()))
    return np.array(out, dtype=np.float64).reshape(-1, 4)


# --- against float64 --------------------------------------------------------------------------------------------------


@few
@given(
    seed=SEEDS,
    vocab=st.integers(1, 67),
    leading=st.sampled_from(LEADING),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.5, 0.7, 3.0]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
    masked=st.sampled_from([0.0, 0.3]),
)
def test_equals_float64_on_already_rounded_inputs(
    token_stats, seed, vocab, leading, dtype, temperature, scale, shift, masked
):
    rng = np.random.default_rng(seed)
    x, y = (torch.tensor(rng.normal(size=(*leading, vocab)) * scale + shift).to(dtype) for _ in range(2))
    first = torch.arange(vocab) == 0  # the first token is never masked: all-masked rows have their own test
    in_policy = torch.tensor(rng.random((*leading, vocab)) < masked) & ~first
    in_reference = in_policy & torch.tensor(rng.random((*leading, vocab)) < 0.9)
    x, y = x.masked_fill(in_policy, -INF), y.masked_fill(in_reference, -INF)
    t = torch.tensor(rng.integers(0, vocab, size=leading))
    t = torch.where(torch.tensor(rng.random(leading) < 0.2), -100, t)

    got = token_stats(x, t, y, temperature=temperature)

    shape = (-1, vocab)
    want = float64_stats(
        x.double().reshape(shape).numpy(), t.reshape(-1).numpy(), y.double().reshape(shape).numpy(), temperature
    )
    # Dividing by the temperature rounds once: half a unit in the last place of the largest logit.
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    largest = (abs(shift) + 8 * scale) / temperature
    for column, value in enumerate(got):
        assert value.shape == t.shape
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_allclose(
            value.reshape(-1).numpy(), want[:, column], rtol=64 * unit, atol=largest * 8 * unit + 64 * unit
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_of_seventy_thousand(token_stats, dtype):
    x, y = randn(3, 70001, seed=1, dtype=dtype), randn(3, 70001, seed=2, dtype=dtype)
    t = torch.tensor([0, 70000, 35000])
    got = torch.stack(token_stats(x, t, y), dim=-1)
    want = float64_stats(x.double().numpy(), t.numpy(), y.double().numpy(), 1.0)
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-6)


def test_seventy_thousand_rows(token_stats):
    x, t = randn(70001, 3, seed=3), torch.arange(70001) % 3
    got = token_stats(x, t)
    logp = x.double().log_softmax(-1)
    torch.testing.assert_close(got.logprobs.double(), logp.gather(1, t[:, None]).squeeze(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy.double(), -(logp.exp() * logp).sum(1), rtol=1e-6, atol=1e-6)


def test_strided_rows_give_the_same(token_stats):
    x, y = randn(7, 6, seed=4), randn(6, 14, seed=5)
    t = torch.arange(6) % 7
    got = token_stats(x.t(), t, y[:, ::2])
    want = token_stats(x.t().contiguous(), t, y[:, ::2].contiguous())
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_half_precision_is_read_exactly(token_stats):
    for dtype in (torch.float16, torch.bfloat16):
        x, t = randn(5, 33, seed=6, dtype=dtype), torch.arange(5)
        for a, b in zip(token_stats(x, t, x.flip(-1)), token_stats(x.float(), t, x.float().flip(-1))):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)


# --- laws -------------------------------------------------------------------------------------------------------------


@few
@given(seed=SEEDS, vocab=st.integers(1, 40), temperature=st.floats(0.2, 5), scale=st.sampled_from([0.1, 2.0, 30.0]))
def test_laws(token_stats, seed, vocab, temperature, scale):
    x, y = randn(4, vocab, seed=seed) * scale, randn(4, vocab, seed=seed + 1) * scale
    every = torch.arange(vocab).expand(4, vocab)
    stats = token_stats(
        x[:, None].expand(-1, vocab, -1), every, y[:, None].expand(-1, vocab, -1), temperature=temperature
    )
    torch.testing.assert_close(stats.logprobs.exp().sum(-1), torch.ones(4))  # every target once: probabilities
    torch.testing.assert_close(stats.ref_logprobs.exp().sum(-1), torch.ones(4))
    assert (stats.logprobs <= 0).all()
    assert (stats.entropy >= -1e-6).all()
    assert (stats.entropy <= math.log(vocab) + 1e-5).all()
    assert (stats.kl >= -1e-5).all()
    same = token_stats(x, every[:, 0], x.clone(), temperature=temperature)
    assert (same.kl == 0).all()
    assert torch.equal(same.logprobs, same.ref_logprobs)


@few
@given(seed=SEEDS, shift=st.sampled_from([1e4, -1e4, 123.0]), temperature=st.sampled_from([1.0, 0.7]))
def test_adding_a_constant_to_a_row_changes_nothing(token_stats, seed, shift, temperature):
    x, y, t = randn(3, 17, seed=seed).double(), randn(3, 17, seed=seed + 1).double(), torch.tensor([0, 8, 16])
    for a, b in zip(
        token_stats(x + shift, t, y - shift, temperature=temperature), token_stats(x, t, y, temperature=temperature)
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_known_values(token_stats):
    # Uniform over 4, and (1/2, 1/4, 1/8, 1/8): entropy 1.75 bits, KL to uniform 2 - 1.75 bits.
    x = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    stats = token_stats(x, torch.tensor(1), torch.zeros(4))
    bit = math.log(2)
    assert stats.logprobs.item() == pytest.approx(-2 * bit)
    assert stats.entropy.item() == pytest.approx(1.75 * bit)
    assert stats.ref_logprobs.item() == pytest.approx(-2 * bit)
    assert stats.kl.item() == pytest.approx(0.25 * bit)


def test_kl_is_from_policy_to_reference(token_stats):
    # The two directions differ: Σ p log(p/q) with p = (0.9, 0.1), q = (0.5, 0.5).
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert abs(forward - backward) > 0.1
    assert token_stats(p.log(), torch.tensor(0), q.log()).kl.item() == pytest.approx(forward, rel=1e-5)
    assert token_stats(q.log(), torch.tensor(0), p.log()).kl.item() == pytest.approx(backward, rel=1e-5)


def test_temperature_divides_both_sets_of_logits(token_stats):
    x, y, t = randn(3, 9, seed=1), randn(3, 9, seed=2), torch.tensor([0, 4, 8])
    for a, b in zip(token_stats(x, t, y, temperature=2.0), token_stats(x / 2, t, y / 2)):
        torch.testing.assert_close(a, b)
    hot, cold = (token_stats(x, t, temperature=T).entropy for T in (5.0, 0.2))
    assert (hot > cold).all()


def test_a_row_does_not_depend_on_the_rows_around_it(token_stats):
    x, y, t = randn(6, 257, seed=1), randn(6, 257, seed=2), torch.arange(6)
    whole = token_stats(x, t, y)
    with_others_ignored = token_stats(x, torch.where(t == 3, t, -100), y)
    for together, among_ignored, alone in zip(whole, with_others_ignored, token_stats(x[3:4], t[3:4], y[3:4])):
        assert torch.equal(together[3], alone[0])
        assert torch.equal(among_ignored[3], alone[0])


def test_without_reference_logits_there_is_no_reference(token_stats):
    x, t = randn(2, 5), torch.tensor([1, 2])
    stats = token_stats(x, t)
    assert stats.ref_logprobs is None
    assert stats.kl is None
    beside = token_stats(x, t, randn(2, 5, seed=1))
    assert torch.equal(stats.logprobs, beside.logprobs)
    assert torch.equal(stats.entropy, beside.entropy)


def test_inputs_are_left_as_they_were(token_stats):
    x, y, t = randn(4, 5), randn(4, 5, seed=1), torch.tensor([0, -100, 2, 3])
    x[0, 1] = y[0, 1] = -INF
    before = x.clone(), y.clone(), t.clone()
    token_stats(x, t, y, temperature=0.7)
    assert all(torch.equal(a, b) for a, b in zip((x, y, t), before))


@pytest.mark.parametrize("leading", LEADING)
def test_any_leading_shape(token_stats, leading):
    x, y = randn(*leading, 5), randn(*leading, 5, seed=1)
    t = torch.full(leading, 3)
    stats = token_stats(x, t, y)
    flat = token_stats(x.reshape(-1, 5), t.reshape(-1), y.reshape(-1, 5))
    for a, b in zip(stats, flat):
        assert a.shape == leading
        assert torch.equal(a.reshape(-1), b)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_any_integer_type_of_target(token_stats, dtype):
    x = randn(3, 300)  # more tokens than the narrow types can count
    want = token_stats(x, torch.tensor([4, 0, 120])).logprobs
    assert torch.equal(token_stats(x, torch.tensor([4, 0, 120], dtype=dtype)).logprobs, want)


def test_the_reference_kernel_is_the_function_itself():
    x, y, t = randn(3, 5), randn(3, 5, seed=1), torch.tensor([0, -100, 2])
    by_name, direct = module.token_stats(x, t, y, kernel="reference"), token_stats_reference(x, t, y)
    for a, b, c in zip(module.token_stats(x, t, y, kernel="auto"), by_name, direct):
        torch.testing.assert_close(a, b)
        assert torch.equal(b, c)


# --- masked tokens and broken rows ------------------------------------------------------------------------------------


def test_a_token_masked_in_both_adds_nothing(token_stats):
    x, y = randn(3, 6, seed=1), randn(3, 6, seed=2)
    keep = torch.tensor([0, 2, 3, 5])
    mask = torch.ones(6, dtype=torch.bool).index_fill(0, keep, False)
    masked = token_stats(x.masked_fill(mask, -INF), keep[:3], y.masked_fill(mask, -INF))
    without = token_stats(x[:, keep], torch.arange(3), y[:, keep])
    for a, b in zip(masked, without):
        torch.testing.assert_close(a, b)


def test_a_token_masked_in_the_reference_alone_makes_kl_infinite(token_stats):
    x, y = randn(3, 6, seed=1), randn(3, 6, seed=2)
    y[1, 4] = -INF
    stats = token_stats(x, torch.tensor([0, 4, 2]), y)
    assert stats.kl[1] == INF
    assert stats.ref_logprobs[1] == -INF
    assert torch.isfinite(stats.kl[[0, 2]]).all()
    assert torch.isfinite(stats.logprobs).all()


def test_kl_is_infinite_even_where_the_policys_probability_underflows(token_stats):
    x, y = torch.tensor([[0.0, -200.0, 0.0]]), torch.tensor([[0.0, -INF, 0.0]])
    assert token_stats(x, torch.tensor([0]), y).kl.item() == INF


def test_a_broken_policy_row_is_nan_even_where_the_reference_masks_a_token(token_stats):
    x, y = torch.tensor([[0.0, NAN, 0.0], [-INF, -INF, -INF]]), torch.tensor([0.0, -INF, 0.0]).expand(2, 3)
    assert token_stats(x, torch.tensor([0, 0]), y).kl.isnan().all()


def test_a_token_masked_in_the_policy_alone_is_finite(token_stats):
    x, y = randn(1, 4, seed=1), randn(1, 4, seed=2)
    x[0, 2] = -INF
    logp, logq = x[0, [0, 1, 3]].log_softmax(-1), y[0].log_softmax(-1)[[0, 1, 3]]
    stats = token_stats(x, torch.tensor([0]), y)
    torch.testing.assert_close(stats.kl[0], (logp.exp() * (logp - logq)).sum())


def test_a_masked_target_has_log_prob_minus_infinity(token_stats):
    x = randn(2, 4)
    x[0, 1] = -INF
    stats = token_stats(x, torch.tensor([1, 1]), x)
    assert stats.logprobs[0] == -INF
    assert stats.ref_logprobs[0] == -INF
    assert torch.isfinite(stats.entropy).all()
    assert (stats.kl == 0).all()


def test_one_token_left_is_certain(token_stats):
    x = torch.full((1, 5), -INF)
    x[0, 3] = 2.0
    stats = token_stats(x, torch.tensor([3]), x)
    assert [value.item() for value in stats] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("breakage", ["all -inf", "one NaN", "one +inf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_row_is_nan_and_alone(token_stats, breakage, dtype):
    x, y, t = randn(5, 7, seed=1, dtype=dtype), randn(5, 7, seed=2, dtype=dtype), torch.tensor([0, 1, 2, 3, 4])
    clean = token_stats(x, t, y)

    def broken(logits):
        logits = logits.clone()
        if breakage == "all -inf":
            logits[2] = -INF
        else:
            logits[2, 5] = NAN if breakage == "one NaN" else INF  # not the target's logit
        return logits

    stats = token_stats(broken(x), t, broken(y))
    others = torch.tensor([0, 1, 3, 4])
    for value, before in zip(stats, clean):
        assert value[2].isnan()
        assert torch.equal(value[others], before[others])
    # Broken in the reference alone, the policy's own numbers are still good.
    stats = token_stats(x, t, broken(y))
    assert stats.kl[2].isnan()
    assert stats.ref_logprobs[2].isnan()
    assert torch.equal(stats.logprobs, clean.logprobs)
    assert torch.equal(stats.entropy, clean.entropy)


@pytest.mark.parametrize("ignore_index", [-100, 0, -1])
def test_ignored_rows_are_exactly_zero_and_not_read(token_stats, ignore_index):
    x, y, t = randn(4, 5, seed=1), randn(4, 5, seed=2), torch.tensor([1, ignore_index, 3, ignore_index])
    x[1], y[1] = NAN, INF
    x[3], y[3] = -INF, NAN
    x.requires_grad_()
    y.requires_grad_()
    stats = token_stats(x, t, y, ignore_index=ignore_index)
    for value in stats:
        assert torch.equal(value[[1, 3]], torch.zeros(2))
        assert torch.isfinite(value).all()
        assert (value[[0, 2]] != 0).all()
    sum(value.sum() for value in stats).backward()
    for grad in (x.grad, y.grad):
        assert torch.equal(grad[[1, 3]], torch.zeros(2, 5))
        assert torch.isfinite(grad).all()
        assert (grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("leading", [(), (3,), (2, 2)])
def test_every_row_ignored(token_stats, leading):
    x = torch.full((*leading, 4), NAN, requires_grad=True)
    stats = token_stats(x, torch.full(leading, -100), x.detach())
    for value in stats:
        assert torch.equal(value, torch.zeros(leading))
    (stats.logprobs.sum() + stats.entropy.sum() + stats.kl.sum()).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", ["logprobs", "entropy", "ref_logprobs", "kl"])
@pytest.mark.parametrize("ignored", [False, True])
def test_gradcheck(token_stats, name, temperature, ignored):
    x, y = (randn(3, 5, seed=s).double().requires_grad_() for s in (1, 2))
    t = torch.tensor([0, -100 if ignored else 3, 4])

    def f(x, y):
        return getattr(token_stats(x, t, y, temperature=temperature), name)

    assert torch.autograd.gradcheck(f, (x, y))


def test_gradcheck_with_masked_tokens(token_stats):
    mask = torch.tensor([[False, True, False, False], [False, False, True, True]])
    x, y = (randn(2, 4, seed=s).double().requires_grad_() for s in (1, 2))

    def f(x, y):
        stats = token_stats(x.masked_fill(mask, -INF), torch.tensor([0, 1]), y.masked_fill(mask, -INF))
        return stats.logprobs, stats.entropy, stats.ref_logprobs, stats.kl

    assert torch.autograd.gradcheck(f, (x, y))


@few
@given(seed=SEEDS, dtype=st.sampled_from(DTYPES), masked=st.booleans(), temperature=st.sampled_from([1.0, 0.5]))
def test_gradient_rows_sum_to_zero_and_are_finite(token_stats, seed, dtype, masked, temperature):
    x, y, t = (
        randn(4, 9, seed=seed, dtype=dtype),
        randn(4, 9, seed=seed + 1, dtype=dtype),
        torch.tensor([0, 1, 2, -100]),
    )
    if masked:
        x[:, 5:7] = y[:, 5:7] = -INF
        x[1, 8] = -INF  # in the policy alone
    x.requires_grad_()
    y.requires_grad_()
    for name in ("logprobs", "entropy", "ref_logprobs", "kl"):
        value = getattr(token_stats(x, t, y, temperature=temperature), name)
        for grad in torch.autograd.grad(value.sum(), (x, y), allow_unused=True):
            if grad is None:
                continue
            assert grad.dtype == dtype
            assert torch.isfinite(grad).all()
            if masked:
                assert (grad[:, 5:7] == 0).all()
            loose = 1e-5 if dtype in (torch.float32, torch.float64) else 0.05  # their gradient is rounded to 8-11 bits
            torch.testing.assert_close(grad.double().sum(-1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=loose)


def test_gradients_in_closed_form(token_stats):
    x, y = randn(1, 5, seed=1).double().requires_grad_(), randn(1, 5, seed=2).double().requires_grad_()
    stats = token_stats(x, torch.tensor([3]), y)
    p, q = x.detach().softmax(-1), y.detach().softmax(-1)
    onehot = torch.eye(5, dtype=torch.float64)[3]

    def grad(value, of):
        return torch.autograd.grad(value.sum(), of, retain_graph=True)[0]

    torch.testing.assert_close(grad(stats.logprobs, x), onehot - p)
    torch.testing.assert_close(grad(stats.entropy, x), -p * (p.log() + stats.entropy.detach()))
    torch.testing.assert_close(grad(stats.kl, x), p * ((p / q).log() - stats.kl.detach()))
    torch.testing.assert_close(grad(stats.kl, y), q - p)
    torch.testing.assert_close(grad(stats.ref_logprobs, y), onehot - q)


def test_a_masked_target_has_a_finite_gradient(token_stats):
    x = torch.tensor([[0.0, -INF, 1.0]], requires_grad=True)
    token_stats(x, torch.tensor([1])).logprobs.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_broken_row_leaves_the_other_rows_gradients_alone(token_stats):
    x, t = randn(3, 4), torch.tensor([0, 1, 2])
    x[1, 3] = NAN
    x.requires_grad_()
    stats = token_stats(x, t)
    (stats.logprobs + stats.entropy).sum().backward()
    assert torch.isfinite(x.grad[[0, 2]]).all()


# --- refusals ---------------------------------------------------------------------------------------------------------

X, T = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
BF = X.bfloat16()


@pytest.mark.parametrize("kernel", ["reference", "fused"])
@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "targets must have shape (2, 3), got (3, 2)", (X, T.t()), {}),
        (ValueError, "targets must have shape (2, 3), got (2, 3, 1)", (X, T[..., None]), {}),
        (ValueError, "targets must have shape", (torch.tensor(1.0), T), {}),
        (ValueError, "ref_logits must have shape (2, 3, 5), got (2, 3, 4)", (X, T, X[..., :4]), {}),
        (ValueError, "ref_logits must have shape (2, 3, 5), got (2, 5)", (X, T, X[:, 0]), {}),
        (TypeError, "logits must be floating point, got torch.int64", (X.long(), T), {}),
        (TypeError, "ref_logits must be floating point, got torch.int64", (X, T, X.long()), {}),
        (TypeError, "targets must be integer token ids, got torch.float32", (X, T.float()), {}),
        (TypeError, "targets must be integer token ids, got torch.bool", (X, T.bool()), {}),
        (TypeError, "ref_logits must have the logits' dtype torch.float32, got torch.float64", (X, T, X.double()), {}),
        (
            TypeError,
            "ref_logits must have the logits' dtype torch.bfloat16, got torch.float16",
            (X.bfloat16(), T, X.half()),
            {},
        ),
        (ValueError, "targets must be on the logits' device cpu, got meta", (X, T.to("meta")), {}),
        (ValueError, "ref_logits must be on the logits' device cpu, got meta", (X, T, X.to("meta")), {}),
        (ValueError, "temperature must be a positive number, got 0", (X, T), {"temperature": 0.0}),
        (ValueError, "temperature must be a positive number, got -1.0", (X, T), {"temperature": -1.0}),
        (ValueError, "temperature must be a positive number, got nan", (X, T), {"temperature": NAN}),
        (ValueError, "temperature must be a positive number, got inf", (X, T), {"temperature": INF}),
        (ValueError, "target 5 is outside the vocabulary [0, 5)", (X, T + 5), {}),
        (ValueError, "target -1 is outside the vocabulary [0, 5)", (X, T - 1), {}),
        (ValueError, "target -100 is outside the vocabulary [0, 5)", (X, T - 100), {"ignore_index": -1}),
        (ValueError, "kernel must be one of auto, fused, reference, got 'fast'", (X, T), {"kernel": "fast"}),
    ],
)
def test_refusals(kernel, error, message, arguments, options):
    with pytest.raises(error) as caught:
        unchecked(*arguments, **{"kernel": kernel, **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
