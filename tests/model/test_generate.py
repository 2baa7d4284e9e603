"""generate, decode, sampling, beam: a plain loop, transformers, exact distributions, limits, the command line."""

import copy
import gc
import itertools
import json
import math
import random
import subprocess
import sys
import threading

import pytest
import torch
from conftest import HELPERS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirlhf import InputError
from minirlhf.commands.generate import Args, Stream, cut_at, main, stop_watch
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.model import decoding as decode
from minirlhf.model.beam import beam_search
from minirlhf.model.checkpoints import save_model
from minirlhf.model.generate import encode_prompt, generate, sample, sample_texts
from minirlhf.model.gpt import GPT, GPTConfig, init_weights, named_weights
from minirlhf.model.sampling import Sampling, adjust, cut, draw, tokens_seen
from minirlhf.model.token_stats import token_stats
from minirlhf.run.command_line import cli
from minirlhf.seeds import mix, seeded, uniforms

V, EOT, CONTEXT = 24, 23, 32
CONFIG = GPTConfig(vocab_size=V, n_positions=CONTEXT, n_layer=2, n_head=2, n_embd=16)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [EOT, 3]]
few = settings(deadline=None, max_examples=15)


@pytest.fixture(params=["as a small model", "as a large one"])
def packing(request, monkeypatch):
    """Steps on weights that our own kernels pack, and on those of a model too large for it."""
    if request.param == "as a large one":
        monkeypatch.setattr(decode, "CACHED", 0)


def random_model(config, seed=0):
    """A model whose next-token distribution depends visibly on the prefix and often ends."""
    model = GPT(config)
    init_weights(model, seed)
    for name, weight in named_weights(model).items():
        if weight.dim() > 1:
            weight.mul_((0.12 if name.endswith("proj.weight") else 0.24) / weight.std())
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def double_model():
    return random_model(CONFIG).double()


@pytest.fixture(scope="module")
def ender():
    """A model that ends sooner: all its states lean towards end-of-text."""
    model = random_model(CONFIG, seed=4)
    towards = model.wte.weight.data[EOT]
    model.ln_f.bias.data += 1.2 * towards / towards.square().sum()
    return model


@pytest.fixture(scope="module")
def theirs(ender, tmp_path_factory):
    """The same weights in transformers."""
    folder = tmp_path_factory.mktemp("theirs")
    save_model(ender, folder, EOT)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def their_generate(theirs, prompt, **options):
    """One prompt, without padding: the new tokens of each response, and the scores."""
    tokens = torch.tensor([prompt])
    options = {"do_sample": False, "pad_token_id": EOT, "return_dict_in_generate": True, **options}
    out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), output_scores=True, **options)
    return out.sequences[:, len(prompt) :].tolist(), getattr(out, "sequences_scores", None)


@torch.no_grad()
def plain_loop(model, prompts, limits, seeds, sampling):
    """No cache, no padding, no batch: each row alone through the whole model at every step."""
    responses, logprobs, truncated = [], [], []
    for prompt, limit, seed in zip(prompts, limits, seeds):
        row, own, u = list(prompt), [], uniforms([seed], limit)
        for t in range(limit):
            logits = model.logits(model(torch.tensor([row]))[:, -1])
            seen = tokens_seen([row], V, torch.device("cpu"))
            token = int(draw(logits, sampling, u[:, t], EOT if t < sampling.min_new_tokens else None, seen))
            own.append((logits / (sampling.temperature or 1.0)).log_softmax(-1)[0, token].item())
            row.append(token)
            if token == EOT:
                break
        responses.append(row[len(prompt) :])
        logprobs.append(own)
        truncated.append(row[-1] != EOT)
    return responses, logprobs, truncated


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
            Sampling(temperature=1.3, min_p=0.2, repetition_penalty=1.4),
            Sampling(temperature=0.0, repetition_penalty=3.0, min_new_tokens=3),
        ]
    ),
    double=st.booleans(),
    leave=st.sampled_from([0.0, 0.25, 2.0]),  # rows that are done leave at once, in fours, never
)
def test_equals_a_plain_loop_without_a_cache(model, double_model, seed, limits, sampling, double, leave):
    model = double_model if double else model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "LEAVE", leave)
        got = generate(model, PROMPTS, EOT, limits, seed, sampling)
    seeds = [mix(seed, row) for row in range(len(PROMPTS))]
    rows, logprobs, truncated = plain_loop(model, PROMPTS, limits, seeds, sampling)
    assert unpadded(got) == rows
    assert got.truncated.tolist() == truncated
    assert got.logprobs.dtype == (torch.float64 if double else torch.float32)
    for row, keep, want in zip(got.logprobs, got.mask, logprobs):
        tolerance = 1e-10 if double else 1e-5
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(row[keep].double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_logprobs_are_those_of_a_second_reading(packing, model, temperature):
    got = generate(model, PROMPTS * 8, EOT, 20, 1, Sampling(temperature=temperature))
    for prompt, response, logprobs, keep in zip(PROMPTS * 8, got.responses, got.logprobs, got.mask):
        response = response[keep]
        whole = torch.cat([torch.tensor(prompt), response])[None]
        logits = model.logits(model(whole))[0, len(prompt) - 1 : -1] / temperature
        want = logits.log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs[keep], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("penalty", "minimum"), [(1.0, 0), (1.0, 6), (1.3, 0), (4.0, 3), (0.7, 0)])
