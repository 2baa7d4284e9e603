"""The fused GELU against float64, and the one of torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.kernels.network import Gelu
from minirlhf.model.gpt import gelu

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
SHAPES = [(), (0,), (1,), (15,), (16,), (17,), (3, 33), (64, 513), (5, 4099)]  # tails, and enough for several threads


def exact(x, grad):
    """Value and gradient in float64, from the formula as it is written."""
    x = x.double().requires_grad_()
    y = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return y.detach(), torch.autograd.grad(y, x, grad.double())[0]


def near(got, want, dtype, scale):
    """A few units in the last place of the result, or of what it is made of where terms cancel."""
    assert got.dtype == dtype
    assert got.shape == want.shape
    allowed = 4 * ULP[dtype] * want.abs() + 2 * 2.0**-23 * scale + torch.finfo(dtype).tiny
    assert ((got.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_float64(shape, dtype):
    g = torch.Generator().manual_seed(len(shape))
    x, grad = (
        (4 * torch.randn(shape, generator=g)).to(dtype).requires_grad_(),
        torch.randn(shape, generator=g).to(dtype),
    )
    y = Gelu.apply(x)
    (d,) = torch.autograd.grad(y, x, grad)
    want, slope = exact(x.detach(), grad)
    near(y.detach(), want, dtype, x.detach().double().abs())
    near(d, slope, dtype, grad.double().abs() * (1 + x.detach().double().abs()))


@settings(deadline=None, max_examples=200)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70), bf16=st.booleans())
def test_whatever_the_values(values, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = torch.tensor(values, dtype=torch.float32).to(dtype)
    grad = torch.ones_like(x)
    y, d = torch.ops.minirlhf.gelu(x), torch.ops.minirlhf.gelu_backward(grad, x)
    want, slope = exact(x, grad)
    near(y, want, dtype, x.double().abs())
    near(d, slope, dtype, 1 + x.double().abs())
    alone = torch.cat([torch.ops.minirlhf.gelu(one) for one in x.split(1)])
    assert torch.equal(alone, y)  # an element's value is its own, wherever it stands


def test_the_ends_of_the_line():
    x = torch.tensor([0.0, -0.0, math.inf, 1e30, -1e30, math.nan, 1.0])
    y = torch.ops.minirlhf.gelu(x)
    assert y[:4].tolist() == [0.0, 0.0, math.inf, x[3].item()]
    assert y[4] == 0.0
    assert y[5].isnan()
    assert y[6].item() == pytest.approx(0.8411919906)  # of the formula; the exact x Φ(x) is 0.8413
    d = torch.ops.minirlhf.gelu_backward(torch.ones(2), torch.tensor([12.0, -12.0]))
    assert d.tolist() == [1.0, 0.0]


def test_rows_of_a_table_and_columns_of_it():
    table = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.ops.minirlhf.gelu(table.t()), torch.ops.minirlhf.gelu(table).t())
    assert torch.equal(torch.ops.minirlhf.gelu(table[:, ::3]), torch.ops.minirlhf.gelu(table)[:, ::3])
    back = torch.ops.minirlhf.gelu_backward(torch.ones(()).expand(40, 30), table)
    assert torch.equal(back, torch.ops.minirlhf.gelu_backward(torch.ones(40, 30), table))


def test_what_does_not_fit_is_refused():
    x = torch.randn(3)
    with pytest.raises(ValueError, match="the gradient must have the input's shape and type"):
        torch.ops.minirlhf.gelu_backward(torch.randn(4), x)
    with pytest.raises(TypeError, match="gelu takes float32 or bfloat16, got Int"):
        torch.ops.minirlhf.gelu(torch.arange(3, dtype=torch.int32))
    twice = x.requires_grad_()
    (d,) = torch.autograd.grad(Gelu.apply(twice).sum(), twice, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(d.sum(), twice)


def test_which_one_runs(monkeypatch):
    from minirlhf.kernels import network

    calls = []
    monkeypatch.setattr(network, "Gelu", type("Spy", (), {"apply": staticmethod(lambda x: calls.append(x) or x)}))
    x = torch.randn(5)
    gelu(x, "fused")
    gelu(x)
    assert len(calls) == 2
    assert torch.equal(gelu(x, "reference"), F.gelu(x, approximate="tanh"))
    assert torch.equal(gelu(x.double()), F.gelu(x.double(), approximate="tanh"))  # float64 is torch's own
    assert len(calls) == 2
