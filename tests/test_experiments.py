"""The experiments of benchmarks/: jobs run in order and once, numbers are what they say, and all of it end to end."""

import csv
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minirlhf import InputError
from minirlhf.commands.best_of_n import kl_bound
from minirlhf.run.command_line import cli
from minirlhf.seeds import seeded

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The modules of benchmarks/, which is no package, by name; these see each other."""
    sys.path.insert(0, str(FOLDER))
    names = ("_jobs", "_experiment", "frontier", "overoptimization", "ablations")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(FOLDER))


# --- jobs ---


def job(bench, folder: Path, name: str, log: list[str], after=(), note: str = "", fails: bool = False):
    made = folder / name / "made"

    def command():
        if fails:
            raise InputError(f"{name} failed")
        log.append(name)
        made.write_text(name)

    return bench["_jobs"].Job(made, command, list(after), note)


def test_jobs_run_after_what_they_read_and_once(bench, tmp_path):
    log: list[str] = []
    first = job(bench, tmp_path, "first", log)
    others = [job(bench, tmp_path, name, log, [first]) for name in ("b", "c", "d")]
    last = job(bench, tmp_path, "last", log, others)
    jobs = [first, *others, last]
    run_all = bench["_jobs"].run_all
    took = run_all(jobs, 2)
    assert log[0] == "first" and log[-1] == "last" and sorted(log[1:4]) == ["b", "c", "d"]
    assert took == pytest.approx(sum(one.seconds() for one in jobs)) and took > 0
    assert run_all(jobs, 2) == took and len(log) == 5  # nothing is run again


def test_what_changed_is_run_again_and_what_reads_it_too(bench, tmp_path):
    log: list[str] = []
    run_all = bench["_jobs"].run_all
    for note in ("one", "two"):
        first = job(bench, tmp_path, "first", log, note=note)
        rest = [job(bench, tmp_path, "reader", log, [first]), job(bench, tmp_path, "alone", log)]
        run_all([first, *rest], 1)
    assert log == ["first", "reader", "alone", "first", "reader"]
    (tmp_path / "alone" / "made").unlink()
    run_all([first, *rest], 1)
    assert log[5:] == ["alone"]
    earlier = time.time() - 100
    os.utime(rest[0].mark, (earlier, earlier))  # as if another experiment had made `first` anew since
    run_all([first, *rest], 1)
    assert log[6:] == ["reader"]


def test_a_failing_job_stops_the_rest_with_one_line(bench, tmp_path):
    log: list[str] = []
    bad = job(bench, tmp_path, "bad", log, fails=True)
    with pytest.raises(InputError, match="bad failed"):
        bench["_jobs"].run_all([bad, job(bench, tmp_path, "reader", log, [bad]), job(bench, tmp_path, "alone", log)], 1)
    assert log == [] and bad.seconds() is None


def test_a_failing_script_is_named_with_its_last_words(bench, tmp_path):
    train = bench["_jobs"].train("train_ppo.py", tmp_path / "ppo", "--init", tmp_path / "none", "--reward", "gold")
    with pytest.raises(InputError, match=r"train_ppo.py .* ended with code 2: error: .*none: no such folder.*ppo.log"):
        bench["_jobs"].run_all([train], 1)


def test_a_job_that_makes_nothing_is_an_error(bench, tmp_path):
    idle = bench["_jobs"].Job(tmp_path / "idle" / "made", lambda: None, note="nothing")
    with pytest.raises(InputError, match="nothing ended without an error and made no"):
        bench["_jobs"].run_all([idle], 1)


def test_a_command_that_runs_is_stopped_when_another_fails(bench, tmp_path):
    long = bench["_jobs"].Job(tmp_path / "long" / "made", ["-c", "import time; time.sleep(60)"])

    def fails():
        time.sleep(0.5)
        raise InputError("it failed")

    began = time.perf_counter()
    with pytest.raises(InputError, match="it failed"):
        bench["_jobs"].run_all([long, bench["_jobs"].Job(tmp_path / "bad" / "made", fails)], 2)
    assert time.perf_counter() - began < 20 and long.seconds() is None


@pytest.mark.parametrize("quick", [False, True])
def test_every_job_waits_for_every_run_it_reads(bench, tmp_path, quick):
    """Whatever run of this experiment a command names stands among the jobs before it."""

    def before(one):
        return {str(other.made.parent) for other in one.after}.union(*(before(other) for other in one.after))

    start = bench["_experiment"].base(tmp_path, 0, quick)
    over, _, _ = bench["overoptimization"].plan(tmp_path, 0, bench["overoptimization"].FULL, quick)
    found, files = bench["frontier"].policies(start, 0, bench["frontier"].FULL, quick)
    report = bench["frontier"].evaluation(start, 0, found, bench["frontier"].FULL)
    changes = bench["ablations"].runs_of(start, 0, quick)
    jobs = [*over, *files, *(policy.job for policy in found), report, *changes.values()]
    folders = {str(one.made.parent) for one in [*jobs, *start.jobs]}
    for one in jobs:
        if not callable(one.command):
            named = {
                part
                for word in one.command
                for part in str(word).removeprefix("mean:").removeprefix("worst:").split(",")
            }
            assert (named & folders) - {str(one.made.parent)} <= before(one), one.command
    (pool,) = (one for one in over if one.made.name == "scores.json")
    models = {folder for folder in folders if "/rm-" in folder}
    assert len(models) == 7 and models | {str(start.sft.made.parent)} <= before(pool)


def test_jobs_run_side_by_side(bench, tmp_path):
    def sleeper(name):
        made = tmp_path / name / "made"

        def command():
            time.sleep(0.4)
            made.write_text("")

        return bench["_jobs"].Job(made, command)

    began = time.perf_counter()
    took = bench["_jobs"].run_all([sleeper(name) for name in "abcd"], 4)
    assert took > 1.5 and time.perf_counter() - began < 1.4


# --- numbers ---


def test_half_of_the_interval_is_students(bench):
    half_width = bench["_experiment"].half_width
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(half_width([1.0]))
    spread = [0.0, 1.0] * 5  # 10 of them: the last of the table
    assert half_width(spread) == pytest.approx(2.262 * math.sqrt(10 / 36) / math.sqrt(10), rel=1e-3)
    covered = 0
    for i in range(2000):
        drawn = torch.randn(3, generator=seeded(8, i)).tolist()
        covered += abs(sum(drawn) / 3) <= half_width(drawn)
    assert 0.93 < covered / 2000 < 0.97


def curve(bench, method, at, gold, proxy=None):
    return bench["overoptimization"].Curve(0, method, "small", 0.0, at, proxy or at, gold)


@pytest.mark.parametrize("method", ["PPO", "best of n"])
def test_the_fit_finds_what_was_put_in(bench, method):
    at = [0.1 * i for i in range(40)]
    shape = (lambda d: d * (1.2 - 0.5 * math.log(d))) if method == "PPO" else (lambda d: d * (1.2 - 0.5 * d))
    gold = [0.0] + [shape(d) for d in at[1:]]
    found = bench["overoptimization"].fit(curve(bench, method, at, gold))
    assert found.alpha == pytest.approx(1.2) and found.beta == pytest.approx(0.5) and found.r2 == pytest.approx(1)
    noisy = [g + float(e) for g, e in zip(gold, torch.randn(40, generator=seeded(1)))]
    assert bench["overoptimization"].fit(curve(bench, method, at, noisy)).r2 < 0.9


def test_parting_is_gold_below_its_start_and_the_proxy_above(bench):
    parting, at = bench["overoptimization"].parting, [0.2 * i for i in range(30)]
    rises = [0.05 * i for i in range(30)]
    falls = [0.4 * i - 0.03 * i * i for i in range(30)]
    both = parting(curve(bench, "PPO", at, falls, rises))
    assert both.parted and both.peak == pytest.approx(max(falls), abs=0.1) and 1 < both.peak_at < 1.7
    assert not parting(curve(bench, "PPO", at, rises, rises)).parted
    assert not parting(curve(bench, "PPO", at, falls, [-x for x in rises])).parted
    assert not parting(curve(bench, "PPO", at[:12], falls[:12], rises[:12])).parted  # past its peak, above SFT still


def test_gold_at_a_distance_is_between_the_points_around_it(bench):
    over = bench["overoptimization"]
    line = curve(bench, "PPO", [float(i) for i in range(9)], [2.0 * i for i in range(9)])
    assert over.gold_at(line, 2.5) == pytest.approx(5) and math.isnan(over.gold_at(line, 9.5))


@pytest.mark.parametrize("n", [2, 8, 32])
def test_the_pool_measures_the_kl_of_best_of_n(bench, n):
    scores = torch.randn(400, 128, generator=seeded(4, n))  # no ties
    kl, error = bench["overoptimization"].best_of_kl(scores, n)
    assert abs(kl - kl_bound(n)) < 2 * error and 0 < error < 0.1


# --- the commands ---


@pytest.fixture
def short(bench, monkeypatch):
    """Trainings of a step or two, and one setting of each method."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    for name in bench["_experiment"].QUICK_STEPS:
        monkeypatch.setitem(bench["_experiment"].QUICK_STEPS, name, 2)
    frontier, over = bench["frontier"], bench["overoptimization"]
    few = frontier.Strengths((0.07,), (), (), (0.1,), (), (2, 4), (2,), 4, 4)
    monkeypatch.setattr(frontier, "QUICK", few)
    extent = over.Extent(rankings=12, rm_steps=2, ppo_steps=3, kl_coefs=(0.1,), prompts=3, pool=8, best_of=(2, 4))
    monkeypatch.setattr(over, "QUICK", extent)
    monkeypatch.setattr(over, "SIZES", {"small": (1, 12, 2), "large": (1, 24, 2)})
    monkeypatch.setattr(over, "MEMBERS", 2)
    changes = {name: bench["ablations"].CHANGES[name] for name in ("default", "shared critic")}
    monkeypatch.setattr(bench["ablations"], "CHANGES", changes)
    return bench