def test_greedy_equals_transformers(packing, ender, theirs, penalty, minimum):
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty, min_new_tokens=minimum)
    got = unpadded(generate(ender, PROMPTS, EOT, 20, 0, sampling))
    for prompt, row in zip(PROMPTS, got):
        options = {"repetition_penalty": penalty} | ({"min_new_tokens": minimum} if minimum else {})
        (want,), _ = their_generate(theirs, prompt, max_new_tokens=20, **options)
        assert row == want
    found = beam_search(ender, PROMPTS, EOT, 20, 1, min_new_tokens=minimum, repetition_penalty=penalty)
    assert [row[keep].tolist() for row, keep in zip(found.responses[:, 0], found.mask[:, 0])] == got  # one beam


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("early", [False, True, "never"])
def test_beam_search_equals_transformers(packing, ender, theirs, beams, length_penalty, early):
    ended = set()
    for penalty, minimum, returned in ((1.0, 0, 1), (1.5, 3, beams)):
        found = beam_search(
            ender, PROMPTS, EOT, 12, beams, length_penalty, returned, minimum, penalty, early_stopping=early
        )
        assert found.responses.shape[:2] == (len(PROMPTS), returned)
        for prompt, texts, masks, scores in zip(PROMPTS, *found):
            options = {"min_new_tokens": minimum} if minimum else {}
            want, want_scores = their_generate(
                theirs, prompt, max_new_tokens=12, num_beams=beams, num_return_sequences=returned, early_stopping=early,
                length_penalty=length_penalty, repetition_penalty=penalty, **options,
            )  # fmt: skip
            for text, keep, theirs_ in zip(texts, masks, want):
                own = text[keep].tolist()
                assert own == theirs_[: len(own)]
                assert all(token == EOT for token in theirs_[len(own) :])  # their padding
                ended.add(own[-1] == EOT)
            torch.testing.assert_close(scores, want_scores, rtol=1e-5, atol=1e-5)
    assert True in ended


def test_beam_search_finds_the_best_of_all_if_it_is_wide_enough():
    """Two new tokens of a vocabulary of 5, and 40 beams: everything is looked at."""
    tiny = random_model(GPTConfig(5, 8, 1, 1, 8), seed=3)
    found = beam_search(tiny, [[1, 2]], 4, 2, beams=16, length_penalty=0.0, returned=8)
    listed = {}
    for response in [(4,), *itertools.product(range(4), range(5))]:
        with torch.no_grad():
            logp = tiny.logits(tiny(torch.tensor([[1, 2, *response]])))[0, 1:-1].log_softmax(-1)
        listed[response] = sum(logp[t, token].item() for t, token in enumerate(response))
    best = sorted(listed, key=lambda response: -listed[response])[:8]
    got = [tuple(row[keep].tolist()) for row, keep in zip(found.responses[0], found.mask[0])]
    assert got == best
    assert found.scores[0].tolist() == pytest.approx([listed[response] for response in best], abs=1e-5)


def test_beams_do_not_depend_on_the_prompts_beside_them(ender):
    together = beam_search(ender, PROMPTS, EOT, 12, 3, returned=2)
    for i, prompt in enumerate(PROMPTS):
        alone = beam_search(ender, [prompt], EOT, 12, 3, returned=2)
        R = alone.responses.shape[-1]
        assert torch.equal(together.responses[i, :, :R], alone.responses[0])
        assert (together.responses[i, :, R:] == EOT).all()
        torch.testing.assert_close(together.scores[i], alone.scores[0])


def test_more_beams_than_there_are_cannot_be_returned(model):
    with pytest.raises(InputError, match="3 of 2 beams cannot be returned"):
        beam_search(model, PROMPTS, EOT, 4, 2, returned=3)
    with pytest.raises(InputError, match="exceed the model's context of 32"):
        beam_search(model, [[1] * 30], EOT, 4, 2)


# --- the decoder ------------------------------------------------------------------------------------------------------


def test_who_packs_the_weights(model, double_model, monkeypatch):
    def of(model, dtype, kernel="auto"):
        model.run_with(kernel)
        return decode.packing_of(model, dtype)

    theirs = "mkldnn" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "none"
    assert (of(model, None), of(model, torch.bfloat16)) == ("ours", "ours")
    assert (of(model, None, "reference"), of(model, torch.bfloat16, "reference")) == ("none", theirs)
    assert (of(double_model, None), of(copy.deepcopy(model).bfloat16(), None)) == ("none", "none")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for limit, fp32, bf16 in ((4, "ours", "ours"), (3, "none", "ours"), (2, "none", "ours"), (1, "none", theirs)):
        monkeypatch.setattr(decode, "CACHED", limit * parameters)
        assert (of(model, None), of(model, torch.bfloat16)) == (fp32, bf16)


