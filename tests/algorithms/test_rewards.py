"""Rewards: what is scored is what was drawn, whatever stands beside it; and every mistake is one line."""

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
from minirlhf.algorithms.reward_model import pair_accuracy
from minirlhf.algorithms.rewards import (
    GoldJudge,
    PythonReward,
    RewardModelScorer,
    TextClassifier,
    load_reward,
    reward_models,
    score,
)
from minirlhf.commands.score import Args, label_accuracy, main
from minirlhf.data import helpdesk
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.model.gpt import last_token
from minirlhf.run.command_line import cli

PROMPT = "Customer: My order hasn't arrived. What should I do?\nAgent:"
REPLIES = [
    " Please check your tracking.",
    " I apologise.",
    "",
    " We will refund it!",
    " No.",
]


class Stub:
    """A reward that returns what it was told to."""

    name = "pkg.module:function"

    def __init__(self, returned):
        self.returned = returned

    def __call__(self, prompts, responses, texts):
        self.seen = (prompts, responses, texts)
        return self.returned


def command(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "200"}
    line = [sys.executable, "-m", "minirlhf.rewards", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- score ---


def test_token_text_is_a_string_with_tokens():
    text = TokenText("Yes.", [5, 6, 7])
    assert text == "Yes." and text.tokens == [5, 6, 7] and json.dumps(text) == '"Yes."'
    assert type(text + "!") is str  # what is made from it was not drawn, and carries no tokens


def test_score_passes_prompts_responses_and_texts():
    stub = Stub([1, 2])
    assert score(stub, ["a", "b"], ["c", "d"]).tolist() == [1.0, 2.0]
    assert stub.seen == (["a", "b"], ["c", "d"], ["ac", "bd"])


@pytest.mark.parametrize(
    "returned",
    [[1, 2.5], (1, 2.5), torch.tensor([1, 2.5], dtype=torch.float64), torch.tensor([1, 2.5], requires_grad=True)],
)
def test_score_takes_whatever_holds_numbers(returned):
    scores = score(Stub(returned), ["a"] * 2, ["b"] * 2)
    assert scores.tolist() == [1.0, 2.5] and scores.dtype == torch.float32 and not scores.requires_grad


@pytest.mark.parametrize(
    "returned, message",
    [
        (torch.zeros(3), "returned shape (3,), expected (8,)"),
        (torch.zeros(8, 1), "returned shape (8, 1), expected (8,)"),
        (0.5, "returned shape (), expected (8,)"),
        ([], "returned shape (0,), expected (8,)"),
        (None, "returned NoneType, expected 8 numbers"),
        (["good"] * 8, "returned list, expected 8 numbers"),
        ([[1.0], 2.0], "returned list, expected 8 numbers"),
        ([0, 0, math.nan] + [0] * 5, 'returned NaN for response 2: "r2"'),
        ([0] * 7 + [-math.inf], 'returned -inf for response 7: "r7"'),
        ([1e300] + [0] * 7, 'returned inf for response 0: "r0"'),  # beyond float32
    ],
)
def test_score_refuses_what_is_not_b_numbers(returned, message):
    with pytest.raises(InputError) as caught:
        score(Stub(returned), ["p"] * 8, [f"r{i}" for i in range(8)])
    assert str(caught.value).startswith(f"reward function pkg.module:function {message}")
    assert "\n" not in str(caught.value)


# --- reward model ---


def by_hand(scorer: RewardModelScorer, tokens: list[int]) -> float:
    with torch.no_grad():
        return float(scorer.model(torch.tensor([tokens]))[0, -1])


def test_reward_model_scores_the_last_token_of_what_was_drawn(tiny_reward_run):
    scorer = RewardModelScorer(tiny_reward_run)
    tokenizer = scorer.tokenizer
    before, after = tokenizer.encode(PROMPT), tokenizer.encode(REPLIES[0])
    ended = TokenText(REPLIES[0], [*after, tokenizer.eot])
    truncated = TokenText(REPLIES[0], after)
    scores = score(scorer, [PROMPT] * 3, [REPLIES[0], ended, truncated])
    assert scores[0] == scores[1]  # a plain string is a whole response
    assert scores[1] == pytest.approx(by_hand(scorer, [*before, *after, tokenizer.eot]), abs=1e-5)
    assert scores[2] == pytest.approx(by_hand(scorer, [*before, *after]), abs=1e-5)
    assert abs(scores[1] - scores[2]) > 1e-3  # nothing is appended to what was cut off


def test_reward_model_never_tokenises_what_was_drawn_again(tiny_reward_run):
    scorer = RewardModelScorer(tiny_reward_run)
    tokenizer = scorer.tokenizer
    spelled = [token for char in " order" for token in tokenizer.encode(char)]  # letter by letter
    assert tokenizer.decode(spelled) == " order" and spelled != tokenizer.encode(" order")
    response = TokenText(" order", [*spelled, tokenizer.eot])
    prompt = TokenText("Agent:", [token for char in "Agent:" for token in tokenizer.encode(char)])
    got = score(scorer, [PROMPT, prompt], [response, response])
    assert got[0] == pytest.approx(by_hand(scorer, [*tokenizer.encode(PROMPT), *response.tokens]), abs=1e-5)
    assert got[1] == pytest.approx(by_hand(scorer, [*prompt.tokens, *response.tokens]), abs=1e-5)
    assert abs(got[0] - score(scorer, [PROMPT], [" order"])[0]) > 1e-4


def test_scores_do_not_depend_on_the_batch(tiny_reward_run):
    tokenizer = Tokenizer.load(tiny_reward_run)
    responses = [
        TokenText(r, [*tokenizer.encode(r), *([tokenizer.eot] if i % 2 else [])]) for i, r in enumerate(REPLIES)
    ]
    responses[2] = TokenText("", [tokenizer.eot])
    alone = torch.cat([score(RewardModelScorer(tiny_reward_run), [PROMPT], [r]) for r in responses])
    for batch_size in (1, 2, 64):
        scorer = RewardModelScorer(tiny_reward_run, batch_size=batch_size)
        for order in itertools.islice(itertools.permutations(range(len(responses))), 0, 120, 29):
            together = score(scorer, [PROMPT] * len(order), [responses[i] for i in order])
            torch.testing.assert_close(together, alone[list(order)], atol=1e-5, rtol=1e-5)
    assert alone.unique().numel() == len(alone)


def test_an_empty_prompt_begins_with_end_of_text(tiny_reward_run):
    scorer = RewardModelScorer(tiny_reward_run)
    eot = scorer.tokenizer.eot
    expected = by_hand(scorer, [eot, *scorer.tokenizer.encode("A text."), eot])
    assert score(scorer, [""], ["A text."])[0] == pytest.approx(expected, abs=1e-5)


def test_reward_model_refuses_what_is_longer_than_its_context(tiny_reward_run):
    scorer = RewardModelScorer(tiny_reward_run)
    fits = TokenText("x" * 63, [1] * 63)
    score(scorer, [TokenText("x", [1])], [fits])
    with pytest.raises(InputError, match=r"65 tokens, but the reward model .*rm reads 64"):
        score(scorer, [TokenText("xx", [1, 1])], [fits])


def test_score_position_survives_padding_on_either_side(tiny_reward_run):
    """The scorer's right padding without a mask gives what left padding with one gives."""
    scorer = RewardModelScorer(tiny_reward_run)
    tokens = [*scorer.tokenizer.encode(PROMPT), *scorer.tokenizer.encode(REPLIES[1]), scorer.tokenizer.eot]
    padded = torch.tensor([[0] * 5 + tokens])
    mask = torch.tensor([[False] * 5 + [True] * len(tokens)])
    with torch.no_grad():
        left = last_token(scorer.model(padded, mask), mask)
    torch.testing.assert_close(left, score(scorer, [PROMPT], [REPLIES[1]]), atol=1e-5, rtol=1e-5)


# --- the others ---


def test_gold_judge_is_the_helpdesks():
    prompts = [p.prompt for p in helpdesk.held_out_prompts(4, seed=3)]
    responses = [" asdf", helpdesk.ideal_reply(prompts[1]), "", helpdesk.ideal_reply(prompts[3])]
    judge = load_reward("gold")
    assert isinstance(judge, GoldJudge) and judge.name == "gold"
    expected = torch.tensor(helpdesk.gold(prompts, responses))
    assert torch.equal(score(judge, prompts, responses), expected)
    assert expected[1] > expected[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with user code in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rewards.py").write_text(
        "import torch\n"
        "LIMIT = 3\n"
        "def brevity(prompts, responses, texts):\n"
        "    assert type(prompts) is type(responses) is type(texts) is list\n"
        "    return [-len(r) for r in responses]\n"
        "def broken(prompts, responses, texts):\n"
        "    return 1 / 0\n"
    )
    (tmp_path / "needy.py").write_text("import a_package_nobody_has\n")
    yield tmp_path
    for name in ("my_rewards", "needy"):
        sys.modules.pop(name, None)


def test_python_function_as_reward(here):
    reward = load_reward("my_rewards:brevity")
    assert isinstance(reward, PythonReward) and reward.name == "my_rewards:brevity"
    assert score(reward, ["p", "p"], ["four", TokenText("", [9])]).tolist() == [-4.0, 0.0]


def test_an_error_in_the_users_function_is_theirs_to_see(here):
    with pytest.raises(ZeroDivisionError):
        score(load_reward("my_rewards:broken"), ["p"], ["r"])
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        load_reward("needy:function")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("my_rewards:brevty", "my_rewards:brevty: brevty does not exist in my_rewards"),
        ("my_rewards:LIMIT", "my_rewards:LIMIT: LIMIT is no function in my_rewards"),
        ("no_such_module:f", "no_such_module:f: there is no module no_such_module in "),
        ("no_such.module:f", "no_such.module:f: there is no module no_such in "),
        ("my_rewards:", "'my_rewards:' does not name a function; write pkg.module:function"),
        ("my-rewards:f", "'my-rewards:f' does not name a function"),
        ("my_rewards.py:brevity", "my_rewards.py:brevity: there is no module my_rewards.py"),
        (
            "runs/nothing",
            "no reward is named 'runs/nothing': there is no such folder; give gold, pkg.module:function, ",
        ),
        ("hf:nothing", "hf:nothing: no such folder"),
        ("mean:", "mean:: an ensemble has two members or more; write mean:runs/rm-1,runs/rm-2"),
        ("worst:gold", "worst:gold: an ensemble has two members or more; write worst:runs/rm-1,runs/rm-2"),
        ("mean:gold,", "mean:gold,: an ensemble has two members or more"),
        ("mean:gold,runs/nothing", "no reward is named 'runs/nothing'"),
    ],
)
def test_a_reward_that_names_nothing(here, spec, message):
    with pytest.raises(InputError) as caught:
        load_reward(spec)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_an_ensemble_is_the_mean_or_the_lowest_of_its_members(here, make_run, tiny_reward_run):
    other = make_run(here / "other-rm", scalar=True, seed=9)
    prompts = [PROMPT] * len(REPLIES)
    single = [score(load_reward(str(folder)), prompts, REPLIES) for folder in (tiny_reward_run, other)]
    single.append(score(load_reward("my_rewards:brevity"), prompts, REPLIES))
    members = f"{tiny_reward_run},{other},my_rewards:brevity"
    mean, worst = load_reward(f"mean:{members}"), load_reward(f"worst:{members}")
    torch.testing.assert_close(score(mean, prompts, REPLIES), torch.stack(single).mean(0))
    torch.testing.assert_close(score(worst, prompts, REPLIES), torch.stack(single).amin(0))
    assert len({int(row) for row in torch.stack(single).argmin(0)}) > 1  # not always the same member
    assert worst.name == f"worst:{members}"
    assert [model.name for model in reward_models(mean)] == [str(tiny_reward_run), str(other)]
    assert reward_models(GoldJudge()) == [] and reward_models(None) == []


