"""explain: every number of the per-token breakdown, by hand; the page and the table; that looking changes nothing."""

import copy
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Killed, Share, tiny_network, weights
from rich.console import Console

from minirlhf import InputError
from minirlhf.algorithms import ppo
from minirlhf.algorithms.losses import clipped, policy_loss
from minirlhf.algorithms.ppo import Networks, PPOConfig, train
from minirlhf.algorithms.rollout import rollout
from minirlhf.commands import explain
from minirlhf.commands.explain import COLUMNS, Explained, page, table, token_text, totals, visible
from minirlhf.commands.watch import Watch, evenly_spaced
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.model.gpt import GPT, ScalarModel, clone
from minirlhf.run.arguments import RunArgs
from minirlhf.run.command_line import cli
from minirlhf.run.folder import Run

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6], [7], [8, 9, 10, 11, 12], [13, 14, 15]]
CONFIG = PPOConfig(
    steps=1, batch_size=8, epochs=1, minibatches=8, response_tokens="3:8", temperature=0.9, lr=5e-2, critic_lr=1e-2,
    warmup_steps=0, kl_coef=0.3, gamma=0.97, lam=0.9, missing_eot_penalty=0.5, microbatch_size=3, sample_every=2,
)  # fmt: skip


def networks(tokenizer, shared: bool = False, seed: int = 0) -> tuple[GPT, GPT, ScalarModel]:
    """Policy, another reference, critic."""
    policy, ref = tiny_network(tokenizer, 32, seed, ends=6.0), clone(tiny_network(tokenizer, 32, 3, ends=6.0))
    critic = ScalarModel(policy.config, trunk=policy if shared else clone(policy))
    critic.score.weight.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    return policy, ref, critic.requires_grad_(True)


def go(folder, models, tokenizer, config=CONFIG, *, explain=8, resume=False, dies_at=None, dtype="fp32", every=2):
    """Train, and what explain.jsonl holds then."""
    run = Run(RunArgs(out=folder, checkpoint_every=every, resume=resume), "train_ppo.py", config.steps)
    checkpoint = run.checkpoint

    def checkpoint_or_die(done, **kwargs):
        if done == dies_at:
            raise Killed
        checkpoint(done, **kwargs)

    run.checkpoint = checkpoint_or_die
    policy, ref, critic = models

    def prompts_at(step):
        return [PROMPTS[(step + i) % 4] for i in range(config.batch_size)]

    policy.run_with(dtype=dtype)
    ref.run_with(dtype=dtype)
    critic.trunk.run_with(dtype=dtype)
    networks = Networks(policy, ref, critic)
    watch = Watch(networks, tokenizer, config, run, explain=explain)
    train(networks, Share(), prompts_at, tokenizer, config, run, 7, watch)
    return records(folder) if explain else []


def records(folder) -> list[Explained]:
    return [Explained(**json.loads(line)) for line in (folder / "explain.jsonl").read_text().splitlines()]


def counted(one: Explained, key: str) -> list:
    return [token[key] for token in one.tokens if token["mask"]]


@pytest.fixture
def drawn(monkeypatch):
    """The rollouts that were drawn."""
    seen = []

    def recorded(*args):
        seen.append(rollout(*args))
        return seen[-1]

    monkeypatch.setattr(ppo, "rollout", recorded)
    return seen


# --- the numbers ------------------------------------------------------------------------------------------------------


