"""Whole steps of ours beside transformers, TRL and nanoGPT: seconds, memory, and that they compute the same.

    pip install 'minirlhf[bench]'
    python benchmarks/vs_peers.py                              # all but PPO and pre-training; close everything else
    python benchmarks/vs_peers.py --only dpo gpt2 --json results.json
    python benchmarks/vs_peers.py --only pretrain --nanogpt ../nanoGPT --text tinyshakespeare.txt
    python benchmarks/vs_peers.py --device cuda --minutes 4 --json results.json    # GPT-2 small; also --model medium

TRL has no PPO for language models any more. Measured is that of 1.10.0, in `trl.experimental`, which is that of 1.12.0,
the last release with one, but for a comment; it wants an
environment of its own: `python -m venv trl110 && trl110/bin/pip install trl==1.10.0`, then
`--ppo-peer-python trl110/bin/python`. A peer that is not there is left out, and the table says why.

Each implementation is a process of its own, set up and warmed up; then they take turns, one round each, while the rest
wait (where they take much memory, both of ours and one peer at a time: in gpt2's DPO up to 16 GB). A round is one whole
step of the shipped train function, or one whole batch of samples, on tokens of fixed length, so that nobody pads. Same
weights (from the same files), same tokens, same number of threads, no reports, no checkpoints, no evaluation.

Ours runs in two settings: `fp32`, like for like, and `best`. Peers run as their manuals say, but without the gradient
checkpointing that TRL turns on by itself and that costs time; with it, where memory is the question. Their fastest in
plain fp32 is held against `fp32`, their fastest of all, in bf16 or compiled too, against `best`.

On a GPU all cases have the shape of GPT-2 small or medium. The GPU is waited for before and after each round, memory is
that of PyTorch's allocator, and one more round, which is not timed, counts host synchronisations. TRL runs compiled
there with `--compile` only: that takes minutes.
"""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import _flops
import torch
from _bench import DTYPES
from _ours import curve, make_model, make_tokenizer
from _report import Bound, built, console, machine, show_bounds, show_facts
from _rounds import Failed, Late, Skipped, Worker, compete, ratio
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from minirlhf import InputError
from minirlhf.checks import check_at_least
from minirlhf.devices import pick_device
from minirlhf.model.checkpoints import save_model
from minirlhf.model.gpt import GPTConfig
from minirlhf.run.command_line import cli
from minirlhf.run.folder import write_text

CaseName = Literal["sampling", "ppo", "dpo", "rm", "sft", "pretrain", "gpt2"]
HERE = Path(__file__).resolve().parent
BENCH = "pip install 'minirlhf[bench]'"
PPO_BENCH = "PPOTrainer is in trl up to 1.12 only: pip install trl==1.10.0 into a Python of its own, --ppo-peer-python"
NANOGPT = "git clone https://github.com/karpathy/nanoGPT, --nanogpt DIR"
SMALL = GPTConfig(vocab_size=1024, n_positions=128, n_layer=4, n_head=4, n_embd=128)
GPT2 = GPTConfig(vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_embd=768)
GPT2_MEDIUM = GPTConfig(vocab_size=50257, n_positions=1024, n_layer=24, n_head=16, n_embd=1024)
MiB = 2**20


