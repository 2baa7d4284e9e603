"""best_of_n: values and KL against enumeration, and the command."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.algorithms.rewards import RewardModelScorer, score
from minirlhf.commands import exact
from minirlhf.commands.best_of_n import Args, expected_best, kl_bound, logratio, main
from minirlhf.data import helpdesk
from minirlhf.data.records import Demonstration, read_records
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.run.command_line import cli
from minirlhf.run.folder import load_run
from minirlhf.seeds import seeded


@settings(max_examples=60)
@given(data=st.data())
def test_expected_best_is_the_mean_over_all_choices(data):
    N = data.draw(st.integers(1, 6))
    n = data.draw(st.integers(1, N))
    scores = torch.tensor([data.draw(st.lists(st.integers(0, 3), min_size=N, max_size=N)) for _ in range(2)]).float()
    values = torch.tensor([data.draw(st.lists(st.integers(-9, 9), min_size=N, max_size=N)) for _ in range(2)]).float()
    for row in range(2):
        means = []
        for chosen in itertools.combinations(range(N), n):
            top = max(float(scores[row, i]) for i in chosen)
            best = [float(values[row, i]) for i in chosen if float(scores[row, i]) == top]
            means.append(sum(best) / len(best))  # among equals, each as likely
        assert float(expected_best(scores, values, n)[row]) == pytest.approx(sum(means) / len(means), abs=1e-4)


def test_expected_best_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="the best of 4 cannot be chosen among 3 responses"):
        expected_best(torch.zeros(1, 3), torch.zeros(1, 3), 4)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_the_measured_kl_without_ties_is_the_formula(n):
    """Scores that never tie: log n - (n - 1)/n, within two standard errors."""
    generator = seeded(11, n)
    best = torch.rand(4000, n, generator=generator).amax(-1)
    ratios = logratio(best, torch.rand(4000, 2 * n + 64, generator=generator), n)
    error = float(ratios.std()) / math.sqrt(len(ratios))
    assert abs(float(ratios.mean()) - kl_bound(n)) < 2 * error


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_measured_kl_with_ties_is_the_exact_one(n):
    """Five responses, two of them with the same score: the KL of `exact.best_of_n`, which lists them all."""
    p, rewards = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]), torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0])
    best = exact.best_of_n(p.log()[None].double(), rewards[None].double(), n)
    truth = float(exact.kl(best, p.log()[None].double()))
    drawn = rewards[torch.multinomial(p, 4000 * (n + 400), True, generator=seeded(2, n))].view(4000, -1)
    ratios = logratio(drawn[:, :n].amax(-1), drawn[:, n:], n)
    assert abs(float(ratios.mean()) - truth) < 2.5 * float(ratios.std()) / math.sqrt(4000)
    assert truth < kl_bound(n) - 0.02  # ties make it less than the bound


def test_the_bound_is_that_of_the_exact_world():
    for n in (1, 2, 7, 100):
        assert kl_bound(n) == pytest.approx(exact.best_of_n_bound(n))
    assert kl_bound(1) == 0


def test_a_response_below_all_others_has_a_finite_ratio():
    ratio = logratio(torch.tensor([-1.0]), torch.zeros(1, 8), 4)
    assert float(ratio) == pytest.approx(math.log(4 * (0.5 / 8.5) ** 3), rel=1e-5)


# --- python -m minirlhf.best_of_n ---


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_run):
    root = tmp_path_factory.mktemp("world")
    tokenizer = Tokenizer.train([p.prompt for p in helpdesk.train_prompts(40, 0)], 600)
    make_run(root / "runs/sft", n_positions=96, tokenizer=tokenizer)
    make_run(root / "runs/rm", scalar=True, seed=3, n_positions=96, tokenizer=tokenizer)
    return root


def test_the_command_keeps_the_best_and_train_sft_reads_it(world, monkeypatch):
    monkeypatch.chdir(world)
    shared = {"n": 5, "max_new_tokens": 8, "device": "cpu"}
    for of in (1, 8):
        main(Args(**shared, of=of, out=world / f"best-{of}.jsonl"))
    rows = [json.loads(line) for line in (world / "best-8.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [p.prompt for p in helpdesk.train_prompts(5, 0)]
    records = read_records(world / "best-8.jsonl")
    assert all(isinstance(record, Demonstration) for record in records) and len(records) == 5
    first = [json.loads(line)["score"] for line in (world / "best-1.jsonl").read_text().splitlines()]
    assert sum(row["score"] for row in rows) > sum(first)
    main(Args(**shared, of=8, out=world / "again.jsonl"))
    assert (world / "again.jsonl").read_bytes() == (world / "best-8.jsonl").read_bytes()


def test_the_score_is_that_of_the_best_of_all_that_were_drawn(world, monkeypatch):
    from minirlhf.commands import best_of_n

    monkeypatch.chdir(world)
    drawn = {}
    draw = best_of_n.sample_each
    monkeypatch.setattr(best_of_n, "sample_each", lambda *given: drawn.setdefault("pool", draw(*given)))
    main(Args(n=4, of=6, max_new_tokens=8, device="cpu", out=world / "kept.jsonl"))
    asked, answers = drawn["pool"]
    scores = score(RewardModelScorer("runs/rm"), asked, answers).view(4, 6)
    rows = [json.loads(line) for line in (world / "kept.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        assert row["score"] == pytest.approx(float(scores[i].max()), abs=1e-5)
        assert row["response"] == str(answers[i * 6 + int(scores[i].argmax())])
    tokenizer = load_run("runs/sft")[1]
    assert all(str(answer) == tokenizer.decode(answer.tokens) for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--of 0", "--of must be at least 1, got 0"),
        ("--temperature 0", "--temperature must be a positive number, got 0"),
        ("--n 1", "--n must be at least 2, got 1"),
        ("--reward runs/none", "no reward is named 'runs/none'"),
        ("runs/none", "runs/none: no such folder"),
        ("--out runs", "--out runs is a folder; name a file"),
        ("--prompts none.jsonl", "none.jsonl: no such file"),
        ("--max-new-tokens 90", "exceed the context of 96"),
    ],
)
def test_mistakes_are_one_line_and_code_2(world, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(world)
    rest = [] if "--out" in arguments else ["--out", "never.jsonl"]
    rest += [] if "--n" in arguments else ["--n", "3"]
    monkeypatch.setattr(sys, "argv", ["best_of_n", *arguments.split(), *rest])
    with pytest.raises(SystemExit) as stopped:
        cli(main, Args)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and message in printed.err and len(printed.err.strip().splitlines()) == 1
    assert not (world / "never.jsonl").exists()


def test_it_runs_as_a_module(world):
    line = [sys.executable, "-m", "minirlhf.best_of_n", "--n", "3", "--of", "2", "--max-new-tokens", "4"]
    done = subprocess.run([*line, "--out", "module.jsonl"], cwd=world, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 prompts, 2 responses each" in done.stdout and len((world / "module.jsonl").read_text().splitlines()) == 3