def by_hand(old, new, ref, old_critic, episodes, config) -> list[dict[str, list]]:
    """Each response's columns, from the networks alone: one sequence at a time, no mask, no padding, no kernel."""
    found = []
    for tokens, where in zip(episodes.tokens, episodes.counted):
        first, n = int(where.nonzero()[0]), int(where.sum())
        row, ids = tokens[: first + n], tokens[first : first + n]
        logp, logq, lognow = (
            torch.log_softmax(m.logits(m(row[None]))[0, first - 1 : -1] / config.temperature, -1)
            for m in (old, ref, new)
        )
        own, reference, now = (table[range(n), ids] for table in (logp, logq, lognow))
        kl = (logp.exp() * (logp - logq)).sum(-1)
        paid = {"k1": own - reference, "k2": (own - reference) ** 2 / 2, "exact": kl}[config.kl_estimator].tolist()
        score = float((ids < 100).double().mean())
        shaped = score - config.missing_eot_penalty * (ids[-1] != old.config.vocab_size - 1).item()
        rewards = [-config.kl_coef * x if config.kl_in != "loss" else 0.0 for x in paid]
        rewards[-1] += shaped
        values = old_critic(row[None])[0, first - 1 : -1].tolist()
        after = [*values[1:], 0.0]
        deltas = [r + config.gamma * v_next - v for r, v_next, v in zip(rewards, after, values)]
        decay = config.gamma * config.lam
        advantages = [sum(decay ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]
        found.append(
            {
                "ids": ids.tolist(), "prompt": tokens[:first].tolist(), "score": score, "shaped_score": shaped,
                "kl_paid": sum(paid), "logprob": own.tolist(), "ref_logprob": reference.tolist(), "kl": kl.tolist(),
                "reward": rewards, "value": values, "advantage": advantages,
                "return": [a + v for a, v in zip(advantages, values)], "ratio": (now - own).exp().tolist(),
            }
        )  # fmt: skip
    if config.whiten:
        every = torch.tensor([a for row in found for a in row["advantage"]], dtype=torch.float64)
        for row in found:
            row["advantage"] = [(a - every.mean().item()) / every.std(correction=0).item() for a in row["advantage"]]
    for row in found:
        pairs = zip(row["ratio"], row["advantage"])
        row["clipped"] = [r > 1 + config.clip if a > 0 else r < 1 - config.clip for r, a in pairs]
    return found


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize(
    ("kl_in", "estimator", "whiten"),
    [("reward", "k1", True), ("reward", "k1", False), ("both", "exact", True), ("loss", "k2", False)],
)
def test_every_number_by_hand(tiny_tokenizer, tmp_path, drawn, kl_in, estimator, whiten, shared):
    config = dataclasses.replace(CONFIG, kl_in=kl_in, kl_estimator=estimator, whiten=whiten)
    policy, ref, critic = networks(tiny_tokenizer, shared)
    old, old_critic = copy.deepcopy((policy, critic))
    looked_at = go(tmp_path / "run", (policy, ref, critic), tiny_tokenizer, config)
    with torch.no_grad():
        expected = by_hand(old, policy, ref, old_critic, drawn[0], config)
    assert [one.response for one in looked_at] == list(range(8))
    marks = {True: 0, False: 0}
    for one, row in zip(looked_at, expected):
        assert (one.step, one.kl_coef, one.kl_estimator, one.kl_in) == (0, 0.3, estimator, kl_in)
        assert (one.clip, one.whiten) == (0.2, whiten)
        assert one.truncated == (row["ids"][-1] != tiny_tokenizer.eot)
        for key in ("score", "shaped_score", "kl_paid"):
            assert getattr(one, key) == pytest.approx(row[key], abs=1e-4)
        texts = [token_text(tiny_tokenizer, i) for i in (*row["prompt"], *row["ids"])]
        assert [token["text"] for token in one.tokens] == texts
        assert [token["mask"] for token in one.tokens] == [False] * len(row["prompt"]) + [True] * len(row["ids"])
        for token in one.tokens[: len(row["prompt"])]:
            assert list(token) == list(COLUMNS)
            assert all(token[key] is None for key in COLUMNS if key not in ("text", "mask"))
        for key in ("logprob", "ref_logprob", "kl", "reward", "value", "advantage", "return", "ratio"):
            assert counted(one, key) == pytest.approx(row[key], abs=2e-4), key
        for mark, own, ratio in zip(counted(one, "clipped"), row["clipped"], row["ratio"]):
            if abs(abs(ratio - 1) - config.clip) > 1e-3:
                assert mark == own
                marks[mark] += abs(ratio - 1) > config.clip
    assert marks[True] > 0 and marks[False] > 0  # beyond ε both ways: clipped, and about to be pulled back
    assert 0 < sum(one.truncated for one in looked_at) < 8


@settings(max_examples=200)
@given(st.floats(0.2, 3), st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3), st.floats(0.05, 0.5))
def test_clipped_is_where_the_surrogate_has_no_gradient(ratio, advantage, clip):
    if min(abs(ratio - 1 - clip), abs(ratio - 1 + clip)) < 1e-6:
        return
    old, a = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    new = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(policy_loss(new, old, a, clip).sum(), new)
    assert clipped(new.detach().exp(), a, clip).item() == (gradient.item() == 0)


