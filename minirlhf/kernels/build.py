"""The compiled kernels of `token_stats`: built from csrc/ at first use, afterwards loaded from a cache.

Two libraries, so that a build for the CPU neither needs nvcc nor wakes a GPU:

    minirlhf_kernels         csrc/ops.cpp and csrc/cpu: the ops' schemas, the CPU kernels, the facts of the build
    minirlhf_kernels_cuda    csrc/cuda: CUDA kernels for the same schemas, built when logits on a GPU first ask for them

torch.utils.cpp_extension compiles them with ninja. Its cache is not ours: it forgets headers, mixes instruction sets,
and a builder that was killed leaves a lock behind that every later process waits for. Here a build has a folder of its
own, named after everything that went into it. One process builds, under a lock that the kernel of the operating system
takes back when a process dies, and renames the finished library into place. So a library that is there is whole, and
loading it needs no compiler, no ninja, and a few milliseconds.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

NAME = "minirlhf_kernels"
CSRC = (
    Path(__file__).resolve().parent.parent.parent / "csrc"
)  # beside the package in a checkout: install with --editable

# What PyTorch compiles its own kernels with (cmake/Codegen.cmake), by what torch.backends.cpu.get_cpu_capability()
# found on this machine. Never -march=native: the cache may lie in a home that other machines share. And never
# -ffast-math: it gives up NaN and infinity, which are answers here. The language standard is the one that
# cpp_extension asks for, since torch's headers need it.
FLAGS = ("-O3", "-DNDEBUG", "-fno-math-errno", "-fopenmp")
INSTRUCTION_SETS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
CUDA_FLAGS = ("-O3", "-DNDEBUG")


class KernelUnavailable(RuntimeError):
    """There is no compiled kernel: one line says why, followed by at most five lines of the compiler's if it failed."""


_lock = threading.RLock()
_outcomes: dict[bool, ModuleType | str] = {}  # by `cuda`: the module, or why there is none
_facts: dict[str, str] = {}


def load(cuda: bool = False) -> ModuleType:
    """The module of the CPU kernels, with torch.ops.minirlhf registered; built if this machine has not built it yet.

    The first answer of a process, good or bad, is its answer to every later call.

    Args:
        cuda: also load the CUDA kernels.

    Raises:
        KernelUnavailable: says why it could not be built or loaded, and what to do about it.
    """
    if cuda not in _outcomes:
        with _lock:
            if cuda not in _outcomes:
                try:
                    _outcomes[cuda] = _load_cuda() if cuda else _load_cpu()
                except KernelUnavailable as reason:
                    _outcomes[cuda] = str(reason)
    outcome = _outcomes[cuda]
    if isinstance(outcome, str):
        raise KernelUnavailable(outcome)
    return outcome


def facts() -> dict[str, str]:
    """How the kernels of this process were built: compiler, instruction set, CUDA architectures, versions, path.

    `build` is the seconds the build took, or "cached" when there was nothing to build. `CUDA architectures` is empty
    as long as no CUDA kernel was asked for.
    """
    module = load()
    return {**module.facts(), "CUDA architectures": "", **_facts}


def _load_cpu() -> ModuleType:
    capability = torch.backends.cpu.get_cpu_capability()
    instructions = capability if capability in INSTRUCTION_SETS else "DEFAULT"
    flags = (
        *FLAGS,
        *INSTRUCTION_SETS.get(instructions, ()),
        f"-DCPU_CAPABILITY={instructions}",
        f"-DCPU_CAPABILITY_{instructions}",
    )
    sources = (CSRC / "ops.cpp", *sorted((CSRC / "cpu").glob("*.cpp")))
    module, path, build = _find_or_build(NAME, f"{_torch_label()}-{instructions.lower()}", sources, cflags=flags)
    _facts.update(torch=torch.__version__, python=platform.python_version(), path=str(path), build=build)
    return module


def _load_cuda() -> ModuleType:
    if torch.version.cuda is None:
        raise KernelUnavailable(f"torch {torch.__version__} is built without CUDA")
    module = load()  # the schemas
    # cpp_extension reads the same variable, and compiles for the GPUs it sees where it is not set.
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    if architectures in ("", "native"):
        seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        if not seen:
            raise KernelUnavailable("no GPU is visible to compile the CUDA kernels for; set TORCH_CUDA_ARCH_LIST")
        architectures = ";".join(f"{major}.{minor}" for major, minor in sorted(seen))
    label = f"{_torch_label()}-cuda{architectures.replace('+PTX', '').replace(';', '-')}"
    sources = (CSRC / "cuda" / "token_stats.cu",)
    _, path, build = _find_or_build(
        f"{NAME}_cuda", label, sources, cuda_cflags=CUDA_FLAGS, also=(architectures, torch.version.cuda)
    )
    _facts.update({"CUDA architectures": architectures, "CUDA path": str(path), "CUDA build": build})
    return module


# --- the cache ---