def test_rounded_products_give_about_the_same_log_probs(packing, model):
    rounded = copy.deepcopy(model)
    rounded.run_with(dtype="bf16")
    got = generate(rounded, PROMPTS * 4, EOT, 16, 3)
    for prompt, response, logprobs, keep in zip(PROMPTS * 4, got.responses, got.logprobs, got.mask):
        whole = torch.tensor([[*prompt, *response[keep].tolist()]])
        with torch.no_grad():
            logp = model.logits(model(whole))[0, len(prompt) - 1 : -1].log_softmax(-1)
        want = logp.gather(-1, response[keep][:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs[keep], want, rtol=0, atol=0.15)
    exact_ones = generate(model, PROMPTS * 4, EOT, 16, 3)
    assert not torch.equal(got.logprobs[:, 0], exact_ones.logprobs[:, 0])  # they were rounded


def test_entropy_is_that_of_token_stats(model):
    got = generate(model, PROMPTS, EOT, 12, 5, Sampling(temperature=0.8), entropy=True)
    assert generate(model, PROMPTS, EOT, 12, 5).entropy is None
    for prompt, response, entropy, keep in zip(PROMPTS, got.responses, got.entropy, got.mask):
        whole = torch.tensor([[*prompt, *response[keep].tolist()]])
        with torch.no_grad():
            logits = model.logits(model(whole))[0, len(prompt) - 1 : -1]
        want = token_stats(logits, response[keep], temperature=0.8).entropy
        torch.testing.assert_close(entropy[keep], want, rtol=1e-5, atol=1e-5)
        assert not entropy[~keep].any()


def test_rows_that_are_done_are_no_longer_computed(model, monkeypatch):
    widths = []
    step = decode.Decoder.step

    def watched(self, tokens):
        widths.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(decode.Decoder, "step", watched)
    generate(model, PROMPTS * 4, EOT, [3] * 10 + [12] * 10, 0, Sampling(min_new_tokens=12))
    assert widths == [20] * 3 + [10] * 9  # the first step is the prompts' last token


def test_prompts_of_like_length_are_read_together_and_nothing_is_padded_much():
    lengths = [0, 0, 1, 4, 5, 5, 9, 30, 31]
    groups = [lengths[part] for part in decode._alike(lengths)]
    assert groups == [[0, 0], [1], [4, 5, 5], [9], [30, 31]]
    assert [*itertools.chain(*groups)] == lengths
    parts = list(decode._alike([50] * 400))
    assert parts[0] == slice(0, decode.PREFILL_TOKENS // 50) and parts[-1].stop == 400


def test_what_is_kept_from_call_to_call_leaks_nothing(model):
    fresh = random_model(CONFIG)
    want = generate(fresh, PROMPTS, EOT, 9, 4)
    generate(model, [[3] * 20] * 9, EOT, 12, 1)  # larger
    decoder = next(iter(decode._decoders[model].values()))
    memory = decoder.memory.data_ptr()
    decoder.memory.fill_(math.nan)  # as a model that has diverged leaves it
    got = generate(model, PROMPTS, EOT, 9, 4)
    assert all(torch.equal(a, b) for a, b in zip(got[:4], want[:4]))
    assert next(iter(decode._decoders[model].values())).memory.data_ptr() == memory  # and the memory is the same


def test_weights_are_read_anew_at_each_call(model):
    changed = random_model(CONFIG)
    generate(changed, PROMPTS, EOT, 9, 4)
    changed.run_with(dtype="bf16")
    generate(changed, PROMPTS, EOT, 9, 4)
    changed.load_state_dict(random_model(CONFIG, seed=5).state_dict())
    for dtype in ("fp32", "bf16"):
        fresh = random_model(CONFIG, seed=5)
        for network in (changed, fresh):
            network.run_with(dtype=dtype)
        assert unpadded(generate(changed, PROMPTS, EOT, 9, 4)) == unpadded(generate(fresh, PROMPTS, EOT, 9, 4))


def test_a_decoder_is_not_shared_while_it_is_used(model):
    inner = []

    def watch(row, tokens):
        if not inner:
            inner.append(generate(model, PROMPTS, EOT, 9, 8))
        return False

    outer = generate(model, PROMPTS, EOT, 9, 4, watch=watch)
    assert unpadded(outer) == unpadded(generate(model, PROMPTS, EOT, 9, 4))
    assert unpadded(inner[0]) == unpadded(generate(model, PROMPTS, EOT, 9, 8))
    results = {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.update({seed: generate(model, PROMPTS, EOT, 9, seed)}))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, got in results.items():
        assert unpadded(got) == unpadded(generate(model, PROMPTS, EOT, 9, seed))
    assert len(results) == 4


def test_a_model_and_its_decoder_can_be_forgotten():
    passing = random_model(CONFIG)
    generate(passing, PROMPTS, EOT, 2, 0)
    gc.collect()  # those of other tests
    before = len(decode._decoders)
    del passing
    gc.collect()
    assert len(decode._decoders) == before - 1


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens():
    done = subprocess.run([sys.executable, HELPERS / "compiled_steps.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what comes back --------------------------------------------------------------------------------------------------


def test_limits_masks_and_truncation(model):
    prompts = PROMPTS * 20
    limits = [1 + i % 17 for i in range(len(prompts))]
    got = generate(model, prompts, EOT, limits, 3)
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
    one, each = (generate(model, PROMPTS, EOT, limit, 4) for limit in (9, [9] * len(PROMPTS)))
    assert all(torch.equal(a, b) for a, b in zip(one[:4], each[:4]))


def test_a_long_prompt_may_stand_beside_a_long_response(model):
    # Each row fits into the context; the longest prompt and the longest response together would not.
    prompts, limits = [[1] * 30, [2]], [2, 31]
    sampling = Sampling(min_new_tokens=31)
    got = generate(model, prompts, EOT, limits, 0, sampling)
    assert got.mask.sum(-1).tolist() == limits
    alone = generate(model, prompts[1:], EOT, 31, 0, Sampling(temperature=0.0, min_new_tokens=31))
    beside = generate(model, prompts, EOT, limits, 0, Sampling(temperature=0.0, min_new_tokens=31))
    assert unpadded(beside)[1] == unpadded(alone)[0]


def test_the_last_position_of_the_context_is_used(model):
    got = generate(model, [[1] * 12], EOT, 20, 0, Sampling(min_new_tokens=20))
    assert got.mask.sum().item() == 20
    with pytest.raises(InputError) as caught:
        generate(model, [[1], [1] * 13], EOT, 20, 0)
    assert str(caught.value) == (
        "a prompt of 13 tokens and 20 new ones exceed the model's context of 32; shorten the prompt or the response"
    )


def test_a_prompt_of_nothing_is_refused(model):
    with pytest.raises(InputError, match="a prompt holds no token; begin it with end-of-text"):
        generate(model, [[1], []], EOT, 4, 0)


def test_memory_that_cannot_be_had_is_said():
    with pytest.raises(MemoryError, match="bytes for keys and values"):
        decode._huge_pages(1 << 60, torch.float32, torch.device("cpu"))


def test_minimum_length(model):
    free = generate(model, PROMPTS * 20, EOT, 12, 5)
    assert (free.mask.sum(-1) < 6).any()
    got = generate(model, PROMPTS * 20, EOT, 12, 5, Sampling(min_new_tokens=6))
    assert not (got.responses[:, :6] == EOT).any()
    lengths = got.mask.sum(-1)
    assert lengths.min() >= 7 or got.truncated[lengths <= 6].all()
    assert (lengths == 7).any()  # and then it may end


def test_the_same_seed_gives_the_same_and_another_another(model):
    one, again, other = (generate(model, PROMPTS, EOT, 20, seed) for seed in (6, 6, 7))
    assert all(torch.equal(a, b) for a, b in zip(one[:4], again[:4]))
    assert unpadded(one) != unpadded(other)


def test_the_global_generator_is_not_touched(model):
    before = torch.get_rng_state()
    torch.manual_seed(0)
    one = generate(model, PROMPTS, EOT, 10, 6)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert unpadded(generate(model, PROMPTS, EOT, 10, 6)) == unpadded(one)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


@few
@given(data=st.data())
def test_what_a_row_is_answered_does_not_depend_on_its_batch(model, data):
    prompts = PROMPTS * 3
    seeds = [1000 + i for i in range(len(prompts))]
    rows = data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=6))
    whole = unpadded(generate(model, prompts, EOT, 14, seeds))
    part = unpadded(generate(model, [prompts[i] for i in rows], EOT, 14, [seeds[i] for i in rows]))
    assert part == [whole[i] for i in rows]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_small_model_s_rows_are_the_same_to_the_bit_in_any_batch(dtype):
    """On a CPU its weights are packed for our own products, which take a row's sums in one order whatever the batch."""
    model = GPT(GPTConfig(vocab_size=300, n_positions=64, n_layer=2, n_head=3, n_embd=48))
    init_weights(model, 0)
    rng = random.Random(0)
    prompts = [[rng.randrange(299) for _ in range(rng.randrange(1, 30))] for _ in range(23)]
    model.run_with(dtype=dtype)
    assert decode.packing_of(model, decode.DTYPES[dtype]) == "ours"
    seeds = list(range(23))
    whole = generate(model, prompts, 299, 20, seeds)
    for start, end in ((0, 1), (3, 9), (9, 22)):
        part = generate(model, prompts[start:end], 299, 20, seeds[start:end])
        R = part.responses.shape[1]
        assert torch.equal(part.responses, whole.responses[start:end, :R])
        assert torch.equal(part.logprobs, whole.logprobs[start:end, :R])


def test_a_seed_for_all_gives_each_row_its_own(model):
    one = generate(model, PROMPTS, EOT, 9, 7)
    each = generate(model, PROMPTS, EOT, 9, [mix(7, row) for row in range(len(PROMPTS))])
    assert unpadded(one) == unpadded(each)
    assert len({tuple(row) for row in unpadded(generate(model, [[3]] * 16, EOT, 20, 7))}) == 16
    with pytest.raises(ValueError, match="5 prompts want as many limits and seeds, got 5 and 2"):
        generate(model, PROMPTS, EOT, 9, [1, 2])


def test_watching_sees_every_token_and_ends_a_row(model):
    seen = {}

    def watch(row, tokens):
        assert tokens[:-1] == seen.get(row, [])
        seen[row] = tokens
        return row % 2 == 0 and len(tokens) == 3

    got = generate(model, PROMPTS, EOT, [9, 9, 2, 9, 9], 4, watch=watch)
    rows = unpadded(got)
    assert [seen[i] for i in range(5)] == rows
    free = unpadded(generate(model, PROMPTS, EOT, [9, 9, 2, 9, 9], 4))
    assert rows == [row[:3] if i % 2 == 0 else row for i, row in enumerate(free)] != free
    assert got.truncated.tolist() == [
        row[-1] != EOT and not (i % 2 == 0 and len(row) == 3) for i, row in enumerate(rows)
    ]


def test_nothing_is_differentiated(model):
    assert not generate(model, PROMPTS, EOT, 3, 0).logprobs.requires_grad


# --- the distribution drawn from --------------------------------------------------------------------------------------

LOGITS = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -1.5, 1.0 - 1e-3])
SEEN = torch.tensor([True, False, True, True, False, False, False])


