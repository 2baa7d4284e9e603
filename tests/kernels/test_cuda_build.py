"""The CUDA source compiles for every generation of GPUs without spills, within its registers. Needs nvcc, no GPU."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="no nvcc: the CUDA source is not compiled"),
]

CUDA_TYPES = ("float", "double", "__half", "__nv_bfloat16")
TYPES = {"f": "float", "d": "double", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
REFERENCE = {"0": "alone", "1": "with reference"}
KERNELS = {
    f"{name} {t} {r}" for name in ("sum_splits", "fill_gradient") for t in TYPES.values() for r in REFERENCE.values()
}
KERNELS |= {"finish_rows float", "finish_rows double"}
INSTANCES = """
#include "token_stats.cuh"
namespace minirlhf::cuda {
#define INSTANTIATE(T) \\
  template cudaError_t launch_token_stats(const Input<T>&, RowState*, Real<T>*, Saved<Real<T>>*, cudaStream_t); \\
  template cudaError_t launch_update(const Input<T>&, RowState*, RowState*, cudaStream_t); \\
  template cudaError_t launch_gradient(const Input<T>&, const Real<T>*, const Saved<Real<T>>*, T*, Rows, T*, Rows, \\
                                       cudaStream_t);
%s
}
"""


def architectures() -> list[str]:
    """sm_80, sm_90 and the first of each newer generation that this nvcc knows."""
    if NVCC is None:
        return ["sm_80", "sm_90"]
    listed = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    numbers = sorted(int(number) for number in re.findall(r"^sm_(\d+)$", listed, re.MULTILINE))
    newer = {number // 10: number for number in reversed(numbers) if number >= 100}
    return [f"sm_{number}" for number in (80, 90, *sorted(newer.values()))]


def register_bound(kernel: str) -> int:
    """What leaves room for the blocks a kernel counts on (`min_blocks` in sums.cuh): 65536 registers, 128 threads each.

    Six blocks of sums of one set of logits, five of two sets or of gradients: their loads hide each other's waiting, so
    fewer would cost bandwidth. Three in double. The kernel with a thread a row does next to nothing.
    """
    if kernel.startswith("finish_rows"):
        return 128
    blocks = 3 if "double" in kernel else 6 if kernel.startswith("sum_splits") and "alone" in kernel else 5
    return 65536 // (128 * blocks) // 8 * 8  # they are handed out by eights


def usage(
    architecture: str, folder: Path, csrc: Path = CSRC, types: Sequence[str] = CUDA_TYPES
) -> dict[str, dict[str, int]]:
    """What ptxas says of every kernel: registers of a thread, bytes of spills, bytes of shared memory."""
    source = folder / f"{architecture}.cu"
    source.write_text(INSTANCES % "".join(f"INSTANTIATE({name})" for name in types))
    flags = ["-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v", f"-I{csrc / 'cuda'}"]
    command = [NVCC, *flags, "-cubin", str(source), "-o", str(source.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stderr, done.stderr[:3000]
    found = {}
    for report in done.stderr.split("Compiling entry function ")[1:]:
        symbol = report.split("'")[1]
        parts = re.match(rf"_ZN8minirlhf4cuda\d+([a-z_]+)(?:I({'|'.join(TYPES)})(?:Lb([01]))?E)?E", symbol)
        assert parts, f"a kernel of an unknown form: {symbol}"
        name, element, with_ref = parts.groups()
        kernel = " ".join(filter(None, (name, TYPES.get(element), REFERENCE.get(with_ref))))
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        shared = re.search(r"(\d+) bytes smem", report)
        found[kernel] = {
            "registers": int(re.search(r"Used (\d+) registers", report)[1]),
            "spills": sum(int(number) for number in stack.groups()),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def excesses(found: dict[str, dict[str, int]]) -> list[str]:
    """What of it is more than it may be, in words."""
    problems = []
    for kernel, used in found.items():
        if used["spills"]:
            problems.append(f"{kernel}: {used['spills']} bytes of spills and stack frame")
        if used["registers"] > register_bound(kernel):
            problems.append(f"{kernel}: {used['registers']} registers, more than {register_bound(kernel)}")
        if used["shared"] > 1024:  # the sums of four warps are 256 bytes; shared memory never limits the blocks
            problems.append(f"{kernel}: {used['shared']} bytes of shared memory")
    return problems


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By architecture, and of the PyTorch part: futures, so that two compilers run at once."""
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        futures = {"extension": pool.submit(compile_extension, folder)}
        futures |= {architecture: pool.submit(usage, architecture, folder) for architecture in architectures()}
        yield futures


@pytest.mark.parametrize("architecture", architectures())
def test_kernels(compiled, architecture):
    found = compiled[architecture].result()
    assert set(found) == KERNELS
    assert not excesses(found)


def test_the_gate_can_fail(tmp_path):
    """16 blocks leave a thread 32 registers: ptxas then has to spill, and this is seen."""
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    sums = csrc / "cuda" / "sums.cuh"
    text = sums.read_text()
    broken = text.replace("? 3 : blocks;", "? 3 : 16;")
    assert broken != text
    sums.write_text(broken)
    problems = excesses(usage("sm_90", tmp_path, csrc, ["__nv_bfloat16"]))
    assert any(re.match("sum_splits bf16 with reference: [0-9]+ bytes of spills", problem) for problem in problems)


def test_memory_is_reached_16_bytes_at_a_time(tmp_path):
    """The loads of a chunk and of what its vectors are cut out of, and a gradient's stores, as PTX names them."""
    source = tmp_path / "bf16.cu"
    source.write_text(INSTANCES % "INSTANTIATE(__nv_bfloat16)")
    command = [NVCC, "-std=c++20", "-O3", "-arch=sm_90", f"-I{CSRC / 'cuda'}", "-ptx", str(source), "-o", "-"]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"\.entry \S*?(sum_splits|fill_gradient)\S*Lb1E\S*\((.*?)\n\}\n", ptx, re.DOTALL))
    assert set(bodies) == {"sum_splits", "fill_gradient"}
    loads = {name: len(re.findall(r"ld\.global\.\S*v4\.\w32", body)) for name, body in bodies.items()}
    assert loads == dict.fromkeys(bodies, 2 * 2 * 2 * 2)  # two inputs, two vectors, two halves; whole chunks and edges
    assert len(re.findall(r"st\.global\.\S*v4\.\w32", bodies["fill_gradient"])) >= 2 * 2  # two outputs, two vectors


def compile_extension(folder: Path) -> subprocess.CompletedProcess:
    """token_stats.cu against PyTorch's headers, with the flags of torch.utils.cpp_extension."""
    flags = ["-std=c++20", "-O3", "-arch=sm_90", *cpp_extension.COMMON_NVCC_FLAGS, "-Xcompiler", "-fPIC"]
    if torch.version.cuda is None:
        flags.append("-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE")  # the header that it leaves out comes with CUDA builds only
    include = Path(torch.__file__).parent / "include"
    flags += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    command = [NVCC, *flags, "-c", str(CSRC / "cuda" / "token_stats.cu"), "-o", str(folder / "token_stats.o")]
    return subprocess.run(command, capture_output=True, text=True)


def test_compiles_against_torch(compiled):
    done = compiled["extension"].result()
    assert done.returncode == 0, done.stderr[-3000:]