def test_every_member_of_an_ensemble_must_share_the_policys_tokenizer(here, make_run, tiny_reward_run, tiny_tokenizer):
    other = make_run(here / "other", scalar=True, tokenizer=Tokenizer.train(["something else entirely " * 3], 260))
    with pytest.raises(InputError, match="have different tokenizers"):
        load_reward(f"mean:{tiny_reward_run},{other}", policy_tokenizer=tiny_tokenizer, policy_folder="runs/sft")


def test_reward_model_must_share_the_policys_tokenizer(tiny_reward_run, tiny_tokenizer):
    reward = load_reward(str(tiny_reward_run), policy_tokenizer=tiny_tokenizer, policy_folder="runs/sft")
    assert isinstance(reward, RewardModelScorer) and reward.name == str(tiny_reward_run)
    other = Tokenizer.train(["something else entirely " * 3], 260)
    with pytest.raises(InputError, match=r"runs/sft and .*rm have different tokenizers"):
        load_reward(str(tiny_reward_run), policy_tokenizer=other, policy_folder="runs/sft")


def test_a_policy_is_no_reward(tiny_run):
    with pytest.raises(InputError, match="a language model, not a reward model"):
        load_reward(str(tiny_run))


# --- text classifier ---


def classifier(
    folder: Path, tokenizer: Tokenizer, labels: list[str], kind: str = "distilbert", pad: bool = True
) -> Path:
    """A random little classifier, saved the way transformers saves."""
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    named = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {n: i for i, n in enumerate(labels)},
    }
    size = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.eot if pad else None, **named}
    torch.manual_seed(0)
    if kind == "distilbert":
        shape = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 40}
        model = DistilBertForSequenceClassification(DistilBertConfig(**shape, **size, initializer_range=0.5))
    else:
        shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2ForSequenceClassification(GPT2Config(**shape, **size, initializer_range=0.5))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    pad_token = {"pad_token": Tokenizer.EOT} if pad else {}
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **pad_token).save_pretrained(folder)
    return folder