def chance(seed, rows):
    """A uniform number a row."""
    return uniforms([mix(seed, row) for row in range(rows)], 1)[:, 0]


def exact(sampling, forbid=None):
    """The probabilities that the options ask for, token by token, in float64."""
    x = LOGITS.double().tolist()
    x = [(v / sampling.repetition_penalty if v > 0 else v * sampling.repetition_penalty) if old else v
         for v, old in zip(x, SEEN.tolist())]  # fmt: skip
    p = {i: math.exp(v / sampling.temperature) for i, v in enumerate(x) if i != forbid}
    kept = sorted(p, key=lambda i: -p[i])
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    total, mass, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        mass += p[i] / total
        if mass >= sampling.top_p:
            break
    nucleus = [i for i in nucleus if p[i] >= sampling.min_p * p[nucleus[0]]]
    total = sum(p[i] for i in nucleus)
    return torch.tensor([p[i] / total if i in nucleus else 0.0 for i in range(len(LOGITS))], dtype=torch.float64)


def follows(counts, want):
    """Chi-square, at most five deviations above its mean, and nothing where nothing is wanted."""
    assert (counts[want == 0] == 0).all()
    seen, n = want > 0, counts.sum()
    chi_square = ((counts - n * want)[seen] ** 2 / (n * want)[seen]).sum().item()
    freedom = int(seen.sum()) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


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
        Sampling(min_p=0.3),
        Sampling(min_p=1.0),
        Sampling(temperature=2.0, min_p=0.2, top_p=0.9),
        Sampling(repetition_penalty=1.8),
        Sampling(repetition_penalty=0.6, temperature=0.8),
        Sampling(repetition_penalty=2.0, temperature=1.5, top_k=6, top_p=0.9, min_p=0.25),
    ],
)
def test_draws_follow_the_exact_distribution(sampling, forbid):
    B = 20_000
    drawn = draw(LOGITS.expand(B, -1), sampling, chance(8, B), forbid, SEEN.expand(B, -1))
    follows(torch.bincount(drawn, minlength=len(LOGITS)).double(), exact(sampling, forbid))


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.3), Sampling(min_p=0.2, repetition_penalty=1.5)], ids=["plain", "cut"]
)
@torch.no_grad()
def test_two_steps_follow_the_exact_joint_distribution(sampling):
    tiny = random_model(GPTConfig(4, 8, 1, 1, 8), seed=2)
    n, eot = 6000, 3
    want = torch.zeros(4, 4, dtype=torch.float64)  # where the first is end-of-text, the second is counted as that too
    for a in range(4):
        for b in range(4):
            p, row = 1.0, [1]
            for token in (a, b):
                if row[-1] == eot and len(row) > 1:
                    p *= float(token == eot)
                    continue
                x = adjust(tiny.logits(tiny(torch.tensor([row]))[:, -1]), sampling.repetition_penalty,
                           tokens_seen([row], 4, torch.device("cpu")), None)  # fmt: skip
                p *= cut(x.double() / sampling.temperature, min_p=sampling.min_p).softmax(-1)[0, token].item()
                row.append(token)
            want[a, b] = p
    assert want.sum() == pytest.approx(1.0)
    got = generate(tiny, [[1]] * n, eot, 2, 11, sampling).responses
    follows(torch.bincount(got[:, 0] * 4 + got[:, 1], minlength=16).double(), want.flatten())


