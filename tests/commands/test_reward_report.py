"""The reward-model report: every equation by hand or by brute force, every number of the report a second way."""

import csv
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirlhf import InputError
from minirlhf.algorithms.losses import ranking_loss
from minirlhf.algorithms.reward_model import pair_accuracy
from minirlhf.algorithms.rewards import RewardModelScorer, score
from minirlhf.commands.calibration import (
    agreement,
    all_pairs,
    best_temperature,
    bootstrap,
    chance_ece,
    clustered_error,
    differences,
    ece,
    kendall_tau_b,
    log_losses,
    mean_ranks,
    mean_with_interval,
    ordered,
    partial_correlation,
    pearson,
    preference_probability,
    quantile_bins,
    ratio_interval,
    reliability,
    spearman,
    squared_errors,
)
from minirlhf.commands.reward_report import Args, _fillers, _read, main
from minirlhf.data import helpdesk
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.run.command_line import cli
from minirlhf.seeds import seeded


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double)


def uniform(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=seeded(seed), dtype=torch.double)


def normal(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=seeded(seed), dtype=torch.double)


# --- pairs ---


def test_all_pairs_are_those_of_each_ranking():
    pairs = all_pairs([2, 3])
    assert list(zip(*(part.tolist() for part in pairs))) == [(0, 1, 0), (2, 3, 1), (2, 4, 1), (3, 4, 1)]
    assert len(all_pairs([1]).first) == 0


def test_ordered_pairs_put_the_better_first_and_leave_ties_out():
    better = ordered(all_pairs([2, 3]), numbers(1, 2, 5, 5, 3))
    assert list(zip(*(part.tolist() for part in better))) == [(1, 0, 0), (2, 4, 1), (3, 4, 1)]
    assert differences(numbers(1, 2, 5, 5, 3), better).tolist() == [1, 2, 2]


def test_quantile_bins_hold_about_as_many_each():
    assert quantile_bins(numbers(5, 1, 4, 2, 3, 0), 3).tolist() == [2, 0, 2, 1, 1, 0]
    assert quantile_bins(numbers(1, 1, 1, 1, 2, 2), 3).tolist() == [0, 0, 0, 0, 1, 1]  # the middle one is empty
    sizes = quantile_bins(uniform(1003, 0), 5).bincount()
    assert len(sizes) == 5 and sizes.max() - sizes.min() <= 1


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 7))
def test_quantile_bins_never_part_equals_nor_turn_an_order_around(values, bins):
    which = quantile_bins(numbers(*values), bins).tolist()
    assert sorted(set(which)) == list(range(max(which) + 1)) and max(which) < bins
    for (x, a), (y, b) in itertools.combinations(zip(values, which), 2):
        assert a == b if x == y else (x < y) == (a < b) or a == b


# --- intervals ---