def logits_by_hand(folder: Path, text: str) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("kind, pad", [("distilbert", True), ("gpt2", True), ("gpt2", False)])
@pytest.mark.parametrize(
    "labels, positive",
    [(["NEGATIVE", "POSITIVE"], 1), (["positive", "negative"], 0), (["LABEL_0", "LABEL_1"], 1)],
)
def test_text_classifier_gives_log_odds(tmp_path, tiny_tokenizer, labels, positive, kind, pad):
    folder = classifier(tmp_path / "clf", tiny_tokenizer, labels, kind, pad)
    reward = load_reward(f"hf:{folder}")
    assert isinstance(reward, TextClassifier) and reward.name == f"hf:{folder}"
    prompts, responses = ["Agent:"] * 3, [" No.", " We will refund the second payment.", " Yes, please."]
    scores = score(reward, prompts, responses)
    for prompt, response, got in zip(prompts, responses, scores):
        logits = logits_by_hand(folder, prompt + response)
        assert got == pytest.approx(float(logits[positive] - logits[1 - positive]), abs=1e-4)
    assert scores.std() > 1e-3


def test_text_classifier_of_three_labels_and_of_one(tmp_path, tiny_tokenizer):
    three = classifier(tmp_path / "three", tiny_tokenizer, ["negative", "neutral", "positive"])
    logits = logits_by_hand(three, "Yes.")
    odds = logits.softmax(-1)[2]
    assert score(load_reward(f"hf:{three}"), [""], ["Yes."])[0] == pytest.approx(
        float((odds / (1 - odds)).log()), abs=1e-4
    )
    one = classifier(tmp_path / "one", tiny_tokenizer, ["score"])
    assert score(load_reward(f"hf:{one}"), [""], ["Yes."])[0] == pytest.approx(
        float(logits_by_hand(one, "Yes.")), abs=1e-4
    )


