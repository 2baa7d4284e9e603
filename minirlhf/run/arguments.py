"""What every training script takes, and what its flags do to the networks."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from minirlhf import InputError
from minirlhf.checks import check_at_least
from minirlhf.devices import pick_device
from minirlhf.kernels import build
from minirlhf.kernels.arguments import Kernel
from minirlhf.model.gpt import GPT, ScalarModel
from minirlhf.run.command_line import LEAN, keep_memory


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


def check_kernel(name: str, device: str) -> None:
    """A kernel that does not exist is an error, and so is `fused` where it cannot be built."""
    if name not in get_args(Kernel):
        raise InputError(f"--kernel must be one of {', '.join(get_args(Kernel))}, got {name!r}")
    if name == "fused":
        try:
            build.load(cuda=pick_device(device).type == "cuda")
        except build.KernelUnavailable as reason:
            raise InputError(f"--kernel fused: {reason}") from reason


def check_compiler(flag: str, device: str) -> None:
    """torch.compile needs a C++ compiler on the CPU, and triton on a GPU."""
    if pick_device(device).type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError(f"{flag} needs a C++ compiler, and there is no {os.environ.get('CXX', 'g++')}; install one")
    if pick_device(device).type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError(f"{flag} needs triton on a GPU, and it is not installed; leave {flag} out, or install it")


def prepare(args: RunArgs, *models: GPT | ScalarModel) -> None:
    """--kernel, --dtype, --checkpointing and --compile, in place: weights keep their names, results but for rounding.

    And torch's own switches for --matmul and --deterministic.
    """
    torch.set_float32_matmul_precision(args.matmul)
    if args.deterministic:
        # Read when the first product is made; buffers of a fixed size, as cuBLAS asks for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads what it did not write
    for model in models:
        trunk = model if isinstance(model, GPT) else model.trunk
        trunk.run_with(args.kernel, args.dtype)
        trunk.checkpointing = args.checkpointing
        if args.compile:
            for block in trunk.h:
                block.compile(dynamic=True)  # lengths change from batch to batch
    if args.checkpointing:
        keep_memory(LEAN)