@dataclass(frozen=True)
class Args:
    device: Literal["cpu", "cuda"] = "cpu"
    """Where ours and the peers run."""
    model: Literal["small", "medium"] = "small"
    """Which GPT-2 the cases on a GPU have the shape of."""
    only: tuple[CaseName, ...] | None = None
    """Which cases; by default all that there are on the device: gpt2 and pretrain are for a CPU."""
    settings: tuple[Literal["fp32", "best", "shared", "lean"], ...] = ("fp32", "best")
    """Of ours; without best, no peer runs in bf16 or compiled either. shared: best, and PPO's critic on the policy's
    trunk, which is another algorithm than the peer's. lean: fp32 with gradient checkpointing, for DPO."""
    peer_python: Path = Path(sys.executable)
    """The Python that has transformers and TRL."""
    ppo_peer_python: Path = Path(sys.executable)
    """The Python that has TRL 1.10, for PPO."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT, for pretrain; it is not written to."""
    text: Path | None = None
    """Tiny Shakespeare, or another text, for pretrain."""
    rounds: int = 10
    """How often each works; half as often for gpt2, and on a GPU where samples are drawn."""
    warm_up: int = 2
    """Rounds before these, which do not count."""
    minutes: float = 0
    """What would end later than this is left out, and named. 0: no limit."""
    threads: int = 0
    """0: as many as torch takes by itself."""
    compile: bool = False
    """Compile our model in the setting `best`, where the function can; on a GPU TRL's, too."""
    quick: bool = False
    """A tenth of the steps of pretrain."""
    shape: tuple[int, int, int, int, int] | None = None
    """Layers, width, heads, vocabulary and context in place of each case's own; not for pretrain."""
    batch: int = 0
    """Rows, or pairs, in place of each case's own; not for pretrain."""
    tokens: tuple[int, int] | None = None
    """Of prompt and response, in place of each case's own; not for pretrain."""
    json: Path | None = None
    """Where to write the results as JSON."""

    @property
    def ours(self) -> dict[str, dict[str, Any]]:
        """By setting, keyword arguments of the shipped functions; each is passed where it is accepted."""
        best = {"dtype": "bf16", "compile": self.compile}
        known = {"fp32": {"dtype": "fp32"}, "best": best, "shared": {**best, "critic": "shared"}}
        known |= {"lean": {"dtype": "fp32", "checkpointing": True}}
        return {name: known[name] for name in self.settings}

    @property
    def cases(self) -> dict[str, list["Case"]]:
        """By name, in the sizes that were asked for; pretrain has none."""
        known = CASES if self.device == "cpu" else gpu_cases(self.model, self.compile)
        wanted = known if self.only is None else self.only
        if missing := [name for name in wanted if name not in known]:
            raise InputError(f"--only {missing[0]}: on a GPU there are {', '.join(known)}")
        return {name: [fit(case, self.shape, self.batch, self.tokens) for case in known[name]] for name in wanted}


