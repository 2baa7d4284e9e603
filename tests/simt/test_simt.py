"""The emulator itself: right kernels pass under every schedule, wrong ones fail under every schedule."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import python_path

import simt

pytestmark = pytest.mark.skipif(simt.COMPILER is None, reason="no C++ compiler")

RIGHT = ["row sums", "__syncwarp", "dynamic", "__ldg", "load", "float", "store", "sum", "shuffles", "indices"]
WRONG = {
    "no barrier after writing": r"race in shared memory|before anything was written",
    "no barrier after reading": "race in shared memory: .* partial",
    "no __syncwarp": r"race in shared memory|before anything was written",
    "a shuffle for a __syncwarp": r"race in shared memory|before anything was written",
    "__syncwarp across warps": r"race in shared memory|before anything was written",
    "two writers": "race in shared memory: threads (0 and 40|40 and 0) write",
    "never written": r"reads slots\[1\] of shared memory before anything was written",
    "written by another block": r"reads slot\[0\] of shared memory before anything was written",
    "past the end of shared": r"slots\[4\] is outside the shared array of 4",
    "before the start of shared": r"slots\[-1\] is outside",
    "past the end of dynamic": r"slots\[99\] is outside the shared array of 99",
    "too much shared": "more than 48 KiB of shared memory",
    "half return": "divergent __syncthreads",
    "different lines": "divergent __syncthreads: .* others at line",
    "uneven loop": "divergent __syncthreads",
    "shuffle against barrier": "deadlock: .* for lane 3, which waits in __syncthreads",
    "half a warp shuffles": "mask 0xffffffff names lane .* which has returned",
    "shuffle after return": "names lane .* which has returned",
    "not in its own mask": "mask 0x0000ffff, which does not name it",
    "whole warp of 48": "names lane 16, but warp 1 of the block has no such lane",
    "source outside mask": "reads from lane .*, which mask 0x0000ffff does not name",
    "different operations": "are in different operations",
    "trap": "__trap",
    "nested": "launched from a kernel",
    "__ldg off by 4": "misaligned access: 16 bytes",
    "load off by 8": "misaligned access at line",
    "float off by 2": "misaligned access at line",
    "store off by 4": "misaligned access: 16 bytes",
    "1025 threads": "more than 1024 threads",
    "no thread": "an empty grid or block",
    "no block": "an empty grid or block",
}
SANITIZED = {
    "one past the end": "heap-buffer-overflow",
    "float off by 2": "misaligned address",
    "signed overflow": "signed integer overflow",
}


@pytest.fixture(scope="module")
def cases():
    return simt.compiled("cases.cpp", ["-O1", *simt.ALIGNMENT])


@pytest.fixture(scope="module")
def sanitized_cases():
    return simt.compiled("cases.cpp", ["-O0", *simt.SANITIZERS], link=simt.SANITIZERS)


def run(program, name: str, seeds: int = 1, stdin: bytes = b"") -> subprocess.CompletedProcess:
    # Leaks are not looked for: that needs ptrace, which containers forbid.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [program, name, str(seeds)], input=stdin, capture_output=True, timeout=60, env=environment, check=False
    )


@pytest.mark.parametrize("name", [*RIGHT, "again after a failure"])
def test_right_kernels_pass_under_many_schedules(cases, name):
    done = run(cases, name, seeds=200)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_fail(cases, name):
    done = run(cases, name)
    assert done.returncode == 1
    assert re.search(WRONG[name], done.stdout.decode()), done.stdout


def test_a_missing_barrier_fails_under_every_schedule(cases):
    """The detector does not depend on luck: each of many seeds, alone, finds both missing barriers."""
    for name in ("no barrier after writing", "no barrier after reading", "a shuffle for a __syncwarp", "two writers"):
        found = run(cases, name, -100).stdout.decode().splitlines()
        assert len(found) == 100 and all("shared memory" in line for line in found)


def test_schedules_differ_by_seed_and_repeat(cases):
    orders = [line.split() for line in run(cases, "order", 20).stdout.decode().splitlines()]
    assert len({tuple(order) for order in orders}) == 20
    assert all(sorted(map(int, order)) == sorted([*range(32), *range(32)]) for order in orders)
    assert [line.split() for line in run(cases, "order", 20).stdout.decode().splitlines()] == orders


@pytest.mark.parametrize("name", [*RIGHT, "again after a failure"])
def test_right_kernels_pass_sanitized(sanitized_cases, name):
    done = run(sanitized_cases, name, seeds=3)
    assert done.returncode == 0, (done.stdout, done.stderr)


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_see_into_the_fibers(sanitized_cases, name):
    done = run(sanitized_cases, name)
    assert done.returncode != 0
    assert SANITIZED[name] in done.stderr.decode()


def test_portable_fibers():
    """Where there is no assembly for switching stacks, ucontext does it."""
    program = simt.compiled("cases.cpp", ["-O0", "-DSIMT_UCONTEXT", *simt.ALIGNMENT])
    assert run(program, "row sums", 5).returncode == 0
    assert run(program, "shuffles", 5).returncode == 0
    assert b"divergent" in run(program, "half return").stdout


def test_widening_is_torchs(cases):
    patterns = np.arange(65536, dtype=np.uint16)
    widened = np.frombuffer(run(cases, "widen").stdout, np.float32).reshape(-1, 2)
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        truth = torch.from_numpy(patterns.view(np.int16)).view(dtype).float().numpy()
        same = widened[:, column].view(np.uint32) == truth.view(np.uint32)
        assert (same | (np.isnan(truth) & np.isnan(widened[:, column]))).all()


def test_rounding_is_torchs(cases):
    """Floats of every kind, and those at, just below and just above the halfway points of both types."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    upper = np.arange(65536, dtype=np.uint32) << 16
    middle_of_bf16 = np.concatenate([upper + offset for offset in (0, 0x7FFF, 0x8000, 0x8001)]).view(np.float32)
    middle_of_fp16 = np.concatenate([finite[:-1] / 2 + finite[1:] / 2, np.float32([-65520, 65520])])
    around = [np.nextafter(middle_of_fp16, np.float32(to)) for to in (-np.inf, np.inf)]
    anything = np.random.default_rng(0).integers(0, 2**32, 300_000, np.uint32).view(np.float32)
    x = np.concatenate([halves, middle_of_bf16, middle_of_fp16, *around, anything]).astype(np.float32)
    ours = np.frombuffer(run(cases, "narrow", stdin=x.tobytes()).stdout, np.uint16).reshape(-1, 2)
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        truth = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert (ours[:, column] == truth)[~np.isnan(x)].all()
        assert (ours[np.isnan(x), column] == 0x7FFF).all()  # as on the GPU, whatever the NaN was


def test_several_processes_compile_once(tmp_path):
    """They all get the same program, whole."""
    script = "import simt; print(simt.compiled('cases.cpp', ['-O0']))"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | python_path(simt.HERE.parent)
    command = [sys.executable, "-c", script]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    programs = {process.communicate(timeout=120)[0].strip() for process in started}
    assert len(programs) == 1
    assert run(programs.pop(), "row sums").returncode == 0


def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"no_such_header\.h: No such file"):
        simt.compiled("cases.cpp", ["-include", "no_such_header.h"])
