"""generate: against a plain loop and against transformers, exact distributions, limits, the command line."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from minirlhf import InputError
from minirlhf.generate import Args, Sampling, cut, draw, encode_prompt, generate, main, sample_texts
from minirlhf.model import GPT, GPTConfig, init_weights, save_model
from minirlhf.runs import cli, seeded
from minirlhf.tokenizer import Tokenizer

V, EOT, CONTEXT = 24, 23, 32
CONFIG = GPTConfig(vocab_size=V, n_positions=CONTEXT, n_layer=2, n_head=2, n_embd=16)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [EOT, 3]]
few = settings(deadline=None, max_examples=15)


def random_model(config, seed=0):
    """A model whose next-token distribution depends visibly on the prefix and often ends."""
    model = GPT(config)
    init_weights(model, seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.mul_((0.12 if name.endswith("proj.weight") else 0.24) / parameter.std())
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@torch.no_grad()
def plain_loop(model, prompts, limits, generator, sampling):
    """No cache, no padding: each row alone through the whole model at every step."""
    rows, ended = [list(p) for p in prompts], [False] * len(prompts)
    out, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    for t in range(max(limits)):
        logits = torch.cat([model.logits(model(torch.tensor([row]))[:, -1]) for row in rows])
        drawn = draw(logits, sampling, generator, forbid=EOT if t < sampling.min_new_tokens else None)
        logp = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        for i, token in enumerate(drawn.tolist()):
            if ended[i] or t >= limits[i]:
                continue
            out[i].append(token)
            logprobs[i].append(logp[i, token].item())
            rows[i].append(token)
            ended[i] = token == EOT
        if all(e or t + 1 >= limit for e, limit in zip(ended, limits)):
            break
    return out, logprobs, [not e for e in ended]


def unpadded(generation):
    return [row[keep].tolist() for row, keep in zip(generation.responses, generation.mask)]


# --- against a plain loop ---------------------------------------------------------------------------------------------


@few
@given(
    seed=st.integers(0, 10**6),
    limits=st.lists(st.integers(1, 20), min_size=5, max_size=5),
    sampling=st.sampled_from(
        [
            Sampling(),
            Sampling(temperature=0.0),
            Sampling(temperature=0.6),
            Sampling(temperature=1.7, top_k=5),
            Sampling(top_p=0.7),
            Sampling(top_k=8, top_p=0.8, min_new_tokens=4),
            Sampling(temperature=0.0, min_new_tokens=20),
        ]
    ),
)
def test_equals_a_plain_loop_without_a_cache(model, seed, limits, sampling):
    got = generate(model, PROMPTS, EOT, limits, seeded(seed), sampling)
    rows, logprobs, truncated = plain_loop(model, PROMPTS, limits, seeded(seed), sampling)
    assert unpadded(got) == rows
    assert got.truncated.tolist() == truncated
    for row, keep, want in zip(got.logprobs, got.mask, logprobs):
        torch.testing.assert_close(row[keep], torch.tensor(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_logprobs_are_those_of_a_second_reading(model, temperature):
    got = generate(model, PROMPTS * 8, EOT, 20, seeded(1), Sampling(temperature=temperature))
    for prompt, response, logprobs, keep in zip(PROMPTS * 8, got.responses, got.logprobs, got.mask):
        response = response[keep]
        whole = torch.cat([torch.tensor(prompt), response])[None]
        logits = model.logits(model(whole))[0, len(prompt) - 1 : -1] / temperature
        want = logits.log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs[keep], want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_equals_transformers(model, tmp_path):
    save_model(model, tmp_path, EOT)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    got = generate(model, PROMPTS, EOT, 20, seeded(0), Sampling(temperature=0.0))
    for prompt, row in zip(PROMPTS, unpadded(got)):
        tokens = torch.tensor([prompt])
        out = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, pad_token_id=EOT
        )
        assert row == out[0, len(prompt) :].tolist()


# --- what comes back --------------------------------------------------------------------------------------------------


def test_limits_masks_and_truncation(model):
    prompts = PROMPTS * 20
    limits = [1 + i % 17 for i in range(len(prompts))]
    got = generate(model, prompts, EOT, limits, seeded(3))
    B, R = got.responses.shape
    lengths = got.mask.sum(-1)
    assert lengths.max() == R
    assert (lengths >= 1).all()
    assert (lengths <= torch.tensor(limits)).all()
    columns = torch.arange(R)
    assert torch.equal(got.mask, columns < lengths[:, None])  # right-padded
    assert (got.responses[~got.mask] == EOT).all()
    assert (got.logprobs[~got.mask] == 0).all()
    assert (got.logprobs[got.mask] < 0).all()
    # The end-of-text that was drawn counts, is the last token, and is the only one.
    ends = ((got.responses == EOT) & got.mask).sum(-1)
    last = got.responses.gather(1, lengths[:, None] - 1).squeeze(1)
    assert torch.equal(ends, (last == EOT).long())
    assert torch.equal(got.truncated, last != EOT)
    assert torch.equal(lengths[got.truncated], torch.tensor(limits)[got.truncated])
    assert 0 < got.truncated.sum() < B  # both kinds are here


def test_one_limit_for_all_is_the_same_limit_each(model):
    one, each = (generate(model, PROMPTS, EOT, limit, seeded(4)) for limit in (9, [9] * len(PROMPTS)))
    assert all(torch.equal(a, b) for a, b in zip(one, each))


def test_a_long_prompt_may_stand_beside_a_long_response(model):
    # Each row fits into the context; the longest prompt and the longest response together would not.
    prompts, limits = [[1] * 30, [2]], [2, 31]
    sampling = Sampling(min_new_tokens=31)
    got = generate(model, prompts, EOT, limits, seeded(0), sampling)
    assert got.mask.sum(-1).tolist() == limits
    alone = generate(model, prompts[1:], EOT, 31, seeded(0), Sampling(temperature=0.0, min_new_tokens=31))
    beside = generate(model, prompts, EOT, limits, seeded(0), Sampling(temperature=0.0, min_new_tokens=31))
    assert unpadded(beside)[1] == unpadded(alone)[0]


def test_the_last_position_of_the_context_is_used(model):
    got = generate(model, [[1] * 12], EOT, 20, seeded(0), Sampling(min_new_tokens=20))
    assert got.mask.sum().item() == 20
    with pytest.raises(InputError) as caught:
        generate(model, [[1], [1] * 13], EOT, 20, seeded(0))
    assert str(caught.value) == (
        "a prompt of 13 tokens and 20 new ones exceed the model's context of 32; shorten the prompt or the response"
    )


def test_minimum_length(model):
    free = generate(model, PROMPTS * 20, EOT, 12, seeded(5))
    assert (free.mask.sum(-1) < 6).any()
    got = generate(model, PROMPTS * 20, EOT, 12, seeded(5), Sampling(min_new_tokens=6))
    assert not (got.responses[:, :6] == EOT).any()
    lengths = got.mask.sum(-1)
    assert lengths.min() >= 7 or got.truncated[lengths <= 6].all()
    assert (lengths == 7).any()  # and then it may end


def test_the_same_seed_gives_the_same_and_another_another(model):
    one, again, other = (generate(model, PROMPTS, EOT, 20, seeded(seed)) for seed in (6, 6, 7))
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert unpadded(one) != unpadded(other)


def test_the_global_generator_is_not_touched(model):
    before = torch.get_rng_state()
    torch.manual_seed(0)
    one = generate(model, PROMPTS, EOT, 10, seeded(6))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert unpadded(generate(model, PROMPTS, EOT, 10, seeded(6))) == unpadded(one)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def test_nothing_is_differentiated(model):
    assert not generate(model, PROMPTS, EOT, 3, seeded(0)).logprobs.requires_grad


# --- the distribution drawn from --------------------------------------------------------------------------------------

LOGITS = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -1.5, 1.0 - 1e-3])


def exact(sampling, forbid=None):
    """The probabilities that the options ask for, token by token, in float64."""
    x = LOGITS.double() / sampling.temperature
    p = {i: math.exp(v) for i, v in enumerate(x.tolist()) if i != forbid}
    kept = sorted(p, key=lambda i: -p[i])
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    total, mass, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        mass += p[i] / total
        if mass >= sampling.top_p:
            break
    total = sum(p[i] for i in nucleus)
    return torch.tensor([p[i] / total if i in nucleus else 0.0 for i in range(len(LOGITS))], dtype=torch.float64)


@pytest.mark.parametrize("forbid", [None, 3])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.5),
        Sampling(top_k=1),
        Sampling(top_k=3),
        Sampling(top_k=100),
        Sampling(top_p=0.05),
        Sampling(top_p=0.6),
        Sampling(top_p=0.95),
        Sampling(temperature=1.5, top_k=5, top_p=0.8),
    ],
)
def test_draws_follow_the_exact_distribution(sampling, forbid):
    B = 20_000
    want = exact(sampling, forbid)
    drawn = draw(LOGITS.expand(B, -1), sampling, seeded(8), forbid)
    counts = torch.bincount(drawn, minlength=len(LOGITS)).double()
    assert (counts[want == 0] == 0).all()
    seen = want > 0
    chi_square = ((counts - B * want)[seen] ** 2 / (B * want)[seen]).sum().item()
    freedom = int(seen.sum()) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9  # five deviations above its mean


def test_temperature_zero_takes_the_most_likely():
    logits = torch.randn(50, V, generator=seeded(0))
    assert torch.equal(draw(logits, Sampling(temperature=0.0), seeded(0)), logits.argmax(-1))
    best = logits.argmax(-1)
    second = logits.scatter(1, best[:, None], -math.inf).argmax(-1)
    rows = [draw(logits[i : i + 1], Sampling(temperature=0.0), seeded(0), forbid=int(best[i])) for i in range(50)]
    assert torch.equal(torch.cat(rows), second)


def test_rows_are_drawn_independently():
    B = 20_000
    drawn = draw(torch.zeros(B, 2), Sampling(), seeded(9))
    together = (drawn[::2] == drawn[1::2]).double().mean().item()
    assert abs(together - 0.5) < 5 * 0.5 / math.sqrt(B / 2)


def test_drawing_leaves_the_logits_alone():
    logits = torch.randn(3, V, generator=seeded(0))
    before = logits.clone()
    draw(logits, Sampling(top_k=3, top_p=0.5), seeded(0), forbid=EOT)
    assert torch.equal(logits, before)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.lists(st.integers(-60, 60), min_size=9, max_size=9, unique=True), min_size=1, max_size=3),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1.0),
    masked=st.integers(0, 8),
)
def test_cut_keeps_the_fewest_tokens(rows, top_k, top_p, masked):
    """Against the definition, row by row, with a margin where the mass is within rounding of p."""
    logits = torch.tensor(rows, dtype=torch.float32) / 10
    logits[:, 9 - masked :] = -math.inf
    left = cut(logits, top_k, top_p)
    for row, kept_row in zip(logits, left):
        kept = kept_row > -math.inf
        assert kept.any()
        assert torch.equal(kept_row[kept], row[kept])
        order = row.argsort(descending=True)
        n = int(kept.sum())
        assert sorted(order[:n].tolist()) == kept.nonzero().squeeze(1).tolist()  # the most likely ones
        most = min(top_k or 9, 9 - masked)
        assert n <= most
        p = row[order[:most]].double().softmax(-1).tolist()
        if top_p == 1.0:
            assert n == most
        else:
            assert sum(p[:n]) >= top_p - 1e-6 or n == most  # enough
            assert sum(p[: n - 1]) < top_p + 1e-6  # and none too many


def test_cut_keeps_one_token_however_small_p_is():
    left = cut(torch.zeros(2, 5), top_p=1e-9)
    assert (left > -math.inf).sum(-1).tolist() == [1, 1]


def test_cut_by_default_cuts_nothing():
    logits = torch.randn(3, V, generator=seeded(0))
    assert torch.equal(cut(logits), logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "--temperature must be at least 0, got -0.1"),
        ({"temperature": math.nan}, "--temperature must be at least 0, got nan"),
        ({"temperature": math.inf}, "--temperature must be a number, got inf"),
        ({"top_k": -1}, "--top-k must be at least 0, got -1"),
        ({"top_p": 0.0}, "--top-p must lie above 0 and at most at 1, got 0.0"),
        ({"top_p": 1.5}, "--top-p must lie above 0 and at most at 1, got 1.5"),
        ({"top_p": math.nan}, "--top-p must lie above 0 and at most at 1, got nan"),
        ({"min_new_tokens": -2}, "--min-new-tokens must be at least 0, got -2"),
    ],
)
def test_impossible_sampling_is_refused(options, message):
    with pytest.raises(InputError) as caught:
        Sampling(**options)
    assert str(caught.value) == message


# --- texts ------------------------------------------------------------------------------------------------------------

WORDS = "the order has not arrived, please check the tracking number; we are sorry to hear that. "


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([WORDS], 290)


@pytest.fixture(scope="module")
def talker(tokenizer):
    return random_model(GPTConfig(tokenizer.vocab_size, n_positions=48, n_layer=1, n_head=2, n_embd=16), seed=2)


def test_sample_texts_is_generate_in_batches(talker, tokenizer):
    prompts = ["the order", "", "we are sorry to hear", "7 ünïcödé", "check"]
    got = sample_texts(talker, tokenizer, prompts, 10, seed=3, batch_size=2)
    assert len(got) == 5
    assert all(1 <= len(response) <= 10 for response in got)
    assert all(tokenizer.eot not in response[:-1] for response in got)
    assert got == sample_texts(talker, tokenizer, prompts, 10, seed=3, batch_size=2)
    assert got != sample_texts(talker, tokenizer, prompts, 10, seed=4, batch_size=2)
    # A batch depends on its own prompts and its place, not on what other batches hold.
    others = ["quite another prompt", "x", *prompts[2:4], "y"]
    assert sample_texts(talker, tokenizer, others, 10, seed=3, batch_size=2)[2:4] == got[2:4]
    # The same prompt again and again is not answered with the same draws.
    assert len({tuple(r) for r in sample_texts(talker, tokenizer, ["the"] * 8, 10, seed=3, batch_size=2)}) > 4
    assert sample_texts(talker, tokenizer, [], 10, seed=3) == []


def test_greedy_answers_do_not_depend_on_order_or_batch(talker, tokenizer):
    prompts = ["the order", "we are sorry to hear", "a", "check the tracking number"]
    greedy = Sampling(temperature=0.0)
    one = sample_texts(talker, tokenizer, prompts, 12, seed=0, sampling=greedy)
    backwards = sample_texts(talker, tokenizer, prompts[::-1], 12, seed=1, sampling=greedy, batch_size=3)
    assert one == backwards[::-1]


def test_an_empty_prompt_is_end_of_text(tokenizer):
    assert encode_prompt(tokenizer, "") == [tokenizer.eot]
    assert encode_prompt(tokenizer, "the") == tokenizer.encode("the")


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(talker, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sft"
    save_model(talker, folder, tokenizer.eot)
    tokenizer.save(folder)
    return folder


def as_subprocess(*arguments):
    """The command as a person runs it: exit code, stdout, stderr."""
    command = [sys.executable, "-m", "minirlhf.generate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def here(monkeypatch, capsys):
    """The same without a process of its own, which would spend its time on imports."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        try:
            cli(main, Args)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_one_prompt_to_the_terminal(run, talker, tokenizer):
    code, out, err = as_subprocess(run, "--prompt", "the order\\nhas", "--max-new-tokens", 9, "--seed", 5)
    assert code == 0, err
    (line,) = out.splitlines()
    want = sample_texts(talker, tokenizer, ["the order\nhas"], 9, seed=5)
    assert json.loads(line) == {"prompt": "the order\nhas", "response": tokenizer.decode(want[0])}


