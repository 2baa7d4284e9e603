"""The certificate: passes with the kernel as it is, fails when it is slightly off, ends in time."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from minirlhf.commands import certificate
from minirlhf.model.token_stats import TokenStats

SMALL = {"vocabularies": (1, 7, 1024)}


def test_it_passes():
    rows, ok = certificate.certificate("cpu", **SMALL)
    assert ok, [row for row in rows if not row.ok]
    assert {(row.dtype, row.vocabulary, row.case) for row in rows} == {
        (dtype, vocabulary, case)
        for dtype in certificate.DTYPES
        for vocabulary in SMALL["vocabularies"]
        for case in (*certificate.CASES, *(f"linear {case}" for case in certificate.LINEAR_CASES))
    }
    assert any(row.value > 0 for row in rows)  # it compares something
    assert any(row.gradient > 0 for row in rows)


class Off(torch.autograd.Function):
    """A value or gradient slightly off."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return x + value

    @staticmethod
    def backward(ctx, g):
        return g * ctx.gradient, None, None


@pytest.mark.parametrize("field", TokenStats._fields)
@pytest.mark.parametrize("op", ["token_stats", "linear_token_stats"])
@pytest.mark.parametrize(("value", "gradient"), [(2e-3, 1.0), (0.0, 1.03), (float("nan"), 1.0), (0.0, float("nan"))])
def test_it_fails_where_one_number_is_off(monkeypatch, capsys, field, op, value, gradient):
    real = getattr(certificate, op)

    def wrong(*arguments, **options):
        stats = real(*arguments, **options)
        number = getattr(stats, field)
        return stats if number is None else stats._replace(**{field: Off.apply(number, value, gradient)})

    if op == "linear_token_stats" and field == "ref_logprobs" and value == 0:
        pytest.skip("the reference of linear_token_stats has no gradient")
    monkeypatch.setattr(certificate, op, wrong)
    assert not certificate.certify(["cpu"], vocabularies=(7,), dtypes=(torch.float32, torch.bfloat16))
    assert "FAIL" in capsys.readouterr().out


def test_an_infinity_or_nan_out_of_place_is_an_infinite_error():
    want, small = np.array([1.0, np.inf, -np.inf, np.nan]), np.full(4, 1e-6)
    assert certificate.largest(want, want, small) == (0, 0)
    for i, wrong in ((0, np.inf), (0, np.nan), (1, 1.0), (1, -np.inf), (1, np.nan), (2, np.inf), (3, 0.0), (3, np.inf)):
        got = want.copy()
        got[i] = wrong
        assert certificate.largest(got, want, small) == (np.inf, np.inf)
    error, share = certificate.largest(want + np.array([2e-6, 0, 0, 0]), want, small)
    assert error == pytest.approx(2e-6)
    assert share == pytest.approx(2)


def test_the_command(tmp_path):
    """It prints the facts of the build and the whole table, and exits 0."""
    done = subprocess.run(
        [sys.executable, "-m", "minirlhf.token_stats"], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count(" pass") >= len(certificate.DTYPES) * len(certificate.VOCABULARIES) * 7
    assert "FAIL" not in done.stdout
    assert "128256" in done.stdout
    assert "compiler" in done.stdout


def test_the_command_fails_with_the_certificate(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["token_stats"])
    monkeypatch.setattr(certificate, "certify", lambda devices: False)
    with pytest.raises(SystemExit) as caught:
        certificate.main()
    assert caught.value.code == 1
    assert "compiler: " in capsys.readouterr().out


def test_the_command_says_why_there_is_nothing_to_certify(monkeypatch, capsys):
    def unavailable(cuda=False):
        raise certificate.kernels.KernelUnavailable("no C++ compiler")

    monkeypatch.setattr(sys, "argv", ["token_stats"])
    monkeypatch.setattr(certificate.kernels, "load", unavailable)
    with pytest.raises(SystemExit) as caught:
        certificate.main()
    assert caught.value.code == "no fused kernel to certify: no C++ compiler"


@pytest.mark.parametrize("instructions", ["avx2", "default"])
@pytest.mark.slow
def test_it_passes_with_other_instruction_sets(instructions):
    """Those of older machines and of none in particular, each a build of its own."""
    call = "certify(['cpu'], vocabularies=(1, 7, 4111))"
    code = f"import sys; from minirlhf.commands.certificate import certify; sys.exit(not {call})"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "4111" in done.stdout
