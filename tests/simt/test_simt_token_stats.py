"""The CUDA kernels of token_stats, run on the CPU: right under every schedule, at every alignment, within bounds.

The properties of the op are tested in test_kernel_properties.py, on these kernels too. Here is what only an
emulator can see; and that it does see it, by breaking the source.
"""

import itertools
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

import simt

pytestmark = pytest.mark.skipif(simt.COMPILER is None, reason="no C++ compiler")

SOURCES = sorted((simt.CSRC / "cuda").glob("*.cuh"))
BARRIERS = [(path.name, i) for path in SOURCES for i in range(path.read_text().count("__syncthreads();"))]


def bf16(x):
    """The bits of float32 numbers cut to bfloat16, and what they stand for."""
    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def at_offset(x, offset, gap=0):
    """The same rows with the first `offset` elements past a 16-byte boundary and `gap` elements after each."""
    n, v = x.shape
    memory = np.zeros(offset + n * (v + gap) + 16, x.dtype)
    begin = -(memory.ctypes.data // x.itemsize) % (16 // x.itemsize) + offset
    rows = np.lib.stride_tricks.as_strided(memory[begin:], (n, v), ((v + gap) * x.itemsize, x.itemsize))
    rows[:] = x
    return rows


def everything(x, targets, y, seed=0, **options):
    """Values, what was saved, and both gradients."""
    stats, saved = simt.token_stats(x, targets, y, seed=seed, **options)
    upstream = np.random.default_rng(1).normal(size=stats.shape).astype(stats.dtype)
    return stats, saved, *simt.token_stats_backward(upstream, x, targets, y, saved, seed=seed, **options)


def same_bits(a, b):
    return all(p.tobytes() == q.tobytes() for p, q in zip(a, b))


def inputs(n, v, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x, y = 3 * rng.normal(size=(2, n, v))
    targets = rng.integers(0, v, n)
    if dtype == np.uint16:
        return bf16(x)[0], targets, bf16(y)[0]
    return x.astype(dtype), targets, y.astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "v"),
    [*itertools.product([np.float32, np.float64, np.float16, np.uint16], [13, 1100, 4600]), (np.float64, 17000)],
)  # the last is cut into two splits
def test_bits_depend_on_neither_schedule_nor_alignment(dtype, v):
    x, targets, y = inputs(3, v, dtype)
    want = everything(x, targets, y, temperature=0.9)
    for k in range(16 // x.itemsize):
        moved = everything(
            at_offset(x, k, 5), targets, at_offset(y, (3 * k + 1) % (16 // x.itemsize)), k, temperature=0.9
        )
        assert same_bits(moved, want)


def test_values():
    """The face itself: dtypes, leading dimensions and unwanted outputs, against the definition."""
    for dtype in (np.float32, np.float64, np.float16, np.uint16):
        x, targets, y = inputs(6, 301, dtype)
        targets[4] = -7
        wide = [(bf16_value(z) if dtype == np.uint16 else z).astype(np.float64) / 0.7 for z in (x, y)]
        log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in wide)
        p, rows = np.exp(log_p), np.arange(6)
        want = np.stack(
            [log_p[rows, targets], -(p * log_p).sum(-1), log_q[rows, targets], (p * (log_p - log_q)).sum(-1)]
        )
        want[:, 4] = 0
        options = {"temperature": 0.7, "ignore_index": -7}
        stats, saved = simt.token_stats(x, targets, y, **options)
        np.testing.assert_allclose(stats, want, rtol=2e-6, atol=2e-6)
        shaped = [z.reshape(2, 3, -1) for z in (x, targets, y)]
        again = simt.token_stats(shaped[0], shaped[1].reshape(2, 3), shaped[2], **options)
        assert again[0].shape == (4, 2, 3) and same_bits(again, (stats, saved))
        turned = [z.transpose(1, 0, 2) for z in (shaped[0], shaped[2])]  # (3, 2, V), a view
        turned = simt.token_stats(turned[0], np.ascontiguousarray(shaped[1].reshape(2, 3).T), turned[1], **options)[0]
        assert turned.transpose(0, 2, 1).tobytes() == stats.tobytes()
        alone, saved = simt.token_stats(x, targets, **options)
        np.testing.assert_allclose(alone, stats[:2], rtol=2e-6, atol=2e-6)
        dx, dy = simt.token_stats_backward(np.ones_like(alone), x, targets, None, saved, **options)
        assert dx.shape == x.shape and dx.dtype == x.dtype and dy.size == 0


def bf16_value(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiles(dtype):
    """Tile by tile, and in place, gives what the whole rows give, to rounding."""
    x, targets, y = inputs(4, 1000, dtype)
    targets[2] = -100
    stats, _, dx, dy = everything(x, targets, y, temperature=1.5)
    state, tiles = np.full((4, 8), np.nan), [slice(0, 333), slice(333, 334), slice(334, 1000)]
    for tile in tiles:
        simt.token_stats_update_(state, x[:, tile], targets, y[:, tile], tile.start, 1.5)
    tiled, saved = simt.token_stats_finish(state, targets, True, 1.5, dtype=dtype)
    upstream = np.random.default_rng(1).normal(size=stats.shape).astype(dtype)
    for tile in tiles:
        simt.token_stats_gradient_(
            x[:, tile], y[:, tile], upstream, targets, saved, tile.start, 1.5, ref_grad=True, seed=3
        )
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == np.float32 else {"rtol": 1e-11, "atol": 1e-12}
    np.testing.assert_allclose(tiled, stats, **tolerance)
    np.testing.assert_allclose(x, dx, **tolerance)
    np.testing.assert_allclose(y, dy, **tolerance)


# --- the driver: every kernel, every alignment, in buffers that end with their last element ---------------------------


def drive(flags, link=(), csrc=simt.CSRC):
    program = simt.compiled("driver.cpp", flags, csrc=csrc, link=link)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_sanitized():
    """Nothing is read or written out of bounds, no arithmetic is undefined; all four types."""
    status, said = drive(["-O1", *simt.SANITIZERS], simt.SANITIZERS)
    assert status == 0, said


def broken(folder, name, pattern, replacement, nth=0):
    """A copy of the sources with the nth match replaced."""
    copy = shutil.copytree(simt.CSRC, folder / "csrc", ignore=shutil.ignore_patterns("*.cpp", "*.cu"))
    path = copy / "cuda" / name
    text = path.read_text()
    place = list(re.finditer(pattern, text))[nth]  # what is not there must not pass for a fault that was found
    path.write_text(text[: place.start()] + place.expand(replacement) + text[place.end() :])
    return copy


FLOAT_ONLY = ["-O1", "-DSIMT_FLOAT_ONLY", *simt.ALIGNMENT]


def test_nothing_broken(tmp_path):
    """What the broken copies are compared with: it must pass."""
    assert drive(FLOAT_ONLY, csrc=broken(tmp_path, "token_stats.cuh", r"\Z", "")) == (0, "")


@pytest.mark.parametrize(("name", "nth"), BARRIERS)
def test_each_barrier_is_needed(tmp_path, name, nth):
    status, said = drive(FLOAT_ONLY, csrc=broken(tmp_path, name, r"__syncthreads\(\);", "", nth))
    assert status == 1
    assert "race in shared memory" in said or "before anything was written" in said


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        pytest.param(r"(elements_past_boundary\(const T\* p\) \{\s*return )[^;]*;", r"\g<1>0;", id="load"),
        pytest.param(r" && elements_past_boundary\(row\.p \+ column\) == 0", "", id="store"),
    ],
)
def test_misaligned(tmp_path, pattern, replacement):
    status, said = drive(FLOAT_ONLY, csrc=broken(tmp_path, "vectors.cuh", pattern, replacement))
    assert status == 1
    assert "misaligned access" in said


def test_out_of_bounds(tmp_path):
    csrc = broken(tmp_path, "vectors.cuh", r"(first \+ j \* stride<T>) \+ reach <= row\.after", r"\1 < row.after")
    status, said = drive(["-O1", "-DSIMT_FLOAT_ONLY", *simt.SANITIZERS], simt.SANITIZERS, csrc)
    assert status != 0
    assert "AddressSanitizer: heap-buffer-overflow" in said or "AddressSanitizer: use-after-poison" in said