def test_a_file_of_prompts_to_a_file(run, talker, tokenizer, tmp_path, here):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "deep" / "out.jsonl"
    records = [{"prompt": "the order"}, {"prompt": "we", "response": "are"}, {"prompt": "é\u2028ü"}, {"text": "sorry"}]
    source.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    options = ["--max-new-tokens", 8, "--temperature", 0.8, "--top-k", 40, "--top-p", 0.9, "--batch-size", 2]
    code, out, _ = here(run, "--prompts", source, "--out", target, *options)
    assert (code, out) == (0, "")
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
    prompts = ["the order", "we", "é\u2028ü", "sorry"]
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.9)
    want = sample_texts(talker, tokenizer, prompts, 8, seed=0, sampling=sampling, batch_size=2)
    assert rows == [{"prompt": p, "response": tokenizer.decode(r)} for p, r in zip(prompts, want)]


def refused(result, message):
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
        (["--prompt", "x", "--top-p", "0"], "--top-p must lie above 0 and at most at 1, got 0.0"),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size must be a positive number, got 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be a positive number, got 0"),
        (["--prompt", "x", "--kernel", "fast"], "--kernel must be one of auto, fused, reference, got 'fast'"),
        ([], "give either --prompt TEXT or --prompts FILE"),
        (["--prompt", "x", "--prompts", "y.jsonl"], "give either --prompt TEXT or --prompts FILE"),
        (["--prompt", "x", "--min-new-tokens", "9", "--max-new-tokens", "8"], "--min-new-tokens 9 exceeds"),
        (["--prompt", "the " * 60, "--max-new-tokens", "8"], "exceed the context of 48; shorten one of them"),
        (["--prompt", "x", "--device", "tpu9"], "--device 'tpu9' is not a device"),
    ],
)
def test_refusals_are_one_line_and_code_two(run, arguments, message, here):
    refused(here(run, *arguments), message)


