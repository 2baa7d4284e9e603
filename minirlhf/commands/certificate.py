"""The certificate: the fused op on this machine beside float64. `python -m minirlhf.token_stats` prints it.

The other side is numpy in double precision, from the definitions alone: it shares no line and no library with the
kernels or with their plain-PyTorch reference. It reads the logits as rounded to their type, so that what is left is the
error of the kernel.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minirlhf.kernels import build as kernels
from minirlhf.model.token_stats import linear_token_stats, token_stats

VOCABULARIES = (1, 7, 1024, 50257, 128256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = ("plain", "reference", "sharp", "masked", "shifted", "temperature", "strided")
LINEAR_CASES = ("plain", "reference", "temperature")
IGNORED = -100
TILE = 16  # hidden width of the linear case


class Row(NamedTuple):
    """One line of the certificate. Errors are absolute; `…_share` is the largest error divided by its tolerance."""

    dtype: torch.dtype
    vocabulary: int
    case: str
    value: float
    value_share: float
    gradient: float
    gradient_share: float

    @property
    def ok(self) -> bool:
        return self.value_share <= 1 and self.gradient_share <= 1  # False for NaN


# --- the definitions in float64 ---------------------------------------------------------------------------------------


def float64_stats(
    x: np.ndarray, targets: np.ndarray, y: np.ndarray | None, temperature: float, ignore_index: int = IGNORED
) -> np.ndarray:
    """Values of float64 rows, (K, N): log-prob and entropy, and with y the reference's log-prob and the KL."""
    counted = targets != ignore_index
    t = np.where(counted, targets, 0)[:, None]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        logp = _log_softmax(x, temperature)
        p = np.exp(logp)
        values = [np.take_along_axis(logp, t, 1)[:, 0], -np.where(np.isneginf(logp), 0.0, p * logp).sum(1)]
        if y is not None:
            logq = _log_softmax(y, temperature)
            terms = np.where(np.isneginf(logq), np.where(np.isnan(logp), np.nan, np.inf), p * (logp - logq))
            terms = np.where(np.isneginf(logp) & ~np.isnan(logq), 0.0, terms)
            values += [np.take_along_axis(logq, t, 1)[:, 0], terms.sum(1)]
    return np.where(counted, np.stack(values), 0.0)


