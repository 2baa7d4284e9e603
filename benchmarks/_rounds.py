"""Processes that take turns, so that all see the same machine: one works for a round while the others wait for a word.

Only the standard library, and torch on a GPU: a peer's worker runs in the peer's own environment, where nothing of ours
is installed.

The parent starts the workers, which set themselves up at once (`Worker`), and lets them work round by round
(`compete`). A worker (`Turns`) reads "go", "count" or "stop" from its stdin, and answers in JSON, a line each, on what
was its stdout; what libraries print goes to stderr. What a round is measured with depends on the device (`Cpu`, `Gpu`).
"""

import ctypes
import gc
import json
import os
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path


class Cpu:
    """What a process on a CPU is measured with: its resident memory. Nothing is waited for, and so nothing counted."""

    device = "cpu"

    def wait(self):
        """Return once everything that was begun is done."""

    def rest(self):
        """Bytes in use; from here on the peak counts."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        except (AttributeError, OSError):
            pass  # the peak is then that of the whole process, set-up included
        return rss("VmRSS")

    def peak(self):
        """Bytes in use at their highest."""
        return rss("VmHWM")

    def watch(self):
        """Count from here on how often the host waits for the device."""

    def watched(self):
        """How often it did; None where there is nothing to wait for."""


class Gpu:
    """The same on a CUDA GPU. Memory is that of PyTorch's allocator, and host synchronisations are those that
    `torch.cuda.set_sync_debug_mode` warns of: reads of a value, copies to and from pageable memory, `nonzero`."""

    device = "cuda"
    SYNC = "called a synchronizing CUDA operation"

    def __init__(self):
        import torch

        self.cuda = torch.cuda

    def wait(self):
        self.cuda.synchronize()

    def rest(self):
        gc.collect()
        self.cuda.empty_cache()  # others are on this GPU, too
        self.cuda.reset_peak_memory_stats()
        return self.cuda.memory_allocated()

    def peak(self):
        return self.cuda.max_memory_allocated()

    def watch(self):
        self.cuda.set_sync_debug_mode("warn")
        self.filters = warnings.catch_warnings(record=True)
        self.seen = self.filters.__enter__()
        warnings.simplefilter("always")

    def watched(self):
        self.filters.__exit__(None, None, None)
        self.cuda.set_sync_debug_mode("default")
        return sum(self.SYNC in str(warning.message) for warning in self.seen)


METERS = {meter.device: meter for meter in (Cpu, Gpu)}


class Turns:
    """A worker's side: `ready` once, then `begin` and `end` around each round."""

    meter = Cpu()
    counting = False
    """Whether this round is not timed, but its host synchronisations are counted."""

    device = property(lambda self: self.meter.device)

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.resting = self.begun = self.seconds = 0

    def skip(self, reason):
        """There is nothing to run here."""
        self._say(skip=reason)
        sys.exit(0)

    def ready(self, **facts):
        """Everything is set up: from here on the peak of the memory counts."""
        self.resting = self.meter.rest()
        self._say(ready=facts)

    def begin(self):
        """Wait for the turn. Leaves the process when there is none any more, from within whatever loop it stands."""
        word = sys.stdin.readline().strip()
        if word not in ("go", "count"):
            sys.stdout.flush()
            os._exit(0)  # a library's atexit work would run while the others are timed
        self.counting = word == "count"
        self.meter.wait()
        if self.counting:
            self.meter.watch()
        self.begun = time.perf_counter()

    def end(self, **about):
        """The round is done; `about` it goes to the parent beside its seconds. What is callable is called after it."""
        syncs = self.meter.watched() if self.counting else None
        self.meter.wait()
        self.seconds = time.perf_counter() - self.begun
        about = {name: value() if callable(value) else value for name, value in about.items()}
        measured = {"seconds": self.seconds, "peak": self.meter.peak(), "resting": self.resting, "syncs": syncs}
        self._say(**measured, about=about)

    def _say(self, **what):
        self.answers.write(json.dumps(what) + "\n")
        self.answers.flush()


def rss(name):
    """VmRSS or VmHWM of this process in bytes; where there is no /proc, the highest of its whole life."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))
    except (OSError, StopIteration):
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest if sys.platform == "darwin" else 1024 * highest


class Failed(Exception):
    """A worker that died, and its last words."""


class Skipped(Failed):
    """A worker whose peer is not there, and why."""


class Late(Failed):
    """A worker that took longer than there was time."""


class Worker:
    """The parent's side of one worker, which sets itself up until it is `ready`.

    Args:
        python: its interpreter.
        script: what it runs, with the job as JSON in its only argument.
        job: what to do.
        threads: for OpenMP and BLAS.
        deadline: on the clock of `time.monotonic`: what it has not answered by then, it need not answer.
    """

    def __init__(self, python, script, job, threads, deadline=None):
        self.deadline, self.facts, self.syncs = deadline, None, None
        self.seconds, self.about, self.peak, self.resting = [], [], 0, 0
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [str(python), str(script), json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | quiet | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def ready(self):
        """Wait until it is set up."""
        self.facts = self._answer()["ready"]

    def round(self, counts=True, syncs=False):
        """Let it work for a round; a warm-up, and one in which synchronisations are counted, is not timed."""
        self.process.stdin.write("count\n" if syncs else "go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak, self.resting = answer["peak"], answer["resting"]
        self.about.append(answer["about"])
        if syncs:
            self.syncs = answer["syncs"]
        if counts:
            self.seconds.append(answer["seconds"])
        return answer

    @property
    def counted(self):
        """What it said about the rounds that count."""
        return self.about[len(self.about) - len(self.seconds) :]

    def stop(self):
        """Let it go."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.facts is None:
            self.process.kill()  # it listens to nobody before it is set up
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def _answer(self):
        if self.deadline is not None:
            left = max(0.0, self.deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                self.process.kill()
                raise Late("no answer in the time that was left")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            said = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            raise Failed(said[-1][:200] if said else f"ended with code {code}")
        answer = json.loads(line)
        if "skip" in answer:
            raise Skipped(answer["skip"])
        return answer


def compete(workers, warm_up, rounds, syncs=False, deadline=None):
    """Warm all up, then let them work in turn: a round calls each once, and every other one in reverse order.

    Args:
        workers: by name.
        warm_up: rounds before any counts.
        rounds: those that count; fewer if the next one would end after the deadline.
        syncs: with one more round after the warm-up, in which host synchronisations are counted and nothing is timed.
        deadline: on the clock of `time.monotonic`.

    Returns:
        Those that failed on the way, and why; the results stand in the workers.
    """
    failed, order = {}, list(workers)
    for i in range(warm_up + syncs + rounds):
        begun = time.monotonic()
        counts = i >= warm_up + syncs
        for name in order if i % 2 == 0 else order[::-1]:
            if name not in failed:
                try:
                    workers[name].round(counts, syncs and i == warm_up)
                except (Failed, BrokenPipeError) as reason:
                    failed[name] = reason
        now = time.monotonic()
        if counts and deadline is not None and now + (now - begun) > deadline:
            break
    return failed


def ratio(ones, others):
    """Median of the ones over the median of the others, and the range of the ratio over the paired rounds."""
    paired = [one / other for one, other in zip(ones, others)]
    return statistics.median(ones) / statistics.median(others), (min(paired), max(paired))