def test_text_classifier_errors(tmp_path, tiny_tokenizer, monkeypatch):
    vague = classifier(tmp_path / "vague", tiny_tokenizer, ["1 star", "2 stars", "3 stars"])
    with pytest.raises(
        InputError, match="cannot tell which of the labels 1 star, 2 stars, 3 stars is the positive one"
    ):
        load_reward(f"hf:{vague}")
    good = classifier(tmp_path / "good", tiny_tokenizer, ["NEGATIVE", "POSITIVE"])
    with pytest.raises(InputError, match=r"text 1 has \d+ tokens, but hf:.* reads 1 to 40"):
        score(load_reward(f"hf:{good}"), ["", ""], ["Yes.", "Yes. " * 40])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs transformers; pip install 'minirlhf\[hf\]'"):
        load_reward(f"hf:{good}")


def test_text_classifier_is_never_unpickled(tmp_path, tiny_tokenizer):
    folder = classifier(tmp_path / "pickled", tiny_tokenizer, ["NEGATIVE", "POSITIVE"])
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"not a text classifier with config.json, model.safetensors and a tokenizer"):
        load_reward(f"hf:{folder}")
    assert not (tmp_path / "sprung").exists()


# --- accuracy ---


def test_pair_accuracy_counts_strict_pairs_only():
    assert pair_accuracy([[2.0, 1.0]], [[1, 2]]) == (1.0, 1)
    assert pair_accuracy([[2.0, 1.0]], [[2, 1]]) == (0.0, 1)
    assert pair_accuracy([[1.0, 1.0]], [[1, 2]]) == (0.5, 1)
    assert pair_accuracy([[3.0, 1.0, 2.0, 0.0]], [[1, 2, 2, 3]]) == (1.0, 5)  # six pairs, one a tie
    accuracy, pairs = pair_accuracy([[1.0, 2.0]], [[1, 1]])
    assert math.isnan(accuracy) and pairs == 0


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), max_size=30))
def test_label_accuracy_equals_a_look_at_every_pair(rows):
    scores, labels = torch.tensor([float(s) for s, _ in rows]), [label for _, label in rows]
    accuracy, pairs = label_accuracy(scores, labels)
    all_pairs = [(a, b) for a, one in rows for b, other in rows if one == 1 and other == 0]
    assert pairs == len(all_pairs)
    if pairs:
        expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in all_pairs) / pairs
        assert accuracy == pytest.approx(expected, abs=1e-9)
    else:
        assert math.isnan(accuracy)


