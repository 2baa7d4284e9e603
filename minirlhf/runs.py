"""A run's folder, and the command line in front of it: configuration, metrics, checkpoints, resuming, devices.

    run.json         script, arguments, seed, versions, whether the run is finished
    metrics.jsonl    one JSON object a step
    samples.jsonl    a few responses every so often
    explain.jsonl, explain.html    responses taken apart, token by token, where PPO is asked for them
    tensorboard/, wandb/           the same metrics and samples, where --log asks for it
    state/           what resuming needs: weights, optimiser moments, step; gone once the run is finished
    config.json, model.safetensors, tokenizer.json     the result, in Hugging Face's layout

Nothing is written before the first step has succeeded, so that bad input leaves no half-written run, and every file
is written under another name and renamed, so that a run killed at any moment can be resumed. The weights after
resuming are those of an uninterrupted run, on one machine and thread count: batches and samples are pure functions of
(seed, step), never of a generator's history. On a CPU they are so bit for bit (with --compile but for rounding). On a
GPU torch adds up some gradients in whatever order its threads come, so that two runs differ in rounding, and only with
--deterministic, which has it take other kernels, are they the same bits.
"""

import ctypes
import importlib.util
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import minirlhf
from minirlhf import InputError, kernels
from minirlhf.checkpoints import find_model, load_model, save_model, write_tensors
from minirlhf.model import GPT, ScalarModel
from minirlhf.token_stats import Kernel
from minirlhf.tokenizer import Tokenizer
from minirlhf.trackers import Trackers

console = Console(highlight=False)
RESUME_ONLY = ("out", "resume", "overwrite", "checkpoint_every", "explain", "log")  # may differ when a run is resumed
ROWS = ("metrics.jsonl", "samples.jsonl", "explain.jsonl")  # appended to step by step


@dataclass(frozen=True)
class RunArgs:
    """What every training script takes."""

    out: Path
    """The run's folder."""
    seed: int = 0
    """Everything random follows from it."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products; weights and optimiser stay fp32."""
    matmul: Literal["highest", "high"] = "highest"
    """On a GPU, what fp32 products are made of: highest (fp32) or high (TF32: several times as fast, 10 bits instead of
    23)."""
    deterministic: bool = False
    """On a GPU, the same bits in every run, at some speed; on a CPU they always are."""
    kernel: str = "auto"
    """Which token_stats: fused (compiled at first use), reference (plain PyTorch) or auto (fused where it can be)."""
    compile: bool = False
    """Compile the network's blocks with torch.compile: a minute at the start, for faster steps on a GPU."""
    checkpointing: bool = False
    """Keep only what enters each block, compute the block again for its gradient, and give freed memory back sooner: a
    third more time, and a fraction of the memory for activations."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint of --out."""
    overwrite: bool = False
    """Replace the run that --out holds."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Show metrics and samples, step by step, in TensorBoard (its files are in the run's folder), Weights & Biases or
    both, too."""

    def __post_init__(self):
        check_at_least(1, checkpoint_every=self.checkpoint_every)
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite contradict each other; give one of them")
        pick_device(self.device)
        check_kernel(self.kernel, self.device)
        if self.compile:
            check_compiler("--compile", self.device)
        if self.matmul == "high" and pick_device(self.device).type == "cpu":
            raise InputError("--matmul high is for a GPU, a CPU has no TF32; leave it out, or give --dtype bf16")


