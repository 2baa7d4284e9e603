"""Evaluation: every number of the report, computed a second way."""

import html
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirlhf import InputError
from minirlhf.algorithms.rewards import RewardModelScorer, score
from minirlhf.commands import evaluate
from minirlhf.commands.best_of_n import logratio
from minirlhf.commands.evaluate import Args, main
from minirlhf.commands.measures import bootstrap_interval, distinct_n, sequence_stats, sign_test, win_rate, wins
from minirlhf.data import helpdesk
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.model.generate import generate, sample
from minirlhf.model.sampling import Sampling
from minirlhf.run.command_line import cli
from minirlhf.run.folder import load_run
from minirlhf.seeds import mix, seeded

# --- win rate and interval ---


def test_ties_count_half():
    mine, theirs = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0])
    assert wins(mine, theirs).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert win_rate(mine, theirs) == 2.5 / 4
    assert win_rate(mine, mine) == 0.5


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=40))
def test_what_one_wins_the_other_loses(rows):
    mine, theirs = torch.tensor(rows, dtype=torch.float32).T
    assert win_rate(mine, theirs) + win_rate(theirs, mine) == pytest.approx(1.0, abs=1e-6)
    low, high = bootstrap_interval(wins(mine, theirs), seed=0, resamples=200)
    assert 0.0 <= low <= high <= 1.0


def test_interval_is_of_the_mean_and_repeatable():
    values = torch.tensor([0.0, 0.5, 1.0, 1.0]).repeat(64)
    low, high = bootstrap_interval(values, seed=3)
    half = 1.96 * float(values.std(correction=0)) / math.sqrt(len(values))  # what the normal curve says
    assert low == pytest.approx(0.625 - half, abs=0.01) and high == pytest.approx(0.625 + half, abs=0.01)
    assert bootstrap_interval(values, seed=3) == (low, high) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval(torch.ones(9), seed=0) == (1.0, 1.0)


def test_interval_covers_the_truth_95_times_in_100():
    """400 evaluations of a run that wins 60%, ties 20% and loses 20%: 95% ± 3 standard errors hold the true 0.7."""
    generator = seeded(7)
    chances = torch.tensor([0.2, 0.2, 0.6])
    covered = 0
    for trial in range(400):
        outcomes = torch.multinomial(chances, 200, replacement=True, generator=generator) / 2.0
        low, high = bootstrap_interval(outcomes, seed=trial, resamples=1000)
        covered += low <= 0.7 <= high
    assert abs(covered / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)


# --- diversity ---


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct_n(["a b", "a  b\n"], 2) == 1 / 2  # over all texts; white space does not matter
    assert distinct_n(["a b", "c a"], 2) == 1.0  # no bigram runs from one text into the next
    assert distinct_n(["a", ""], 2) == 0.0


# --- KL ---


@pytest.fixture(scope="module")
def policies(tmp_path_factory, make_run):
    """Two random policies that disagree, and their tokenizer."""
    folder = tmp_path_factory.mktemp("policies")
    (model, tokenizer), (other, _) = (load_run(make_run(folder / str(seed), seed=seed)) for seed in (0, 5))
    return model, other, tokenizer


PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9]]


def drawn_from(model, prompts, seed, eot, temperature=1.0, limit=10):
    drawn = generate(model, prompts, eot, limit, seed, Sampling(temperature=temperature))
    return [row[keep].tolist() for row, keep in zip(drawn.responses, drawn.mask)]


