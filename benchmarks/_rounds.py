"""Processes that take turns, so that all see the same machine: one works for a round while the others wait for a word.

Only the standard library: a peer's worker runs in the peer's own environment, where nothing of ours is installed.

The parent starts the workers one after another (`Worker`) and lets them work round by round (`compete`). A worker
(`Turns`) reads "go" or "stop" from its stdin, and answers in JSON, a line each, on what was its stdout; what libraries
print goes to stderr.
"""

import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Turns:
    """A worker's side: `ready` once, then `begin` and `end` around each round."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.resting = self.begun = self.rounds = 0
        # How a round ends and what memory is, in place of the process's own: see _device.py.
        self.settle, self.forget_peak = (lambda: None), forget_peak
        self.peak_now, self.resting_now = (lambda: rss("VmHWM")), (lambda: rss("VmRSS"))
        self.watch, self.watched = None, None  # a round, and what counts during it

    def skip(self, reason):
        """There is nothing to run here."""
        self._say(skip=reason)
        sys.exit(0)

    def ready(self, **facts):
        """Everything is set up: from here on the peak of the memory counts."""
        gc.collect()
        self.forget_peak()
        self.resting = self.resting_now()
        self._say(ready=facts)

    def begin(self):
        """Wait for the turn. Leaves the process when there is none any more, from within whatever loop it stands."""
        if sys.stdin.readline().strip() != "go":
            sys.stdout.flush()
            os._exit(0)  # a library's atexit work would run while the others are timed
        if self.rounds == self.watch:
            self.watched.start()
        self.settle()
        self.begun = time.perf_counter()

    def end(self, **about):
        """The round is done; `about` it goes to the parent beside its seconds."""
        if self.rounds == self.watch:
            about |= self.watched.stop()
        self.rounds += 1
        self.settle()
        seconds = time.perf_counter() - self.begun
        self._say(seconds=seconds, peak=self.peak_now(), resting=self.resting, about=about)

    def _say(self, **what):
        self.answers.write(json.dumps(what) + "\n")
        self.answers.flush()


def forget_peak():
    """From here on the peak of the resident memory counts."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    except (AttributeError, OSError):
        pass  # the peak is then that of the whole process, set-up included


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


class Worker:
    """The parent's side of one worker.

    Args:
        python: its interpreter.
        script: what it runs, with the job as JSON in its only argument.
        job: what to do.
        threads: for OpenMP and BLAS.
    """

    def __init__(self, python, script, job, threads):
        self.seconds, self.about, self.peak, self.resting = [], [], 0, 0
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed in `stop`
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
        try:
            self.facts = self._answer()["ready"]
        except BaseException:
            self.stop()
            raise

    def round(self, counts=True):
        """Let it work for a round; a warm-up counts for the memory only."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak, self.resting = answer["peak"], answer["resting"]
        self.about.append(answer["about"])
        if counts:
            self.seconds.append(answer["seconds"])
        return answer

    @property
    def counted(self):
        """What it said about the rounds that count."""
        return self.about[len(self.about) - len(self.seconds) :]

    def stop(self):
        """Let it go."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def _answer(self):
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


def compete(workers, warm_up, rounds):
    """Warm all up, then let them work in turn: a round calls each once, and every other one in reverse order.

    Args:
        workers: by name.
        warm_up: rounds before any counts.
        rounds: those that count.

    Returns:
        Those that failed on the way, and why; the results stand in the workers.
    """
    failed, order = {}, list(workers)
    for i in range(warm_up + rounds):
        for name in order if i % 2 == 0 else order[::-1]:
            if name not in failed:
                try:
                    workers[name].round(counts=i >= warm_up)
                except (Failed, BrokenPipeError) as reason:
                    failed[name] = str(reason)
    return failed


def ratio(ones, others):
    """Median of the ones over the median of the others, and the range of the ratio over the paired rounds."""
    paired = [one / other for one, other in zip(ones, others)]
    return statistics.median(ones) / statistics.median(others), (min(paired), max(paired))
