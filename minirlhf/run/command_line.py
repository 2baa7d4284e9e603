"""The command line of every script: arguments from a dataclass, a mistake in one line, memory that is kept."""

import ctypes
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import torch
import tyro
from rich.text import Text

from minirlhf import InputError


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
            the most that glibc takes. `LEAN` saves memory instead: in the heap, gradients taken anew
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
