"""A person as the judge: two responses to one prompt, blind, in random order and on random sides; one key each.

Verdicts are kept as they are given, a line each, and are never asked for twice: whoever stops in the middle goes on
there with the same command.
"""

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from minirlhf import InputError
from minirlhf.commands.measures import bootstrap_interval
from minirlhf.run.terminal import console

KEYS = {"1": "left", "2": "right", "0": "tie", "=": "tie", "q": "quit"}


class Comparison(NamedTuple):
    """Two responses to compare, and what the automatic judge says of them."""

    run: str
    baseline: str
    prompt: str
    response: str  # the run's
    other: str  # the baseline's
    lead: float  # the automatic judge's score of the run's less that of the baseline's

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a verdict one of this comparison."""
        return self.run, self.baseline, self.prompt, self.response, self.other


def read_key() -> str:
    """One key from the terminal, or the first character of a line where there is no terminal; "q" at the end."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip()[:1] if line else "q"
    if os.name == "nt":
        import msvcrt

        return msvcrt.getwch()
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin, termios.TCSADRAIN)  # Ctrl-C still interrupts, and what was typed ahead is kept
        pressed = os.read(sys.stdin.fileno(), 16).decode(errors="replace")
        return pressed[:1] or "q"  # of an arrow's several characters the first, which means nothing here
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def read_verdicts(path: Path) -> dict[tuple[str, ...], float]:
    """What was judged before: 1 the run, 0 the baseline, 1/2 a tie."""
    found = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key = tuple(str(row[name]) for name in ("run", "baseline", "prompt", "response", "other"))
            found[key] = {"run": 1.0, "baseline": 0.0, "tie": 0.5}[row["chosen"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a verdict ({error!r}); mend or delete this line") from error
    return found


def ask(
    comparisons: Sequence[Comparison], path: Path, count: int, seed: int, key: Callable[[], str] | None = None
) -> list[tuple[Comparison, float]]:
    """Show up to `count` comparisons and take a key for each; verdicts are appended to `path` one by one.

    Two responses that are the same are a tie, and are not shown.

    Args:
        comparisons: all there are; which come first, and who stands on the left, is drawn from the seed.
        path: human.jsonl, of this and of earlier sittings.
        count: verdicts to have in the end, earlier ones among them.
        seed: of order and sides.
        key: where keys come from; `read_key` unless another is given.

    Returns:
        The comparisons judged, earlier ones among them, and 1, 0 or 1/2: the run, the baseline, or a tie.
    """
    known, rng = read_verdicts(path), random.Random(f"human {seed}")
    order = rng.sample(list(comparisons), len(comparisons))[:count]
    sides = [rng.random() < 0.5 for _ in order]  # drawn for all, so that going on changes none
    judged = []
    for i, (one, run_left) in enumerate(zip(order, sides)):
        verdict = known.get(one.key)
        if verdict is None and one.response == one.other:
            verdict = 0.5
        if verdict is None:
            _show(one, run_left, f"{i + 1} of {len(order)}")
            try:
                answer = _answer(key or read_key)
            except KeyboardInterrupt:
                answer = "quit"
            if answer == "quit":
                console.print(f"stopped; the verdicts so far are in {path}, and the same command goes on from here")
                break
            verdict = 0.5 if answer == "tie" else float((answer == "left") == run_left)
            _keep(path, one, run_left, verdict)
        judged.append((one, verdict))
    return judged


def _show(one: Comparison, run_left: bool, title: str) -> None:
    left, right = (one.response, one.other) if run_left else (one.other, one.response)
    console.rule(title)
    console.print(Text(one.prompt))
    width = max(20, console.width // 2 - 1)
    sides = [Panel(Text(text.strip()), title=name, width=width) for name, text in (("1", left), ("2", right))]
    console.print(Columns(sides, padding=0))
    console.print("better: 1 or 2 · 0 neither · q stops", style="dim")


def _answer(key: Callable[[], str]) -> str:
    while (pressed := key()) not in KEYS:
        console.print("press 1, 2, 0 or q")
    return KEYS[pressed]


def _keep(path: Path, one: Comparison, run_left: bool, verdict: float) -> None:
    chosen = {1.0: "run", 0.0: "baseline", 0.5: "tie"}[verdict]
    row = {**one._asdict(), "left": "run" if run_left else "baseline", "chosen": chosen}
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_bytes().endswith(b"\n")  # an editor's, or a killed write
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * cut + json.dumps(row, ensure_ascii=False) + "\n")


def summarise(judged: Sequence[tuple[Comparison, float]], seed: int) -> dict[str, dict[str, Any]]:
    """For each run, the person's win rate over the baseline, and how far the automatic judge agrees.

    Agreement is the share of the comparisons, among those that both order strictly, that they order alike; None where
    there is none.
    """
    found = {}
    for run in dict.fromkeys(one.run for one, _ in judged):
        own = [(one.lead, verdict) for one, verdict in judged if one.run == run]
        verdicts = torch.tensor([verdict for _, verdict in own])
        low, high = bootstrap_interval(verdicts, seed)
        strict = [(lead > 0) == (verdict > 0.5) for lead, verdict in own if lead != 0 and verdict != 0.5]
        alike = torch.tensor(strict, dtype=torch.float32)
        bounds = bootstrap_interval(alike, seed) if strict else (None, None)
        found[run] = {
            "comparisons": len(own),
            "win_rate": float(verdicts.mean()),
            "win_rate_low": low,
            "win_rate_high": high,
            "ties": float((verdicts == 0.5).float().mean()),
            "strict": len(strict),
            "agreement": float(alike.mean()) if strict else None,
            "agreement_low": bounds[0],
            "agreement_high": bounds[1],
        }
    return found