# --- python -m minirlhf.rewards ---


def test_command_scores_every_kind_of_record(tmp_path, tiny_reward_run):
    rows = [
        {"text": "A text.", "label": 1},
        {"text": "Another one.", "label": 0},
        {"prompt": PROMPT, "response": REPLIES[0]},
        {"prompt": PROMPT, "chosen": REPLIES[0], "rejected": REPLIES[1]},
        {"prompt": PROMPT, "responses": [REPLIES[1], REPLIES[0]], "ranking": [2, 1]},
        {"prompt": PROMPT, "responses": REPLIES[:2] + REPLIES[3:], "ranking": [1, 2, 2, 3]},
    ]
    done = command(tiny_reward_run, write_jsonl(tmp_path / "in.jsonl", rows), "--out", tmp_path / "deep" / "out.jsonl")
    assert done.returncode == 0, done.stderr
    out = [json.loads(line) for line in (tmp_path / "deep" / "out.jsonl").read_text().splitlines()]
    assert [set(row) for row in out] == [{"score"}] * 3 + [{"chosen", "rejected"}] * 2 + [{"scores"}]
    scorer = RewardModelScorer(tiny_reward_run)
    by_reply = dict(zip(REPLIES, score(scorer, [PROMPT] * 5, REPLIES).tolist()))
    assert out[0]["score"] == pytest.approx(float(score(scorer, [""], ["A text."])), abs=1e-5)
    assert out[2]["score"] == pytest.approx(by_reply[REPLIES[0]], abs=1e-5)
    for row in out[3:5]:
        assert row["chosen"] == pytest.approx(by_reply[REPLIES[0]], abs=1e-5)
        assert row["rejected"] == pytest.approx(by_reply[REPLIES[1]], abs=1e-5)
    assert out[5]["scores"] == pytest.approx([by_reply[r] for r in REPLIES[:2] + REPLIES[3:]], abs=1e-5)
    expected, pairs = pair_accuracy(
        [[out[3]["chosen"], out[3]["rejected"]], [out[4]["rejected"], out[4]["chosen"]], out[5]["scores"]],
        [[1, 2], [2, 1], [1, 2, 2, 3]],
    )
    assert f"pair accuracy {expected:.4f} over {pairs} pairs" in done.stdout and pairs == 7
    assert f"label accuracy {float(out[0]['score'] > out[1]['score']):.4f} over 1 pairs" in done.stdout