def clustered_pairs(groups: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 1, 2 or 6 pairs, right with a chance of their own that is ½ or 1: pairs of a prompt are alike."""
    rng = random.Random(seed)
    rows = []
    for g in range(groups):
        chance = rng.choice((0.5, 1.0))
        rows += [(g, float(rng.random() < chance)) for _ in range(rng.choice((1, 2, 6)))]
    return torch.tensor([g for g, _ in rows]), numbers(*(hit for _, hit in rows))


def test_interval_over_prompts_covers_the_truth_95_times_in_100():
    covered = narrow = 0
    for trial in range(300):
        group, hits = clustered_pairs(120, trial)
        found = mean_with_interval(hits, group, 120, trial)
        assert found["value"] == pytest.approx(float(hits.mean()))
        covered += found["low"] <= 0.75 <= found["high"]
        one_by_one = mean_with_interval(hits, torch.arange(len(hits)), len(hits), trial)
        narrow += one_by_one["low"] <= 0.75 <= one_by_one["high"]
    assert abs(covered / 300 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 300)
    assert narrow < covered - 10  # pairs drawn one by one claim too much


def test_interval_of_a_ratio_is_that_of_sums_over_sums():
    totals, counts = numbers(1, 0, 3, 2), numbers(2, 1, 3, 6)
    rows = torch.randint(4, (2000, 4), generator=seeded(5))
    ratios = sorted(sum(float(totals[i]) for i in row) / sum(float(counts[i]) for i in row) for row in rows.tolist())
    low, high = ratio_interval(totals, counts, 5)
    assert ratios[40] <= low <= ratios[60] and ratios[1939] <= high <= ratios[1959]
    assert ratio_interval(totals, counts, 5) == (low, high)
    many = uniform(50, 0), torch.ones(50, dtype=torch.double)
    assert ratio_interval(*many, 5) != ratio_interval(*many, 6)


def test_prompts_without_pairs_count_for_nothing():
    found = mean_with_interval(numbers(1, 1, 0), torch.tensor([0, 0, 3]), 5, 0)
    assert found["value"] == pytest.approx(2 / 3) and (found["low"], found["high"]) == (0, 1)
    assert all(math.isnan(v) for v in mean_with_interval(numbers(), torch.tensor([], dtype=torch.long), 3, 0).values())


def test_bootstrap_draws_whole_groups():
    group, hits = clustered_pairs(150, 1)
    sizes = group.bincount().tolist()

    def statistic(rows):
        seen = group[rows].bincount(minlength=150).tolist()
        assert all(n % size == 0 for n, size in zip(seen, sizes))
        return [float(hits[rows].mean()), 7.0]

    mean, constant = bootstrap(statistic, group, 150, 0, resamples=1500)
    expected = mean_with_interval(hits, group, 150, 0)
    assert mean["value"] == pytest.approx(expected["value"])
    assert mean["low"] == pytest.approx(expected["low"], abs=0.01)
    assert mean["high"] == pytest.approx(expected["high"], abs=0.01)
    assert constant == {"value": 7, "low": 7, "high": 7}


def test_clustered_error():
    x = normal(50, 0)
    alone = clustered_error(x, torch.arange(50))
    assert alone == pytest.approx(float(x.std()) / math.sqrt(50))
    assert clustered_error(x.repeat(3), torch.arange(50).repeat(3)) == pytest.approx(alone)  # said thrice, known once
    assert clustered_error(x, torch.arange(50) + 9) == pytest.approx(alone)  # groups without values are no groups
    assert math.isnan(clustered_error(x, torch.zeros(50, dtype=torch.long)))
    group, hits = clustered_pairs(2000, 3)
    interval = mean_with_interval(hits, group, 2000, 0)
    assert 2 * 1.96 * clustered_error(hits, group) == pytest.approx(interval["high"] - interval["low"], rel=0.06)


# --- calibration ---


def test_a_pair_of_a_ranking_is_bradley_terry_whatever_the_others_are():
    """Summed over all orders of four, Plackett–Luce places a before b with probability σ(r_a - r_b)."""
    scores = torch.tensor([[0.3, -1.2, 2.0, 0.7]], dtype=torch.double)
    for a, b in itertools.permutations(range(4), 2):
        before = 0.0
        for order in itertools.permutations(range(4)):  # order[k] = the rank of response k
            if order[a] < order[b]:
                before += math.exp(-float(ranking_loss(scores, [rank + 1 for rank in order])))
        assert before == pytest.approx(float(preference_probability(scores[:, a] - scores[:, b])), abs=1e-9)


def test_probability_is_the_sigmoid_of_the_difference_over_the_temperature():
    assert preference_probability(numbers(0, math.log(3)), 1.0).tolist() == pytest.approx([0.5, 0.75])
    assert preference_probability(numbers(2 * math.log(3)), 2.0).tolist() == pytest.approx([0.75])


P_BY_HAND, Y_BY_HAND = numbers(0.05, 0.07, 0.1, 0.55, 0.58, 1.0), numbers(0, 1, 0, 1, 0, 1)


def test_reliability_and_ece_by_hand():
    count, claimed, happened = reliability(P_BY_HAND, Y_BY_HAND)
    assert count.tolist() == [2, 1, 0, 0, 0, 2, 0, 0, 0, 1]
    assert claimed[[0, 1, 5, 9]].tolist() == pytest.approx([0.06, 0.1, 0.565, 1.0])
    assert happened[[0, 1, 5, 9]].tolist() == [0.5, 0, 0.5, 1]
    assert bool(claimed[2].isnan()) and bool(happened[2].isnan())
    assert ece(P_BY_HAND, Y_BY_HAND) == pytest.approx((2 * 0.44 + 1 * 0.1 + 2 * 0.065 + 0) / 6)
    assert ece(P_BY_HAND, Y_BY_HAND, bins=1) == pytest.approx(abs(0.5 - float(P_BY_HAND.mean())))


def calibrated(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    p = uniform(n, seed)
    return p, (uniform(n, seed + 1000) < p).double()


def test_a_calibrated_judge_lies_on_the_diagonal():
    p, y = calibrated(40_000, 0)
    count, claimed, happened = reliability(p, y)
    assert bool(((happened - claimed).abs() < 4 * 0.5 / count.sqrt()).all())
    assert ece(p, y) < 0.01
    assert ece(p**2, y) > 0.1 and ece(1 - p, y) == pytest.approx(0.5, abs=0.02)


def test_chance_ece_is_what_calibrated_judges_show():
    p, _ = calibrated(500, 2)
    seen = torch.tensor([ece(p, (uniform(500, 50 + i) < p).double()) for i in range(400)])
    mean, high = chance_ece(p, seed=0)
    error = float(seen.std()) / math.sqrt(400)
    assert mean == pytest.approx(float(seen.mean()), abs=6 * error) and mean > 20 * error
    assert float((seen > high).double().mean()) == pytest.approx(0.05, abs=0.05)
    assert chance_ece(p, 0) == (mean, high) != chance_ece(p, 1)
    assert chance_ece(numbers(0, 1, 1), 0) == (0, 0)  # who is sure and right leaves nothing to chance


def test_the_true_probability_has_the_lowest_brier_score():
    assert squared_errors(numbers(0.9, 0.2, 0.5), numbers(1, 1, 0)).tolist() == pytest.approx([0.01, 0.64, 0.25])
    p, y = calibrated(40_000, 4)
    truth = float(squared_errors(p, y).mean())
    assert truth == pytest.approx(float((p * (1 - p)).mean()), abs=0.005)
    for bent in (p**1.3, p**0.7, 0.9 * p + 0.05, torch.full_like(p, 0.5)):
        distance = float((bent - p).square().mean())
        assert float(squared_errors(bent, y).mean()) - truth == pytest.approx(distance, abs=0.004) and distance > 0.0005


def test_log_loss_is_that_of_a_pair():
    lead = numbers(-3, 0, 0.5, 40)
    assert log_losses(lead).tolist() == pytest.approx((-preference_probability(lead).log()).tolist(), abs=1e-12)
    pairs = torch.stack([lead, torch.zeros_like(lead)], dim=1)
    assert log_losses(lead).tolist() == pytest.approx(ranking_loss(pairs, [1, 2]).tolist(), abs=1e-12)
    assert log_losses(lead, 4.0).tolist() == pytest.approx(log_losses(lead / 4).tolist())
    assert float(log_losses(numbers(-1000.0))) == 1000  # and not infinite


def chosen_leads(n: int, temperature: float, seed: int) -> torch.Tensor:
    """r_chosen - r_rejected, where a choice follows σ(difference / temperature)."""
    d = 3 * normal(n, seed)
    return torch.where(uniform(n, seed + 500) < torch.sigmoid(d / temperature), d, -d)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_best_temperature_finds_the_one_that_chose(temperature):
    lead = chosen_leads(20_000, temperature, 7)
    found = best_temperature(lead)
    assert found == pytest.approx(temperature, rel=0.05)
    lowest = float(log_losses(lead, found).mean())
    for other in (0.5, 0.9, 0.99, 1.01, 1.1, 2):
        assert float(log_losses(lead, found * other).mean()) > lowest
    assert best_temperature(10 * lead) == pytest.approx(10 * found, rel=1e-6)


def test_best_temperature_by_hand_and_where_there_is_none():
    # Differences of ±1, three of four right: σ(1 / T) = 3/4, so T = 1 / ln 3.
    assert best_temperature(numbers(1, 1, 1, -1)) == pytest.approx(1 / math.log(3))
    for lead in (numbers(1, 2), numbers(1, 0), numbers(0, 0), numbers()):
        assert math.isnan(best_temperature(lead))
    for lead in (numbers(1, -1), numbers(1, -2), numbers(-1, -2)):
        assert best_temperature(lead) == math.inf


# --- correlation ---


def test_correlations_against_another_way():
    x = normal(60, 1)
    y = 0.5 * x + normal(60, 2)
    assert pearson(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))
    # Without ties, Spearman's is 1 - 6 Σ d² / n(n² - 1), d the difference of ranks.
    rank = {k: {v: i for i, v in enumerate(sorted(row.tolist()))} for k, row in (("x", x), ("y", y))}
    d2 = sum((rank["x"][a] - rank["y"][b]) ** 2 for a, b in zip(x.tolist(), y.tolist()))
    assert spearman(x, y) == pytest.approx(1 - 6 * d2 / (60 * (60**2 - 1)))
    assert spearman(x, x.exp()) == pytest.approx(1) and pearson(x, x.exp()) < 0.95
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    for constant in (torch.full((60,), 0.1, dtype=torch.double), torch.zeros(60, dtype=torch.double)):
        assert math.isnan(pearson(x, constant)) and math.isnan(spearman(constant, x))


def test_equal_values_share_their_mean_rank():
    assert mean_ranks(numbers(10, 30, 10, 20, 30, 30)).tolist() == [1.5, 5, 1.5, 3, 5, 5]


def test_partial_correlation_is_that_of_the_residuals():
    z = normal(80, 3)
    x, y = z + normal(80, 4), normal(80, 5) - 2 * z
    left = []
    for v in (x, y):  # what a line through z leaves
        dz = z - z.mean()
        left.append(v - v.mean() - dz * (dz @ (v - v.mean())) / (dz @ dz))
    found = partial_correlation(pearson(x, y), pearson(x, z), pearson(y, z))
    assert found == pytest.approx(pearson(*left)) and abs(found) < 0.3 < abs(pearson(x, y))
    assert math.isnan(partial_correlation(0.5, 1.0, 0.5)) and partial_correlation(0.5, 0, 0) == 0.5


# --- agreement ---


def test_agreement_by_hand():
    assert agreement(numbers(1, 2, -1, 0, 0, 5), numbers(3, -1, -2, 0, 1, 0)).tolist() == [1, 0, 1, 0.5, 0.5, 0.5]


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=2, max_size=7))
def test_kendall_by_brute_force(rows):
    """τ_b = (C - D) / √((n₀ - n_x)(n₀ - n_y)): concordant, discordant, and pairs not tied in x and in y."""
    x, y = numbers(*(a for a, _ in rows)), numbers(*(b for _, b in rows))
    pairs = all_pairs([len(rows)])
    concordant = discordant = untied_x = untied_y = 0
    for (a, b), (c, d) in itertools.combinations(rows, 2):
        concordant += (a - c) * (b - d) > 0
        discordant += (a - c) * (b - d) < 0
        untied_x += a != c
        untied_y += b != d
    found = kendall_tau_b(differences(x, pairs), differences(y, pairs), pairs.ranking, 1)
    if untied_x and untied_y:
        assert float(found) == pytest.approx((concordant - discordant) / math.sqrt(untied_x * untied_y))
    else:
        assert bool(found.isnan().all())


def test_kendall_is_of_each_ranking_and_agreement_is_half_of_it():
    pairs = all_pairs([3, 4, 2])
    x, y = normal(9, 8), normal(9, 9)
    leads = differences(x, pairs), differences(y, pairs)
    tau = kendall_tau_b(*leads, pairs.ranking, 3)
    for q in range(3):
        assert float(agreement(*leads)[pairs.ranking == q].mean()) == pytest.approx((1 + float(tau[q])) / 2)
    assert kendall_tau_b(leads[0], leads[0], pairs.ranking, 3).tolist() == pytest.approx([1, 1, 1])
    assert kendall_tau_b(leads[0], -leads[0], pairs.ranking, 3).tolist() == pytest.approx([-1, -1, -1])


# --- python -m minirlhf.reward_report ---


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_run):
    """Two reward models of random weights that read the helpdesk, reward functions, and files of pairs."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = Tokenizer.train([prompt.prompt for prompt in helpdesk.held_out_prompts(40)], 600)
    make_run(root / "runs" / "rm", scalar=True, seed=3, n_positions=128, tokenizer=tokenizer)
    make_run(root / "other" / "rm", scalar=True, seed=4, n_positions=128, tokenizer=tokenizer)
    (root / "marks.py").write_text(
        "from minirlhf.data import helpdesk\n\n"
        "def words(prompts, responses, texts):\n    return [float(len(r.split())) for r in responses]\n\n"
        "def truth(prompts, responses, texts):\n    return [g / 2 for g in helpdesk.gold(prompts, responses)]\n\n"
        "def inverted(prompts, responses, texts):\n    return [-g for g in helpdesk.gold(prompts, responses)]\n\n"
        "def flat(prompts, responses, texts):\n    return [0.1] * len(responses)\n\n"
        "def nan(prompts, responses, texts):\n    return [float('nan')] * len(responses)\n"
    )
    rows = [
        {"prompt": "a", "chosen": " one two", "rejected": " three"},
        {"prompt": "a", "responses": [" x", " y z", " u v w"], "ranking": [1, 1, 2]},
        {"prompt": "b,\n\"c\"", "chosen": " good", "rejected": " bad\r one"},
    ]  # fmt: skip
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    yield world
    sys.modules.pop("marks", None)


def read(folder: Path) -> tuple[dict, list[dict]]:
    with open(folder / "pairs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, quoting=csv.QUOTE_NONNUMERIC))
    return json.loads((folder / "report.json").read_text()), rows


def run(out: Path, *rm: str, **given) -> tuple[dict, list[dict]]:
    main(Args(rm=rm, out=out, device="cpu", **given))
    return read(out)


def test_command_without_arguments_reports_on_runs_rm(world):
    line = [sys.executable, "-m", "minirlhf.reward_report", "--n", "12", "--device", "cpu"]
    done = subprocess.run(line, cwd=world, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    report, rows = read(world / "runs/rm-report")
    assert list(report["judges"]) == ["rm", "gold"] and report["judges"]["rm"]["spec"] == "runs/rm"
    assert (report["rankings"], report["prompts"], report["responses"]) == (12, 12, 48)
    assert report["pairs"] == len(rows) and report["pairs"] + report["tied_pairs"] == 12 * 6
    assert report["agreement"]["raters"] == ["annotators", "annotators again", "gold", "longer", "rm"]
    assert (world / "runs/rm-report/report.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (world / "runs/rm-report").iterdir()} == {"report.json", "pairs.csv", "report.png"}
    for word in ("a perfect judge is right on", "below the ceiling", "by margin", "ECE", "best T", "longer preferred",
                 "filler adds", "annotators again", "τ_b", "report.json, pairs.csv and report.png"):  # fmt: skip
        assert word in done.stdout


def test_every_number_of_a_pair_again_from_pairs_csv(here):
    report, rows = run(here / "again", "runs/rm", n=60, seed=2)
    assert len({row["first"] for row in rows}) == 2
    for name, temperature in (("rm", 1), ("gold", helpdesk.ANNOTATOR_TEMPERATURE)):
        got = report["judges"][name]
        lead = [row[f"{name}:margin"] for row in rows]
        assert lead == [row[f"{name}:chosen"] - row[f"{name}:rejected"] for row in rows]
        hits = [0.5 + 0.5 * ((d > 0) - (d < 0)) for d in lead]
        assert got["accuracy"]["value"] == pytest.approx(sum(hits) / len(hits))
        group = torch.tensor([int(row["ranking"]) for row in rows])
        assert got["accuracy"] == pytest.approx(mean_with_interval(numbers(*hits), group, 60, 2))

        assert sum(b["pairs"] for b in got["by_margin"]) == len(rows)
        by_margin = sorted(zip(map(abs, lead), hits))
        lowest = by_margin[: got["by_margin"][0]["pairs"]]
        assert got["by_margin"][0]["mean_margin"] == pytest.approx(sum(m for m, _ in lowest) / len(lowest))
        assert got["by_margin"][0]["accuracy"]["value"] == pytest.approx(sum(h for _, h in lowest) / len(lowest))

        calibration = got["calibration"]
        assert calibration["temperature"] == temperature
        y = [float(row["first"] == "chosen") for row in rows]
        p = [1 / (1 + math.exp(-(d if first else -d) / temperature)) for d, first in zip(lead, y)]
        assert calibration["brier"]["value"] == pytest.approx(sum((a - b) ** 2 for a, b in zip(p, y)) / len(y))
        nll = sum(-math.log(a if b else 1 - a) for a, b in zip(p, y)) / len(y)
        assert calibration["nll"]["value"] == pytest.approx(nll)
        gap = 0.0
        for b, found in enumerate(calibration["reliability"]):
            inside = [(a, o) for a, o in zip(p, y) if min(int(a * 10), 9) == b]
            assert found["pairs"] == len(inside)
            if inside:
                claimed, happened = (sum(part) / len(inside) for part in zip(*inside))
                assert found["claimed"] == pytest.approx(claimed)
                assert found["happened"]["value"] == pytest.approx(happened)
                gap += abs(claimed - happened) * len(inside) / len(y)
        assert calibration["ece"] == pytest.approx(gap)
        if calibration["best_temperature"]["value"] is not None:
            best, losses = calibration["best_temperature"]["value"], {}
            for t in (0.97 * best, best, 1.03 * best):
                losses[t] = sum(math.log1p(math.exp(-d / t)) for d in lead) / len(lead)
            assert min(losses, key=losses.get) == best and losses[best] == pytest.approx(calibration["best_nll"])
            assert calibration["best_temperature"]["low"] <= best
            assert best <= (calibration["best_temperature"]["high"] or math.inf)  # null where no T is too high

        words = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows]
        longer = [h if w > 0 else 1 - h for h, w in zip(hits, words) if w]
        assert got["length"]["prefers_longer"]["value"] == pytest.approx(sum(longer) / len(longer))
    longer = [w > 0 for w in words if w]
    assert report["annotators_prefer_longer"]["value"] == pytest.approx(sum(longer) / len(longer))

    # What stands between two judges.
    mine, truth = report["judges"]["rm"], report["judges"]["gold"]
    assert mine["below_ceiling"]["value"] == pytest.approx(truth["accuracy"]["value"] - mine["accuracy"]["value"])
    gold_margins = [abs(row["gold:margin"]) for row in rows]
    assert mine["by_gold_margin"][-1]["mean_margin"] == pytest.approx(truth["by_margin"][-1]["mean_margin"])
    assert [b["pairs"] for b in mine["by_gold_margin"]] == [b["pairs"] for b in truth["by_margin"]]
    top = sorted(gold_margins)[-mine["by_gold_margin"][-1]["pairs"]]
    hits = [row["rm:margin"] > 0 for row in rows if abs(row["gold:margin"]) >= top]
    assert mine["by_gold_margin"][-1]["accuracy"]["value"] == pytest.approx(sum(hits) / len(hits))
    distance = [
        (1 / (1 + math.exp(-row["rm:margin"])) - 1 / (1 + math.exp(-row["gold:margin"] / 2))) ** 2 for row in rows
    ]
    assert mine["calibration"]["rms_from_truth"] == pytest.approx(math.sqrt(sum(distance) / len(rows)))


def test_every_number_of_the_rankings_again(here):
    report, rows = run(here / "rankings", "runs/rm", n=30, seed=1)
    rankings = helpdesk.rankings(30, 1, held_out=True)
    assert report["noise_ceiling"] == helpdesk.noise_ceiling(rankings)
    assert report["judges"]["gold"]["accuracy"]["value"] == pytest.approx(report["noise_ceiling"])
    scorer = RewardModelScorer("runs/rm")
    scores = [score(scorer, [r.prompt] * 4, r.responses).tolist() for r in rankings]
    gold = [helpdesk.gold([r.prompt] * 4, r.responses) for r in rankings]
    mine = report["judges"]["rm"]
    assert mine["accuracy"]["value"] == pytest.approx(pair_accuracy(scores, [r.ranks for r in rankings])[0])
    by_gold = pair_accuracy(scores, [[-round(1e6 * g) for g in row] for row in gold])[0]
    assert mine["gold_accuracy"]["value"] == pytest.approx(by_gold)
    chosen = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    expected = {
        (r.prompt, r.responses[a], r.responses[b])
        for r in rankings
        for a, b in itertools.permutations(range(4), 2)
        if r.ranks[a] < r.ranks[b]
    }
    assert set(chosen) == expected and len(chosen) == sum(
        r.ranks[a] < r.ranks[b] for r in rankings for a, b in itertools.permutations(range(4), 2)
    )

    raters = {
        "annotators": [[-x for x in r.ranks] for r in rankings],
        "annotators again": [[-x for x in r.ranks] for r in helpdesk.rank_again(rankings, 1)],
        "gold": [[round(g, 5) for g in row] for row in gold],
        "longer": [[len(text.split()) for text in r.responses] for r in rankings],
        "rm": scores,
    }
    table = report["agreement"]
    assert table["raters"] == list(raters)
    for (i, x), (j, y) in itertools.product(enumerate(raters.values()), repeat=2):
        alike, taus = [], []
        for own, other in zip(x, y):
            signs = [
                ((own[a] > own[b]) - (own[a] < own[b]), (other[a] > other[b]) - (other[a] < other[b]))
                for a, b in itertools.combinations(range(4), 2)
            ]
            alike += [0.5 if not s * t else float(s == t) for s, t in signs]
            untied = sum(s != 0 for s, _ in signs) * sum(t != 0 for _, t in signs)
            taus += [sum(s * t for s, t in signs) / math.sqrt(untied)] if untied else []
        assert table["share"][i][j] == pytest.approx(sum(alike) / len(alike)) == pytest.approx(table["share"][j][i])
        assert table["tau_b"][i][j] == pytest.approx(sum(taus) / len(taus)) == pytest.approx(table["tau_b"][j][i])
        assert table["tau_b_se"][i][j] == pytest.approx(
            float(torch.tensor(taus, dtype=torch.double).std()) / math.sqrt(len(taus)), abs=1e-9
        )
        by_ranking = numbers(*alike).reshape(30, 6).mean(1)
        assert table["share_se"][i][j] == pytest.approx(float(by_ranking.std()) / math.sqrt(30), abs=1e-9)
        if i == j:
            assert table["tau_b"][i][i] == pytest.approx(1)
    assert table["share"][4][4] == 1 and 0.95 < table["share"][0][0] < 1  # annotators tie, the model does not

    words = torch.tensor(raters["longer"], dtype=torch.double)
    marks, truth = torch.tensor(scores, dtype=torch.double), torch.tensor(gold, dtype=torch.double)
    length, flat = mine["length"], [x.flatten() for x in (marks, words, truth)]
    assert length["pearson_words"]["value"] == pytest.approx(float(torch.corrcoef(torch.stack(flat))[0, 1]))
    own = torch.stack([(x - x.mean(1, keepdim=True)).flatten() for x in (marks, words)])
    assert length["within_words"]["value"] == pytest.approx(float(torch.corrcoef(own)[0, 1]))
    solved = torch.linalg.inv(torch.corrcoef(torch.stack(flat)))  # partial correlations, from the precision matrix
    partial = -float(solved[0, 1]) / math.sqrt(float(solved[0, 0] * solved[1, 1]))
    assert length["pearson_given_gold_words"]["value"] == pytest.approx(partial)
    tokens = [len(scorer.tokenizer.encode(text)) for r in rankings for text in r.responses]
    assert length["spearman_tokens"]["value"] == pytest.approx(spearman(flat[0], numbers(*tokens)))


def test_a_judge_of_known_faults_shows_them(here):
    specs = ("marks:truth", "marks:inverted", "marks:words", "marks:flat")
    report, _ = run(here / "faults", *specs, n=150)
    truth, inverted, words, flat, gold = report["judges"].values()
    assert truth["accuracy"] == pytest.approx(gold["accuracy"]) and truth["gold_accuracy"]["value"] == 1
    assert inverted["accuracy"]["value"] == pytest.approx(1 - truth["accuracy"]["value"])
    assert inverted["gold_accuracy"]["value"] == 0 and inverted["calibration"]["best_temperature"]["value"] is None
    # Half of gold is the annotators' utility: σ of it is the truth, up to the ties that are left out.
    assert truth["calibration"]["ece"] < truth["calibration"]["ece_by_chance_95"] + 0.01
    assert truth["calibration"]["rms_from_truth"] < 1e-6
    best = truth["calibration"]["best_temperature"]
    assert 0.7 < best["low"] <= 1 <= best["high"] < 1.4
    for judge in (inverted, words, flat):
        assert judge["calibration"]["brier"]["value"] > truth["calibration"]["brier"]["high"]
        assert judge["calibration"]["rms_from_truth"] > 0.2

    length = words["length"]
    for name in ("pearson_words", "spearman_words", "within_words", "prefers_longer"):
        assert length[name] == pytest.approx({"value": 1, "low": 1, "high": 1})
    assert length["pearson_given_gold_words"]["value"] == pytest.approx(1)
    assert words["filler"]["rises"] == 1 and words["filler"]["change"] > 4
    said = [text for ranking in helpdesk.rankings(150, 0, held_out=True) for text in ranking.responses]
    deviation = float(numbers(*(len(text.split()) for text in said)).std())
    assert words["filler"]["deviations"] == pytest.approx(words["filler"]["change"] / deviation)
    # It rises only where the filler's full stop ends what was left open.
    assert gold["filler"]["rises"] < 0.01 and gold["filler"]["change"] < 0
    assert truth["filler"]["change"] == pytest.approx(gold["filler"]["change"] / 2)
    assert "pearson_tokens" not in length and "pearson_given_gold_words" not in gold["length"]

    assert (
        flat["accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5} and flat["length"]["pearson_words"]["value"] is None
    )
    assert flat["calibration"]["nll"]["value"] == pytest.approx(math.log(2))
    assert flat["calibration"]["brier"]["value"] == 0.25 and len(flat["by_margin"]) == 1
    raters = report["agreement"]["raters"]
    row = dict(zip(raters, report["agreement"]["share"][raters.index("marks:words")]))
    assert row["marks:words"] == report["agreement"]["share"][raters.index("longer")][raters.index("longer")]
    assert row["marks:flat"] == 0.5
    assert report["agreement"]["tau_b"][raters.index("marks:flat")] == [None] * len(raters)


def test_the_filler_does_nothing_and_is_not_there_yet(here):
    args = Args(n=150)
    data = _read(args)
    fillers = _fillers(args, data)
    assert not [1 for filler, said in zip(fillers, data.responses) if filler in said]
    assert sum(any(idle in said for idle in helpdesk.RAMBLING) for said in data.responses) > 20  # it had to choose
    report, _ = run(here / "filler", "marks:words", n=20)
    rankings = helpdesk.rankings(20, 0, held_out=True)
    assert set(report["filler"]) <= set(helpdesk.RAMBLING) and len(report["filler"]) > 3
    report, _ = run(here / "filler", "runs/rm", "marks:words", n=20, filler=" Well, well, well. ")
    words, mine = report["judges"]["marks:words"]["filler"], report["judges"]["rm"]["filler"]
    assert report["filler"] == "Well, well, well." and (words["change"], words["change_se"]) == (3, 0)
    scorer = RewardModelScorer("runs/rm")
    change = []
    for ranking in rankings:
        longer = [f"{text.rstrip()} Well, well, well." for text in ranking.responses]
        prompts = [ranking.prompt] * 4
        change.append(score(scorer, prompts, longer) - score(scorer, prompts, ranking.responses))
    change = torch.stack(change).double()  # (20, 4)
    assert mine["change"] == pytest.approx(float(change.mean()), abs=1e-5) and mine["responses"] == 80
    assert mine["change_se"] == pytest.approx(float(change.mean(1).std()) / math.sqrt(20), rel=1e-4)
    assert mine["rises"] == pytest.approx(float((change > 0).double().mean()))


def test_a_file_of_pairs_and_rankings(here, capsys):
    report, rows = run(here / "file", "runs/rm", "other/rm", "marks:words", data="pairs.jsonl")
    assert list(report["judges"]) == ["rm", "other/rm", "marks:words"] and report["noise_ceiling"] is None
    assert (report["rankings"], report["prompts"], report["responses"], report["pairs"]) == (3, 2, 7, 4)
    assert report["tied_pairs"] == 1 and report["agreement"]["raters"][:2] == ["annotators", "longer"]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        ("a", " one two", " three"),
        ("a", " x", " u v w"),
        ("a", " y z", " u v w"),
        ('b,\n"c"', " good", " bad\r one"),
    ]
    assert [row["source"] for row in rows] == [f"pairs.jsonl:{line}" for line in (1, 2, 2, 3)]
    assert [row["marks:words:margin"] for row in rows] == [1, -2, -1, -1]
    accuracy = report["judges"]["marks:words"]["accuracy"]
    assert accuracy == {"value": 0.25, "low": 0, "high": pytest.approx(1 / 3)}  # of two prompts, 1 in 3 and 0 in 1
    assert report["annotators_prefer_longer"]["value"] == 0.25
    assert "below_ceiling" not in report["judges"]["rm"] and "gold" not in capsys.readouterr().out
    assert report["filler"].endswith(".") and (here / "file/report.png").stat().st_size > 1000


def test_same_seed_same_report_and_another_seed_another(here):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(here / name, "runs/rm", data="pairs.jsonl", seed=seed)
    files = {name: [(here / name / f).read_bytes() for f in ("report.json", "pairs.csv")] for name in "abc"}
    assert files["a"] == files["b"] and files["a"][0] != files["c"][0]


def test_a_longer_file_is_drawn_from(here, capsys):
    rows = [{"prompt": f"p{i}", "chosen": " a b", "rejected": f" c{i}"} for i in range(30)]
    (here / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, drawn = run(here / "some", "marks:words", data="many.jsonl", n=7)
    assert "7 of the 30 records of many.jsonl, at random" in capsys.readouterr().out
    prompts = [row["prompt"] for row in drawn]
    assert len(set(prompts)) == 7 and prompts != [f"p{i}" for i in range(7)]


def test_texts_beyond_the_context_are_cut_and_not_filled(here, make_run, capsys):
    make_run(here / "short", scalar=True, n_positions=32, tokenizer=Tokenizer.load(here / "runs/rm"))
    scorer = RewardModelScorer("short")
    rows = [{"prompt": f"p{i}", "chosen": " no" * (2 + 20 * i), "rejected": " no"} for i in range(3)]
    (here / "growing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [(row["prompt"], row[key]) for row in rows for key in ("chosen", "rejected")]
    beyond = [sum(len(scorer.example(p, r + end).tokens) > 32 for p, r in texts) for end in ("", " It is so.")]
    assert 0 < beyond[0] <= beyond[1] < 6
    for spec in ("short", "mean:marks:words,short"):
        if spec != "short":  # an ensemble has no tokens to cut for all its members
            with pytest.raises(InputError, match="the reward model short reads 32"):
                run(here / "cut", spec, data="growing.jsonl", filler="It is so.")
            continue
        report, _ = run(here / "cut", spec, data="growing.jsonl", filler="It is so.")
        assert report["judges"]["short"]["filler"]["responses"] == 6 - beyond[1]
        said = capsys.readouterr().out
        assert f"{beyond[0]} of 6 responses were cut to the context of 32 tokens" in said
        assert f"{beyond[1]} have no room for the filler" in said


def test_on_a_file_a_model_called_gold_is_a_model_like_any_other(here, make_run):
    tokenizer = Tokenizer.load(here / "runs/rm")
    make_run(here / "gold", scalar=True, seed=6, n_positions=128, tokenizer=tokenizer)
    main(Args(rm=("runs/rm", "./gold"), data="pairs.jsonl", out=here / "golden", device="cpu"))
    report = json.loads((here / "golden/report.json").read_text())
    assert list(report["judges"]) == ["rm", "gold"] and report["noise_ceiling"] is None
    for row in report["judges"].values():
        assert not {key for key in row if "gold" in key and row[key] is not None}
        assert row["calibration"].get("rms_from_truth") is None


def test_gold_as_a_reward_of_its_own_has_a_name_of_its_own(here):
    report, _ = run(here / "golds", "gold", "runs/rm", "runs/rm", n=8)
    assert list(report["judges"]) == ["gold (2)", "rm", "runs/rm", "gold"]
    assert report["judges"]["gold (2)"]["accuracy"] == report["judges"]["gold"]["accuracy"]


@pytest.fixture
def bad_files(here, make_run):
    make_run(here / "policy", n_positions=96, tokenizer=Tokenizer.load(here / "runs/rm"))
    (here / "empty.jsonl").write_text("")
    (here / "broken.jsonl").write_text(
        '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": 3}\n'
    )
    (here / "texts.jsonl").write_text('{"text": "t", "label": 1}\n')
    (here / "one.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 3)
    tied = {"responses": ["a", "b"], "ranking": [1, 1]}
    (here / "tied.jsonl").write_text("".join(json.dumps({"prompt": p, **tied}) + "\n" for p in "pq"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("runs/none", "no reward is named 'runs/none'"),
        ("runs/rm marks:none", "marks:none: none does not exist in marks"),
        ("policy", "policy: "),
        ("--data none.jsonl", "none.jsonl: no such file"),
        ("--data empty.jsonl", "empty.jsonl: holds no records"),
        ("--data broken.jsonl", 'broken.jsonl:2: "chosen" must be a string, not a number; fix or delete this line'),
        ("--data texts.jsonl", "texts.jsonl:1: this record is a text; minirlhf.reward_report needs"),
        ("--data one.jsonl", "one.jsonl: holds a single prompt; give at least 2"),
        ("--data tied.jsonl", "tied.jsonl: all responses are tied; add some that are better than others"),
        ("marks:nan", "reward function marks:nan returned NaN for response 0"),
        ("--n 1", "--n must be at least 2, got 1"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--filler=", "--filler is empty; give a sentence, or leave the flag out"),
        ("--out pairs.jsonl", "--out pairs.jsonl is a file; name a folder"),
        ("--device tpu9", "--device 'tpu9' is not "),
    ],
)
def test_mistakes_are_one_line_and_code_2(here, bad_files, monkeypatch, capsys, arguments, message):
    quick = ["--n", "4"] * ("--n" not in arguments)
    out = [] if "--out" in arguments else ["--out", "never"]
    monkeypatch.setattr(sys, "argv", ["reward_report", *arguments.split(), *quick, *out])
    with pytest.raises(SystemExit) as stopped:
        cli(main, Args)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not (here / "never").exists()


def test_the_default_model_that_is_missing_names_its_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^runs/rm does not exist yet; run python train_rm.py first$"):
        main(Args(device="cpu"))


def test_a_picture_that_fails_leaves_no_report(here, monkeypatch):
    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr("minirlhf.commands.reward_report_show._plot_length", fails)
    with pytest.raises(OSError, match="no space"):
        run(here / "half", "marks:words", data="pairs.jsonl")
    assert not (here / "half/report.json").exists() and not (here / "half/report.png").exists()