@pytest.mark.parametrize("options", [{}, {"kl_estimator": "k3"}, {"kl_in": "both", "kl_estimator": "exact"}])
def test_the_sums_add_up(tiny_tokenizer, tmp_path, options):
    config = dataclasses.replace(CONFIG, whiten=False, normalise_reward=True, steps=2, **options)
    for one in go(tmp_path / "run", networks(tiny_tokenizer), tiny_tokenizer, config):
        paid = one.shaped_score - one.kl_coef * one.kl_paid
        assert sum(counted(one, "reward")) == pytest.approx(paid, abs=1e-4)
        logratio = [p - q for p, q in zip(counted(one, "logprob"), counted(one, "ref_logprob"))]
        terms = {"k1": logratio, "k3": [math.expm1(-x) + x for x in logratio], "exact": counted(one, "kl")}
        assert one.kl_paid == pytest.approx(sum(terms[config.kl_estimator]), rel=1e-4, abs=1e-4)
        for a, v, g in zip(*(counted(one, key) for key in ("advantage", "value", "return"))):
            assert g == pytest.approx(a + v, abs=1e-5)
        said = totals(one)
        for number in (f"score {one.score:+.3f}", f"to PPO {one.shaped_score:+.3f}", f"{one.kl_paid:.3f}"):
            assert number in said
        assert f"Σ KL {sum(counted(one, 'kl')):.3f} nats" in said
        assert f"Σ reward {sum(counted(one, 'reward')):+.3f} = " in said
        assert ("by k3" in said) == (config.kl_estimator == "k3")


def test_a_policy_that_did_not_move_has_ratio_1(tiny_tokenizer, tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e-12, critic_lr=1e-12)
    for one in go(tmp_path / "run", networks(tiny_tokenizer), tiny_tokenizer, config):
        assert counted(one, "ratio") == pytest.approx([1.0] * len(counted(one, "ratio")), abs=1e-5)
        assert not any(counted(one, "clipped"))


def test_bf16_differs_by_its_rounding_only(tiny_tokenizer, tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e-12, critic_lr=1e-12)
    for one in go(tmp_path / "run", networks(tiny_tokenizer), tiny_tokenizer, config, dtype="bf16"):
        assert counted(one, "ratio") == pytest.approx([1.0] * len(counted(one, "ratio")), abs=0.1)
        assert sum(counted(one, "reward")) == pytest.approx(one.shaped_score - one.kl_coef * one.kl_paid, abs=1e-4)


# --- when, and that it changes nothing --------------------------------------------------------------------------------

LONG = dataclasses.replace(CONFIG, steps=6, minibatches=2, lr=3e-3, critic_lr=3e-3, kl_target=0.5, kl_horizon=50)


