"""python -m minirlhf.exact: the shipped loops end at the exact optimum, and the command says so, or says where not."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minirlhf import InputError
from minirlhf.commands import convergence, exact
from minirlhf.commands.convergence import (
    Args,
    WatchedRun,
    closed_forms,
    measure,
    missed_bounds,
    reference_of,
    seen_half,
)

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, timeout: int = 600) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "minirlhf.exact", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command as the README has it: five random worlds."""
    out = tmp_path_factory.mktemp("exact")
    done = command("--out", str(out))
    return done, out, json.loads((out / "exact.json").read_text())


@pytest.mark.slow
def test_five_worlds_end_within_their_bounds(finished):
    done, _, report = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(report["worlds"]) == 5
    for world in report["worlds"]:
        start = world["reference"]["regret"]
        assert start > 0.3  # the reference is far from the optimum: there was something to learn
        for method, bound in (("ppo", 0.02), ("ppo_exact", 0.01), ("dpo", 0.02)):
            curve = world["runs"][method]["curve"]
            assert curve[0]["regret"] == pytest.approx(start) and curve[0]["share"] == 0 and curve[-1]["share"] == 1
            assert curve[-1]["regret"] <= bound * start, (world["seed"], method)
            assert len(curve) > 20


@pytest.mark.slow
def test_the_figures_are_those_of_the_worlds(finished):
    _, _, report = finished
    for world in report["worlds"]:
        again = closed_forms(world["seed"], report["beta"])
        for key in ("reference", "optimum", "frontier", "best_of_n"):
            assert json.loads(json.dumps(again[key])) == world[key]
        best = world["optimum"]
        assert best["regret"] == pytest.approx(0, abs=1e-9)
        for method in ("ppo", "ppo_exact", "dpo"):  # regret is what J lacks
            for row in world["runs"][method]["curve"]:
                lacks = best["reward"] - row["reward"] - report["beta"] * (best["kl"] - row["kl"])
                assert row["regret"] == pytest.approx(lacks, abs=1e-5)
        kls = [row["kl"] for row in world["best_of_n"]]
        assert all(row["kl"] <= row["kl_bound"] + 1e-12 for row in world["best_of_n"])
        assert kls == sorted(kls) and kls[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_half_of_the_preferences_leave_the_other_half_to_chance(finished):
    _, _, report = finished
    for world in report["worlds"]:
        first, *_, last = world["runs"]["dpo_half"]["curve"]
        assert last["regret_among_seen"] < 0.12 * first["regret_among_seen"]
        assert last["regret"] > 0.3 * first["regret"]


@pytest.mark.slow
def test_table_and_picture(finished):
    done, out, _ = finished
    for words in ("PPO, k1 in the reward", "PPO, exact KL", "DPO", "best of 16", "worst", "bound of KL", "unseen"):
        assert words in done.stdout
    assert (out / "exact.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["exact.json", "exact.png"]


@pytest.mark.slow
def test_a_bound_that_is_missed_is_named(finished):
    report = copy.deepcopy(finished[2])
    assert missed_bounds(report) == []
    report["worlds"][3]["runs"]["dpo"]["curve"][-1]["regret"] = 0.03 * report["worlds"][3]["reference"]["regret"]
    report["worlds"][1]["best_of_n"][2]["kl"] = 9.0
    report["worlds"][4]["runs"]["ppo"]["curve"][-1]["regret"] = float("nan")
    lines = missed_bounds(report)
    assert len(lines) == 3
    assert lines[0].startswith("world 1: best of 4 has KL 9.0")
    assert lines[1] == "world 3: DPO ends at 3.00% of the reference's regret, bound 2%"
    assert lines[2].startswith("world 4: PPO, k1 in the reward ends at nan%")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--worlds", "0"), "--worlds must be at least 1, got 0"),
        (("--beta", "0"), "--beta must be a positive number, got 0.0"),
        (("--workers", "-1"), "--workers must be at least 0, got -1"),
        (("--out", "pyproject.toml"), "--out pyproject.toml is a file; name a folder"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments, message):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {message}\n"


def test_out_is_made_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "closed_forms", lambda *_: pytest.fail("training began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        convergence.main(Args(out=tmp_path / "file" / "inside"))
    assert str(caught.value).startswith(f"--out {tmp_path / 'file' / 'inside'} cannot be written (")
    assert str(caught.value).endswith("; name another folder")


@pytest.mark.slow
def test_at_another_beta_the_table_is_there_and_no_bound_is_checked(tmp_path):
    done = command("--worlds", "1", "--beta", "5", "--out", str(tmp_path / "new" / "report"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "new" / "report" / "exact.json").read_text())
    assert report["bounds"] == {} and report["beta"] == 5.0
    assert report["worlds"][0]["runs"]["ppo"]["curve"][-1]["kl"] < 0.1  # a nat is dear
    assert "PPO, exact KL" in done.stdout


def test_measures_of_a_policy_by_hand():
    world = exact.make_world(4, 2, 3, seed=1)
    ref = reference_of(world, 1)
    ref_logps = exact.log_probs(world, ref).double()
    seen = seen_half(world, 1)
    assert seen.sum(-1).tolist() == [11, 11, 11]
    row = measure(ref_logps, ref_logps, world, 0.5, seen)
    p = ref_logps.exp()
    assert row["kl"] == pytest.approx(0) and row["reward"] == pytest.approx(float((p * world.rewards).sum() / 3))
    assert row["unseen"] == pytest.approx(1 - float((p * seen).sum() / 3))
    # Among the responses seen, regret is that of a world in which there are no others.
    among = 0.0
    for x in range(3):
        own, rewards = ref_logps[x][seen[x]], world.rewards[x][seen[x]]
        own = (own - own.logsumexp(-1))[None]
        among += float(exact.regret(own, own, rewards[None], 0.5)) / 3
    assert row["regret_among_seen"] == pytest.approx(among)
    best, _ = exact.optimum(ref_logps, world.rewards, 0.5)
    given_up = ref_logps.clone()
    given_up[1, 4] = -30.0
    assert row["forgotten"] == pytest.approx(0)
    assert measure(given_up, ref_logps, world, 0.5, seen)["forgotten"] == pytest.approx(best[1, 4].exp().item() / 3)


def test_a_watched_run_looks_at_the_start_the_end_and_between(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "POINTS", 4)
    looked = []
    run = WatchedRun(tmp_path / "run", "test", 10, lambda: {"n": float(looked.append(0) or len(looked))})
    for step in range(10):
        run.log(step, {"loss": torch.ones(())})
    assert [(row["share"], row["n"]) for row in run.curve] == [(0.0, 1), (0.3, 2), (0.5, 3), (0.8, 4), (1.0, 5)]


def test_the_same_seed_gives_the_same_run(monkeypatch):
    monkeypatch.setattr(convergence, "PPO", dataclasses.replace(convergence.PPO, steps=2))
    monkeypatch.setattr(convergence.console, "quiet", False)
    threads = torch.get_num_threads()
    curves = [convergence.train_one(3, "ppo", 0.5)["curve"] for _ in range(2)]
    assert curves[0] == curves[1] and len(curves[0]) == 3
    assert convergence.train_one(4, "ppo", 0.5)["curve"] != curves[0]
    torch.set_num_threads(threads)