def cache_folder() -> Path:
    """$MINIRLHF_CACHE, or minirlhf in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    if chosen := os.environ.get("MINIRLHF_CACHE"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache).absolute() / "minirlhf"


def _torch_label() -> str:
    return f"torch{torch.__version__}-py{sys.version_info.major}{sys.version_info.minor}"


def _find_or_build(
    name: str, label: str, sources: tuple[Path, ...], cflags=(), cuda_cflags=(), also=()
) -> tuple[ModuleType | None, Path, str]:
    """The library `name` from the cache, else built: its module (None for CUDA), its path, "cached" or the seconds."""
    if os.name != "posix":
        raise KernelUnavailable("the fused kernel is built on Linux and macOS only")
    if missing := [source for source in sources if not source.is_file()]:
        raise KernelUnavailable(
            f"{missing[0]} is not there: the kernel is compiled from a checkout, installed with pip install --editable"
        )
    folder = cache_folder() / f"{label}-{_digest(sources, (name, *cflags, *cuda_cflags, *also))}"
    library = folder / f"{name}.so"
    found, module = _open(name, library)
    if found:
        return module, library, "cached"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_process(folder / "lock"):
            found, module = _open(name, library)  # another process may have built it while this one waited
            if found:
                return module, library, "cached"
            if library.exists():
                _say(f"{library} is damaged and is built anew")
            begun = time.perf_counter()
            module = _build(name, library, sources, cflags, cuda_cflags)
            return module, library, f"{time.perf_counter() - begun:.1f} s"
    except OSError as error:
        raise KernelUnavailable(
            f"the kernel's cache {folder.parent} cannot be used ({error}); set MINIRLHF_CACHE to a folder of yours"
        ) from error


def _digest(sources: tuple[Path, ...], settings: tuple[str, ...]) -> str:
    """A name for everything that a build depends on; another build gets another name.

    The compiler is left out on purpose: a machine without one must find what another machine compiled. The C library
    is in, since a home may be shared by machines of which the older one could not load what the newer one linked.
    """
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else platform.platform()
    torches = (torch.__version__, torch.version.git_version, sysconfig.get_config_var("SOABI"), platform.machine())
    digest = hashlib.sha256("\0".join(map(str, (*settings, *torches, libc))).encode())
    folders = {CSRC, *(source.parent for source in sources)}
    headers = {path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh")}
    for path in (Path(__file__), *sorted({*sources, *headers})):  # this file: how it is built
        content = path.read_bytes()
        digest.update(f"\0{path.parent.name}/{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _open(name: str, library: Path) -> tuple[bool, ModuleType | None]:
    """Whether the library is there and could be loaded, and its module; one that is damaged counts as not there."""
    if not library.is_file():
        return False, None
    try:
        if name != NAME:
            torch.ops.load_library(str(library))
            return True, None
        spec = importlib.util.spec_from_file_location(name, library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return True, module
    except (ImportError, OSError):
        return False, None


@contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """One process at a time; the lock of a process that is killed is free at once."""
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is building the fused kernel; waiting for it …")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


# --- the build ---


def _build(name: str, library: Path, sources: tuple[Path, ...], cflags, cuda_cflags) -> ModuleType | None:
    """Compile, link and load in a folder beside `library`, then rename it to `library`."""
    compiler, ninja = _find_compiler(), _find_ninja()
    include = Path(sysconfig.get_path("include", scheme="posix_prefix"))
    if not (include / "Python.h").is_file():
        raise KernelUnavailable(f"{include} has no Python.h; install Python's headers (python3-dev)")
    if "clang" in _version(compiler):
        # clang's OpenMP is not the one that torch brings along: without this flag the kernel runs, on one thread.
        cflags = tuple(flag for flag in cflags if flag != "-fopenmp")
        _say("clang compiles the fused kernel for one thread; for all of them set CXX=g++")

    from torch.utils import cpp_extension  # takes longer to import than a cached library to load

    cuda_home = None
    if cuda_cflags:
        cuda_home = cpp_extension.CUDA_HOME = _find_cuda(cpp_extension.CUDA_HOME)

    for stale in library.parent.glob("build-*"):  # whoever made it was killed: this process holds the lock
        shutil.rmtree(stale, ignore_errors=True)
    _say(
        f"building the fused kernel for {'CUDA (a minute or two' if cuda_cflags else 'the CPU (about half a minute'}, "
        f"once for this version of torch) …"
    )
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent, ignore_cleanup_errors=True) as folder:
        path = os.pathsep.join((str(ninja.parent), os.environ.get("PATH", os.defpath)))
        with _environment(PATH=path, CXX=compiler):
            try:
                # Linked without -fopenmp: the one OpenMP runtime of the process is then torch's, whatever its name.
                module = cpp_extension.load(
                    name,
                    [str(source) for source in sources],
                    extra_cflags=list(cflags),
                    extra_cuda_cflags=list(cuda_cflags),
                    extra_ldflags=[] if cuda_home is None else _cudart_flags(Path(cuda_home), Path(folder)),
                    extra_include_paths=[str(CSRC)],
                    build_directory=folder,
                    is_python_module=name == NAME,
                )
            except ImportError as error:
                raise KernelUnavailable(f"what {compiler} built cannot be loaded: {error}") from error
            except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
                raise KernelUnavailable(_failure("nvcc" if cuda_cflags else compiler, str(error))) from error
        # What is loaded from here stays loaded under its new name.
        os.replace(Path(folder) / library.name, library)
    if name == NAME:
        module.__file__ = module.__spec__.origin = str(library)
        return module
    return None


def _find_compiler() -> str:
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if shutil.which(command):
            return command
    missing = f"CXX={chosen}" if chosen else "c++"
    raise KernelUnavailable(f"no C++ compiler: {missing} is not found; install g++, or set CXX to a compiler")


def _version(compiler: str) -> str:
    """What the compiler says of itself; one that cannot do even that is not asked to compile."""
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailable(f"the C++ compiler {compiler} does not run: {error}") from error
    if answer.returncode != 0:
        raise KernelUnavailable(_failure(compiler, answer.stdout + answer.stderr or "it says nothing"))
    return answer.stdout


INSTALLED = Path("/usr/local")  # where CUDA's own installer puts cuda-13.0 and the like


def _find_cuda(found: str | None) -> str:
    """CUDA's folder: the one that torch found, where it holds what is compiled against, else one of the installed.

    torch takes the folder above an nvcc on the path, which may be a script that calls another.
    """

    def version(home: Path) -> tuple[bool, tuple[int, ...]]:
        numbers = tuple(int(number) for number in re.findall(r"\d+", home.name))
        return numbers[:1] == tuple(int(n) for n in torch.version.cuda.split(".")[:1]), numbers

    installed = sorted(INSTALLED.glob("cuda*"), key=version, reverse=True)  # of torch's major version first
    tried = [Path(home) for home in (found, *installed) if home is not None]
    for home in tried:
        if (home / "include" / "cuda_runtime.h").is_file() and (home / "bin" / "nvcc").exists():
            if str(home) != found:
                _say(f"CUDA is taken from {home}")
            return str(home)
    cure = f"install CUDA {torch.version.cuda}'s, or set CUDA_HOME to its folder"
    if not tried:
        raise KernelUnavailable(f"nvcc is not found; {cure}")
    where = ", ".join(map(str, tried))
    raise KernelUnavailable(f"nvcc with its include/cuda_runtime.h is not found in {where}; {cure}")


def _cudart_flags(home: Path, folder: Path) -> list[str]:
    """Where the linker finds -lcudart, which cpp_extension asks for and looks for in lib64 alone.

    Where CUDA came as a compiler without libraries it is torch's own, which has no name that a linker looks for: it
    gets one in `folder`.
    """
    places = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    if found := [place for place in places if (place / "libcudart.so").is_file()]:
        return [f"-L{shlex.quote(str(place))}" for place in found]
    major = torch.version.cuda.split(".")[0]
    library = next(Path(torch.__file__).parent.parent.glob(f"nvidia/*/lib/libcudart.so.{major}"), None)
    if library is None:
        return []  # it may be where every linker looks
    (folder / "libcudart.so").symlink_to(library)
    return [f"-L{shlex.quote(str(folder))}"]


def _find_ninja() -> Path:
    """pip puts ninja beside the interpreter, and that folder is only on PATH while its environment is activated."""
    folders = [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))]
    found = shutil.which("ninja", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise KernelUnavailable("ninja is not found, which builds the kernel; install it: pip install ninja")
    return Path(found)


def _failure(compiler: str, output: str) -> str:
    """One line, then what of a compiler's output says why: its first errors, or else its last words."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # ninja repeats the commands it ran and counts them.
    words = [line for line in lines if not re.match(r"\[\d+/\d+\]|FAILED:|ninja:|Error building extension", line)]
    words = [line for line in words if not (" -o " in line and " -c " in line)]
    errors = [line for line in words if re.search(r"\b(error|Error|undefined reference|Killed|No space left)\b", line)]
    # The linker names what it lacks in a line of its own, before the compiler says that the linker failed.
    errors = [line for line in words if re.search(r"\bcannot find (-l|crt|/)", line)] + errors
    chosen = list(dict.fromkeys(errors))[:5] or words[-5:] or lines[-5:]
    return "\n  ".join((f"the compiler {compiler} failed:", *(line[:300] for line in chosen)))


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """cpp_extension takes the compiler and the way to ninja from the process's environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    """Build, or find built: the CPU's kernels, with --cuda the CUDA kernels too."""
    if not set(arguments) <= {"--cuda"}:
        sys.exit("usage: python -m minirlhf.kernels [--cuda]")
    try:
        load()
    except KernelUnavailable as reason:
        sys.exit(f"no fused kernel, the plain PyTorch one will be used: {reason}")
    print(f"the fused kernel is ready: {facts()['path']}")
    if "--cuda" in arguments:
        try:
            load(cuda=True)
        except KernelUnavailable as reason:
            sys.exit(f"no fused kernel for CUDA: {reason}")
        print(f"the CUDA kernels for {facts()['CUDA architectures']} are ready: {facts()['CUDA path']}")
