"""A step of decoding as one operation, and the packed products in it, against plain PyTorch and float64."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.kernels import ops as fused  # noqa: F401
from minirlhf.model.decoding import _weights
from minirlhf.model.gpt import GPT, GPTConfig, init_weights

ops = torch.ops.minirlhf

# --- one new token a row, through the whole network -------------------------------------------------------------------


def step_inputs(B, dtype=torch.float32, layers=2, n_head=2, d=8, slots=12, packing="none"):
    """Weights as decoding arranges them, random keys and values, tokens and positions."""
    model = GPT(GPTConfig(vocab_size=100, n_positions=16, n_layer=layers, n_head=n_head, n_embd=n_head * d))
    init_weights(model, 0)
    g = torch.Generator().manual_seed(B)
    for parameter in model.parameters():  # norms and biases, too, which begin all alike
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    weights = _weights(model, None if dtype == torch.float32 else dtype, packing)
    stores = [torch.randn(2, B * n_head, slots, d, generator=g) for _ in range(layers)]
    tokens, positions = torch.randint(100, (B,), generator=g), torch.randint(slots, (B,), generator=g)
    return weights, stores, tokens, positions


def plain_step(weights, stores, tokens, positions):
    """The same, operation by operation."""
    B, D = len(tokens), weights.wpe.shape[1]

    def affine(x, weight, bias=None):
        return F.linear(x.to(weight.dtype), weight, bias)

    x = weights.wte[tokens] + weights.wpe[positions]
    for layer, store in zip(weights.layers, stores):
        qkv = affine(F.layer_norm(x, (D,), *layer.ln_1), *layer.attn)
        mixed = ops.decode_attention_(store, qkv.view(store.shape[1], 3, -1), positions).view(B, D)
        x = x + affine(mixed, *layer.proj)
        inner = affine(F.layer_norm(x, (D,), *layer.ln_2), *layer.fc)
        x = x + affine(ops.gelu(inner), *layer.out)
    return affine(F.layer_norm(x, (D,), *weights.ln_f), weights.head)


def fused_step(weights, stores, tokens, positions):
    flat = [part for layer in weights.layers for pair in layer for part in pair]
    around = [weights.wte, weights.wpe, *weights.ln_f, weights.head]
    return ops.decode_step_(flat, around, stores, tokens, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", ["none", "ours"])
@pytest.mark.parametrize("B", [1, 2, 7, 40])
@pytest.mark.parametrize("d", [8, 5])  # in all a width of 16, and of 15, which fills neither vectors nor pairs
def test_a_step_is_its_operations(B, packing, dtype, d):
    n_head = 2 if d == 8 else 3
    plain, stores, tokens, positions = step_inputs(B, dtype, n_head=n_head, d=d)
    others = [store.clone() for store in stores]
    want = plain_step(plain, others, tokens, positions)
    weights = step_inputs(B, dtype, n_head=n_head, d=d, packing=packing)[0]
    assert (weights.head.dim() > 2) == (packing == "ours")
    got = fused_step(weights, stores, tokens, positions)
    assert got.shape == (B, 128)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance, check_dtype=packing == "none")
    assert torch.equal(got, got.to(dtype).to(got.dtype)), "what a product gives is rounded, as in training"
    for store, other in zip(stores, others):
        torch.testing.assert_close(store, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_packed_step_is_the_same_whatever_the_batch(dtype):
    weights, stores, tokens, positions = step_inputs(41, dtype, packing="ours")
    alone = [store.clone() for store in stores]
    together = fused_step(weights, stores, tokens, positions)
    for rows in (slice(0, 1), slice(5, 8), slice(17, 30)):
        own = [store[:, 2 * rows.start : 2 * rows.stop].clone() for store in alone]
        assert torch.equal(fused_step(weights, own, tokens[rows], positions[rows]), together[rows])
        for one, all_rows in zip(own, stores):
            assert torch.equal(one, all_rows[:, 2 * rows.start : 2 * rows.stop])


def test_threads_share_the_rows():
    """Several threads, each with rows of its own, find what one finds, whatever the weights' layout and the autocast
    of the thread that calls; in a process of its own.
    """
    program = (
        "import itertools, sys, torch; from test_decode_step import step_inputs, fused_step\n"
        "packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()\n"
        "bf16 = ['none', 'ours', *['mkldnn'] * packs]\n"
        "cases = [(torch.float32, 'none'), (torch.float32, 'ours'), *[(torch.bfloat16, packing) for packing in bf16]]\n"
        "for dtype, packing in cases:\n"
        "    found = []\n"
        "    for threads, cast in itertools.product((1, 2, 3), (False, True)):\n"
        "        torch.set_num_threads(threads)\n"
        "        inputs = step_inputs(41, dtype, packing=packing)\n"
        "        assert inputs[0].head.is_mkldnn == (packing == 'mkldnn')\n"
        "        with torch.autocast('cpu', torch.bfloat16, enabled=cast): logits = fused_step(*inputs)\n"
        "        found.append((logits.float(), *inputs[1]))\n"
        "    tolerance = 0 if packing == 'ours' else 1e-5 if dtype == torch.float32 else 2e-2\n"
        "    for other in found[1:]:\n"
        "        for one, two in zip(found[0], other): torch.testing.assert_close(one, two, rtol=0, atol=tolerance)\n"
        "print('equal')"
    )
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=here)
    assert done.stdout.strip() == "equal", done.stderr


def test_a_step_that_does_not_fit_is_refused():
    weights, stores, tokens, positions = step_inputs(3)
    with pytest.raises(ValueError, match="a store for each"):
        fused_step(weights, stores[:1], tokens, positions)
    with pytest.raises(ValueError, match="a token and a position a row"):
        fused_step(weights, stores, tokens[:2], positions)
    for packing in ("none", "ours"):
        weights, stores, tokens, positions = step_inputs(3, packing=packing)
        with pytest.raises(ValueError, match="is outside the 12 slots"):
            fused_step(weights, stores, tokens, torch.full((3,), 12))
    with pytest.raises(ValueError, match="token 128 is outside the vocabulary"):
        fused_step(weights, stores, torch.full((3,), 128), positions)
    with pytest.raises(ValueError, match="3 rows do not fit the stores"):
        fused_step(weights, [store[:, :4] for store in stores], tokens, positions)
    with pytest.raises(ValueError, match="packed weights want all of a network's shapes"):
        fused_step(weights._replace(wpe=weights.wpe.double()), stores, tokens, positions)
    for wrong in ([store[:1] for store in stores], [store.transpose(2, 3) for store in stores]):
        with pytest.raises(ValueError, match="packed weights want all of a network's shapes"):
            fused_step(weights, wrong, tokens, positions)
    other = step_inputs(3, torch.bfloat16, packing="ours")[0]
    with pytest.raises(ValueError, match="packed weights want all of a network's shapes"):
        fused_step(weights._replace(head=other.head), stores, tokens, positions)


# --- packed products --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(0, 20), n=st.integers(1, 70), k=st.integers(1, 40), bf16=st.booleans(), seed=st.integers(0, 99)
)  # fmt: skip
def test_a_packed_linear_layer_is_one(rows, n, k, bf16, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((rows, k), (n, k), (n,)))
    if bf16:
        x, weight = x.bfloat16(), weight.bfloat16()
    got = ops.packed_linear(x, ops.pack_weight(weight), bias)
    assert got.dtype == x.dtype
    want = x.double() @ weight.double().T + bias.double()
    bound = (x.double().abs() @ weight.double().abs().T + bias.double().abs()) * (2.0**-8 if bf16 else 1e-6)
    assert ((got.double() - want).abs() <= bound).all()


def test_a_packed_linear_layer_takes_any_shape_and_keeps_what_is_not_a_number():
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(9, 5), torch.randn(9)
    x[0, 1, 2] = math.inf
    x[1, 2, 0] = math.nan
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-1)):
        got = ops.packed_linear(x.to(dtype), ops.pack_weight(weight.to(dtype)), bias)
        want = F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (torch.ones(2, 4), torch.ones(3, 4).double(), torch.ones(3), TypeError, "float32 or bfloat16, got Double"),
        (torch.ones(2, 4), torch.ones(3), torch.ones(3), ValueError, "a weight must be"),
        (torch.ones(2, 5), torch.ones(3, 4), torch.ones(3), ValueError, r"made of one of shape \(3, 5\)"),
        (torch.ones(2, 4).bfloat16(), torch.ones(3, 4), torch.ones(3), TypeError, "the weight's type, got BFloat16"),
        (torch.ones(2, 4), torch.ones(3, 4), torch.ones(99), ValueError, r"made of one of shape \(99, 4\)"),
        (torch.ones(2, 4), torch.ones(3, 4), torch.ones(3).double(), TypeError, "the bias must be float32"),
    ],
)
def test_a_packed_layer_that_does_not_fit_is_refused(x, weight, bias, error, message):
    with pytest.raises(error, match=message):
        ops.packed_linear(x, ops.pack_weight(weight), bias)


def test_what_nobody_packed_is_refused():
    width = ops.pack_weight(torch.ones(1, 4)).shape[2]
    for shape in ((1, 4, width - 1), (1, 4, 1), (1, 2, width, 2), (1, 2, width, 1), (4, width), (1, 4, width, 1, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            if shape == tuple(ops.pack_weight(torch.ones(1, 4, dtype=dtype)).shape):
                continue
            with pytest.raises(ValueError, match="the weight must be what pack_weight made"):
                ops.packed_linear(torch.ones(2, 4, dtype=dtype), torch.ones(shape, dtype=dtype), torch.ones(1))
    with pytest.raises(ValueError, match="the weight must be what pack_weight made"):
        ops.packed_linear(torch.ones(2, 4), ops.pack_weight(torch.ones(1, 4)).transpose(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="the weight must be what pack_weight made"):
        ops.packed_linear(torch.tensor(1.0), ops.pack_weight(torch.ones(1, 1)), torch.ones(1))


@pytest.mark.parametrize("pairs", [False, True])
def test_layers_large_enough_for_several_tasks(pairs):
    """bfloat16 in pairs, where the processor multiplies these, and k after k, as all others read it."""
    torch.set_num_threads(2)
    try:
        g = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(shape, generator=g) for shape in ((300, 65), (130, 65), (130,)))
        want = x.bfloat16().double() @ weight.bfloat16().double().T + bias.double()
        packed = ops.pack_weight(weight.bfloat16())
        if not pairs:
            width = packed.shape[2]
            panels = F.pad(weight.bfloat16(), (0, 0, 0, len(packed) * width - 130)).view(-1, width, 65)
            packed = panels.transpose(1, 2).contiguous()
        got = ops.packed_linear(x.bfloat16(), packed, bias)
        torch.testing.assert_close(got.double(), want, rtol=2.0**-8, atol=1e-5)
        torch.testing.assert_close(ops.packed_linear(x, ops.pack_weight(weight), bias), F.linear(x, weight, bias))
    finally:
        torch.set_num_threads(1)
