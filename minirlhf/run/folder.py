"""A run's folder: configuration, metrics, checkpoints, resuming.

    run.json         script, arguments, seed, versions, whether the run is finished
    metrics.jsonl    one JSON object per step
    samples.jsonl    a few responses every so often
    explain.jsonl, explain.html    responses with a breakdown per token, where PPO is asked for it
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

import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import minirlhf
from minirlhf import InputError
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.model.checkpoints import find_model, load_model, save_model, write_tensors
from minirlhf.model.gpt import GPT, ScalarModel
from minirlhf.run.arguments import RunArgs
from minirlhf.run.terminal import console, show_samples
from minirlhf.run.trackers import Trackers

RESUME_ONLY = ("out", "resume", "overwrite", "checkpoint_every", "explain", "log")  # may differ when a run is resumed


ROWS = ("metrics.jsonl", "samples.jsonl", "explain.jsonl")  # appended to step by step


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
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