@dataclass(frozen=True)
class Case:
    """What is done, how large it is, and the peers with their settings."""

    name: str
    task: Literal["sampling", "ppo", "dpo", "rm", "sft"]
    config: GPTConfig
    batch: int
    prompt: int
    response: int
    peers: dict[str, dict[str, Any]]
    epochs: int = 4  # of PPO, and its minibatches
    minibatches: int = 4
    micro: int = 0
    slow: bool = False  # half the rounds
    heavy: bool = False  # ours and one peer at a time, since together they take too much memory
    asked: dict[str, float] = field(default_factory=dict)  # how many times as fast as this peer ours has to be

    @property
    def tokens(self) -> int:
        """Of a round: those drawn, or those read, a prompt once for both responses of a pair."""
        read = {"sampling": 0, "dpo": self.prompt + self.response, "rm": self.prompt + self.response}
        return self.batch * (read.get(self.task, self.prompt) + self.response)

    @property
    def title(self) -> str:
        c = self.config
        rows = "pairs" if self.task in ("dpo", "rm") else "rows"
        size = f"{c.n_layer} layers of {c.n_embd}, V = {c.vocab_size:,}"
        return f"{self.name}: {self.batch} {rows}, prompt {self.prompt}, response {self.response}; {size}"

    def works(self, reference: bool) -> dict[str, list[_flops.Work]]:
        """Its floating-point operations, by phase."""
        given = (self.config, self.batch, self.prompt, self.response)
        if self.task == "ppo":
            return _flops.ppo_step(*given, self.epochs, self.micro or self.batch // self.minibatches)
        if self.task == "dpo":
            return {"": _flops.dpo_step(*given, reference)}
        return {"": {"sampling": _flops.generation, "rm": _flops.rm_step, "sft": _flops.sft_step}[self.task](*given)}


# What a peer's name says; `dtype` and `compile` make it one that only `best` is compared with.
BF16, COMPILED = {"dtype": "bf16"}, {"compile": True}
TRAINERS = {"TRL": {}, "TRL, bf16": BF16, "TRL, compiled": COMPILED}
KNOWN = {"TRL, reference known": {"precompute": True}, "TRL, reference known, bf16": {"precompute": True} | BF16}
LEAN = {"TRL, gradient checkpointing": {"checkpointing": True}}
DRAWS = {"transformers": {}, "transformers, bf16": BF16, "transformers, compiled": COMPILED}
# In the order in which they run.
CASES: dict[str, list[Case]] = {
    "sampling": [Case("sampling", "sampling", SMALL, 64, 16, 48, DRAWS)],
    "ppo": [Case("ppo", "ppo", SMALL, 64, 16, 32, {"TRL": {}, "TRL, bf16": BF16})],
    "dpo": [Case("dpo", "dpo", SMALL, 16, 24, 40, TRAINERS | KNOWN)],
    "rm": [Case("rm", "rm", SMALL, 16, 24, 40, TRAINERS)],
    "sft": [Case("sft", "sft", SMALL, 16, 24, 40, TRAINERS)],
    "pretrain": [],
    "gpt2": [
        Case("gpt2 sampling", "sampling", GPT2, 8, 16, 64, DRAWS, slow=True),
        Case("gpt2 dpo", "dpo", GPT2, 4, 56, 200, {"TRL": {}, "TRL, bf16": BF16} | LEAN, slow=True, heavy=True),
    ],
}
SYNCS = 3  # of the host with the GPU, at most, for each optimiser step
ROLLOUT_SYNCS = 10  # and for a rollout


def gpu_cases(model: str, compiled: bool) -> dict[str, list[Case]]:
    """Sized for a GPU of 80 GB, most important first. What is asked holds for GPT-2 small."""
    small, config = model == "small", GPT2 if model == "small" else GPT2_MEDIUM
    draws = {"transformers": {}, "transformers, bf16": BF16, "transformers, bf16, compiled": BF16 | COMPILED}
    trainers = {"TRL": {}, "TRL, bf16": BF16} | ({"TRL, bf16, compiled": BF16 | COMPILED} if compiled else {})

    def train(task: Any, batch: int, prompt: int, response: int, **rest: Any) -> list[Case]:
        return [Case(task, task, config, batch, prompt, response, trainers, heavy=not small, **rest)]

    faster = {"transformers, bf16": 5, "transformers, bf16, compiled": 2} if small else {}
    twice = {"TRL, bf16": 2} if small else {}
    return {
        "sampling": [Case("sampling", "sampling", config, 64, 48, 64, draws, slow=True, asked=faster)],
        "dpo": train("dpo", 16, 128, 128, asked=twice),
        "ppo": train("ppo", 64, 48, 64, slow=True, asked=twice),
        "sft": train("sft", 32, 128, 128),
        "rm": train("rm", 16, 128, 128),
    }


@dataclass(frozen=True)
class Row:
    """One implementation in one case. Seconds and bytes; a ratio is of medians, with its range over paired rounds."""

    case: str
    implementation: str
    seconds: float | None = None
    """Median of the rounds; in pretrain until the loss is reached."""
    rounds: list[float] = field(default_factory=list)
    to_fp32: tuple[float, tuple[float, float]] | None = None
    """Times ours in the setting fp32."""
    to_best: tuple[float, tuple[float, float]] | None = None
    """Times ours in the setting best."""
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    """The process's resident memory, or on a GPU what its tensors take, at its highest, set-up aside."""
    growth_bytes: int | None = None
    """The same beyond what was there after set-up: gradients, the optimiser's state, what the backward needs."""
    syncs: int | None = None
    """How often the host waited for the GPU in a round; in ours of DPO without the reference's pass."""
    floor_share: float | None = None
    """The time that the matrix products alone would take here, over the median."""
    parts: dict[str, float] = field(default_factory=dict)
    """Medians of parts of a round, in seconds."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of ours, as they were accepted; of a peer, what differs from how it runs by itself."""
    note: str = ""
    skipped: bool = False


# --- rounds -----------------------------------------------------------------------------------------------------------


def fit(case: Case, shape: Sequence[int] | None, batch: int, tokens: tuple[int, int] | None) -> Case:
    """The case in the sizes that were asked for, if any; what is asked of ours holds for its own."""
    if shape or batch or tokens:
        case = dataclasses.replace(case, asked={})
    if shape:
        layers, width, heads, vocabulary, context = shape
        check_at_least(257, vocabulary=vocabulary)  # bytes and end-of-text
        case = dataclasses.replace(case, config=GPTConfig(vocabulary, context, layers, heads, width))
    prompt, response = tokens or (case.prompt, case.response)
    check_at_least(1, prompt=prompt)
    check_at_least(2, response=response)
    case = dataclasses.replace(case, batch=batch or case.batch, prompt=prompt, response=response)
    if prompt + response > case.config.n_positions:
        raise InputError(
            f"{case.name}: a prompt of {prompt} tokens and a response of {response} exceed the context of "
            f"{case.config.n_positions}; shorten --tokens, or lengthen the context in --shape"
        )
    if case.task == "ppo" and case.batch % case.minibatches:
        raise InputError(f"--batch {case.batch} must be a multiple of PPO's {case.minibatches} minibatches")
    return case


def write_inputs(case: Case, folder: Path) -> None:
    """Weights in Hugging Face's files, and tokens: responses to train on end with end-of-text."""
    eot = case.config.vocab_size - 1
    endless = case.task in ("sampling", "ppo")
    tokenizer = make_tokenizer(case.config.vocab_size)
    wanted = {"sampling": ("policy",), "ppo": ("policy", "reward"), "dpo": ("policy", "reference"), "rm": ("reward",)}
    for seed, name in enumerate(("policy", "reference", "reward")):
        if name in wanted.get(case.task, ("policy",)):
            save_model(make_model(case.config, seed, scalar=name == "reward", endless=endless), folder / name, eot)
            tokenizer.save(folder / name)
    rng = random.Random(0)
    draw = lambda length: [[rng.randrange(eot) for _ in range(length)] for _ in range(case.batch)]  # noqa: E731
    data = {"prompts": draw(case.prompt)}
    for name in ("chosen", "rejected"):
        data[name] = [[*tokens, eot] for tokens in draw(case.response - 1)]
    (folder / "data.json").write_text(json.dumps(data))


def plain(settings: dict[str, Any]) -> bool:
    """Whether a peer is set side by side with ours in fp32."""
    return not settings.keys() & {"dtype", "compile"}


def entrants(case: Case, args: Args) -> dict[str, tuple[Path, str, dict[str, Any], str]]:
    """By name: its Python, its script, its settings, and how to get it if it is a peer's."""
    found = {f"ours, {name}": (Path(sys.executable), "_ours.py", own, "") for name, own in args.ours.items()}
    python, install = (args.ppo_peer_python, PPO_BENCH) if case.task == "ppo" else (args.peer_python, BENCH)
    wanted = {name: own for name, own in case.peers.items() if "best" in args.settings or plain(own)}
    return found | {name: (python, "_theirs.py", own, install) for name, own in wanted.items()}


def heats(case: Case, names: Sequence[str]) -> list[list[str]]:
    """Who takes turns with whom: all with all, or ours with one peer after the other."""
    ours, peers = ([name for name in names if name.startswith("ours") == wanted] for wanted in (True, False))
    return [[*ours, peer] for peer in peers] if case.heavy and peers else [[*ours, *peers]]


def run_case(
    case: Case, args: Args, information: dict[str, Any], deadline: float | None = None
) -> tuple[list[Row], list[Bound], list[Bound]]:
    """All implementations of a case, in rounds: rows, what must be the same, and what is compared."""
    rounds, cuda = max(1, args.rounds // 2) if case.slow else args.rounds, args.device == "cuda"
    wanted = entrants(case, args)
    rows: dict[tuple[str, str], Row] = {}
    checks: list[Bound] = []
    waits: list[Bound] = []
    with tempfile.TemporaryDirectory(prefix="vs_peers.") as folder:
        write_inputs(case, Path(folder))
        job = {"task": case.task, "folder": folder, "threads": torch.get_num_threads(), "shape": vars(case.config)}
        job |= {"batch": case.batch, "response": case.response, "epochs": case.epochs, "micro": case.micro}
        job |= {"minibatches": case.minibatches, "steps": args.warm_up + cuda + rounds + 1, "device": args.device}
        for heat in heats(case, list(wanted)):
            started: dict[str, Worker] = {}
            workers: dict[str, Worker] = {}
            gone: dict[str, Exception] = {}
            measured = any(row.seconds is not None for row in rows.values())
            try:
                for name in heat:
                    python, script, settings, _ = wanted[name]
                    own = job | {"settings": settings}
                    started[name] = Worker(python, HERE / script, own, job["threads"], deadline)
                for name in reversed(heat) if measured else heat:
                    try:
                        started[name].ready()
                        workers[name] = started[name]
                    except Failed as reason:
                        gone[name] = reason
                    if measured and not workers:  # ours need not work again beside nobody
                        break
                workers = {name: workers[name] for name in heat if name in workers}
                gone |= compete(workers, args.warm_up, rounds, cuda, deadline)
            finally:
                for worker in started.values():
                    worker.stop()
            workers = {name: worker for name, worker in workers.items() if name not in gone and worker.seconds}
            for worker in workers.values():
                found = worker.facts.get("versions", {}).items()
                information["peers"] |= {f"{name} for ppo" if case.task == "ppo" else name: v for name, v in found}
            absent = [absence(case, name, reason, wanted[name][3]) for name, reason in gone.items()]
            for row in [row for part in parts_of(case, workers) for row in tabulate(case, *part, args.device)] + absent:
                rows.setdefault((row.case, row.implementation), row)  # ours are shown from their first heat
            checks += same(case, workers)
            waits += [] if measured else synchronisations(case, workers)
    found = list(rows.values())
    return found, checks, compare(found) + promised(case, found) + waits


def absence(case: Case, name: str, reason: Exception, install: str) -> Row:
    """The row of one that did not run, and why."""
    if isinstance(reason, Skipped):
        return Row(case.name, name, note=f"skipped: {reason}; {install}", skipped=True)
    if isinstance(reason, Late):
        return Row(case.name, name, note=f"left out: {reason}", skipped=True)
    return Row(case.name, name, note=f"failed: {reason}")


def parts_of(case: Case, workers: dict[str, Worker]) -> list[tuple[str, dict[str, Worker], bool]]:
    """What is set side by side: name, whose workers, and whether the reference's pass is part of our time.

    Our DPO runs the reference once over what it will see, before the first step; TRL by default in each step. Where
    every pair is seen once, which is the rule, that is the same work, and ours is counted with it. TRL can do as we do,
    too: then neither is.
    """
    if case.task != "dpo":
        return [(case.name, workers, False)]
    known = {name for name, settings in case.peers.items() if settings.get("precompute")}
    each = {name: worker for name, worker in workers.items() if name not in known}
    parts = [(case.name, each, True)]
    if known & workers.keys():
        once = {name: w for name, w in workers.items() if name in known or name.startswith("ours")}
        parts.append((f"{case.name}, reference known", once, False))
    return parts


def tabulate(case: Case, name: str, workers: dict[str, Worker], reference: bool, device: str = "cpu") -> list[Row]:
    """Rows of what was measured side by side."""

    def seconds(worker: Worker) -> list[float]:
        known = [0.0 if reference else about.get("reference_seconds", 0.0) for about in worker.counted]
        return [whole - less for whole, less in zip(worker.seconds, known)]

    def against(worker: Worker, other: str) -> tuple[float, tuple[float, float]] | None:
        return ratio(seconds(worker), seconds(workers[other])) if other in workers else None

    works = case.works(reference)
    rows = []
    for implementation, worker in workers.items():
        bf16 = (case.peers.get(implementation) or worker.facts.get("settings", {})).get("dtype") == "bf16"
        dtype = DTYPES["bf16" if bf16 else "fp32"]
        floor = sum(_flops.floor_seconds(part, case.config, dtype, device) for part in works.values())
        parts = {
            key.removesuffix("_seconds"): statistics.median(about[key] for about in worker.counted)
            for key in worker.counted[0]
            if key.endswith("_seconds") and (reference or not key.startswith("reference"))
        }
        median = statistics.median(seconds(worker))
        rows.append(
            Row(
                name,
                implementation,
                median,
                seconds(worker),
                against(worker, "ours, fp32"),
                against(worker, "ours, best"),
                case.tokens / median,
                worker.peak,
                worker.peak - worker.resting,
                worker.syncs,
                floor / median,
                parts,
                case.peers.get(implementation) or worker.facts.get("settings", {}),
            )
        )
    return rows


# --- the same, and faster ---------------------------------------------------------------------------------------------


def same(case: Case, workers: dict[str, Worker]) -> list[Bound]:
    """That ours in fp32 and each peer in fp32 compute the same from the same weights and tokens."""
    ours = workers.get("ours, fp32")
    found = []
    for name, worker in workers.items():
        if ours is None or worker is ours or name.startswith("ours") or not plain(case.peers[name]):
            continue
        if case.task == "sampling":
            pairs = list(zip(ours.facts["greedy"], worker.facts["greedy"], strict=True))
            equal = sum(a == b for a, b in pairs)
            asked = "same greedy tokens in ≥ 90% of the rows"  # near ties may go either way, and all after them
            found.append(Bound(f"{case.name}, {name}", asked, f"{equal} of {len(pairs)}", equal >= 0.9 * len(pairs)))
        elif case.task == "ppo":
            a, b = ours.about[0]["updates"], worker.about[0]["updates"]
            found.append(Bound(f"{case.name}, {name}", "as many optimiser steps", f"{a} and {b}", a == b))
        else:
            a, b = ours.about[0]["loss"], worker.about[0]["loss"]
            close = abs(a - b) <= 1e-3 * max(1.0, abs(a))
            found.append(Bound(f"{case.name}, {name}", "same first loss to 1e-3", f"{a:.5f} and {b:.5f}", close))
    return found


def compare(rows: Sequence[Row]) -> list[Bound]:
    """Ours in fp32 beside the fastest peer in fp32, ours at its best beside the fastest of all; and memory."""
    found = []
    for name in dict.fromkeys(row.case for row in rows):
        own = {row.implementation: row for row in rows if row.case == name}
        peers = [row for row in own.values() if not row.implementation.startswith("ours") and row.seconds is not None]
        alike = [row for row in peers if plain(row.settings)]
        for setting, those in (("fp32", alike), ("best", peers)):
            ratios = {row.implementation: getattr(row, f"to_{setting}") for row in those}
            known = {peer: times[0] for peer, times in ratios.items() if times is not None}
            if known:
                fastest = min(known, key=known.__getitem__)
                times = known[fastest]
                found.append(Bound(f"{name}, {setting}", f"no slower than {fastest}", f"{times:.2f}×", times >= 1))
        for peer in alike if name == "gpt2 dpo" else ():
            setting = "lean" if peer.settings.get("checkpointing") and "ours, lean" in own else "fp32"
            if f"ours, {setting}" in own and own[f"ours, {setting}"].peak_bytes:
                share = own[f"ours, {setting}"].peak_bytes / peer.peak_bytes
                asked = f"peak memory ≤ 60% of {peer.implementation}"
                found.append(Bound(f"{name}, {setting}", asked, f"{share:.0%}", share <= 0.6))
    return found


def promised(case: Case, rows: Sequence[Row]) -> list[Bound]:
    """How many times as fast as a peer ours has to be: in fp32 as one in plain fp32, at its best as the others."""
    found = []
    for row in rows:
        setting = "fp32" if plain(row.settings) else "best"
        times = getattr(row, f"to_{setting}")
        if row.case == case.name and row.implementation in case.asked and times is not None:
            least = case.asked[row.implementation]
            asked = f"≥ {least:g}× as fast as {row.implementation}"
            found.append(Bound(f"{case.name}, {setting}", asked, f"{times[0]:.2f}×", times[0] >= least))
    return found


def synchronisations(case: Case, workers: dict[str, Worker]) -> list[Bound]:
    """How often our training may wait for the GPU."""
    found = []
    for name, worker in workers.items():
        if not name.startswith("ours") or worker.syncs is None or case.task == "sampling":
            continue
        steps, most = (worker.about[0]["updates"], ROLLOUT_SYNCS) if case.task == "ppo" else (1, 0)
        most += SYNCS * steps
        asked = f"≤ {most} host synchronisations"
        found.append(Bound(f"{case.name}, {name}", asked, str(worker.syncs), worker.syncs <= most))
    return found


# --- pre-training -----------------------------------------------------------------------------------------------------

PRETRAIN = "pretrain: tiny Shakespeare by character, nanoGPT's CPU recipe"
# nanoGPT's README, "I only have a macbook", but for the evaluations, which are better (200 batches) and not timed.
NANOGPT_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128}
NANOGPT_RECIPE = {"block_size": 64, "batch_size": 12, "dropout": 0.0, "eval_iters": 200, "log_interval": 1}
# The same in our words; AdamW's β₂ is ours, 0.95 where theirs is 0.99.
RECIPE = {
    "batch_size": 12,
    "lr": 1e-3,
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "eval_every": 50,
}
STEPS = 2000
# Of some runs of 600 to 1,000 steps with rates from 3e-3 to 8e-3 and batches of 8 or 12, the first to end below it.
BEST_RECIPE = RECIPE | {"lr": 4e-3, "warmup_steps": 50}
BEST_STEPS = 750


def run_nanogpt(args: Args, folder: Path, steps: int) -> list[tuple[float, float]]:
    """nanoGPT's train.py as its README runs it on a CPU: (seconds of training, validation loss) at each evaluation."""
    copy = folder / "nanoGPT"
    shutil.copytree(args.nanogpt, copy, ignore=shutil.ignore_patterns(".git", "out*", "*.bin", "assets"))
    shutil.copy(args.text, copy / "data" / "shakespeare_char" / "input.txt")
    options = NANOGPT_SHAPE | NANOGPT_RECIPE | {"max_iters": steps, "lr_decay_iters": steps, "device": "cpu"}
    options |= {"dtype": "float32", "compile": False, "eval_interval": min(250, steps // 4)}
    flags = [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for command in (["data/shakespeare_char/prepare.py"], ["train.py", "config/train_shakespeare_char.py", *flags]):
        done = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Failed((done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1][:200])
    seconds = [float(ms) / 1e3 for ms in re.findall(r"^iter \d+: loss .*, time ([\d.]+)ms", done.stdout, re.MULTILINE)]
    found = re.findall(r"^step (\d+): train loss .*, val loss ([\d.]+)", done.stdout, re.MULTILINE)
    losses = {int(step): float(loss) for step, loss in found}
    return curve(seconds, losses, set(losses))  # it evaluates at the beginning of an iteration


def reached(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Seconds until an evaluation first has the loss."""
    return next((seconds for seconds, loss in points if loss <= target), None)


def run_pretrain(args: Args) -> tuple[list[Row], list[Bound], list[Bound]]:
    """nanoGPT to the lowest validation loss of its run, and ours to the same."""
    if args.text is None:
        return [Row("pretrain", "nanoGPT and ours", note="skipped: needs a text; --text FILE", skipped=True)], [], []
    curves: dict[str, list[tuple[float, float]]] = {}
    rows, settings = [], {}
    shrink = 10 if args.quick else 1
    with tempfile.TemporaryDirectory(prefix="vs_peers.") as name:
        folder = Path(name)
        if args.nanogpt is None:
            rows.append(Row("pretrain", "nanoGPT", note=f"skipped: no checkout; {NANOGPT}", skipped=True))
        else:
            try:
                curves["nanoGPT"] = run_nanogpt(args, folder, STEPS // shrink)
            except Failed as reason:
                rows.append(Row("pretrain", "nanoGPT", note=f"failed: {reason}"))
        (folder / "data.json").write_text(json.dumps({"text": str(args.text.resolve())}))
        for setting, own in args.ours.items():
            recipe, steps = (RECIPE, STEPS) if setting == "fp32" else (BEST_RECIPE, BEST_STEPS)
            recipe = recipe | {"steps": steps // shrink, "warmup_steps": recipe["warmup_steps"] // shrink}
            job = {"task": "pretrain", "folder": name, "threads": torch.get_num_threads(), "settings": own, "seed": 0}
            job |= {"device": "cpu"}
            shape = {"n_positions": NANOGPT_RECIPE["block_size"], **NANOGPT_SHAPE}
            try:
                worker = Worker(
                    sys.executable, HERE / "_ours.py", job | {"shape": shape, "recipe": recipe}, job["threads"]
                )
                try:
                    worker.ready()
                    curves[f"ours, {setting}"] = worker.round()["about"]["curve"]
                    settings[f"ours, {setting}"] = worker.facts["settings"] | recipe
                finally:
                    worker.stop()
            except Failed as reason:
                rows.append(Row("pretrain", f"ours, {setting}", note=f"failed: {reason}"))
    target = min(loss for _, loss in curves["nanoGPT"]) if "nanoGPT" in curves else None
    times = {n: points[-1][0] if target is None else reached(points, target) for n, points in curves.items()}

    def against(name: str, other: str) -> tuple[float, tuple[float, float]] | None:
        if times[name] is None or times.get(other) is None:
            return None
        return times[name] / times[other], 2 * (times[name] / times[other],)

    for name, points in curves.items():
        lowest = min(loss for _, loss in points)
        what = f"its end, loss {lowest:.3f}" if target is None else f"loss {target:.3f}"
        note = f"to {what}; whole run {points[-1][0]:.1f} s, lowest {lowest:.3f}"
        note = note if times[name] is not None else f"not reached: {note}"
        ratios = against(name, "ours, fp32"), against(name, "ours, best")
        rows.append(Row("pretrain", name, times[name], [], *ratios, settings=settings.get(name, {}), note=note))
    bounds = []
    for setting in args.settings if target is not None else ():
        own = times.get(f"ours, {setting}")
        measured = f"{times['nanoGPT'] / own:.2f}×" if own else "not reached"
        asked = f"nanoGPT's loss of {target:.3f}, no later"
        bounds.append(Bound(f"pretrain, {setting}", asked, measured, bool(own) and own <= times["nanoGPT"]))
    return rows, [], bounds


# --- what is shown ----------------------------------------------------------------------------------------------------

LEGEND = """\
s: median of {rounds} rounds ({slow} in slow cases), in which all work once, in turn. × fp32, × best: how many times our
median in that setting, and its range over the paired rounds. peak: memory at its highest after set-up; growth: beyond
what was there when the models were loaded. floor: the time of the matrix products alone, as fast as this machine does
them in this precision (_flops.py), over the median."""
GPU_LEGEND = """\
tokens/s: those drawn, or those read, a prompt once for both responses of a pair. syncs: how often the host waits for
the GPU in a round, as torch.cuda.set_sync_debug_mode sees it."""


def show_rows(title: str, rows: Sequence[Row], device: str) -> None:
    table = Table(box=SIMPLE, title=escape(title), title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("implementation", no_wrap=True)
    more = ("tokens/s", "syncs") if device == "cuda" else ()
    for column in ("s", "× fp32", "× best", "peak MiB", "growth", "floor", *more):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("of which, in s")
    previous = rows[0].case if rows else ""
    for row in (row for row in rows if row.seconds is not None):
        if row.case != previous:
            table.add_section()
            table.add_row(f"[bold]{escape(row.case)}[/]")
            previous = row.case
        parts = " · ".join(f"{name} {seconds:.3f}" for name, seconds in row.parts.items())
        table.add_row(
            escape(row.implementation),
            f"{row.seconds:.4f}" if row.seconds < 10 else f"{row.seconds:.1f}",
            times(row.to_fp32),
            times(row.to_best),
            "" if row.peak_bytes is None else f"{row.peak_bytes / MiB:.0f}",
            "" if row.growth_bytes is None else f"{row.growth_bytes / MiB:.0f}",
            "" if row.floor_share is None else f"{row.floor_share:.0%}",
            *(("" if x is None else f"{x:,.0f}" for x in (row.tokens_per_second, row.syncs)) if more else ()),
            escape(" ".join(part for part in (parts, row.note) if part)),
        )
    console.print(table)
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.seconds is None:
            notes.setdefault(row.note, []).append(row.implementation)
    for note, names in notes.items():
        console.print(escape(f"{' · '.join(names)}: {note}"), soft_wrap=True)


def times(given: tuple[float, tuple[float, float]] | None) -> str:
    if given is None:
        return ""
    middle, (low, high) = given
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f} – {high:.2f})"


def check(args: Args) -> None:
    pick_device(args.device)
    check_at_least(1, rounds=args.rounds)
    for flag in ("only", "settings"):
        if getattr(args, flag) == ():
            raise InputError(f"--{flag} needs at least one name")
    check_at_least(0, threads=args.threads, warm_up=args.warm_up, batch=args.batch, minutes=args.minutes)
    for flag, path in (("--peer-python", args.peer_python), ("--ppo-peer-python", args.ppo_peer_python)):
        if not os.access(path, os.X_OK) or path.is_dir():
            raise InputError(f"{flag} {path}: no such program; name a Python that has the peer")
    if args.nanogpt is not None and not (args.nanogpt / "train.py").is_file():
        raise InputError(f"--nanogpt {args.nanogpt}: no train.py there; name a checkout of karpathy/nanoGPT")
    if args.text is not None and not args.text.is_file():
        raise InputError(f"--text {args.text}: no such file; name a text")


def write(path: Path | None, information: dict[str, Any], rows: list[Row], bounds: list[Bound]) -> None:
    """What is known so far, as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"rows": rows, "bounds": bounds}
        lists = {name: [dataclasses.asdict(one) for one in ones] for name, ones in found.items()}
        write_text(path, json.dumps(information | lists, indent=1, ensure_ascii=False) + "\n")


def main(args: Args) -> None:
    begun = time.monotonic()
    deadline = begun + 60 * args.minutes if args.minutes else None
    check(args)
    cases = args.cases
    if args.threads:
        torch.set_num_threads(args.threads)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # transformers' Trainer would use all
    information: dict[str, Any] = {"machine": machine(args.device)} | built(args.device)
    show_facts(information)
    information["peers"] = {}
    rows: list[Row] = []
    checks: list[Bound] = []
    bounds: list[Bound] = []
    quickest = 0.0
    for name in cases:
        for case in cases[name] or [None]:
            at = time.monotonic()
            if deadline is not None and at + quickest > deadline:  # a longer one has fewer rounds
                note = f"left out, since it would end after {args.minutes:g} minutes"
                console.print(f"{note}: {name if case is None else case.name}")
                rows.append(Row(name if case is None else case.name, "all", note=note, skipped=True))
                continue
            if case is None:
                title, (new, same_as, asked) = PRETRAIN, run_pretrain(args)
            else:
                title, (new, same_as, asked) = case.title, run_case(case, args, information, deadline)
            quickest = min(quickest or math.inf, time.monotonic() - at)
            show_rows(title, new, args.device)
            rows += new
            checks += same_as
            bounds += asked
            write(args.json, information, rows, [*checks, *bounds])  # whoever is stopped later has this
    show_facts({"peers": information["peers"]})
    legend = LEGEND.format(rounds=args.rounds, slow=max(1, args.rounds // 2))
    console.print(legend + ("\n" + GPU_LEGEND if args.device == "cuda" else ""))
    show_bounds([*checks, *bounds])
    if args.json is not None:
        write(args.json, information, rows, [*checks, *bounds])
        console.print(f"written: {args.json}")
    ours_failed = any(row.note.startswith("failed") for row in rows if row.implementation.startswith("ours"))
    if ours_failed or not all(one.met for one in checks):
        sys.exit(1)


if __name__ == "__main__":
    cli(main, Args)
