"""The fused attention of decoding against its definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.kernels import ops as fused  # noqa: F401

ops = torch.ops.minirlhf


def exact(store, qkv, positions):
    """Head by head in float64, with the new key and value in their slots; the store as it should be then."""
    store, qkv = store.double().clone(), qkv.double()
    heads = len(qkv) // max(1, len(positions))
    out = torch.zeros(len(qkv), store.shape[-1], dtype=torch.float64)
    for n, (q, k, v) in enumerate(qkv):
        p = int(positions[n // heads])
        store[0, n, p], store[1, n, p] = k, v
        weights = (store[0, n, : p + 1] @ q / len(q) ** 0.5).softmax(0)
        out[n] = weights @ store[1, n, : p + 1]
    return out, store


def made(rows, heads, slots, d, dtype=torch.float32, spare=0, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    store = torch.randn(2, rows * heads + spare, slots, d, generator=g)
    qkv = (scale * torch.randn(rows * heads, 3, d, generator=g)).to(dtype)
    return store, qkv, torch.randint(0, slots, (rows,), generator=g)


@settings(deadline=None, max_examples=120)
@given(
    rows=st.integers(1, 5), heads=st.integers(1, 4), slots=st.integers(1, 70), d=st.sampled_from([1, 5, 8, 16, 33]),
    spare=st.integers(0, 2), bf16=st.booleans(), seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 30.0]),
)  # fmt: skip
def test_it_is_the_definition(rows, heads, slots, d, spare, bf16, seed, scale):
    dtype = torch.bfloat16 if bf16 else torch.float32
    store, qkv, positions = made(rows, heads, slots, d, dtype, spare, seed, scale)
    want, after = exact(store, qkv, positions)
    got = ops.decode_attention_(store, qkv, positions)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), want, rtol=0, atol=(5e-5 if dtype == torch.float32 else 2.0**-8) * (1 + scale * 4)
    )
    assert torch.equal(store.double(), after)  # what is kept is what was given, to the bit


def test_a_row_is_the_same_whatever_the_batch_and_whatever_stands_behind_it():
    store, qkv, positions = made(40, 4, 90, 32)  # enough for several threads
    together, kept = store.clone(), store.clone()
    out = ops.decode_attention_(together, qkv, positions)
    for row in (0, 17, 39):
        own = slice(4 * row, 4 * row + 4)
        alone = kept[:, own].clone()
        alone[:, :, int(positions[row]) + 1 :] = float("nan")  # slots that are not filled yet are not read
        assert torch.equal(ops.decode_attention_(alone, qkv[own], positions[row : row + 1]), out[own])


def test_scores_of_any_size():
    store, qkv, positions = made(2, 2, 20, 16, scale=1.0)
    store[0] *= 1e4  # one slot has all the weight
    want, _ = exact(store, qkv, positions)
    torch.testing.assert_close(ops.decode_attention_(store, qkv, positions).double(), want, rtol=0, atol=1e-2)
    qkv[0, 0, 3] = float("nan")
    out = ops.decode_attention_(store, qkv, positions)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


def test_no_rows():
    store, qkv, positions = made(0, 2, 4, 8, spare=3)
    assert ops.decode_attention_(store, qkv, positions).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, q, p: (s, q, p + 4), "position [4-7] is outside the 4 slots"),
        (lambda s, q, p: (s, q, p - 9), "position -[0-9] is outside the 4 slots"),
        (lambda s, q, p: (s, q[:, :2], p), "qkv must be"),
        (lambda s, q, p: (s, torch.cat([q, q]), p), "qkv must be"),
        (lambda s, q, p: (s, q[:3], p), "3 heads do not divide among 2 rows"),
        (lambda s, q, p: (s.transpose(2, 3), q, p), "store must be"),
        (lambda s, q, p: (s.double(), q, p), "store must be float32, got Double"),
        (lambda s, q, p: (s, q.double(), p), "qkv must be float32 or bfloat16, got Double"),
        (lambda s, q, p: (s, q, p.int()), "positions must be int64, got Int"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ops.decode_attention_(*change(*made(2, 2, 4, 8)))