def test_uniforms_are_splitmix64():
    """The numbers that others publish for it, with the 53 highest bits kept."""
    for seed, want in (
        (1234567, (6457827717110365317, 3203168211198807973, 9817491932198370423)),
        (0, (0xE220A8397B1DCDAF,)),
    ):
        got = uniforms([seed], len(want))[0].tolist()
        assert got == [(w >> 11) * 2.0**-53 for w in want]


def test_uniforms_are_uniform_and_a_function_of_seed_and_place_alone():
    u = uniforms([mix(3, row) for row in range(500)], 200)
    assert u.dtype == torch.float64 and u.shape == (500, 200)
    assert (u >= 0).all() and (u < 1).all()
    follows(torch.bincount((u.flatten() * 50).long(), minlength=50).double(), torch.full((50,), 0.02).double())
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):  # neither neighbours in a row nor rows know of each other
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(a.numel())
    assert torch.equal(uniforms([mix(3, 7)], 50)[0], u[7, :50])
    assert torch.equal(uniforms([2**64 + 5, -1], 3), uniforms([5, 2**64 - 1], 3))  # 64 bits of a seed count


def test_a_penalty_makes_what_was_seen_less_likely_on_both_sides_of_zero():
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert adjust(x, 2.0, seen, None).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    assert adjust(x, 2.0, seen, 2).tolist() == [[1.0, -4.0, -math.inf, -2.0]]
    assert adjust(x, 1.0, None, None) is x


