"""Many small trainings: each a command of its own on one thread, as many at a time as there are cores.

A model this small keeps one core busy and two cores only half, so the trainings run side by side. What is finished is
not run again: an experiment that was interrupted goes on where it stood, and says what all of it took.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _report import console

from minirlhf import InputError

ROOT = Path(__file__).resolve().parent.parent


def cores() -> int:
    """Cores that are ours."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Job:
    """One command, and the jobs whose results it reads.

    It is done when `made` is there and beside it the mark, `made`.job: the command, torch's version, and how long it
    took. What a command printed is in FOLDER.log, beside `made`'s folder.
    """

    made: Path
    """What it makes, in a folder of its own."""
    command: Sequence[str] | Callable[[], None]
    """Arguments for python, run in the project's folder; or a function, which writes `made`."""
    after: list["Job"] = field(default_factory=list)
    note: str = ""
    """Of a function: what its result depends on."""

    @property
    def mark(self) -> Path:
        """Where what it took is kept."""
        return self.made.with_name(f"{self.made.name}.job")

    @property
    def as_text(self) -> str:
        """What tells this job from another with the same output."""
        return self.note if callable(self.command) else " ".join(map(str, self.command))

    def seconds(self) -> float | None:
        """What it took when it ran; None if it has yet to run: never, as another command, or before what it reads."""
        try:
            noted, when = json.loads(self.mark.read_text()), self.mark.stat().st_mtime
            stale = any(before.mark.stat().st_mtime > when for before in self.after)
        except (OSError, ValueError):
            return None
        same = noted["command"] == self.as_text and noted["torch"] == torch.__version__
        return noted["seconds"] if same and self.made.exists() and not stale else None


def train(script: str, out: Path, *arguments: object, after: Sequence[Job] = ()) -> Job:
    """A job that trains a run with one of the four scripts."""
    command = [str(ROOT / script), *map(str, arguments), "--out", str(out), "--overwrite"]
    return Job(out / "model.safetensors", command, list(after))


def run_all(jobs: Sequence[Job], workers: int) -> float:
    """Run what has yet to run, each job after those it reads, which stand before it; return all their core-seconds.

    Raises:
        InputError: a job failed; the last line it printed, and where the rest is.
    """
    todo: list[Job] = []
    for job in jobs:  # each stands behind those it reads, so what is to be made anew is known by then
        if job.seconds() is None or any(before in todo for before in job.after):
            todo.append(job)
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} jobs are done already")
    stop = threading.Event()
    begun, finished = time.perf_counter(), 0
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {}
        try:
            while todo or running:
                waiting = {id(job) for job in [*todo, *running.values()]}
                ready = [job for job in todo if not any(id(before) in waiting for before in job.after)]
                for job in ready[: workers - len(running)]:
                    todo.remove(job)
                    running[pool.submit(_run, job, stop)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    future.result()
                    finished += 1
                    so_far = time.perf_counter() - begun
                    console.print(
                        f"  {so_far:5.0f} s  {finished} done, {len(todo) + len(running)} to go  "
                        f"{job.made.parent.name} in {job.seconds():.0f} s"
                    )
        finally:
            stop.set()
    return sum(job.seconds() or 0.0 for job in jobs)


def _run(job: Job, stop: threading.Event) -> None:
    job.mark.unlink(missing_ok=True)
    job.made.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if callable(job.command):
        job.command()
    else:
        _command(job, stop)
    partial = job.mark.with_name(job.mark.name + ".partial")
    if not job.made.exists():
        raise InputError(
            f"{job.as_text} ended without an error and made no {job.made}; delete its folder and try again"
        )
    noted = {"command": job.as_text, "torch": torch.__version__, "seconds": time.perf_counter() - began}
    partial.write_text(json.dumps(noted))
    partial.replace(job.mark)


def _command(job: Job, stop: threading.Event) -> None:
    folder = job.made.parent
    log = folder.with_name(folder.name + ".log")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )}  # fmt: skip
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, *job.command], stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
        while process.poll() is None:
            if stop.wait(0.2):  # another job failed, or the experiment was interrupted
                process.terminate()
                process.wait(30)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
        raise InputError(f"{' '.join(job.command)} ended with code {process.returncode}: {lines[-1]} (see {log})")