def test_looks_are_at_the_first_rollout_and_where_samples_are_shown(tiny_tokenizer, tmp_path, capsys):
    looked_at = go(tmp_path / "run", networks(tiny_tokenizer), tiny_tokenizer, LONG, explain=3)
    assert [(one.step, one.response) for one in looked_at] == [
        (s, i) for s in (0, 1, 3, 5) for i in evenly_spaced(8, 3)
    ]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9
    for sample, one in zip(samples, looked_at[3:]):  # three samples: the same responses
        assert (sample["step"], sample["reward"]) == (one.step, one.score)
        if not re.search(r"[\ufffd\\]", sample["prompt"] + sample["response"]):
            whole = "".join(token["text"] for token in one.tokens).replace(Tokenizer.EOT, "")
            assert whole == sample["prompt"] + sample["response"]
    assert len({one.kl_coef for one in looked_at}) == 4  # β as it was in each rollout
    logged = [json.loads(line)["kl_coef"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [one.kl_coef for one in looked_at[::3]] == [logged[step] for step in (0, 1, 3, 5)]
    assert "explain.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("n", "count", "rows"),
    [
        (8, 3, [0, 2, 5]),
        (8, 8, list(range(8))),
        (2, 3, [0, 1]),
        (128, 3, [0, 42, 85]),
        (5, 1, [0]),
        (10, 6, [0, 1, 3, 5, 6, 8]),
    ],
)
def test_rows_are_evenly_spaced(n, count, rows):
    assert evenly_spaced(n, count) == rows


@pytest.mark.parametrize(("shared", "dtype"), [(False, "fp32"), (True, "fp32"), (True, "bf16")])
def test_looking_changes_no_bit(tiny_tokenizer, tmp_path, shared, dtype):
    after, logged = [], []
    for number in (0, 8):
        policy, ref, critic = networks(tiny_tokenizer, shared)
        folder = tmp_path / str(number)
        go(folder, (policy, ref, critic), tiny_tokenizer, LONG, explain=number, dtype=dtype)
        after.append(weights(policy, critic, ref))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged.append([{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows])
        assert {path.name for path in folder.glob("explain*")} == (
            {"explain.jsonl", "explain.html"} if number else set()
        )
    assert torch.equal(*after)
    assert logged[0] == logged[1]


@pytest.mark.parametrize("dies_at", [1, 4, 6])  # goes on from step 0, 2 and 4
def test_a_resumed_run_gives_the_page_of_one_never_killed(tiny_tokenizer, tmp_path, monkeypatch, dies_at):
    pages = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)  # the page names the folder
        out = Path("run")
        if name == "killed":
            with pytest.raises(Killed):
                go(out, networks(tiny_tokenizer), tiny_tokenizer, LONG, explain=2, dies_at=dies_at)
            with open(out / "explain.jsonl", "a", encoding="utf-8") as file:
                file.write('{"step": 3, "response": 0, "tok')  # it died while it wrote
        # A checkpoint brings its own weights.
        fresh = networks(tiny_tokenizer, seed=9 if name == "killed" and dies_at > 3 else 0)
        go(out, fresh, tiny_tokenizer, LONG, explain=2, resume=name == "killed")
        pages.append([(out / file).read_bytes() for file in ("explain.html", "explain.jsonl")])
    assert pages[0] == pages[1]
    assert not list(Path("run").glob("*.partial"))


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_token_of_any_bytes_can_be_read(tiny_tokenizer):
    assert token_text(tiny_tokenizer, tiny_tokenizer.eot) == Tokenizer.EOT
    whole = [token_text(tiny_tokenizer, i) for i in tiny_tokenizer.encode("I'm sorry,\n<é>")]
    assert whole[-3:] == ["\\xc3", "\\xa9", ">"]
    assert "".join(whole[:-3]) == "I'm sorry,\n<"
    for i in range(tiny_tokenizer.vocab_size):
        shown = visible(token_text(tiny_tokenizer, i))
        assert shown and shown.isprintable() and " " not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a b\n", "␣a␣b⏎"),
        ("\t\r\x1b[31m\x00", "\\t\\r\\x1b[31m\\x00"),
        ("\u200b\u202e\u2028", "\\u200b\\u202e\\u2028"),
        ("日é", "日é"),
    ],
)
def test_what_cannot_be_seen_is_shown(text, shown):
    assert visible(text) == shown


# --- the page and the table -------------------------------------------------------------------------------------------