def float64_gradients(
    upstream: np.ndarray,
    x: np.ndarray,
    targets: np.ndarray,
    y: np.ndarray | None,
    temperature: float,
    ignore_index: int = IGNORED,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gradients of Σ upstream · values with respect to x and y, each (N, V).

    What is infinitely unlikely has no gradient, nor has a KL that is infinite; an upstream 0 switches a value off,
    whatever it is.
    """
    values = float64_stats(x, targets, y, temperature, ignore_index)
    counted = (targets != ignore_index)[:, None]
    onehot = np.arange(x.shape[1]) == np.where(counted, targets[:, None], -1)
    g = [row[:, None] for row in upstream]

    def times(g, values):
        return np.where(g == 0, 0.0, g * values)

    def mean(p, values):  # p · values, 0 where p is
        return np.where(p == 0, 0.0, p * values)

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        logp = _log_softmax(x, temperature)
        p = np.exp(logp)
        dx = times(g[0], onehot - p) - times(g[1], mean(p, logp + values[1][:, None]))
        dy = None
        if y is not None:
            logq = _log_softmax(y, temperature)
            q, kl = np.exp(logq), values[3][:, None]
            through_kl = np.where(np.isposinf(kl), 0.0, g[3])
            dx = dx + times(through_kl, mean(p, logp - logq - kl))
            dy = np.where(counted, (times(through_kl, q - p) + times(g[2], onehot - q)) / temperature, 0.0)
    return np.where(counted, dx / temperature, 0.0), dy


def _log_softmax(x: np.ndarray, temperature: float) -> np.ndarray:
    z = (x - x.max(1, keepdims=True)) / temperature
    return z - np.log(np.exp(z).sum(1, keepdims=True))


# --- tolerances -------------------------------------------------------------------------------------------------------

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-10}


def value_tolerance(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What each of the float64 values (K, N) may be off by."""
    size = np.where(np.isfinite(values), np.abs(values), 0.0)
    if dtype == torch.float64:
        return 1e-10 * (1 + size)
    out = 3e-6 + 1e-6 * size  # the log-probs
    out[1] = 1e-5
    if len(out) == 4:
        out[3] = 1e-5 + 1e-5 * size[3]
    return out


def gradient_tolerance(
    gradients: np.ndarray, upstream: np.ndarray, values: np.ndarray, dtype: torch.dtype, temperature: float
) -> np.ndarray:
    """What each of the float64 gradients (N, V) may be off by.

    Relative to the gradient by the rounding of its type; and by a millionth of the largest terms it is a difference of:
    the row's largest upstream gradient or gradient, and for a KL above 1, whose own tolerance grows with it, the KL
    times its upstream gradient.
    """
    size = np.where(np.isfinite(gradients), np.abs(gradients), 0.0)
    if not size.size:
        return size
    terms = np.maximum(np.abs(upstream).max(0) / temperature, size.max(1))
    if len(values) == 4:
        kl = np.where(np.isfinite(values[3]), values[3], 0.0)
        terms = np.maximum(terms, np.abs(upstream[3]) * kl / temperature)
    small = 1e-10 if dtype == torch.float64 else 1e-6
    subnormal = 2.0**-25 if dtype == torch.float16 else 0.0  # half the smallest float16
    return ROUNDING[dtype] * size + small * terms[:, None] + subnormal


def linear_tolerances(
    values: np.ndarray,
    gradients: Sequence[np.ndarray],
    upstream: np.ndarray,
    logits: np.ndarray,
    dtype: torch.dtype,
    temperature: float,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same for `linear_token_stats`: what its values, and its gradients of hidden and weight, may be off by.

    Its logits are off to begin with: sums of products, rounded to the type of the weights as those of a linear layer.
    Its gradients are sums over rows or columns: relative to the largest in the matrix.
    """
    unit = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2)
    off = 4 * unit * np.abs(logits[np.isfinite(logits)]).max(initial=1.0) / temperature
    tolerances = []
    for exact in gradients:
        scale = max(np.abs(exact).max(initial=0.0), np.abs(upstream).max(initial=0.0) / temperature)
        tolerances.append(ROUNDING[dtype] * np.abs(exact) + (unit + off) * scale)
    return value_tolerance(values, dtype) + off, tolerances


def largest(got: np.ndarray, want: np.ndarray, tolerance: np.ndarray) -> tuple[float, float]:
    """Largest error, and largest share of the tolerance. An infinity or NaN out of place is an infinite error."""
    with np.errstate(invalid="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        error = np.where(same, 0.0, np.abs(got - want))
    error = np.where(np.isfinite(error), error, np.inf)
    if not error.size:
        return 0.0, 0.0
    return float(error.max()), float((error / np.maximum(tolerance, 1e-300)).max())


# --- cases ------------------------------------------------------------------------------------------------------------


def _case(case: str, dtype: torch.dtype, vocabulary: int, rng: np.random.Generator):
    """Logits, targets, reference logits or None and the temperature of one case, on the CPU."""
    rows = 12 if vocabulary <= 1024 else 4
    x, y = (rng.normal(size=(rows, vocabulary)) * 2 for _ in range(2))
    targets = rng.integers(0, vocabulary, size=rows)
    if case == "sharp":  # one token has 0.999 of the probability; it is the target of every other row
        likely = np.where(np.arange(rows) % 2 == 0, targets, rng.integers(0, vocabulary, size=rows))
        for logits in (x, y):
            others = np.log(np.exp(logits).sum(1))
            logits[np.arange(rows), likely] = others + np.log(999)
    if case == "masked":  # the first token never is; row 0 ends with an infinite KL, row 1 does not count
        mask = rng.random((rows, vocabulary)) < 0.3
        mask[:, 0] = False
        x[mask] = -np.inf
        y[mask & (rng.random(mask.shape) < 0.5)] = -np.inf
        if vocabulary > 1:
            y[0, -1], x[0, -1] = -np.inf, -3
        x[1], targets[1] = np.nan, IGNORED
    if case == "shifted":
        sign = np.where(np.arange(rows) % 2 == 0, 1, -1)[:, None]
        x, y = x + 1e4 * sign, y - 1e4 * sign
    logits = [torch.from_numpy(values).to(dtype) for values in (x, y)]
    if case == "strided":  # a slice of a wider table: rows start where no vector load would like them to
        for i, values in enumerate(logits):
            wide = torch.full((rows, vocabulary + 47), float("nan"), dtype=dtype)
            wide[:, 3 : 3 + vocabulary] = values
            logits[i] = wide
    temperature = {"temperature": 0.7, "strided": 1.5}.get(case, 1.0)
    return logits[0], torch.from_numpy(targets), None if case == "plain" else logits[1], temperature


def _compare(case: str, dtype: torch.dtype, vocabulary: int, device: str, rng: np.random.Generator) -> Row:
    x, targets, y, temperature = _case(case, dtype, vocabulary, rng)
    leaves = [logits.to(device).requires_grad_() for logits in (x, y) if logits is not None]
    views = leaves if case != "strided" else [leaf[:, 3 : 3 + vocabulary] for leaf in leaves]
    stats = token_stats(
        views[0], targets.to(device), *views[1:], temperature=temperature, ignore_index=IGNORED, kernel="fused"
    )
    outputs = [value for value in stats if value is not None]
    upstream = torch.from_numpy(rng.normal(size=(len(outputs), len(targets)))).to(outputs[0].dtype)
    gradients = torch.autograd.grad(outputs, views, list(upstream.to(device)))

    x64, y64 = (_float64(views[0]), _float64(views[1]) if y is not None else None)
    g64, t64 = _float64(upstream), targets.numpy()
    want = float64_stats(x64, t64, y64, temperature)
    value, value_share = largest(np.stack([_float64(v) for v in outputs]), want, value_tolerance(want, dtype))
    gradient = gradient_share = 0.0
    for got, exact in zip(gradients, float64_gradients(g64, x64, t64, y64, temperature)):
        error, share = largest(_float64(got), exact, gradient_tolerance(exact, g64, want, dtype, temperature))
        gradient, gradient_share = max(gradient, error), max(gradient_share, share)
    return Row(dtype, vocabulary, case, value, value_share, gradient, gradient_share)


def _compare_linear(case: str, dtype: torch.dtype, vocabulary: int, device: str, rng: np.random.Generator) -> Row:
    """`linear_token_stats` beside the definitions on float64 logits."""
    rows, temperature = 12 if vocabulary <= 1024 else 4, 0.7 if case == "temperature" else 1.0
    hidden, ref_hidden = (torch.from_numpy(rng.normal(size=(rows, TILE))).to(dtype) for _ in range(2))
    weight, ref_weight = (torch.from_numpy(rng.normal(size=(vocabulary, TILE)) / 4).to(dtype) for _ in range(2))
    targets = torch.from_numpy(rng.integers(0, vocabulary, size=rows))
    targets[1] = IGNORED
    leaves = [hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()]
    reference = () if case == "plain" else (ref_hidden.to(device), ref_weight.to(device))
    stats = linear_token_stats(
        *leaves, targets.to(device), *reference, temperature=temperature, ignore_index=IGNORED, kernel="fused"
    )
    outputs = [value for value in stats if value is not None]
    upstream = torch.from_numpy(rng.normal(size=(len(outputs), rows))).to(outputs[0].dtype)
    asked = [(value, g) for value, g in zip(outputs, upstream.to(device)) if value.requires_grad]
    gradients = torch.autograd.grad([value for value, _ in asked], leaves, [g for _, g in asked])

    h, w, g64, t64 = _float64(hidden), _float64(weight), _float64(upstream), targets.numpy()
    x64, y64 = h @ w.T, _float64(ref_hidden) @ _float64(ref_weight).T if reference else None
    want = float64_stats(x64, t64, y64, temperature)
    d_logits, _ = float64_gradients(g64, x64, t64, y64, temperature)
    exact = d_logits @ w, d_logits.T @ h
    logits = np.concatenate([x64, y64] if reference else [x64])
    value_tolerances, tolerances = linear_tolerances(want, exact, g64, logits, dtype, temperature)
    value, value_share = largest(np.stack([_float64(v) for v in outputs]), want, value_tolerances)
    gradient = gradient_share = 0.0
    for i in range(2):
        error, share = largest(_float64(gradients[i]), exact[i], tolerances[i])
        gradient, gradient_share = max(gradient, error), max(gradient_share, share)
    return Row(dtype, vocabulary, f"linear {case}", value, value_share, gradient, gradient_share)


def _float64(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


# --- the table --------------------------------------------------------------------------------------------------------


def certificate(
    device: str, vocabularies: Sequence[int] = VOCABULARIES, dtypes: Sequence[torch.dtype] = DTYPES, seed: int = 0
) -> tuple[list[Row], bool]:
    """Every dtype × V × case on one device, values and gradients: the rows, and whether all of them pass."""
    rng = np.random.default_rng(seed)
    rows = [
        compare(case, dtype, vocabulary, device, rng)
        for compare, cases in ((_compare, CASES), (_compare_linear, LINEAR_CASES))
        for dtype in dtypes
        for vocabulary in vocabularies
        for case in cases
    ]
    return rows, all(row.ok for row in rows)


def certify(
    devices: Iterable[str], vocabularies: Sequence[int] = VOCABULARIES, dtypes: Sequence[torch.dtype] = DTYPES
) -> bool:
    """Print the certificate of each device. True if every row passes."""
    console, everything = Console(), True
    for device in devices:
        rows, ok = certificate(device, vocabularies, dtypes)
        title = f"largest error against float64 on {device}"
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title=title, title_justify="left")
        for name in ("dtype", "V", "case", "value", "share", "gradient", "share", ""):
            table.add_column(name, justify="left" if name in ("dtype", "case", "") else "right", no_wrap=True)
        for row in rows:
            table.add_row(
                str(row.dtype).removeprefix("torch."),
                str(row.vocabulary),
                row.case,
                f"{row.value:.1e}",
                f"{row.value_share:.2f}",
                f"{row.gradient:.1e}",
                f"{row.gradient_share:.2f}",
                "pass" if row.ok else "[bold red]FAIL[/]",
            )
        console.print(table)
        failed = sum(not row.ok for row in rows)
        console.print(f"{device}: {len(rows) - failed} of {len(rows)} rows pass", highlight=False)
        everything = everything and ok
    console.print(LEGEND, highlight=False)
    return everything


LEGEND = """value: the largest error; share: the largest error divided by its tolerance
tolerance of a log-prob 3e-6 + 1e-6·|log-prob|, entropy 1e-5, KL 1e-5 + 1e-5·KL;
in float64 1e-10 relative; of a gradient float32 1e-5, bfloat16 2^-8, float16
2^-10, float64 1e-10 relative, plus 1e-6 (float64: 1e-10) of the row's largest
upstream gradient, gradient, or KL times its upstream gradient; linear: on top of that, what its logits are off
by as sums of products, rounded to their type"""


def main() -> None:
    """Build the kernels, say how, and certify them; exit status 1 if they cannot be built or a row fails."""
    parser = argparse.ArgumentParser(prog="python -m minirlhf.token_stats", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args()
    gpu = torch.cuda.is_available()
    try:
        kernels.load(cuda=gpu)
    except kernels.KernelUnavailable as reason:
        sys.exit(f"no fused kernel to certify: {reason}")
    for name, fact in kernels.facts().items():
        print(f"{name}: {fact or 'none'}")
    if not gpu:
        print("no GPU here: the CUDA kernels are not run")
    sys.exit(0 if certify(["cpu", "cuda"] if gpu else ["cpu"]) else 1)