def by_brute_force(model, other, prompt, response, temperature):
    """Sums over the response of Σ_v p_v (log p_v - log q_v) and of log p_a - log q_a, token by token, in float64."""
    kl = k1 = 0.0
    for t, token in enumerate(response):
        before = torch.tensor([prompt + response[:t]])
        with torch.no_grad():
            x, y = (m.logits(m(before)[0, -1]).double() / temperature for m in (model, other))
        p, q = torch.softmax(x, -1), torch.softmax(y, -1)
        kl += float((p * (p.log() - q.log())).sum())
        k1 += float(p[token].log() - q[token].log())
    return kl, k1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_equals_brute_force(policies, temperature):
    model, other, tokenizer = policies
    responses = drawn_from(model, PROMPTS, 0, tokenizer.eot, temperature)
    responses[1] = [4, tokenizer.eot]  # one that ended, beside others that were cut
    stats = sequence_stats(model, other, PROMPTS, responses, temperature, batch_size=3)
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses)):
        kl, k1 = by_brute_force(model, other, prompt, response, temperature)
        assert float(stats.kl[i]) == pytest.approx(kl, rel=1e-4) and kl > 0.01
        assert float(stats.k1[i]) == pytest.approx(k1, abs=1e-3)


def test_kl_of_a_model_with_itself_is_zero(policies):
    model, _, tokenizer = policies
    stats = sequence_stats(model, model, PROMPTS, drawn_from(model, PROMPTS, 1, tokenizer.eot))
    assert torch.equal(stats.kl, torch.zeros(4)) and torch.equal(stats.k1, torch.zeros(4))