def test_temperature_zero_takes_the_most_likely():
    logits = torch.randn(50, V, generator=seeded(0))
    assert torch.equal(draw(logits, Sampling(temperature=0.0), chance(0, 50)), logits.argmax(-1))
    best = logits.argmax(-1)
    second = logits.scatter(1, best[:, None], -math.inf).argmax(-1)
    rows = [draw(logits[i : i + 1], Sampling(temperature=0.0), chance(0, 1), forbid=int(best[i])) for i in range(50)]
    assert torch.equal(torch.cat(rows), second)


def test_rows_are_drawn_independently():
    B = 20_000
    drawn = draw(torch.zeros(B, 2), Sampling(), chance(9, B))
    together = (drawn[::2] == drawn[1::2]).double().mean().item()
    assert abs(together - 0.5) < 5 * 0.5 / math.sqrt(B / 2)


def test_drawing_leaves_the_logits_alone():
    logits = torch.randn(3, V, generator=seeded(0))
    before = logits.clone()
    seen = torch.ones(3, V, dtype=torch.bool)
    draw(logits, Sampling(top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2.0), chance(0, 3), EOT, seen)
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
        ({"min_p": -0.1}, "--min-p must lie between 0 and 1, got -0.1"),
        ({"min_p": 1.1}, "--min-p must lie between 0 and 1, got 1.1"),
        ({"min_p": math.nan}, "--min-p must lie between 0 and 1, got nan"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty must be a positive number, got 0.0"),
        ({"repetition_penalty": -1.0}, "--repetition-penalty must be a positive number, got -1.0"),
        *(
            (
                {"temperature": 0.0, **cut_away},
                "--temperature 0 takes the most likely token, whatever --top-k, --top-p and "
                "--min-p leave of the rest; drop these, or raise the temperature",
            )
            for cut_away in ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1})
        ),
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
    whole = generate(talker, [encode_prompt(tokenizer, p) for p in prompts], tokenizer.eot, 10, 3)
    assert got == unpadded(whole)
    for batch_size in (1, 3, 64):  # which changes nothing
        assert sample_texts(talker, tokenizer, prompts, 10, seed=3, batch_size=batch_size) == got
    assert got != sample_texts(talker, tokenizer, prompts, 10, seed=4, batch_size=2)
    # A response depends on its prompt and its place, not on what the others are.
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


@few
@given(data=st.data())
def test_a_response_ends_where_its_text_first_holds_a_stop_string(talker, tokenizer, data):
    """Stop strings cut out of free responses, so that they are hit, mostly across tokens."""
    prompts = ["the order", "we are", "check", "ü", "no"]
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    free = sample_texts(talker, tokenizer, prompts, 20, seed=6)
    stops = []
    for text in data.draw(st.lists(st.sampled_from([tokenizer.decode(row) for row in free]), min_size=1, max_size=2)):
        start = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + data.draw(st.integers(1, 5))])
    assume(not any("\ufffd" in stop for stop in stops))  # the sign for bytes that are no text is no text to wait for
    drawn = sample(talker, tokens, tokenizer.eot, 20, 6, watch=stop_watch(tokenizer, stops))
    ended = 0
    for row, response in zip(free, drawn):
        n = first_hit(tokenizer, row, stops)
        ended += n is not None
        assert response.tokens == row[:n]
    assert ended >= 1


def test_a_stop_string_ends_before_the_first_of_several():
    assert cut_at("a b c", ["c", "b"]) == "a "
    assert cut_at("a b c", ["x"]) == "a b c"
    assert cut_at("", ["x"]) == ""


def first_hit(tokenizer, tokens, stops):
    """How many tokens it takes until a stop string is there."""
    holds = (any(s in tokenizer.decode(tokens[:n]) for s in stops) for n in range(len(tokens) + 1))
    return next((n for n, hit in enumerate(holds) if hit), None)


def streamed(tokenizer, tokens, stops):
    """What is on the terminal after each token, and at the end."""
    written, looks = [], []
    stream = Stream(tokenizer, stops, written.append)
    for n in range(1, len(tokens) + 1):
        over = stream(0, tokens[:n])
        looks.append("".join(written))
        if over:
            break
    stream.end()
    return looks, "".join(written)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="abé€😀 \n", max_size=12),
    stops=st.lists(st.text(alphabet="abé€😀 ", min_size=1, max_size=4), max_size=3),
    cuts=st.integers(0, 3),
)
def test_a_stream_writes_whole_characters_once_and_no_stop_string(tokenizer, text, stops, cuts):
    # Byte by byte, the hardest way to spell it; the last bytes may be missing.
    spelled = [tokenizer.encoding.encode_single_token(bytes([byte])) for byte in text.encode()]
    tokens = spelled[: max(0, len(spelled) - cuts)]
    looks, end = streamed(tokenizer, tokens, stops)
    # What is drawn after a stop string could hold another one that begins before it.
    assert end == cut_at(tokenizer.decode(tokens[: first_hit(tokenizer, tokens, stops)]), stops)
    for look in looks:
        assert end.startswith(look)
        assert "\ufffd" not in look
    for n, look in enumerate(looks[:-1], start=1):  # and it does not lag: only what may become a stop string is held
        ready = tokens[:n]
        said = bytes(b for t in ready for b in tokenizer.encoding.decode_single_token_bytes(t)).decode(errors="ignore")
        held = said[len(look) :]
        assert said.startswith(look) and (held == "" or any(stop.startswith(held) for stop in stops))


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