def token(text, *numbers, mask=True, clipped=False) -> dict:
    if not mask:
        return dict.fromkeys(COLUMNS) | {"text": text, "mask": False}
    return dict(zip(COLUMNS, (text, True, *numbers, clipped)))


ONE = Explained(
    step=3, response=42, truncated=True, score=1.5, shaped_score=0.5, kl_coef=0.07, kl_estimator="k1", kl_in="reward",
    kl_paid=3.0, clip=0.2, whiten=True,
    tokens=[
        token("Agent", mask=False),
        token(":\n", mask=False),
        token(" <script>alert(1)</script>", -12.34, -15.34, 0.125, -0.21, -0.5, -1.25, -0.75, 0.0625, clipped=True),
        token('"&\\xc3', -0.01, -0.02, 2.5, 0.5, 0.25, 2.75, 1.5, 1.125),
    ],
)  # fmt: skip


class Reader(HTMLParser):
    """A page's elements, once every one of them is known to be closed by its own end tag."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        assert all(name in ("class", "style", "id", "href", "lang", "charset") for name, _ in attributes)
        if tag != "meta":
            self.open.append((tag, []))

    def handle_endtag(self, tag):
        opened, content = self.open.pop()
        assert opened == tag
        self.text.append((tag, "".join(content)))

    def handle_data(self, data):
        for _, content in self.open:
            content.append(data)

    def all(self, tag):
        return [text for name, text in self.text if name == tag]


def test_the_page_is_whole_and_needs_nothing_else():
    html = page([ONE], "train_ppo.py → runs/<b>")
    reader = Reader(html)
    assert html.startswith("<!DOCTYPE html>")
    assert {tag for tag, _ in reader.seen} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "dl", "dt", "dd", "nav", "a", "span",
        "small", "table", "caption", "thead", "tbody", "tr", "th", "td", "i",
    }  # fmt: skip
    for outside in ("http", "src=", "//", "url(", "@import", "<script"):
        assert outside not in html
    assert [attributes["href"] for tag, attributes in reader.seen if tag == "a"] == ["#step3"]
    assert "runs/<b>" in reader.all("h1")[0]
    # A sentence for each column, and the whitening.
    assert reader.all("dt") == reader.all("th") == [column.label for column in COLUMNS.values()]
    for said, column in zip(reader.all("dd"), COLUMNS.values()):
        assert said.startswith(column.meaning) and said.endswith(".")
    assert "mean 0 and deviation 1" in reader.all("dd")[list(COLUMNS).index("advantage")]
    assert "mean 0" not in page([ONE._replace(whiten=False)], "run")


def test_the_page_shows_every_token_and_number():
    reader = Reader(page([ONE], "run"))
    cells = reader.all("td")
    assert [cells[i : i + 11] for i in range(0, 44, 11)] == [
        ["Agent", "·", *[""] * 9],
        [":⏎", "·", *[""] * 9],
        ["␣<script>alert(1)</script>", "✓", "-12.34", "-15.34", "0.125", "-0.210", "-0.50", "-1.25", "-0.75", "0.062",
         "yes"],
        ['"&\\xc3', "✓", "-0.01", "-0.02", "2.500", "+0.500", "+0.25", "+2.75", "+1.50", "1.125", ""],
    ]  # fmt: skip
    # The strip: the text above its advantage, with its sign, for those who see no colour.
    assert reader.all("span") == ["Agent", ":⏎", "␣<script>alert(1)</script>-1.25", '"&\\xc3+2.75']
    spans = [attributes for tag, attributes in reader.seen if tag == "span"]
    assert [span["class"] for span in spans] == ["prompt", "prompt", "down", "up"]
    assert [span.get("style") for span in spans[2:]] == ["--a:0.27", "--a:0.60"]  # 1.25 of 2.75
    (caption,) = reader.all("caption")
    assert caption == (
        "2 tokens, cut at the limit; score +1.500, to PPO +0.500; Σ KL 2.625 nats, 3.000 by k1; "
        "Σ reward +0.290 = +0.500 − 0.07 × 3.000"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"truncated": False, "score": 0.5}, "2 tokens, ended by itself; score +0.500; Σ KL 2.625 nats, 3.000 by k1; "),
        ({"kl_in": "loss"}, "Σ reward +0.290 = +0.500"),
        ({"kl_estimator": "exact", "kl_in": "both"}, "Σ KL 2.625 nats; Σ reward +0.290 = +0.500 − 0.07 × 3.000"),
    ],
)
def test_the_totals(options, said):
    line = totals(ONE._replace(**options))
    assert line.startswith(said) or line.endswith(said)


def test_a_number_that_is_none_is_shown_as_such():
    tokens = [*ONE.tokens, {**ONE.tokens[-1], "ratio": None, "kl": None, "advantage": -1e-9}]
    reader = Reader(page([ONE._replace(tokens=tokens)], "run"))
    assert reader.all("td")[44:] == [
        '"&\\xc3',
        "✓",
        "-0.01",
        "-0.02",
        "–",
        "+0.500",
        "+0.25",
        "+0.00",
        "+1.50",
        "–",
        "",
    ]
    assert "Σ KL – nats" in reader.all("caption")[0]


def test_what_is_infinite_is_written_as_null(tiny_tokenizer, tmp_path, monkeypatch):
    losses = explain.token_losses

    def far(*args):
        terms = losses(*args)
        return terms._replace(logratio=terms.logratio + 1e3)

    monkeypatch.setattr(explain, "token_losses", far)
    for one in go(tmp_path / "run", networks(tiny_tokenizer), tiny_tokenizer):
        assert counted(one, "ratio") == [None] * len(counted(one, "ratio"))
    Reader((tmp_path / "run" / "explain.html").read_text())


def test_a_long_run_shows_its_first_and_last_steps(monkeypatch):
    monkeypatch.setattr(explain, "PAGE_STEPS", 4)
    steps = [ONE._replace(step=step, response=i) for step in range(7) for i in (0, 1)]
    reader = Reader(page(steps, "run"))
    assert [text.partition(",")[0] for text in reader.all("h2")] == ["Step 0", "Step 4", "Step 5", "Step 6"]
    assert len(reader.all("table")) == 8
    assert "3 more are in explain.jsonl." in reader.all("p")
    assert not any("more are in" in text for text in Reader(page(steps[:8], "run")).all("p"))


def printed(one: Explained, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(one))
    return console.file.getvalue().splitlines()


def test_the_table_prints_every_column_in_80_characters():
    lines = printed(ONE, 80)
    assert max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    assert totals(ONE) in said and said.startswith("step 3, response 42: ")
    ruled = next(i for i, line in enumerate(lines) if "──" in line)
    head = " ".join(lines[ruled - 3 : ruled])
    for column in COLUMNS.values():
        assert all(word in head for word in re.findall("[a-zA-Z]+", column.label))
    numbers = [line.split() for line in lines[ruled + 1 :] if "✓" in line]
    assert numbers[0][-10:] == ["✓", "-12.34", "-15.34", "0.125", "-0.210", "-0.50", "-1.25", "-0.75", "0.062", "yes"]
    assert numbers[1] == ['"&\\xc3', "✓", "-0.01", "-0.02", "2.500", "+0.500", "+0.25", "+2.75", "+1.50", "1.125"]
    assert "".join(line[:12].strip() for line in lines[ruled + 3 : -1]) == "␣<script>alert(1)</script>"


def test_a_long_prompt_is_cut_on_the_terminal_and_not_on_the_page():
    prompt = [token(f"w{i} ", mask=False) for i in range(200)]
    one = ONE._replace(tokens=prompt + ONE.tokens[2:])
    said = "\n".join(printed(one, 80))
    assert "… 192 more" in said and "w191" not in said and "w192␣" in said and "w199␣" in said
    assert sum(cell.startswith("w") for cell in Reader(page([one], "run")).all("td")) == 200


def test_text_is_no_markup_on_the_terminal():
    one = ONE._replace(tokens=[*ONE.tokens[:2], {**ONE.tokens[2], "text": "[red]x[/]"}])
    assert any("[red]x[/]" in line for line in printed(one, 100))


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with four prompts."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"Customer: My {what} broke!\nAgent:"}) for what in ("lamp", "cup", "é", "phone")]
    Path("prompts.jsonl").write_text("\n".join(lines))
    return tmp_path


def command_line(policy, reward, *more) -> list[str]:
    return [*map(str, ("--prompts", "prompts.jsonl", "--init", policy, "--reward", reward, "--out", "out", "--steps", 3,
                       "--batch-size", 8, "--response-tokens", 6, "--device", "cpu", *more))]  # fmt: skip


def call(commands, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_ppo.py", *arguments])
    cli(commands["train_ppo"].main, commands["train_ppo"].Args)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--critic", "shared"],
        ["--dtype", "bf16"],
        ["--kl-in", "both", "--kl-estimator", "exact"],
        ["--responses-per-prompt", 4, "--stop-kl", 1e-9, "--kernel", "reference"],
    ],
    ids=["default", "shared", "bf16", "exact", "several"],
)
def test_it_works_with_other_options(here, commands, monkeypatch, tiny_run, tiny_reward_run, options, capsys):
    call(commands, monkeypatch, *command_line(tiny_run, tiny_reward_run, "--explain", 2, *options))
    looked_at = records(here / "out")
    assert [(one.step, one.response) for one in looked_at] == [(0, 0), (0, 4), (2, 0), (2, 4)]
    reader = Reader((here / "out" / "explain.html").read_text())
    assert len(reader.all("table")) == 4
    assert len(reader.all("td")) == 11 * sum(len(one.tokens) for one in looked_at)
    for one in looked_at:
        assert 1 <= len(counted(one, "text")) <= 6
        assert sum(counted(one, "reward")) == pytest.approx(one.shaped_score - one.kl_coef * one.kl_paid, abs=1e-3)
    assert "step 2, response 4" in capsys.readouterr().out


def test_as_a_process_and_resumed_without_looking(here, commands, monkeypatch, tiny_run, tiny_reward_run):
    arguments = command_line(tiny_run, tiny_reward_run, "--explain", 2)
    done = subprocess.run([sys.executable, ROOT / "train_ppo.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("step 0, response 0: ", "step 2, response 4: ", "ratio", "clipped", "out/explain.html"):
        assert words in done.stdout
    before = (here / "out" / "model.safetensors").read_bytes()
    call(commands, monkeypatch, *command_line(tiny_run, tiny_reward_run, "--overwrite"))
    assert (here / "out" / "model.safetensors").read_bytes() == before
    assert not (here / "out" / "explain.jsonl").exists()


def test_whether_to_look_may_change_when_a_run_is_resumed(here, commands, monkeypatch, tiny_run, tiny_reward_run):
    arguments = command_line(tiny_run, tiny_reward_run, "--checkpoint-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(commands["train_ppo"].Run, "samples", stop)  # at the last step
        with pytest.raises(Killed):
            call(commands, patch, *arguments)
    call(commands, monkeypatch, *arguments, "--resume", "--explain", "1")
    assert [one.step for one in records(here / "out")] == [2]


def stop(*args, **kwargs):
    raise Killed


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "error: --explain must be at least 0, got -1\n"),
        (9, "error: --explain 9 is more than the 8 responses of a rollout; lower it, or raise --batch-size\n"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(here, commands, monkeypatch, capsys, tiny_run, value, message):
    with pytest.raises(SystemExit) as ended:
        call(commands, monkeypatch, *command_line(tiny_run, "gold", "--explain", value))
    assert ended.value.code == 2
    assert capsys.readouterr().err == message
    assert not (here / "out").exists()


def test_the_message_is_also_an_error_of_the_arguments(commands, tmp_path):
    with pytest.raises(InputError, match="--explain 129 is more than the 128 responses"):
        commands["train_ppo"].Args(out=tmp_path / "out", explain=129)