@pytest.mark.slow
def test_all_experiments_end_to_end(short, tmp_path, capsys):
    """What they write is there and agrees with itself; what one made, the next does not make again."""
    for name in ("frontier", "ablations", "overoptimization"):
        short[name].main(short[name].Args(out=tmp_path, quick=True, workers=2))
        said = capsys.readouterr().out
        root = tmp_path / "quick"
        result = json.loads((root / f"{name}.json").read_text())
        with open(root / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert (root / f"{name}.png").read_bytes().startswith(b"\x89PNG") and rows
        assert result["took"]["core_seconds"] > 0 and result["facts"]["torch"] == torch.__version__
        assert ("jobs are done already" in said) == (name != "frontier")
        if name == "frontier":
            report = json.loads((root / "seed-0/frontier-report/report.json").read_text())
            found = {(row["method"], row["setting"]): row for row in rows}
            assert float(found["best of n, reward model", "n = 4"]["kl_bound"]) == pytest.approx(kl_bound(4))
            assert float(found["DPO", "β = 0.1"]["gold"]) == report["runs"]["dpo-0.1"]["gold"]
            assert float(found["SFT", ""]["kl"]) == 0
            assert len(result["summary"]) == len(rows) == 6
        elif name == "ablations":
            assert [row["change"] for row in rows] == ["default", "shared critic"]
            assert float(rows[0]["against_default"]) == 0.5 and float(rows[1]["seconds"]) > 0
        else:
            kinds = {(row["method"], row["reward"]) for row in rows}
            assert kinds == {(m, r) for m in ("PPO", "best of n") for r in ("small", "large", "mean", "worst")}
            assert "gold falls below the SFT policy's while the proxy rises" in said
            parted = [json.loads(line) for line in (root / "parted.jsonl").read_text().splitlines()]
            apart = [row["proxy"] - row["gold"] for row in parted]
            assert len(parted) == 3 and apart == sorted(apart, reverse=True)


@pytest.mark.parametrize("name", ["frontier", "overoptimization", "ablations"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--seeds 1 1", "--seeds 1 1: one is named twice"), ("--seeds -1", "--seeds must be at least 0"),
     ("--seeds 0 1 2 3 4 5 6 7 8 9 10", "--seeds: 11 are more than 10"),
     ("--workers -1", "--workers must be at least 0")],
)  # fmt: skip
def test_mistakes_are_one_line_and_code_2(bench, name, arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [name, *arguments.split(), "--out", str(tmp_path / "never")])
    with pytest.raises(SystemExit) as stopped:
        cli(bench[name].main, bench[name].Args)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "never").exists()


def test_they_say_how_they_are_called():
    done = subprocess.run([sys.executable, FOLDER / "frontier.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--quick" in done.stdout