def test_kl_has_a_direction_and_does_not_depend_on_the_batch(policies):
    model, other, tokenizer = policies
    responses = drawn_from(model, PROMPTS, 2, tokenizer.eot)
    stats = sequence_stats(model, other, PROMPTS, responses)
    alone = [sequence_stats(model, other, [p], [r]).kl for p, r in zip(PROMPTS, responses)]
    torch.testing.assert_close(stats.kl, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (sequence_stats(other, model, PROMPTS, responses).kl - stats.kl).abs().max() > 1e-3


def test_both_estimates_of_the_kl_agree_on_the_policys_own_samples(policies):
    model, other, tokenizer = policies
    prompts = [[i % 200] for i in range(600)]
    responses = drawn_from(model, prompts, 3, tokenizer.eot, limit=4)
    kl, k1, _ = sequence_stats(model, other, prompts, responses, batch_size=64)
    error = float((k1 - kl).std()) / math.sqrt(len(prompts))
    assert abs(float(k1.mean() - kl.mean())) < 4 * error
    assert float(kl.std()) < float(k1.std())  # the exact one leaves less to chance


# --- python -m minirlhf.evaluate ---


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_run):
    """runs/sft, ppo, dpo and rm of random weights, with a tokenizer that reads the helpdesk, and a prompts file."""
    root = tmp_path_factory.mktemp("world")
    prompts = [prompt.prompt for prompt in helpdesk.held_out_prompts(40)]
    tokenizer = Tokenizer.train(prompts, 600)
    for seed, name in enumerate(("sft", "ppo", "dpo")):
        make_run(root / "runs" / name, seed=seed, n_positions=96, tokenizer=tokenizer)
    make_run(root / "runs" / "rm", scalar=True, seed=3, n_positions=96, tokenizer=tokenizer)
    metrics = [{"step": i, "reward": i / 9, "gold": i / 5, "kl_exact": i / 3} for i in range(9)]
    (root / "runs/ppo/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    rows = [{"prompt": f"Customer: My {thing} is broken.\nAgent:"} for thing in ("lamp", "kettle", "chair", "bag")]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in prompts[:6]))
    (root / "judges.py").write_text(
        "def brevity(prompts, responses, texts):\n    return [-len(r) for r in responses]\n"
    )
    return root


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    yield world
    sys.modules.pop("judges", None)


def read(folder: Path) -> tuple[dict, list[dict]]:
    lines = (folder / "responses.jsonl").read_text().splitlines()
    return json.loads((folder / "report.json").read_text()), [json.loads(line) for line in lines]


def test_command_without_arguments_compares_ppo_and_dpo_on_the_helpdesk(world):
    line = [sys.executable, "-m", "minirlhf.evaluate", "--n", "12", "--max-new-tokens", "12", "--device", "cpu"]
    done = subprocess.run(line, cwd=world, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    report, rows = read(world / "runs/report")
    assert (report["baseline"], report["judge"], report["reward"], report["prompts"]) == ("sft", "gold", "runs/rm", 12)
    assert list(report["runs"]) == ["sft", "ppo", "dpo"]
    keys = [
        "baseline",
        "temperature",
        "win_rate",
        "win_rate_low",
        "win_rate_high",
        "ties",
        "p_value",
        "gold",
        "gold_se",
    ]
    keys += ["lead", "lead_low", "lead_high", "score", "score_se", "kl", "kl_se", "kl_bound", "length", "eos_rate"]
    keys += ["entropy", "repetition", "distinct_1", "distinct_2", "distinct_3"]
    assert all(list(row) == keys for row in report["runs"].values())
    sft = report["runs"]["sft"]
    assert (sft["win_rate"], sft["win_rate_low"], sft["win_rate_high"], sft["kl"]) == (0.5, 0.5, 0.5, 0.0)
    assert report["runs"]["ppo"]["kl"] > 0.1
    assert [row["prompt"] for row in rows[::3]] == [p.prompt for p in helpdesk.held_out_prompts(12)]
    assert (world / "runs/report/report.png").read_bytes().startswith(b"\x89PNG")
    assert not [*(world / "runs/report").glob("*.partial")]
    for word in ("win rate", "sft", "ppo", "dpo", "12 held-out prompts", "the same prompts"):
        assert word in done.stdout
    assert done.stderr == ""


def test_report_says_what_the_responses_say(here):
    out = here / "by_hand"
    main(Args(runs=(Path("runs/ppo"),), out=out, prompts="prompts.jsonl", judge="judges:brevity", reward="runs/rm",
              max_new_tokens=20, device="cpu", show=0))  # fmt: skip
    report, rows = read(out)
    assert report["judge"] == "judges:brevity" and list(report["runs"]) == ["sft", "ppo"]
    (sft, tokenizer), (ppo, _) = load_run("runs/sft"), load_run("runs/ppo")
    scorer = RewardModelScorer("runs/rm")
    prompts = [row["prompt"] for row in rows if row["run"] == "ppo"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    gold = {}
    for i, (name, model) in enumerate((("sft", sft), ("ppo", ppo))):
        # What `main` drew, drawn again: it depends on the seed, the row and the prompt's place.
        drawn = generate(model, ids, tokenizer.eot, 20, mix(0, i))
        tokens = [row[keep].tolist() for row, keep in zip(drawn.responses, drawn.mask)]
        own, got = [row for row in rows if row["run"] == name], report["runs"][name]
        assert [row["response"] for row in own] == [tokenizer.decode(row) for row in tokens]
        gold[name] = torch.tensor([-float(len(row["response"])) for row in own])
        assert got["gold"] == pytest.approx(float(gold[name].mean()))
        drawn_texts = [TokenText(tokenizer.decode(row), row) for row in tokens]
        assert got["score"] == pytest.approx(float(score(scorer, prompts, drawn_texts).mean()), abs=1e-5)
        kl = sequence_stats(model, sft, ids, tokens).kl
        assert got["kl"] == pytest.approx(float(kl.mean()), abs=1e-5)
        assert got["kl_se"] == pytest.approx(float(kl.std()) / 2, abs=1e-5)  # √4 = 2 prompts
        assert got["length"] == sum(map(len, tokens)) / 4
        assert got["eos_rate"] == sum(row[-1] == tokenizer.eot for row in tokens) / 4
        assert got["distinct_2"] == distinct_n([row["response"] for row in own], 2)
    assert report["runs"]["ppo"]["win_rate"] == win_rate(gold["ppo"], gold["sft"])
    low, high = bootstrap_interval(wins(gold["ppo"], gold["sft"]), 0)
    assert (report["runs"]["ppo"]["win_rate_low"], report["runs"]["ppo"]["win_rate_high"]) == (low, high)


def test_the_baseline_against_itself_draws_anew_and_is_fair(here):
    """The same weights as a run of their own: other samples, half of the wins, no KL."""
    out = here / "null"
    main(Args(runs=(Path("runs/sft"), Path("runs/sft")), out=out, n=60, judge="judges:brevity", max_new_tokens=8,
              device="cpu", show=0))  # fmt: skip
    report, rows = read(out)
    names = ["sft", "runs/sft", "runs/sft (2)"]
    assert list(report["runs"]) == names and report["baseline"] == "sft"
    by_run = [[row["response"] for row in rows if row["run"] == name] for name in names]
    assert all(sum(a == b for a, b in zip(by_run[0], other)) < 6 for other in by_run[1:])
    for name in names[1:]:
        row = report["runs"][name]
        assert row["kl"] == 0.0 and row["score"] is None
        assert abs(row["win_rate"] - 0.5) < 4 * 0.5 / math.sqrt(60)


def test_runs_of_one_name_are_told_apart(here, make_run):
    twin = make_run(here / "elsewhere" / "ppo", seed=8, n_positions=96, tokenizer=Tokenizer.load(here / "runs/sft"))
    main(Args(runs=(Path("runs/ppo"), twin), out=here / "twins", n=2, max_new_tokens=4, device="cpu", show=0))
    assert list(read(here / "twins")[0]["runs"]) == ["sft", "ppo", str(twin)]


def test_same_seed_same_report_and_another_seed_another(here):
    shared = {"runs": (Path("runs/ppo"),), "prompts": "prompts.jsonl", "judge": "judges:brevity", "device": "cpu"}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(Args(**shared, out=here / name, seed=seed, max_new_tokens=6, show=0))
    a, b, c = (read(here / name) for name in "abc")
    assert a == b and a[1] != c[1]


def test_prompts_from_plain_texts_are_their_first_tokens(here):
    main(Args(runs=(), baseline=Path("runs/sft"), out=here / "texts", prompts="texts.jsonl", prompt_tokens=14, n=4,
              judge="judges:brevity", max_new_tokens=4, device="cpu", show=1))  # fmt: skip
    report, rows = read(here / "texts")
    texts = [json.loads(line)["text"] for line in (here / "texts.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.load(here / "runs/sft")
    prompts = [row["prompt"] for row in rows if row["run"] == "sft"]
    assert report["prompts"] == len(prompts) == 4  # a random choice of the six
    assert set(prompts) <= {tokenizer.decode(tokenizer.encode(text)[:14]) for text in texts}


def test_a_prompt_that_just_fits_is_kept_and_a_longer_one_left_out_on_request(here, capsys):
    tokenizer = Tokenizer.load(here / "runs/sft")
    context = json.loads((here / "runs/sft/config.json").read_text())["n_positions"]
    rows = [{"prompt": "Please help" + " me" * k} for k in (2, 5, 9, 14)]
    (here / "growing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = [len(tokenizer.encode(row["prompt"])) for row in rows]
    for room, kept in ((lengths[-1], 4), (lengths[-1] - 1, 3)):
        out = here / f"room{room}"
        main(Args(runs=(), baseline=Path("runs/sft"), out=out, prompts="growing.jsonl", judge="judges:brevity",
                  max_new_tokens=context - room, skip_long_prompts=True, device="cpu", show=0))  # fmt: skip
        assert read(out)[0]["prompts"] == kept
        said = f"1 of 4 prompts were too long for the context of {context} and left out"
        assert (said in capsys.readouterr().out) == (kept < 4)


def test_best_of_n_is_the_best_of_the_first_n_and_its_kl_that_of_its_rarity(here):
    out = here / "best"
    main(Args(runs=(Path("runs/ppo"),), out=out, prompts="prompts.jsonl", judge="judges:brevity", reward="runs/rm",
              max_new_tokens=6, device="cpu", show=0, best_of=(3, 16)))  # fmt: skip
    report, rows = read(out)
    assert list(report["runs"]) == ["sft", "ppo", "best of 3", "best of 16"]
    sft, tokenizer = load_run("runs/sft")
    prompts = [row["prompt"] for row in rows if row["run"] == "sft"]
    ids = [tokenizer.encode(prompt) for prompt in prompts for _ in range(64)]
    drawn = [row.tokens for row in sample(sft, ids, tokenizer.eot, 6, mix(0, 2, 1))]
    texts = [TokenText(tokenizer.decode(row), row) for row in drawn]
    pool = score(RewardModelScorer("runs/rm"), [p for p in prompts for _ in range(64)], texts).view(4, 64)
    for n in (3, 16):
        own, got = [row for row in rows if row["run"] == f"best of {n}"], report["runs"][f"best of {n}"]
        for i, row in enumerate(own):
            best = int(pool[i, :n].argmax())
            assert row["response"] == str(texts[64 * i + best])
            assert row["score"] == pytest.approx(float(pool[i, best]), abs=1e-5)
        assert got["kl"] == pytest.approx(float(logratio(pool[:, :n].amax(-1), pool[:, n:], n).mean()), abs=1e-5)
        assert got["kl_bound"] == pytest.approx(math.log(n) - (n - 1) / n) and got["entropy"] is None
        assert got["score"] == pytest.approx(float(pool[:, :n].amax(-1).mean()), abs=1e-5)
    assert report["runs"]["best of 16"]["score"] >= report["runs"]["best of 3"]["score"]
    assert report["runs"]["ppo"]["kl_bound"] is None


def test_at_several_temperatures_each_is_compared_with_the_baseline_at_its_own(here):
    out = here / "warm"
    main(Args(runs=(Path("runs/ppo"),), out=out, prompts="prompts.jsonl", judge="judges:brevity", max_new_tokens=12,
              device="cpu", show=0, temperature=(0.3, 1.0), best_of=(2,)))  # fmt: skip
    report, rows = read(out)
    assert report["temperatures"] == [0.3, 1.0]
    names = [f"{name}, T = {t}" for t in ("0.3", "1.0") for name in ("sft", "ppo", "best of 2")]
    assert list(report["runs"]) == names
    for t in ("0.3", "1.0"):
        cold = report["runs"][f"ppo, T = {t}"]
        assert cold["baseline"] == f"sft, T = {t}" and cold["temperature"] == float(t)
        gold = {n: torch.tensor([r["gold"] for r in rows if r["run"] == f"{n}, T = {t}"]) for n in ("sft", "ppo")}
        assert cold["win_rate"] == win_rate(gold["ppo"], gold["sft"])
        assert cold["lead"] == pytest.approx(float((gold["ppo"] - gold["sft"]).mean()), abs=1e-5)
    assert report["runs"]["sft, T = 0.3"]["entropy"] < report["runs"]["sft, T = 1.0"]["entropy"]
    pairs = {(names[i], names[j]) for i, j in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5))}
    assert {(row["run"], row["over"]) for row in report["head_to_head"]} == pairs


def test_names_that_would_collide_are_told_apart(here, make_run):
    tokenizer = Tokenizer.load(here / "runs/sft")
    twin = make_run(here / "best of 2", seed=8, n_positions=96, tokenizer=tokenizer)
    main(Args(runs=(Path("best of 2"),), out=here / "collide", n=3, max_new_tokens=4, device="cpu", show=0,
              best_of=(2,), temperature=(1.0, 1.0000001)))  # fmt: skip
    names = [f"{name}, T = {t}" for t in ("1.0", "1.0000001") for name in ("sft", "best of 2 (2)", "best of 2")]
    report, rows = read(here / "collide")
    assert list(report["runs"]) == names and len(rows) == 3 * 6 and twin.is_dir()


def test_a_prompt_that_comes_twice_counts_once(here, capsys):
    rows = [json.loads(line) for line in (here / "prompts.jsonl").read_text().splitlines()]
    (here / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0], rows[2]]))
    main(Args(runs=(), baseline=Path("runs/sft"), out=here / "twice", prompts="twice.jsonl", judge="judges:brevity",
              max_new_tokens=4, device="cpu", show=0))  # fmt: skip
    assert read(here / "twice")[0]["prompts"] == 4
    assert "2 of 6 prompts came again and were left out" in capsys.readouterr().out


def test_a_reward_model_that_reads_less_than_the_policy_limits_the_prompts(here, make_run):
    tokenizer = Tokenizer.load(here / "runs/sft")
    make_run(here / "short-rm", scalar=True, seed=5, n_positions=24, tokenizer=tokenizer)
    shared = {"runs": (Path("runs/ppo"),), "prompts": "prompts.jsonl", "judge": "judges:brevity", "device": "cpu"}
    with pytest.raises(InputError, match="exceed the context of 24"):
        main(Args(**shared, reward="short-rm", max_new_tokens=20, out=here / "never"))
    assert not (here / "never").exists()


def test_a_damaged_line_of_a_runs_metrics_is_named_before_anything_is_sampled(here, make_run):
    tokenizer = Tokenizer.load(here / "runs/sft")
    bad = make_run(here / "damaged", seed=8, n_positions=96, tokenizer=tokenizer)
    (bad / "metrics.jsonl").write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(InputError, match=r"damaged/metrics.jsonl:2: not one step's metrics"):
        main(Args(runs=(bad,), n=3, max_new_tokens=4, device="cpu", out=here / "never"))
    assert not (here / "never").exists()


def test_head_to_head_is_the_two_runs_own_comparison(here):
    main(Args(out=here / "duel", n=30, judge="judges:brevity", max_new_tokens=10, device="cpu", show=0))
    report, rows = read(here / "duel")
    gold = {name: torch.tensor([r["gold"] for r in rows if r["run"] == name]) for name in ("sft", "ppo", "dpo")}
    (duel,) = (row for row in report["head_to_head"] if (row["run"], row["over"]) == ("ppo", "dpo"))
    won = wins(gold["ppo"], gold["dpo"])
    assert duel["win_rate"] == float(won.mean()) and duel["p_value"] == sign_test(won)
    assert duel["ties"] == pytest.approx(float((won == 0.5).float().mean()))
    assert report["runs"]["ppo"]["p_value"] == sign_test(wins(gold["ppo"], gold["sft"]))


def test_the_page_stands_alone_and_shows_what_was_drawn(here):
    main(Args(out=here / "paged", n=5, max_new_tokens=10, device="cpu", show=0, page=3))
    text = (here / "paged/report.html").read_text()
    _, rows = read(here / "paged")
    assert text.count('<p class="prompt">') == 3 and text.count("<small>") == 9
    for row in rows[:9]:
        assert html.escape(row["prompt"]) in text and html.escape(row["response"].strip()) in text
    assert "data:image/png;base64,iVBOR" in text and "win rate, 95%" in text and "lead, 95%" in text
    assert not re.search(r"https?://|<script|src=\"(?!data:)", text)
    for name, row in json.loads((here / "paged/report.json").read_text())["runs"].items():
        assert f"<td>{name}</td>" in text and f"<td>{row['length']:.1f}</td>" in text


def test_markup_in_a_response_is_text(here, monkeypatch):
    monkeypatch.setattr(evaluate, "respond", lambda model, tokenizer, prompts, *rest: [
        TokenText("<b>[red]&amp;", [1, tokenizer.eot]) for _ in prompts
    ])  # fmt: skip
    main(Args(out=here / "marked", prompts="prompts.jsonl", judge="judges:brevity", max_new_tokens=4, device="cpu"))
    text = (here / "marked/report.html").read_text()
    assert "<b>[red]" not in text and "&lt;b&gt;[red]&amp;amp;" in text


@pytest.fixture
def bad_runs(here, make_run):
    """Runs that do not fit, and bad files, beside the good ones."""
    make_run(here / "other_tokenizer", tokenizer=Tokenizer.train(["something else entirely"], 260))
    unfinished = make_run(here / "unfinished", n_positions=96, tokenizer=Tokenizer.load(here / "runs/sft"))
    info = json.loads((unfinished / "run.json").read_text()) | {"finished": False}
    (unfinished / "run.json").write_text(json.dumps(info))
    (here / "long.jsonl").write_text('{"prompt": "p"}\n' + json.dumps({"prompt": "word " * 90}) + "\n")
    (here / "one.jsonl").write_text('{"prompt": "p"}\n')
    (here / "empty.jsonl").write_text("")
    (here / "nan.py").write_text("def judge(prompts, responses, texts):\n    return [float('nan')] * len(texts)\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("runs/none", "runs/none: no such folder"),
        ("--baseline runs/none", "runs/none: no such folder"),
        ("--reward runs/none", "no reward is named 'runs/none'"),
        ("runs/ppo other_tokenizer", "runs/sft and other_tokenizer have different tokenizers"),
        ("runs/rm", "runs/rm: a reward model, not a language model"),
        ("unfinished", "unfinished: this run of train_sft is not finished"),
        ("--prompts none.jsonl --judge gold", "none.jsonl: no such file"),
        ("--prompts empty.jsonl --judge gold", "empty.jsonl: holds no records"),
        ("--prompts one.jsonl --judge gold", "one.jsonl: holds one record; give at least 2 prompts"),
        ("--prompts long.jsonl --judge gold", "long.jsonl:2: a prompt of "),
        ("--prompts prompts.jsonl", "--prompts prompts.jsonl needs a --judge to decide the wins"),
        ("--judge nan:judge", "reward function nan:judge returned NaN for response 0"),
        ("--judge nan:other", "nan:other: other does not exist in nan"),
        ("--n 1", "--n must be at least 2, got 1"),
        ("--temperature 0", "--temperature must be a positive number, got 0"),
        ("--temperature 1 1", "--temperature 1.0 1.0: one is named twice"),
        ("--best-of 1", "--best-of must be at least 2, got 1"),
        ("--best-of 4 4", "--best-of 4 4: one is named twice"),
        ("--human-n 0", "--human-n must be at least 1, got 0"),
        ("--max-new-tokens -3", "--max-new-tokens must be a positive number, got -3"),
        ("--out prompts.jsonl", "--out prompts.jsonl is a file; name a folder"),
        ("--device tpu9", "--device 'tpu9' is not "),
    ],
)
def test_mistakes_are_one_line_and_code_2(here, bad_runs, monkeypatch, capsys, arguments, message):
    quick = ["--n", "4"] * ("--n" not in arguments) + ["--max-new-tokens", "6"] * ("--max" not in arguments)
    out = [] if "--out" in arguments else ["--out", "never"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments.split(), *quick, *out])
    with pytest.raises(SystemExit) as stopped:
        cli(main, Args)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not (here / "never").exists()


def test_a_default_run_that_is_missing_names_its_script(tmp_path, monkeypatch, make_run):
    monkeypatch.chdir(tmp_path)
    for name, script in (
        ("sft", "train_sft.py"),
        ("ppo", "train_ppo.py"),
        ("dpo", "train_dpo.py"),
        ("rm", "train_rm.py"),
    ):
        with pytest.raises(InputError, match=rf"^runs/{name} does not exist yet; run python {script} first$"):
            main(Args(device="cpu"))
        make_run(tmp_path / "runs" / name, scalar=name == "rm")