def test_command_writes_only_json_to_the_terminal(tmp_path, capsys):
    prompt = helpdesk.held_out_prompts(1)[0].prompt
    pair = {"prompt": prompt, "chosen": helpdesk.ideal_reply(prompt), "rejected": " asdf"}
    main(Args("gold", write_jsonl(tmp_path / "in.jsonl", [pair] * 3)))
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert len(rows) == 3 and all(row["chosen"] > row["rejected"] for row in rows)
    assert printed.err == "pair accuracy 1.0000 over 3 pairs\n"


def test_command_cuts_long_texts_as_training_does_and_says_so(tmp_path, tiny_reward_run, capsys):
    rows = [{"prompt": "word " * 100 + PROMPT, "response": " No."}, {"prompt": PROMPT, "response": " No."}]
    main(Args(str(tiny_reward_run), write_jsonl(tmp_path / "in.jsonl", rows), device="cpu"))
    printed = capsys.readouterr()
    assert "1 of 2 texts were cut to the context of 64 tokens" in printed.err
    scorer = RewardModelScorer(tiny_reward_run)
    tokens = [*scorer.tokenizer.encode(rows[0]["prompt"]), *scorer.tokenizer.encode(" No."), scorer.tokenizer.eot]
    got = json.loads(printed.out.splitlines()[0])["score"]
    assert got == pytest.approx(by_hand(scorer, tokens[-64:]), abs=1e-5)


def test_command_is_deterministic_and_order_free(tmp_path, tiny_reward_run, capsys):
    rows = [{"prompt": PROMPT, "response": f" Reply {'again ' * (i % 4)}{i}."} for i in range(12)]
    shuffled = random.Random(0).sample(rows, len(rows))
    outputs = []
    for name, order in (("a", rows), ("b", shuffled)):
        main(Args(str(tiny_reward_run), write_jsonl(tmp_path / f"{name}.jsonl", order), batch_size=5, device="cpu"))
        printed = capsys.readouterr().out.splitlines()
        outputs.append({row["response"]: json.loads(line)["score"] for row, line in zip(order, printed)})
    assert outputs[0] == pytest.approx(outputs[1], abs=1e-5)


BAD = [
    (["gold", "{tmp}/absent.jsonl"], "absent.jsonl: no such file"),
    (["gold", "{tmp}/broken.jsonl"], "broken.jsonl:3: not valid JSON"),
    (["gold", "{tmp}/prompts.jsonl"], "prompts.jsonl:1: this record is a prompt"),
    (["gold", "{tmp}/good.jsonl", "--batch-size", "0"], "--batch-size must be a positive number, got 0"),
    (["nothing", "{tmp}/good.jsonl"], "no reward is named 'nothing'"),
    (["bad_reward:shape", "{tmp}/good.jsonl"], "reward function bad_reward:shape returned shape (3,), expected (2,)"),
    (["bad_reward:nan", "{tmp}/good.jsonl"], "reward function bad_reward:nan returned NaN for response 1"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_command_mistakes_are_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    bad_files(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["rewards", *arguments, "--out", str(tmp_path / "out.jsonl")])
    with pytest.raises(SystemExit) as stopped:
        cli(main, Args)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and message in printed.err
    assert len(printed.err.strip().splitlines()) == 1 and printed.out == ""
    assert not (tmp_path / "out.jsonl").exists()
    sys.modules.pop("bad_reward", None)


def test_command_mistakes_from_outside(tmp_path):
    """The same in a process of its own, with the function found in the current directory."""
    bad_files(tmp_path)
    done = command("bad_reward:shape", tmp_path / "good.jsonl", cwd=tmp_path)
    message = (
        "error: reward function bad_reward:shape returned shape (3,), expected (2,); return one number per response\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def bad_files(folder: Path) -> None:
    good = {"prompt": "p", "response": "r"}
    write_jsonl(folder / "good.jsonl", [good, good])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "p"}])
    (folder / "broken.jsonl").write_text(json.dumps(good) + "\n\n{'prompt'}\n")
    (folder / "bad_reward.py").write_text(
        "import math\n"
        "def shape(prompts, responses, texts):\n    return [0.0] * 3\n"
        "def nan(prompts, responses, texts):\n    return [0.0, math.nan]\n"
    )
