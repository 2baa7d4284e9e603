"""The project's CUDA source on a CPU, without a GPU: see simt.h.

`compiled` builds a program or a Python module once and keeps it. `token_stats` and its like run the kernels of
csrc/cuda/token_stats.cuh over numpy arrays, with the arguments of the registered ops (csrc/ops.cpp). `seed` picks the
schedule of threads and blocks, which must make no difference. What the emulator finds fault with is a RuntimeError.

Logits are (..., V) arrays of float32, float64 or float16, or the bits of bfloat16 as uint16, with at most two leading
dimensions, of any strides. Only the last dimension must be dense.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pybind11

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

FLAGS = [
    "-std=c++20",
    "-DMINIRLHF_SIMT",
    f"-I{HERE}",
    "-Wno-unknown-pragmas",
]
# Every access is checked for alignment, as a GPU does; simt.h turns a failed check into an error of the launch.
ALIGNMENT = ["-DSIMT_ALIGNMENT", "-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
# AddressSanitizer and UndefinedBehaviorSanitizer, for a program of its own.
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiled(
    source: str, flags: Sequence[str], *, csrc: Path = CSRC, suffix: str = "", link: Sequence[str] = ()
) -> Path:
    """The program (or, with a `suffix`, the library) made of one source here: from the cache, or compiled now.

    Args:
        source: a file's name.
        flags: for the compiler, beside `FLAGS`.
        csrc: the folder it includes from.
        suffix: of the library's name.
        link: for the linker.
    """
    key = hashlib.sha256(repr((_version(), FLAGS, list(flags), list(link), suffix)).encode())
    headers = sorted(path for path in csrc.rglob("*") if path.suffix in {".h", ".cuh"})
    for path in [HERE / source, HERE / "simt.h", *headers]:
        key.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minirlhf" / "simt"
    folder = cache / key.hexdigest()[:24]
    result = folder / f"simt{suffix}"
    if result.exists():
        return result
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one process compiles, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            object_file, unfinished = folder / "object.o", folder / "unfinished"
            # Compiled and linked in two steps: at the linker -fsanitize=alignment would bring in a library.
            _run([COMPILER, *FLAGS, f"-I{csrc}", *flags, "-c", str(HERE / source), "-o", str(object_file)])
            _run([COMPILER, str(object_file), *link, "-o", str(unfinished)])
            object_file.unlink()
            unfinished.replace(result)
    return result


@functools.cache
def _version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


@functools.cache
def module() -> ModuleType:
    """The pybind11 module of the kernels; built at first use."""
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    # Hidden: else two versions of the module in one process would share the emulator's state.
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", *ALIGNMENT, *include]
    path = compiled("module.cpp", flags, suffix=sysconfig.get_config_var("EXT_SUFFIX"), link=["-shared"])
    spec = importlib.util.spec_from_file_location("simt_token_stats", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def token_stats(x, targets, y=None, temperature=1.0, ignore_index=-100, *, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """stats (K, ...): logprob, entropy and, with a reference, ref_logprob and kl; saved (N, 6) for the gradient."""
    _check(x, targets, y)
    stats, saved = _fresh((4 if y is not None else 2, *targets.shape), _real(x)), _fresh((targets.size, 6), _real(x))
    module().seed(seed)
    module().token_stats(stats, saved, _rows(x), targets, _rows(y), temperature, ignore_index)
    return stats, saved


def token_stats_backward(
    grad_stats, x, targets, y, saved, temperature=1.0, ignore_index=-100, policy_grad=True, ref_grad=True, *, seed=0
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of x and y; one that is not wanted is empty."""
    _check(x, targets, y)
    _check_saved(grad_stats, x, targets, y, saved)
    grads = [_fresh(x.shape if wanted else (0,), x.dtype) for wanted in (policy_grad, ref_grad and y is not None)]
    dx, dy = (_rows(grad) if grad.shape == x.shape else None for grad in grads)
    module().seed(seed)
    module().gradient(dx, dy, grad_stats, _rows(x), targets, _rows(y), saved, 0, temperature, ignore_index)
    return grads[0], grads[1]


def token_stats_update_(state, x, targets, y=None, first_column=0, temperature=1.0, ignore_index=-100, *, seed=0):
    """A tile of columns, float32 or float64, goes into the state (N, 8), float64; column 0 begins it anew."""
    _check(x, targets, y)
    assert state.shape == (targets.size, 8) and state.dtype == np.float64 and state.flags.c_contiguous
    module().seed(seed)
    module().update(state, _rows(x), targets, _rows(y), first_column, temperature, ignore_index)


def token_stats_finish(
    state, targets, with_ref, temperature=1.0, ignore_index=-100, dtype=np.float32, *, seed=0
) -> tuple[np.ndarray, np.ndarray]:
    """What `token_stats` gives, from the state that all tiles have gone into."""
    assert state.shape == (targets.size, 8) and state.dtype == np.float64 and state.flags.c_contiguous
    stats, saved = _fresh((4 if with_ref else 2, *targets.shape), dtype), _fresh((targets.size, 6), dtype)
    module().seed(seed)
    module().finish(stats, saved, state, targets, with_ref, temperature, ignore_index)
    return stats, saved


def token_stats_gradient_(
    x, y, grad_stats, targets, saved, first_column=0, temperature=1.0, ignore_index=-100, policy_grad=True,
    ref_grad=False, *, seed=0,
):  # fmt: skip
    """A tile of logits, and the reference's if `ref_grad`, becomes its gradient in place."""
    _check(x, targets, y)
    _check_saved(grad_stats, x, targets, y, saved)
    module().seed(seed)
    rows, ref_rows = _rows(x), _rows(y)
    dx, dy = rows if policy_grad else None, ref_rows if ref_grad else None
    module().gradient(dx, dy, grad_stats, rows, targets, ref_rows, saved, first_column, temperature, ignore_index)


def _real(x: np.ndarray) -> type:
    return np.float64 if x.dtype == np.float64 else np.float32


def _fresh(shape: tuple[int, ...], dtype) -> np.ndarray:
    """As torch.empty on a GPU, but what is never written shows: it stays NaN."""
    out = np.empty(shape, dtype)
    out.view(np.uint8).fill(0xFF)
    return out


def _rows(x: np.ndarray | None) -> np.ndarray | None:
    """(N, V) or (A, B, V), a view: the kernels address rows by two strides."""
    if x is None or x.ndim in (2, 3):
        return x
    assert x.ndim == 1, "at most two leading dimensions"
    return x[None]


def _check(x, targets, y) -> None:
    assert targets.dtype == np.int64 and targets.flags.c_contiguous and targets.shape == x.shape[:-1]
    assert y is None or (y.shape == x.shape and y.dtype == x.dtype)
    for logits in (x,) if y is None else (x, y):
        assert logits.shape[-1] == 1 or logits.strides[-1] == logits.itemsize, "the last dimension must be dense"
        assert logits.flags.aligned, "a tensor's elements are aligned"


def _check_saved(grad_stats, x, targets, y, saved) -> None:
    for array, shape in ((grad_stats, (4 if y is not None else 2, *targets.shape)), (saved, (targets.size, 6))):
        assert array.shape == shape and array.dtype == _real(x) and array.flags.c_contiguous
