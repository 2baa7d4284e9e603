"""The fused attention of whole sequences, and its gradient, against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.kernels.network import Attention
from minirlhf.model.gpt import attention

ops = torch.ops.minirlhf


def exact(qkv, n_head, attend, grad):
    """Output and gradient in float64, as the equation is written."""
    qkv = qkv.double().requires_grad_()
    B, T, D = *qkv.shape[:2], qkv.shape[2] // 3
    q, k, v = qkv.view(B, T, 3, n_head, D // n_head).permute(2, 0, 3, 1, 4)
    looks = torch.ones(T, T, dtype=torch.bool).tril() if attend is None else attend[:, None]
    scores = (q @ k.transpose(-1, -2) / (D // n_head) ** 0.5).masked_fill(~looks, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D)
    return out.detach(), torch.autograd.grad(out, qkv, grad.double())[0]


def made(B, T, n_head, d, masked=False, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    qkv = (scale * torch.randn(B, T, 3 * n_head * d, generator=g)).to(dtype)
    grad = torch.randn(B, T, n_head * d, generator=g).to(dtype)
    attend = (torch.rand(B, T, T, generator=g) < 0.4) | torch.eye(T, dtype=torch.bool) if masked else None
    return qkv, grad, attend


@settings(deadline=None, max_examples=150)
@given(
    B=st.integers(1, 4), T=st.integers(1, 40), n_head=st.integers(1, 3), d=st.sampled_from([1, 5, 8, 16, 33]),
    masked=st.booleans(), bf16=st.booleans(), seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 5.0]),
)  # fmt: skip
def test_value_and_gradient_are_the_definition(B, T, n_head, d, masked, bf16, seed, scale):
    dtype = torch.bfloat16 if bf16 else torch.float32
    qkv, grad, attend = made(B, T, n_head, d, masked, dtype, seed, scale)
    want, slope = exact(qkv, n_head, attend, grad)
    leaf = qkv.clone().requires_grad_()
    out = Attention.apply(leaf, n_head, attend)
    (got,) = torch.autograd.grad(out, leaf, grad)
    assert out.dtype == got.dtype == dtype
    # Products are float32's whatever the type; bfloat16 rounds what comes out once.
    error = 2e-6 * (1 + scale) ** 3 * d**0.5
    rounding = 2.0**-8 if bf16 else 0.0
    assert ((out.double() - want).abs() <= error + rounding * want.abs()).all()
    assert ((got.double() - slope).abs() <= error * (1 + T**0.5) + rounding * slope.abs()).all()


@pytest.mark.parametrize("T", [300, 1030])
def test_long_sequences(T):
    qkv, grad, _ = made(1, T, 1, 64, seed=T)
    want, slope = exact(qkv, 1, None, grad)
    torch.testing.assert_close(ops.attention(qkv, 1, None).double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(ops.attention_backward(grad, qkv, 1, None).double(), slope, rtol=0, atol=5e-5)


def test_scores_of_any_size():
    qkv, grad, _ = made(2, 20, 2, 16, scale=200.0)  # one token has all the weight
    want, _ = exact(qkv, 2, None, grad)
    torch.testing.assert_close(ops.attention(qkv, 2, None).double(), want, rtol=1e-5, atol=1e-2)
    assert ops.attention_backward(grad, qkv, 2, None).isfinite().all()
    qkv[1, 3, 0] = float("nan")  # a query's
    out = ops.attention(qkv, 2, None)
    assert out[1, 3, :16].isnan().all()
    out[1, 3, :16] = 0.0
    assert out.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_a_sequence_is_the_same_whatever_the_batch_and_whatever_follows(masked):
    qkv, grad, attend = made(9, 33, 4, 8, masked)
    out, back = ops.attention(qkv, 4, attend), ops.attention_backward(grad, qkv, 4, attend)
    for row in (0, 4, 8):
        own = slice(row, row + 1)
        given = qkv[own], 4, attend[own] if masked else None
        assert torch.equal(ops.attention(*given), out[own])
        assert torch.equal(ops.attention_backward(grad[own], *given), back[own])
    if not masked:  # in causal attention, what follows is not read
        later = qkv.clone()
        later[:, 20:] = torch.randn_like(later[:, 20:])
        assert torch.equal(ops.attention(later, 4, None)[:, :20], out[:, :20])
        short = grad.clone()
        short[:, 20:] = 0.0
        assert torch.equal(ops.attention_backward(short, qkv, 4, None)[:, 20:], torch.zeros(9, 13, 96))


def test_a_causal_mask_is_causal_attention():
    qkv, grad, _ = made(2, 29, 2, 16)
    causal = torch.ones(2, 29, 29, dtype=torch.bool).tril()
    assert torch.equal(ops.attention(qkv, 2, causal), ops.attention(qkv, 2, None))
    assert torch.equal(ops.attention_backward(grad, qkv, 2, causal), ops.attention_backward(grad, qkv, 2, None))


def test_layouts():
    """Strides of any kind, and no tokens at all."""
    qkv, _, attend = made(3, 10, 2, 8, masked=True)
    turned = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.attention(turned, 2, attend), ops.attention(qkv, 2, attend))
    wide = torch.zeros(3, 12, 14, dtype=torch.bool)
    wide[:, :10, :10] = attend
    assert torch.equal(ops.attention(qkv, 2, wide[:, :10, :10]), ops.attention(qkv, 2, attend))
    spread = torch.ones(()).expand(3, 10, 16)
    assert torch.equal(
        ops.attention_backward(spread, qkv, 2, None), ops.attention_backward(torch.ones(3, 10, 16), qkv, 2, None)
    )
    for kernel in ("fused", "reference"):
        assert attention(torch.zeros(0, 4, 12), 2, None, kernel).shape == (0, 4, 4)
        assert attention(torch.zeros(2, 0, 12), 2, None, kernel).shape == (2, 0, 4)


def test_which_one_the_network_takes(monkeypatch):
    calls = []
    monkeypatch.setattr(Attention, "apply", lambda *given: calls.append(given) or ops.attention(*given))
    qkv, _, attend = made(2, 6, 2, 8, masked=True)
    fused = attention(qkv, 2, attend[:, None])
    assert len(calls) == 1
    plain = attention(qkv, 2, attend[:, None], "reference")
    wide = attention(qkv.double(), 2, attend[:, None])  # float64 is torch's own
    assert len(calls) == 1
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(fused.double(), wide, rtol=1e-5, atol=1e-6)
    low = attention(qkv.bfloat16(), 2, None, "reference")
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, attention(qkv.bfloat16(), 2, None), rtol=0, atol=2e-2)


def test_second_derivatives_are_refused():
    qkv, _, _ = made(1, 4, 1, 8)
    leaf = qkv.requires_grad_()
    (d,) = torch.autograd.grad(Attention.apply(leaf, 1, None).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, a: (x[0], 2, a), "qkv must be"),
        (lambda x, a: (x[..., :47], 2, a), "qkv must be"),
        (lambda x, a: (x, 5, a), "qkv must be"),
        (lambda x, a: (x, 0, a), "qkv must be"),
        (lambda x, a: (x.double(), 2, a), "attention takes float32 or bfloat16, got Double"),
        (lambda x, a: (x, 2, a[:, :5]), "attend must be"),
        (lambda x, a: (x, 2, a.float()), "attend must be bool, got Float"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    qkv, _, attend = made(2, 6, 2, 8, masked=True)
    with pytest.raises((ValueError, TypeError), match=message):
        ops.attention(*change(qkv, attend))


def test_a_gradient_of_another_shape_is_refused():
    qkv, grad, _ = made(2, 6, 2, 8)
    with pytest.raises(ValueError, match="the gradient must have the output's shape and type"):
        ops.attention_backward(grad[:, :5], qkv, 2, None)
    with pytest.raises(ValueError, match="the gradient must have the output's shape and type"):
        ops.attention_backward(grad.transpose(0, 1), qkv, 2, None)
    with pytest.raises(ValueError, match="the gradient must have the output's shape and type"):
        ops.attention_backward(grad.bfloat16(), qkv, 2, None)
