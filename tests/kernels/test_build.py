"""The build of the compiled kernels and its cache: on tiny stand-ins for csrc/, then on the real thing.

Whatever compiles runs in a process of its own: a process loads one build and keeps it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from minirlhf.kernels import build as kernels
from minirlhf.kernels.build import KernelUnavailable

# A Python module in plain C, so that compiling it takes well under a second. Its facts show what it was compiled from.
OPS = """
#include <Python.h>
#include "common.h"
int from_cpu();
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)
static PyObject* facts(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "instruction set", TEXT(CPU_CAPABILITY), "common", COMMON, "cpu",
                       from_cpu() == 1 ? "one" : "two");
}
static PyMethodDef methods[] = {{"facts", facts, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "minirlhf_kernels", nullptr, -1, methods};
#define INIT2(name) PyInit_##name
#define INIT(name) INIT2(name)
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&definition); }
"""

LOAD = """
import json, sys, threading, time
from pathlib import Path
import torch
from minirlhf.kernels import build as kernels
if sys.argv[1:]:
    kernels.CSRC = Path(sys.argv[1])
modules, reasons = [], []
def load():
    try:
        modules.append(kernels.load())
    except kernels.KernelUnavailable as reason:
        reasons.append(str(reason))
threads = [threading.Thread(target=load) for _ in range(4)]
begun = time.perf_counter()
[thread.start() for thread in threads]
[thread.join() for thread in threads]
seconds = time.perf_counter() - begun
assert len(modules) + len(reasons) == 4 and len(set(map(id, modules))) + len(set(reasons)) == 1
maps = Path("/proc/self/maps")
maps = maps.read_text().splitlines() if maps.exists() else []
print(json.dumps({
    "seconds": seconds,
    "reason": reasons[0] if reasons else None,
    "facts": kernels.facts() if modules else None,
    "cpp_extension": "torch.utils.cpp_extension" in sys.modules,
    "mapped": sorted({line.split()[-1] for line in maps if "/" in line}),
}))
"""


@pytest.fixture
def csrc(tmp_path) -> Path:
    """Stand-in sources, in a folder with a space in its name."""
    folder = tmp_path / "a checkout" / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "ops.cpp").write_text(OPS)
    (folder / "common.h").write_text('#define COMMON "old"\n')
    (folder / "cpu" / "token_stats.cpp").write_text('#include "value.h"\nint from_cpu() { return VALUE; }\n')
    (folder / "cpu" / "value.h").write_text("#define VALUE 1\n")
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "the cache"


@pytest.fixture
def here(monkeypatch, csrc, cache) -> None:
    """This process has not asked for a kernel yet. For tests that end before anything is compiled."""
    monkeypatch.setattr(kernels, "CSRC", csrc)
    monkeypatch.setattr(kernels, "_outcomes", {})
    monkeypatch.setattr(kernels, "_facts", {})
    monkeypatch.setenv("MINIRLHF_CACHE", str(cache))


@pytest.fixture
def start():
    """Start a process, and a group of its own, in which four threads ask for the kernel at once."""
    processes = []

    def start(csrc: Path | None = None, cache: Path | None = None, **environment: str) -> subprocess.Popen:
        environment = {**os.environ, **environment} | ({"MINIRLHF_CACHE": str(cache)} if cache else {})
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", LOAD, *([str(csrc)] if csrc else [])],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        with suppress(ProcessLookupError):  # the rule: nothing of the group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out) | {"stderr": err}


def compiler(folder: Path, instead: str = "") -> Path:
    """A C++ compiler that notes each file it compiles in `log`, and runs `instead` of compiling."""
    path = folder / "bin" / "g++"
    path.parent.mkdir(exist_ok=True)
    run = f'{shutil.which(os.environ.get("CXX", "c++"))} "$@"'
    path.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo compiled >> "{folder}/log"\n{instead}\n;; esac\nexec {run}\n'
    )
    path.chmod(0o755)
    return path


def compiled(folder: Path) -> int:
    log = folder / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_until(condition, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


# --- the cache ---


def test_built_once_then_loaded_without_a_compiler(start, csrc, cache, tmp_path):
    # The ninja that pip put beside the interpreter is taken, not one that happens to be on PATH.
    broken = tmp_path / "another" / "ninja"
    broken.parent.mkdir()
    shutil.copy("/bin/false", broken)
    path = f"{broken.parent}{os.pathsep}{os.environ['PATH']}"
    first = finish(start(csrc, cache, CXX=str(compiler(tmp_path)), PATH=path))
    assert first["facts"]["build"].endswith(" s") and first["stderr"].count("building the fused kernel") == 1
    assert first["facts"]["common"] == "old" and first["facts"]["torch"] == torch.__version__
    library = Path(first["facts"]["path"])
    assert library.is_relative_to(cache) and compiled(tmp_path) == 2
    assert {path.name for path in library.parent.iterdir()} == {library.name, "lock"}  # nothing half-done is left

    second = finish(start(csrc, cache, CXX="/bin/false", PATH=str(tmp_path)))
    assert second["facts"] == first["facts"] | {"build": "cached"}
    assert second["stderr"] == "" and not second["cpp_extension"] and compiled(tmp_path) == 2
    assert second["seconds"] <= 0.5


def test_a_header_that_changed_is_compiled_in(start, csrc, cache):
    finish(start(csrc, cache))
    (csrc / "common.h").write_text('#define COMMON "new"\n')
    (csrc / "cpu" / "value.h").write_text("#define VALUE 2\n")
    after = finish(start(csrc, cache))["facts"]
    assert after["build"] != "cached" and after["common"] == "new" and after["cpu"] == "two"


@pytest.mark.parametrize("name", ["ops.cpp", "common.h", "cpu/token_stats.cpp", "cpu/value.h", "cpu/another.h"])
def test_every_file_counts(here, csrc, name):
    sources = (csrc / "ops.cpp", csrc / "cpu" / "token_stats.cpp")
    before = kernels._digest(sources, ())
    assert kernels._digest(sources, ()) == before
    with (csrc / name).open("a") as file:
        file.write("// changed\n")
    assert kernels._digest(sources, ()) != before


def test_everything_else_that_shapes_a_build_counts(here, csrc, monkeypatch):
    sources = (csrc / "ops.cpp", csrc / "cpu" / "token_stats.cpp")
    digests = [kernels._digest(sources, ()), kernels._digest(sources, ("-O2",)), kernels._digest(sources, ("-O2", "x"))]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        digests.append(kernels._digest(sources, ()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "confstr", lambda name: "glibc 2.99")
        digests.append(kernels._digest(sources, ()))
    (csrc / "cpu" / "value.h").rename(csrc / "value.h")
    digests.append(kernels._digest(sources, ()))
    assert len(set(digests)) == len(digests)


def test_each_instruction_set_has_its_own_build(start, csrc, cache):
    best = torch.backends.cpu.get_cpu_capability()
    best = best if best in kernels.INSTRUCTION_SETS else "DEFAULT"
    asked = ["default", *(["avx2"] if best == "AVX512" else [])]
    found = [finish(start(csrc, cache, ATEN_CPU_CAPABILITY=name))["facts"] for name in asked]
    assert [facts["instruction set"] for facts in found] == [name.upper() for name in asked]
    assert len({facts["path"] for facts in found}) == len(asked)
    if best == "DEFAULT":
        pytest.skip("this machine knows one instruction set")
    assert finish(start(csrc, cache))["facts"]["instruction set"] == best


def test_four_processes_at_once_build_once(start, csrc, cache, tmp_path):
    cxx = compiler(tmp_path, instead="sleep 1")  # long enough for all of them to come
    processes = [start(csrc, cache, CXX=str(cxx)) for _ in range(4)]
    found = [finish(process)["facts"] for process in processes]
    assert sorted(facts["build"] == "cached" for facts in found) == [False, True, True, True]
    assert len({facts["path"] for facts in found}) == 1 and compiled(tmp_path) == 2


def test_a_builder_that_was_killed_is_in_nobodys_way(start, csrc, cache, tmp_path):
    builder = start(csrc, cache, CXX=str(compiler(tmp_path, instead="sleep 60")))
    wait_until(lambda: compiled(tmp_path))
    waiting = start(csrc, cache)
    assert "waiting" in waiting.stderr.readline()
    builder.kill()  # its ninja and its compilers live on
    found = finish(waiting)
    assert found["facts"]["common"] == "old" and found["facts"]["build"] != "cached"
    assert not list(Path(found["facts"]["path"]).parent.glob("build-*"))  # what the killed one left


def test_a_damaged_library_is_built_anew(start, csrc, cache):
    library = Path(finish(start(csrc, cache))["facts"]["path"])
    library.write_bytes(library.read_bytes()[:64])
    again = finish(start(csrc, cache))
    assert again["facts"]["build"] != "cached" and "damaged" in again["stderr"]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "mine"))
    assert kernels.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("MINIRLHF_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.cache_folder() == tmp_path / "minirlhf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernels.cache_folder() == tmp_path / ".cache" / "minirlhf"


# --- what can go wrong ---


def test_an_error_in_the_source_is_shown_in_a_few_lines(start, csrc, cache):
    (csrc / "cpu" / "token_stats.cpp").write_text("int from_cpu() { return " + "undeclared(0) + " * 20 + "VALUE; }\n")
    reason = finish(start(csrc, cache))["reason"]
    assert "token_stats.cpp:1" in reason and "error: " in reason and "undeclared" in reason
    assert reason.count("\n") <= 5 and len(reason) < 2000
    assert not list(cache.rglob("build-*")) and not list(cache.rglob("*.so"))


def test_a_compiler_that_breaks_gives_its_last_lines(start, csrc, cache, tmp_path):
    words = "for i in 1 2 3 4 5 6 7 8 9; do echo line $i; done; echo the licence has run out; exit 3"
    cxx = compiler(tmp_path, instead=words)
    reason = finish(start(csrc, cache, CXX=str(cxx)))["reason"]
    first, *rest = reason.split("\n")
    assert str(cxx) in first and rest[-1].strip() == "the licence has run out" and 1 < len(rest) <= 5
    assert not list(cache.rglob("build-*"))


def test_what_cannot_be_loaded_is_not_kept(start, csrc, cache):
    (csrc / "cpu" / "token_stats.cpp").write_text("int another() { return 1; }\n")
    reason = finish(start(csrc, cache))["reason"]
    assert "cannot be loaded" in reason and "from_cpu" in reason and "\n" not in reason
    assert not list(cache.rglob("*.so"))


def test_a_compiler_that_does_not_run(here, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(KernelUnavailable, match="the compiler /bin/false failed"):
        kernels.load()


def test_no_compiler(here, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelUnavailable, match=r"no C\+\+ compiler: c\+\+ is not found; install"):
        kernels.load()


def test_the_compiler_asked_for_is_missing(here, monkeypatch):
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(KernelUnavailable, match=r"CXX=g\+\+-99 is not found"):
        kernels.load()


def test_no_ninja(here, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)  # anything that runs
    monkeypatch.setattr(sysconfig, "get_path", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(KernelUnavailable, match="pip install ninja"):
        kernels.load()


def test_ninja_beside_an_interpreter_that_is_not_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels._find_ninja().parent.samefile(sysconfig.get_path("scripts"))


def test_no_python_headers(here, monkeypatch, tmp_path):
    get_path = sysconfig.get_path
    wrong = {"include": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *args, **kwargs: wrong.get(name) or get_path(name))
    with pytest.raises(KernelUnavailable, match=r"no Python\.h; install"):
        kernels.load()


def test_no_sources(here, csrc):
    (csrc / "ops.cpp").unlink()
    with pytest.raises(KernelUnavailable, match=r"ops\.cpp is not there.*--editable"):
        kernels.load()


def test_a_cache_that_cannot_be_written(here, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "file"))
    with pytest.raises(KernelUnavailable, match="set MINIRLHF_CACHE"):
        kernels.load()


def test_the_first_answer_of_a_process_stays(here, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(KernelUnavailable) as first:
        kernels.load()
    monkeypatch.setattr(kernels, "_find_or_build", lambda *args, **kwargs: pytest.fail("asked again"))
    with pytest.raises(KernelUnavailable) as second:
        kernels.load()
    assert str(first.value) == str(second.value) and first.value is not second.value


def test_a_torch_without_cuda_says_so(here, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(KernelUnavailable, match="built without CUDA"):
        kernels.load(cuda=True)


def test_first_errors_of_a_page():
    page = "\n".join(
        ["Error building extension 'minirlhf_kernels': [1/2] c++ -c a.cpp -o a.o", "FAILED: [code=1] a.o"]
        + ["c++ -Werror -c a.cpp -o a.o", "In file included from a.cpp:1:"]
        + [f"a.cpp:{i // 2}: error: wrong {i // 2}" for i in range(30)]
        + ["ninja: build stopped: subcommand failed."]
    )
    assert kernels._failure("c++", page).split("\n  ") == ["the compiler c++ failed:"] + [
        f"a.cpp:{i}: error: wrong {i}" for i in range(5)
    ]


def test_the_linker_s_word_comes_first():
    page = """[2/2] c++ a.o -shared -lcudart -o a.so
        FAILED: [code=1] a.so
        c++ a.o -shared -lcudart -o a.so
        /usr/bin/ld: cannot find -lcudart: No such file or directory
        collect2: error: ld returned 1 exit status
        ninja: build stopped: subcommand failed."""
    assert kernels._failure("nvcc", page).split("\n  ") == [
        "the compiler nvcc failed:",
        "/usr/bin/ld: cannot find -lcudart: No such file or directory",
        "collect2: error: ld returned 1 exit status",
    ]


# --- where CUDA is ---


def cuda_folder(path, *, header=True, nvcc=True):
    """As much of CUDA as is looked at."""
    for there, file in ((header, "include/cuda_runtime.h"), (nvcc, "bin/nvcc")):
        if there:
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).touch()
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture
def installed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "INSTALLED", tmp_path / "local")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "local").mkdir()
    return tmp_path / "local"


def test_cuda_is_where_torch_found_it(installed, tmp_path, capsys):
    cuda_folder(installed / "cuda-13.0")
    found = cuda_folder(tmp_path / "mine")
    assert kernels._find_cuda(str(found)) == str(found)
    assert capsys.readouterr().err == ""


def test_an_nvcc_without_its_headers_is_looked_for_among_the_installed(installed, tmp_path, capsys):
    wrapper = cuda_folder(tmp_path / "usr", header=False)
    for name in ("cuda-12.8", "cuda-13.0", "cuda-13.2", "cuda-14.1", "cuda"):
        cuda_folder(installed / name)
    cuda_folder(installed / "cuda-13.9", nvcc=False)
    assert kernels._find_cuda(str(wrapper)) == str(installed / "cuda-13.2"), "of torch's major version the newest"
    assert capsys.readouterr().err == f"CUDA is taken from {installed / 'cuda-13.2'}\n"
    for name in ("cuda-13.0", "cuda-13.2"):
        shutil.rmtree(installed / name)
    assert kernels._find_cuda(None) == str(installed / "cuda-14.1"), "else the newest"


def test_no_cuda_says_where_it_was_looked_for(installed, tmp_path):
    with pytest.raises(KernelUnavailable, match=r"nvcc is not found; install CUDA 13\.0's, or set CUDA_HOME"):
        kernels._find_cuda(None)
    wrapper = cuda_folder(tmp_path / "usr", header=False)
    cuda_folder(installed / "cuda-13.0", header=False)
    with pytest.raises(KernelUnavailable) as reason:
        kernels._find_cuda(str(wrapper))
    assert str(wrapper) in str(reason.value) and str(installed / "cuda-13.0") in str(reason.value)


def test_cudart_is_linked_from_where_it_is(installed, tmp_path, monkeypatch):
    home = cuda_folder(tmp_path / "home")
    (tmp_path / "build").mkdir()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site" / "torch" / "__init__.py"))
    assert kernels._cudart_flags(home, tmp_path / "build") == []
    wheel = tmp_path / "site" / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    assert kernels._cudart_flags(home, tmp_path / "build") == [f"-L{tmp_path / 'build'}"]
    assert (tmp_path / "build" / "libcudart.so").resolve() == wheel
    (home / "lib").mkdir()
    (home / "lib" / "libcudart.so").touch()
    assert kernels._cudart_flags(home, tmp_path / "build") == [f"-L{home / 'lib'}"]


def test_both_libraries_are_built_when_asked_for(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(kernels, "load", lambda cuda=False: asked.append(cuda))
    facts = {"path": "cpu.so", "CUDA path": "cuda.so", "CUDA architectures": "9.0"}
    monkeypatch.setattr(kernels, "facts", lambda: facts)
    kernels.main([])
    assert asked == [False]
    kernels.main(["--cuda"])
    assert asked == [False, False, True]
    assert capsys.readouterr().out.splitlines()[-1] == "the CUDA kernels for 9.0 are ready: cuda.so"
    with pytest.raises(SystemExit, match="usage"):
        kernels.main(["--gpu"])

    def no_gpu(cuda=False):
        if cuda:
            raise KernelUnavailable("no GPU is visible")

    monkeypatch.setattr(kernels, "load", no_gpu)
    with pytest.raises(SystemExit, match="no fused kernel for CUDA: no GPU is visible"):
        kernels.main(["--cuda"])


# --- the real sources ---


def test_the_real_kernel_starts_fast_and_brings_no_second_openmp(start):
    finish(start())  # built now unless this machine has it
    found = finish(start(CXX="/bin/false"))
    assert found["facts"]["build"] == "cached" and found["seconds"] <= 0.5
    assert {"compiler", "instruction set", "CUDA architectures", "torch", "python", "path"} <= set(found["facts"])
    assert all(isinstance(value, str) for value in found["facts"].values())
    runtimes = [path for path in found["mapped"] if any(name in Path(path).name for name in ("gomp", "iomp", "libomp"))]
    if found["mapped"]:  # Linux
        assert found["facts"]["path"] in found["mapped"] and len(runtimes) == 1
        # Where torch's runtime has another name than the compiler's, asking for the compiler's would bring a second.
        assert b"libgomp" not in Path(found["facts"]["path"]).read_bytes()