def test_stop_strings_at_the_command_line(run, talker, tokenizer, here):
    free = tokenizer.decode(sample_texts(talker, tokenizer, ["the order"], 30, seed=5)[0])
    first, second = free[8:11], free[14:16]
    assert "\n" not in first + second and len(cut_at(free, [first])) > 0
    for stops in (["--stop", first], ["--stop", second, "--stop", first], ["--stop", second, first]):
        code, out, err = here(run, "--prompt", "the order", "--max-new-tokens", 30, "--seed", 5, *stops)
        assert code == 0, err
        given = [stop for stop in stops if stop != "--stop"]
        assert json.loads(out)["response"] == cut_at(free, given) != free


def test_streaming_shows_what_is_drawn(run, talker, tokenizer, here):
    free = tokenizer.decode(sample_texts(talker, tokenizer, ["the order"], 30, seed=5)[0])
    options = ["--prompt", "the order", "--max-new-tokens", 30, "--seed", 5, "--stream"]
    code, out, err = here(run, *options)
    assert (code, out) == (0, free + "\n"), err
    code, out, _ = here(run, *options, "--stop", free[8:11])
    assert (code, out) == (0, cut_at(free, [free[8:11]]) + "\n")


def test_demonstrations_before_every_prompt(run, talker, tokenizer, tmp_path, here):
    rows = [{"prompt": "Q: a\nA:", "response": " b"}, {"messages": [
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}]  # fmt: skip
    records, plain, source = tmp_path / "shots.jsonl", tmp_path / "shots.txt", tmp_path / "prompts.jsonl"
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text("As it\n stands: ")
    source.write_text('{"prompt": "x"}\n{"prompt": "we"}\n')
    for file, before in (
        (records, "Q: a\nA: b\n\n\n\nHuman: c\n\nAssistant: d\n\n"), (plain, "As it\n stands: "),
    ):  # fmt: skip
        code, out, err = here(run, "--prompts", source, "--few-shot", file, "--max-new-tokens", 4)
        assert code == 0, err
        want = sample_texts(talker, tokenizer, [before + "x", before + "we"], 4, seed=0)
        got = [json.loads(line) for line in out.splitlines()]
        assert got == [{"prompt": p, "response": tokenizer.decode(r)} for p, r in zip(("x", "we"), want)]
    source.write_text('{"prompt": "x"}\n\n{"prompt": "%s"}\n' % ("the " * 20))
    message = f"error: {source}:3: a prompt behind {records} of "
    refused(here(run, "--prompts", source, "--few-shot", records, "--max-new-tokens", 4), message)
    records.write_text('{"prompt": "x"}\n')
    refused(
        here(run, "--prompt", "x", "--few-shot", records), f"{records}:1: this record is a prompt; --few-shot needs"
    )


def test_log_probs_at_the_command_line(run, talker, tokenizer, here):
    code, out, err = here(run, "--prompt", "the", "--max-new-tokens", 6, "--logprobs")
    assert code == 0, err
    row = json.loads(out)
    (drawn,) = sample(talker, [encode_prompt(tokenizer, "the")], tokenizer.eot, 6, 0)
    assert list(row) == ["prompt", "response", "logprobs"] and row["logprobs"] == pytest.approx(drawn.logprobs)
    assert len(drawn.logprobs) == len(drawn.tokens)


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"]], ids=["fp32", "bf16"])
def test_beams_at_the_command_line(run, talker, tokenizer, here, dtype):
    options = ["--beams", 4, "--return", 2, "--length-penalty", 0.5, "--repetition-penalty", 1.2, "--logprobs"]
    code, out, err = here(run, "--prompt", "the order", "--max-new-tokens", 8, *options, *dtype)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    prompt = [encode_prompt(tokenizer, "the order")]
    rounded = copy.deepcopy(talker)
    rounded.run_with(dtype=dtype[-1] if dtype else "fp32")
    found = beam_search(rounded, prompt, tokenizer.eot, 8, 4, 0.5, 2, 0, 1.2)
    assert [row["response"] for row in rows] == [
        tokenizer.decode(text[keep].tolist()) for text, keep in zip(found.responses[0], found.mask[0])
    ]
    assert [row["score"] for row in rows] == pytest.approx(found.scores[0].tolist())
    code, out, _ = here(run, "--prompt", "the order", "--max-new-tokens", 8, "--beams", 1)
    greedy = sample_texts(talker, tokenizer, ["the order"], 8, 0, Sampling(temperature=0.0))[0]
    assert json.loads(out) == {"prompt": "the order", "response": tokenizer.decode(greedy)}


def test_a_run_opened_by_transformers_gives_the_same_responses(run, tokenizer, here):
    """From the folder: its weights, its tokenizer, greedy and with beams, through the command line."""
    theirs = AutoModelForCausalLM.from_pretrained(run).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(run)
    for prompt in ("the order has not", "we", "ü: "):
        tokens = their_tokenizer(prompt, return_tensors="pt").input_ids
        for ours, options in (
            (["--temperature", 0], {}),
            (["--temperature", 0, "--repetition-penalty", 1.5, "--min-new-tokens", 5],
             {"repetition_penalty": 1.5, "min_new_tokens": 5}),
            (["--beams", 3, "--length-penalty", 0.3, "--return", 2],
             {"num_beams": 3, "length_penalty": 0.3, "num_return_sequences": 2}),
        ):  # fmt: skip
            want = theirs.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False,
                pad_token_id=tokenizer.eot, **options,
            )  # fmt: skip
            new = [row[tokens.shape[1] :].tolist() for row in want]
            code, out, err = here(run, "--prompt", prompt, "--max-new-tokens", 12, *ours)
            assert code == 0, err
            got = [json.loads(line)["response"] for line in out.splitlines()]
            assert got == [their_tokenizer.decode(row, skip_special_tokens=True) for row in new]


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
        (["--prompt", "x", "--min-p", "1.5"], "--min-p must lie between 0 and 1, got 1.5"),
        (["--prompt", "x", "--repetition-penalty", "0"], "--repetition-penalty must be a positive number, got 0.0"),
        (
            ["--prompt", "x", "--temperature", "0", "--top-k", "5"],
            "--temperature 0 takes the most likely token, whatever",
        ),
        (
            ["--prompt", "x", "--temperature", "0", "--top-p", ".5"],
            "--temperature 0 takes the most likely token, whatever",
        ),
        (
            ["--prompt", "x", "--temperature", "0", "--min-p", ".5"],
            "--temperature 0 takes the most likely token, whatever",
        ),
        (["--prompt", "x", "--beams", "0"], "--beams must be a positive number, got 0"),
        (["--prompt", "x", "--beams", "2", "--temperature", "0"], "--beams draws nothing, so --temperature 0.0 has no"),
        (["--prompt", "x", "--beams", "2", "--top-k", "5"], "--beams draws nothing, so --top-k 5 has no meaning"),
        (["--prompt", "x", "--beams", "2", "--top-p", ".5"], "--beams draws nothing, so --top-p 0.5 has no meaning"),
        (["--prompt", "x", "--beams", "2", "--min-p", ".5"], "--beams draws nothing, so --min-p 0.5 has no meaning"),
        (["--prompt", "x", "--beams", "2", "--stop", "y"], "--beams has no --stop"),
        (["--prompt", "x", "--beams", "2", "--return", "3"], "--return 3 exceeds --beams 2; lower it"),
        (["--prompt", "x", "--beams", "2", "--return", "0"], "--return must be a positive number, got 0"),
        (
            ["--prompt", "x", "--beams", "2", "--length-penalty", "nan"],
            "--length-penalty must lie between -10 and 10, got",
        ),
        (
            ["--prompt", "x", "--beams", "2", "--length-penalty", "99"],
            "--length-penalty must lie between -10 and 10, got",
        ),
        (["--prompt", "x", "--return", "1"], "--return 1 goes with --beams; add --beams, or leave it out"),
        (["--prompt", "x", "--length-penalty", "1"], "--length-penalty 1.0 goes with --beams; add --beams"),
        (["--prompt", "x", "--stop", ""], "--stop is empty, which every response begins with; give some text"),
        (["--prompts", "y.jsonl", "--stream"], "as it is drawn; leave out --prompts"),
        (["--prompt", "x", "--stream", "--out", "y.jsonl"], "as it is drawn; leave out --out"),
        (["--prompt", "x", "--stream", "--beams", "2"], "as it is drawn; leave out --beams"),
        (["--prompt", "x", "--stream", "--logprobs"], "as it is drawn; leave out --logprobs"),
        (["--prompt", "x", "--dtype", "fp8"], "--dtype"),
        (["--prompt", "x", "--few-shot", "nothing.jsonl"], "nothing.jsonl: no such file"),
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


def test_a_token_cut_away_is_not_drawn_even_by_the_smallest_random_number():
    logits = torch.tensor([[float("-inf"), 0.0, 1.0], [0.0, 2.0, 1.0]])
    assert draw(logits, Sampling(top_k=2), torch.zeros(2, dtype=torch.float64)).tolist() == [1, 1]
    logits[:, 2] = -math.inf
    assert draw(logits, Sampling(), torch.full((2,), 1 - 2.0**-53, dtype=torch.float64)).tolist() == [
        1,
        1,
    ]  # nor by the largest


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature):
    broken = random_model(CONFIG)
    broken.h[0].c_fc.bias.data[0] = math.nan
    with pytest.raises(InputError, match="logits are not numbers"):
        generate(broken, PROMPTS, EOT, 3, 0, Sampling(temperature))