def test_a_refusal_by_the_process_itself(run):
    refused(as_subprocess(run, "--prompt", "x", "--top-p", "1.5"), "--top-p must lie above 0 and at most at 1, got 1.5")


def test_a_prompt_too_long_names_its_file_and_line(run, tmp_path, here):
    source, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{{"prompt": "the"}}\n\n{{"prompt": "{}"}}\n'.format("no " * 60))
    refused(here(run, "--prompts", source, "--out", out, "--max-new-tokens", 8), f"error: {source}:3: a prompt of ")
    assert not out.exists()


def test_a_missing_run_is_named(tmp_path, here):
    refused(here(tmp_path / "nothing", "--prompt", "x"), f"{tmp_path / 'nothing'}: no such folder")


def test_a_missing_file_is_named(run, tmp_path, here):
    refused(here(run, "--prompts", tmp_path / "nothing.jsonl"), f"{tmp_path / 'nothing.jsonl'}: no such file")


def test_a_token_cut_away_is_not_drawn_even_by_the_smallest_random_number(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, **kwargs: torch.zeros(*shape, **kwargs))
    logits = torch.tensor([[float("-inf"), 0.0, 1.0], [0.0, 2.0, 1.0]])
    assert draw(logits, Sampling(top_k=2), torch.Generator()).tolist() == [1, 1]