class Run:
    """One training run's folder: start or resume it, log to it, checkpoint it, finish it."""

    def __init__(self, args: RunArgs, script: str, steps: int):
        self.folder, self.script, self.steps = args.out, script, steps
        self.checkpoint_every = args.checkpoint_every
        self.arguments = _plain(asdict(args))
        self.replaces = False  # the old run is only removed once this one has something to put in its place
        self.written = False
        self.last_checkpoint = 0
        self.progress: Progress | None = None
        self._look_at_folder(args)
        config = {key: value for key, value in self.arguments.items() if key not in RESUME_ONLY}
        self.trackers = Trackers(args.log, self.folder, {"script": script, **config})

    def _look_at_folder(self, args: RunArgs) -> None:
        if not self.folder.exists():
            return
        # An empty folder, or all that a run killed in its first moment leaves behind.
        if self.folder.is_dir() and all(path.name == "run.json.partial" for path in self.folder.iterdir()):
            return
        if not self.folder.is_dir():
            raise InputError(f"--out {self.folder} is a file; name a folder")
        info = read_run(self.folder)
        if args.overwrite:
            if info is None:
                raise InputError(f"--out {self.folder} holds files but no run; --overwrite only replaces a run")
            if Path.cwd().is_relative_to(self.folder.resolve()):
                raise InputError(
                    f"--out {self.folder} holds the current directory, which --overwrite would remove; "
                    "name a folder of its own"
                )
            self.replaces = True
            return
        if not args.resume:
            raise InputError(f"--out {self.folder} already holds files; give --resume, --overwrite or another folder")
        if info is None:
            raise InputError(f"--out {self.folder} holds no run to resume; name another folder")
        if info["script"] != self.script:
            raise InputError(
                f"--out {self.folder} is a run of {info['script']}, not {self.script}; name another folder"
            )
        for key, value in self.arguments.items():
            # An argument that an earlier version did not have is the same as now.
            if key not in RESUME_ONLY and info["arguments"].get(key, value) != value:
                raise InputError(
                    f"--resume: {key} was {info['arguments'][key]!r} when {self.folder} began, now {value!r}; "
                    "resume with the same arguments, or start anew with --overwrite"
                )
        self.written = True

    @property
    def finished(self) -> bool:
        """True when resuming has nothing left to do."""
        return self.written and bool((read_run(self.folder) or {}).get("finished"))

    # --- the loop ---

    def range(self, start: int) -> Iterator[int]:
        """Steps from `start` to the end, with a progress bar when somebody is looking."""
        begun = time.perf_counter()
        console.print(
            f"[bold]{self.script}[/] → {escape(str(self.folder))}: {self.steps} steps"
            + (f", from {start}" if start else "")
        )
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as self.progress:
            self.task = self.progress.add_task("", total=self.steps, completed=start, note="")
            for step in range(start, self.steps):
                yield step
                self.progress.update(self.task, advance=1)
        console.print(f"  {self.steps - start} steps in {time.perf_counter() - begun:.0f} s")

    def log(self, step: int, metrics: dict[str, float | Tensor | None], show: tuple[str, ...] = ()) -> None:
        """Append one step's metrics to metrics.jsonl; those named in `show` appear beside the progress bar."""
        self._begin()
        row = {"step": step, **{k: _number(v) for k, v in metrics.items()}}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.trackers.follow()
        if self.progress is not None:
            note = "  ".join(f"{k} {row[k]:.3f}" for k in show if row.get(k) is not None)
            self.progress.update(self.task, note=note)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append responses to samples.jsonl and show them."""
        self.append("samples.jsonl", [{"step": step, **row} for row in rows])
        self.trackers.follow()
        show_samples(f"step {step}", rows)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Append rows, each with its step, to one of `ROWS` in the run's folder."""
        if not rows:
            return
        self._begin()
        with open(self.folder / name, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def require_finite(self, step: int, **values: float | Tensor) -> None:
        """Stop, before the weights are touched, when a loss or a gradient is not a number."""
        for name, value in values.items():
            if not math.isfinite(float(value)):
                kept = f"the checkpoint of step {self.last_checkpoint} is kept in {self.folder / 'state'}"
                raise InputError(
                    f"{name} became {float(value)} at step {step} of {self.script}; "
                    f"{kept if self.last_checkpoint else 'no checkpoint had been written yet'}; "
                    "lower the learning rate or look at the data, then start again"
                )

    # --- state ---

    def restore(self, *, numbers: dict[str, float] | None = None, **parts: nn.Module | torch.optim.Optimizer) -> int:
        """Fill modules, optimisers and numbers from the last checkpoint; return the step to go on from (0 = fresh)."""
        path = self.folder / "state" / "checkpoint.safetensors"
        if not self.written or not path.is_file():
            if self.written:  # killed before its first checkpoint
                self._forget_from(0)
            return 0
        try:
            with safe_open(path, "pt") as file:
                info = json.loads(file.metadata()["info"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: cut off or damaged ({error}); start again with --overwrite") from error
        for name, part in parts.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            if isinstance(part, nn.Module):
                try:
                    part.load_state_dict(own)
                except RuntimeError as error:
                    what = str(error).splitlines()[-1].strip()[:200]  # the last tensor that does not fit
                    raise InputError(
                        f"{path}: does not fit the {name} of this run ({what}); what the run started from has changed: "
                        "put it back, or start again with --overwrite"
                    ) from error
            else:
                _load_optimizer(part, own)
        if numbers is not None:
            numbers.update(info["numbers"])
        self._forget_from(info["step"])
        self.last_checkpoint = info["step"]
        return info["step"]

    def checkpoint(
        self, done: int, *, numbers: dict[str, float] | None = None, **parts: nn.Module | torch.optim.Optimizer
    ) -> None:
        """After `done` steps, if it is time: write what `restore` needs, in one file, in one rename.

        A step may overflow the weights though its loss was a number: that stops the run here, and after the last step,
        so that neither a checkpoint nor a result holds such weights.
        """
        if done % self.checkpoint_every and done != self.steps:
            return
        tensors = {}
        for name, part in parts.items():
            own = part.state_dict() if isinstance(part, nn.Module) else _optimizer_tensors(part)
            tensors |= {f"{name}/{key}": value.detach() for key, value in own.items()}
        ends = [end.double().cpu() for value in tensors.values() for end in value.aminmax()]  # nothing as large is made
        self.require_finite(done - 1, **{"a weight": torch.stack(ends).abs().max()})  # NaN if any is
        if done == self.steps:
            return
        tensors = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
        self._begin()
        (self.folder / "state").mkdir(exist_ok=True)
        path = self.folder / "state" / "checkpoint.safetensors"
        partial = path.with_name(path.name + ".partial")
        write_tensors(tensors, partial, {"info": json.dumps({"step": done, "numbers": numbers or {}})})
        partial.replace(path)
        self.last_checkpoint = done

    def finish(self, model: GPT | ScalarModel, tokenizer: Tokenizer) -> None:
        """Write the result in Hugging Face's layout and mark the run as finished."""
        self._begin()
        tokenizer.save(self.folder)
        save_model(model, self.folder, tokenizer.eot)
        self._write_info(finished=True)
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        self.trackers.close()

    def _begin(self) -> None:
        if self.written:
            return
        folder = self.folder.resolve()  # what a link points to is replaced, the link stays
        if self.replaces:
            # Renamed first: whoever is killed while the old run is being removed has no half of it in place.
            aside = folder.with_name(f".{folder.name}.replaced")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                folder.rename(aside)
            except OSError as error:
                raise InputError(
                    f"--out {self.folder} cannot be replaced ({error.strerror}); name a folder of its own"
                ) from error
            shutil.rmtree(aside)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_info(finished=False)
        self.written = True

    def _write_info(self, finished: bool) -> None:
        info = {
            "script": self.script,
            "arguments": self.arguments,
            "seed": self.arguments["seed"],
            "finished": finished,
            "versions": {
                "minirlhf": minirlhf.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
            },
        }
        write_text(self.folder / "run.json", json.dumps(info, indent=2) + "\n")

    def _forget_from(self, step: int) -> None:
        """Drop logged rows that the resumed run is about to write again."""
        for name in ROWS:
            path = self.folder / name
            if path.is_file():
                # Only "\n" ends a row: a sampled text may hold other line separators. A killed run may cut a character.
                lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
                rows = [line for line in lines if _step_of(line) < step]
                write_text(path, "".join(row + "\n" for row in rows))


# --- files ------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write under another name, then rename: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_run(folder: Path) -> dict[str, Any] | None:
    """A run's run.json, or None when the folder holds no run."""
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) and "script" in info and "arguments" in info else None


def load_run(
    folder: str | Path, *, scalar: bool = False, device: torch.device | str = "cpu"
) -> tuple[GPT | ScalarModel, Tokenizer]:
    """The model and tokenizer of a finished run, of any Hugging Face GPT-2 folder, or of a GPT-2 of their hub."""
    folder = find_model(folder)
    info = read_run(folder)
    if info is not None and not info.get("finished"):
        raise InputError(f"{folder}: this run of {info['script']} is not finished; go on with --resume")
    model, tokenizer = load_model(folder, scalar=scalar), Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
            "the two are not from the same model"
        )
    return model.to(device).eval(), tokenizer


def require_same_tokenizer(one: Tokenizer, folder: str | Path, other: Tokenizer, other_folder: str | Path) -> None:
    """Refuse two models that do not read the same token ids."""
    if one != other:
        raise InputError(f"{folder} and {other_folder} have different tokenizers; train one from the other with --init")


def ensure_run(folder: Path, script: str, *arguments: str) -> Path:
    """A default input that does not exist yet is trained first, and says so.

    The script is the one in the current directory, or else the one beside the script that is running.
    """
    info = read_run(folder)
    if info is not None and info.get("finished"):
        return folder
    beside = Path(sys.argv[0]).parent / script
    if not Path(script).is_file() and beside.is_file():
        script = str(beside)
    command = [sys.executable, script, *arguments, *(["--resume"] if info is not None else [])]
    why = "is not finished" if info else "does not exist yet"
    console.print(escape(f"{folder} {why}: running {' '.join(['python', *command[1:]])}"))
    done = subprocess.run(command)
    if done.returncode:
        raise InputError(f"{folder} could not be trained ({script} ended with code {done.returncode}); see above")
    return folder


# --- the command line -------------------------------------------------------------------------------------------------


def cli(main: Callable[[Any], None], args_type: type, prog: str | None = None) -> None:
    """Parse a dataclass from the command line and run: a user's mistake is one line on stderr and exit code 2.

    Args:
        main: what to run.
        args_type: its arguments.
        prog: how the command is called, for its usage line; by default as the file is called.
    """
    keep_memory()
    try:
        main(_parse(args_type, prog))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; a training script goes on from its last checkpoint with --resume", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        what = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        print(f"error: memory ran out ({what}); {MEMORY_CURES}", file=sys.stderr)
        sys.exit(2)


LEAN = 1 << 22  # bytes: tensors from this size on are given back when they are freed, with --checkpointing


def keep_memory(mapped: int = 1 << 25) -> None:
    """Have the C library keep what the main thread frees for its next tensors, up to a gigabyte.

    By itself glibc gives the system back what is free at the end of its heap. A step of training frees its activations,
    and the next one has them mapped and zeroed again, page by page: about a twentieth of a small model's step. Other C
    libraries are left as they are.

    Args:
        mapped: tensors of more bytes are mapped one by one instead, and given back when they are freed. The default is
            the most that glibc takes. `LEAN` is for who would rather have the memory: in the heap, gradients taken anew
            in each step leave holes that no activation fits into. GPT-2 small's step of DPO takes a fifth less memory
            then, and an eighth more time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, mapped)  # M_MMAP_THRESHOLD; set, it no longer moves


MEMORY_CURES = (
    "train with a smaller --microbatch-size (sample and score with a smaller --batch-size), with --checkpointing, or "
    "with --dtype bf16"
)


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or, as torch's allocator says it, in the machine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def check_at_least(minimum: float, **values: float) -> None:
    """Refuse numbers below `minimum`, NaN too, by their flag's name."""
    for name, value in values.items():
        if not value >= minimum:
            raise InputError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")


def check_positive(**values: float) -> None:
    """Refuse numbers that are not positive and finite, by their flag's name."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be a positive number, got {value}")


def check_share(**values: float) -> None:
    """Refuse numbers outside [0, 1], by their flag's name."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {value}")


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; a GPU asked for and absent is an error."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} such GPUs; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def check_kernel(name: str, device: str) -> None:
    """A kernel that does not exist is an error, and so is `fused` where it cannot be built."""
    if name not in get_args(Kernel):
        raise InputError(f"--kernel must be one of {', '.join(get_args(Kernel))}, got {name!r}")
    if name == "fused":
        try:
            kernels.load(cuda=pick_device(device).type == "cuda")
        except kernels.KernelUnavailable as reason:
            raise InputError(f"--kernel fused: {reason}") from reason


def check_compiler(flag: str, device: str) -> None:
    """torch.compile needs a C++ compiler on the CPU, and triton on a GPU."""
    if pick_device(device).type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError(f"{flag} needs a C++ compiler, and there is no {os.environ.get('CXX', 'g++')}; install one")
    if pick_device(device).type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError(f"{flag} needs triton on a GPU, and it is not installed; leave {flag} out, or install it")


def prepare(args: RunArgs, *models: GPT | ScalarModel) -> None:
    """--kernel, --checkpointing and --compile, in place: weights keep their names, and results but for rounding; and
    torch's own switches for --matmul and --deterministic.
    """
    torch.set_float32_matmul_precision(args.matmul)
    if args.deterministic:
        # Read when the first product is made; buffers of a fixed size, as cuBLAS asks for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads what it did not write
    for model in models:
        trunk = model if isinstance(model, GPT) else model.trunk
        trunk.use_kernel(args.kernel)
        trunk.checkpointing = args.checkpointing
        if args.compile:
            for block in trunk.h:
                block.compile(dynamic=True)  # lengths change from batch to batch
    if args.checkpointing:
        keep_memory(LEAN)


def cosine_lr(step: int, steps: int, peak: float, warmup: int, floor: float = 0.1) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor` · peak (Loshchilov & Hutter 2017, eq. 5).

    Args:
        step: from 0; the first step already moves.
        steps: in the whole run.
        peak: highest learning rate.
        warmup: steps until the peak.
        floor: share of the peak that is left at the end.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def products(device: torch.device, dtype: str) -> str:
    """What the matrix products of a run are made of: fp32, tf32 (on a GPU, see --matmul) or bf16."""
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == "fp32" and tf32 else dtype


def read(numbers: dict[str, Any]) -> dict[str, float]:
    """Numbers by name, some of them scalars on a device, as Python's: a GPU is waited for once, for all of them.

    None stays None.
    """
    far = {name: x.detach().double() for name, x in numbers.items() if isinstance(x, Tensor) and x.device.type != "cpu"}
    near = {name: x.item() for name, x in numbers.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    fetched = torch.stack(list(far.values())).tolist() if far else []
    return {**numbers, **near, **dict(zip(far, fetched))}


def autocast(device: torch.device, dtype: str):
    """Matrix products in bfloat16 when asked; everything that sums stays float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext()


@contextmanager
def side_by_side(wanted: bool = True) -> Iterator[Callable[..., tuple[Any, Any]] | None]:
    """Two pieces of work that share nothing, on half of the CPU's threads each: `both(f, g)` gives what they return.

    Threads that work on one model wait for each other after every operation; here each has its own. None instead of
    `both` if it is not wanted, or if there is a single thread.
    """
    threads = torch.get_num_threads()
    if not wanted or threads < 2:
        yield None
        return
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads // 2,)) as pool:

            def both(f: Callable[[], Any], g: Callable[[], Any]) -> tuple[Any, Any]:
                other = pool.submit(g)
                return f(), other.result()

            torch.set_num_threads(threads - threads // 2)
            yield both
    finally:  # when the pool is gone
        torch.set_num_threads(threads)


def mix(*keys: int) -> int:
    """Keys (seed, step, …) as one number of 64 bits: neighbouring keys give unrelated ones."""
    mixed = 0
    for key in keys:  # splitmix64 (Steele et al. 2014)
        mixed = (mixed + key + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


def seeded(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on `keys` (seed, step, …) alone: what makes a resumed run draw the same numbers."""
    return torch.Generator(device).manual_seed(mix(*keys) & 0x7FFFFFFFFFFFFFFF)


def show_samples(title: str, rows: list[dict[str, Any]]) -> None:
    """Print responses as a table, one column a key."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", show_lines=True)
    for key in rows[0]:
        table.add_column(key, overflow="fold", justify="right" if isinstance(rows[0][key], float) else "left")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else Text(str(v).strip()) for v in row.values()))
    console.print(table)


# --- small print ------------------------------------------------------------------------------------------------------


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}/{key}": torch.as_tensor(value) for index, own in state.items() for key, value in own.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parse(args_type: type, prog: str | None) -> Any:
    """The arguments; what tyro refuses, in a box of several lines, is an InputError of one."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(args_type, prog=prog, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    except SystemExit as stop:
        if stop.code != 2:
            raise
        box = Text.from_ansi(said.getvalue()).plain.splitlines()
        said = io.StringIO()
        lines = [line.strip("│╭╮╰╯─ ") for line in box if not line.startswith("╭")]  # without the title
        parts = " ".join(line or "\n" for line in lines).split("\n")  # ruled off from each other
        raise InputError("; ".join(part.strip(" .") for part in parts if part.strip())) from None
    finally:
        sys.stderr.write(said.getvalue())  # a library's warning


def _plain(value: Any) -> Any:
    """A dataclass's dict as JSON will give it back."""
    return json.loads(json.dumps(value, default=str))


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # the last line of a killed run may be cut off
