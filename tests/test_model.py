"""model: GPT-2 as transformers computes it, padding, the KV cache, initialisation, files in and out."""

import dataclasses
import json
import math
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from minirlhf import InputError
from minirlhf.data import Example, pack
from minirlhf.model import (
    GPT,
    GPTConfig,
    KVCache,
    ScalarModel,
    _attention_mask,
    adamw,
    clone,
    decay_groups,
    init_head,
    init_weights,
    last_token,
    load_model,
    response_stats,
    save_model,
    scatter_counted,
)
from minirlhf.token_stats import token_stats

CONFIG = GPTConfig(vocab_size=61, n_positions=24, n_layer=3, n_head=4, n_embd=32)
EOT = 60
few = settings(deadline=None, max_examples=25)


def rough(model, seed=0):
    """Weights far from their start, biases and norms too, so that every one of them matters to the result."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=g)
        parameter.data.copy_(noise * 0.2 + (1.0 if "ln_" in name and name.endswith("weight") else 0.0))
    return model.eval()


def tokens_of(*shape, seed=0, vocab=CONFIG.vocab_size):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def hf_config(**changes):
    shape = {"vocab_size": 61, "n_positions": 24, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return GPT2Config(**{**shape, "bos_token_id": EOT, "eos_token_id": EOT, **changes})


@pytest.fixture(scope="module")
def gpt():
    return rough(GPT(CONFIG))


@pytest.fixture(scope="module")
def scalar():
    return rough(ScalarModel(CONFIG), seed=1)


@pytest.fixture
def saved(gpt, tmp_path):
    """A folder with a language model, to be damaged."""
    save_model(gpt, tmp_path / "run", EOT)
    return tmp_path / "run"


# --- against transformers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_theirs_loads_into_ours(tmp_path):
    theirs = rough(GPT2LMHeadModel(hf_config()))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = tokens_of(3, 24)
    torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_theirs_without_a_head_loads_too(tmp_path):
    theirs = rough(GPT2Model(hf_config()))  # OpenAI's own files lack the "transformer." prefix, as these do
    theirs.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    tokens = tokens_of(2, 10)
    torch.testing.assert_close(load_model(tmp_path)(tokens), theirs(tokens).last_hidden_state, rtol=0, atol=1e-4)


@torch.no_grad()
def test_ours_opens_in_theirs(gpt, saved):
    theirs, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert isinstance(theirs, GPT2LMHeadModel)
    assert not any(report.values())  # nothing missing, unexpected or mismatched
    tokens = tokens_of(3, 24)
    torch.testing.assert_close(theirs.eval()(tokens).logits, gpt.logits(gpt(tokens)), rtol=0, atol=1e-4)
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == EOT
    assert theirs.dtype == torch.float32


@torch.no_grad()
def test_left_padding_is_as_theirs(gpt, saved):
    theirs = AutoModelForCausalLM.from_pretrained(saved).eval()
    tokens = tokens_of(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    want = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    torch.testing.assert_close(gpt.logits(gpt(tokens, mask))[mask], want[mask], rtol=0, atol=1e-4)


@torch.no_grad()
def test_their_scalar_model_loads_into_ours(tmp_path):
    theirs = rough(GPT2ForSequenceClassification(hf_config(num_labels=1)))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, scalar=True)
    for length in (1, 7, 24):
        tokens = tokens_of(1, length, seed=length)
        torch.testing.assert_close(ours(tokens)[:, -1], theirs(tokens).logits[:, 0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_our_scalar_model_opens_in_theirs(scalar, tmp_path):
    save_model(scalar, tmp_path, EOT)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, GPT2ForSequenceClassification)
    assert not any(report.values())
    for length in (1, 7, 24):
        tokens = tokens_of(1, length, seed=length)
        tokens[:, -1] = EOT  # the whole sequence counts, its end-of-text too
        torch.testing.assert_close(theirs.eval()(tokens).logits[:, 0], scalar(tokens)[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_scalar", [False, True])
def test_saved_and_loaded_is_the_same_to_the_bit(gpt, scalar, is_scalar, tmp_path):
    model = scalar if is_scalar else gpt
    save_model(model, tmp_path / "deep" / "run", EOT)
    again = load_model(tmp_path / "deep" / "run", scalar=is_scalar)
    assert again.config == model.config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    assert sorted(p.name for p in (tmp_path / "deep" / "run").iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_files_load_as_float32(gpt, saved):
    weights = {name: tensor.half() for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(weights, saved / "model.safetensors")
    again = load_model(saved)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    torch.testing.assert_close(again.wte.weight, gpt.wte.weight.half().float())


# --- padding ----------------------------------------------------------------------------------------------------------


def padded(rows, left, right, fill):
    """Rows of tokens with `left` and `right` padding each, on a common width; and the mask."""
    width = max(len(row) + a + b for row, a, b in zip(rows, left, right))
    tokens = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, left)):
        tokens[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = True
    return tokens, mask


RAGGED = st.lists(st.tuples(st.integers(1, 24), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)


@few
@given(shapes=RAGGED, fill=st.integers(0, EOT), seed=st.integers(0, 99))
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(gpt, scalar, shapes, fill, seed):
    rows = [tokens_of(length, seed=seed + i) for i, (length, _, _) in enumerate(shapes)]
    tokens, mask = padded(rows, [left for _, left, _ in shapes], [right for _, _, right in shapes], fill)
    hidden, values = gpt(tokens, mask), scalar(tokens, mask)
    assert torch.isfinite(hidden).all()
    for row, real, states, value in zip(rows, mask, hidden, values):
        torch.testing.assert_close(states[real], gpt(row[None])[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(value[real], scalar(row[None])[0], rtol=0, atol=1e-5)
    last = last_token(values, mask)
    assert torch.equal(last, torch.stack([value[real][-1] for value, real in zip(values, mask)]))


@few
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4), fill=st.integers(0, EOT))
@torch.no_grad()
def test_right_padding_needs_no_mask(gpt, lengths, fill):
    rows = [tokens_of(length, seed=length) for length in lengths]
    tokens, mask = padded(rows, [0] * len(rows), [0] * len(rows), fill)
    torch.testing.assert_close(gpt(tokens)[mask], gpt(tokens, mask)[mask], rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_between_tokens_changes_nothing(gpt):
    # As after generation: left-padded prompts, then right-padded responses.
    row = tokens_of(9)
    tokens = torch.cat([row[:4], torch.full((3,), EOT), row[4:]])[None]
    mask = torch.tensor([[True] * 4 + [False] * 3 + [True] * 5])
    torch.testing.assert_close(gpt(tokens, mask)[mask], gpt(row[None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_does_not_reach_the_gradient(gpt, side):
    row = tokens_of(8)
    left, right = 5 * (side != "right"), 6 * (side != "left")
    tokens, mask = padded([row], [left], [right], EOT)

    def gradients(tokens, mask):
        hidden = gpt(tokens, mask)
        picked = hidden if mask is None else hidden[mask]
        loss = gpt.logits(picked).reshape(8, -1).log_softmax(-1).gather(1, row.roll(-1)[:, None]).mean()
        return torch.autograd.grad(loss, list(gpt.parameters()))

    for (name, _), a, b in zip(gpt.named_parameters(), gradients(tokens, mask), gradients(row[None], None)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        if name != "h.0.c_attn.bias":
            assert a.abs().max() > 1e-4


@torch.no_grad()
def test_a_row_of_nothing_but_padding_stays_finite_and_alone(gpt):
    tokens, mask = tokens_of(2, 6), torch.tensor([[True] * 6, [False] * 6])
    hidden = gpt(tokens, mask)
    assert torch.isfinite(hidden).all()
    torch.testing.assert_close(hidden[0], gpt(tokens[:1])[0], rtol=0, atol=1e-5)


def test_every_position_may_look_at_something():
    # Softmax over nothing is NaN in some attention kernels, so padding must see itself at least.
    real = torch.tensor([[False, False, True, False], [False] * 4])
    for new in (1, 2, 4):
        looks = _attention_mask(real, new)
        assert looks.shape == (2, 1, new, 4)
        assert looks.any(-1).all()


@torch.no_grad()
def test_last_token_wherever_the_padding_stands():
    values = torch.arange(15.0).reshape(3, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    assert last_token(values, mask).tolist() == [1.0, 9.0, 13.0]
    single = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]).bool()
    assert last_token(values, single).tolist() == [0.0, 9.0, 12.0]


# --- sequences packed into a row --------------------------------------------------------------------------------------

# What the sequences of a group share, and how each goes on: nothing shared, one that is the beginning of another, the
# same sequence twice, and one alone, all of them may come.
SHARED = st.lists(st.integers(0, EOT), max_size=8)
ENDS = st.lists(st.lists(st.integers(0, EOT), min_size=1, max_size=8), min_size=1, max_size=4)
GROUPS = st.lists(st.tuples(SHARED, ENDS), min_size=1, max_size=3)
MADE_UP = [
    [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 4, 7, 8]],  # K = 3
    [[6, 7], [7, 6, 5]],  # no common beginning
    [[8, 9], [8, 9, 10, 11]],  # one is the beginning of the other
    [[12, 13, 14], [12, 13, 14]],  # twice the same
    [[15]],
]


def lay_out(groups, fill):
    return pack([[Example(sequence, len(sequence) - 1) for sequence in group] for group in groups], fill)


def packed_states(model, packed):
    """What a model says of a packed batch, (B·T, …)."""
    return model(packed.tokens, positions=packed.positions, attend=packed.attend).flatten(0, 1)


@few
@given(drawn=GROUPS, fill=st.integers(0, EOT))
@torch.no_grad()
def test_a_packed_sequence_has_the_states_it_has_alone(gpt, scalar, drawn, fill):
    groups = [[shared + end for end in ends] for shared, ends in drawn]
    packed = lay_out(groups, fill)
    hidden, values = packed_states(gpt, packed), packed_states(scalar, packed)
    assert torch.isfinite(hidden).all()
    sequences = [sequence for group in groups for sequence in group]
    for sequence, end in zip(sequences, packed.ends.tolist(), strict=True):
        row, column = divmod(end, packed.tokens.shape[1])
        own = row * packed.tokens.shape[1] + packed.attend[row, 0, column].nonzero().flatten()
        torch.testing.assert_close(hidden[own], gpt(torch.tensor([sequence]))[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(values[own], scalar(torch.tensor([sequence]))[0], rtol=0, atol=1e-5)
        assert own[-1] == end


@pytest.mark.parametrize("kind", ["hidden states", "scores"])
def test_a_packed_batch_has_the_gradient_of_its_sequences_alone(gpt, scalar, kind):
    model = gpt if kind == "hidden states" else scalar
    sequences = [sequence for group in MADE_UP for sequence in group]
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(len(sequences), CONFIG.n_embd, generator=g)[..., 0 if model is scalar else slice(None)]

    def gradients(ends):
        return torch.autograd.grad((ends * weight).sum(), list(model.parameters()))

    packed = lay_out(MADE_UP, EOT)
    together = gradients(packed_states(model, packed)[packed.ends])
    alone = gradients(torch.stack([model(torch.tensor([sequence]))[0, -1] for sequence in sequences]))
    for (name, _), a, b in zip(model.named_parameters(), together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        assert a.abs().max() > 1e-4, name


def test_what_pads_a_packed_batch_reaches_nothing(gpt):
    def ends_and_gradients(fill, columns):
        packed = lay_out(MADE_UP, fill)
        packed = packed._replace(
            tokens=F.pad(packed.tokens, (0, columns), value=fill),
            positions=F.pad(packed.positions, (0, columns)),
            attend=F.pad(packed.attend, (0, columns, 0, columns)) | torch.eye(packed.tokens.shape[1] + columns).bool(),
        )
        rows = torch.arange(len(MADE_UP)).repeat_interleave(torch.tensor([len(group) for group in MADE_UP]))
        ends = packed_states(gpt, packed)[packed.ends + columns * rows]
        return ends, *torch.autograd.grad(ends.square().sum(), list(gpt.parameters()))

    plain = ends_and_gradients(EOT, 0)
    for fill, columns in ((5, 0), (EOT, 4), (60, 7)):
        for a, b in zip(ends_and_gradients(fill, columns), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_packed_row_may_be_longer_than_the_context_but_no_sequence_may(gpt):
    prompt = list(range(20))
    packed = lay_out([[[*prompt, k, k, k, k] for k in range(30, 36)]], EOT)
    assert packed.tokens.shape == (1, 44)
    alone = gpt(torch.tensor([[*prompt, 35, 35, 35, 35]]))[0, -1]
    torch.testing.assert_close(packed_states(gpt, packed)[-1], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="25 tokens exceed the context of 24"):
        packed_states(gpt, lay_out([[[*prompt, 1, 2, 3, 4, 5], [*prompt, 2]]], EOT))


# --- causality and the cache ------------------------------------------------------------------------------------------


@few
@given(at=st.integers(0, 11), left=st.integers(0, 3), new=st.integers(1, EOT))
@torch.no_grad()
def test_a_token_changes_no_state_before_it(gpt, at, left, new):
    tokens = tokens_of(1, 12 + left)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, :left] = False
    changed = tokens.clone()
    changed[0, left + at] = (changed[0, left + at] + new) % CONFIG.vocab_size
    before, after = gpt(tokens, mask), gpt(changed, mask)
    assert torch.equal(before[0, : left + at], after[0, : left + at])
    moved = (before != after).any(-1)[0, left + at :]
    assert moved.all()  # and it does change its own state and every later one


CUTS = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@few
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4), steps=CUTS, seed=st.integers(0, 99))
@torch.no_grad()
def test_the_cache_gives_what_the_whole_sequence_gives(gpt, lengths, steps, seed):
    """Ragged, left-padded prompts, then chunks of one token or several."""
    steps = steps[: max(1, next((i for i in range(len(steps)) if sum(steps[: i + 1]) > 16), len(steps)))]
    B, P, R = len(lengths), max(lengths), sum(steps)
    tokens = tokens_of(B, P + R, seed=seed)
    mask = torch.ones(B, P + R, dtype=torch.bool)
    for i, length in enumerate(lengths):
        mask[i, : P - length] = False
    cache = KVCache(CONFIG, B, P + R, torch.device("cpu"), torch.float32)
    parts = [gpt(tokens[:, :P], mask[:, :P], cache)]
    for step in steps:
        parts.append(gpt(tokens[:, cache.length : cache.length + step], None, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], gpt(tokens, mask)[mask], rtol=0, atol=1e-5)
    assert cache.length == P + R


@torch.no_grad()
def test_the_cache_takes_padding_among_the_new_tokens(gpt):
    # A row that has ended is given padding while the others go on.
    tokens = tokens_of(2, 7)
    mask = torch.tensor([[True] * 7, [False] + [True] * 3 + [False, False, True]])
    cache = KVCache(CONFIG, 2, 7, torch.device("cpu"), torch.float32)
    parts = [gpt(tokens[:, :4], mask[:, :4], cache)]
    parts += [gpt(tokens[:, t : t + 1], mask[:, t : t + 1], cache) for t in (4, 5, 6)]
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], gpt(tokens, mask)[mask], rtol=0, atol=1e-5)


@torch.no_grad()
def test_sequences_longer_than_the_context_are_refused(gpt):
    gpt(tokens_of(1, 24))
    with pytest.raises(ValueError, match="25 tokens exceed the context of 24"):
        gpt(tokens_of(1, 25))
    tokens, mask = tokens_of(1, 30), torch.ones(1, 30, dtype=torch.bool)
    mask[:, :6] = False
    gpt(tokens, mask)  # 24 real tokens: padding takes no position
    mask[:, 5] = True
    with pytest.raises(ValueError, match="25 tokens exceed the context of 24"):
        gpt(tokens, mask)
    cache = KVCache(CONFIG, 1, 30, torch.device("cpu"), torch.float32)
    gpt(tokens_of(1, 24), None, cache)
    with pytest.raises(ValueError, match="25 tokens exceed the context of 24"):
        gpt(tokens_of(1, 1), None, cache)


# --- statistics of the response ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_response_stats_are_those_of_all_positions_picked_out(gpt, side):
    rows = [tokens_of(9), tokens_of(5, seed=1), tokens_of(12, seed=2)]
    left = [12 - len(row) if side == "left" else 0 for row in rows]
    tokens, mask = padded(rows, left, [0, 0, 0], EOT)
    counted = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    first = mask.long().argmax(-1)
    counted.scatter_(1, first[:, None], False)  # nothing predicts a row's first token
    reference = rough(GPT(CONFIG), seed=5)
    got = response_stats(gpt, tokens, counted, reference, mask=mask if side == "left" else None, temperature=0.7)
    want = []
    for row, where in zip(rows, (c[m] for c, m in zip(counted, mask))):
        logits, ref_logits = (m.logits(m(row[None, :-1]))[0] for m in (gpt, reference))
        stats = token_stats(logits, row[1:], ref_logits, temperature=0.7)
        want.append(torch.stack(stats)[:, where[1:]])
    want = torch.cat(want, dim=1)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    spread = scatter_counted(got.logprobs, counted)
    assert torch.equal(spread[counted], got.logprobs)
    assert (spread[~counted] == 0).all()
    got.kl.sum().backward()
    assert gpt.wte.weight.grad is not None
    assert all(p.grad is None for p in reference.parameters())  # the reference is only read
    gpt.zero_grad()


@torch.no_grad()
def test_response_stats_of_nothing(gpt):
    tokens = tokens_of(2, 5)
    counted = torch.zeros_like(tokens, dtype=torch.bool)
    counted[:, 0] = True  # never predicted
    assert response_stats(gpt, tokens, counted).logprobs.shape == (0,)


# --- the head, initialisation, decay, copies --------------------------------------------------------------------------


def test_the_head_is_the_token_embedding(gpt):
    hidden = torch.randn(2, 3, CONFIG.n_embd, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gpt.logits(hidden), hidden @ gpt.wte.weight.T)
    assert not any("head" in name for name, _ in gpt.named_parameters())
    grad = torch.autograd.grad(gpt.logits(hidden).sum(), gpt.wte.weight)[0]
    assert (grad != 0).all()


def test_parameter_count():
    # GPT-2's smallest model has 124,439,808 parameters.
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_embd=768))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_initial_weights():
    model = ScalarModel(GPTConfig(vocab_size=500, n_positions=64, n_layer=8, n_head=4, n_embd=256))
    init_weights(model, seed=0)
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            want = 0.05 / math.sqrt(2 * 8) if name.endswith("proj.weight") else 0.05  # 0.8/√256
            want = 0.01 if name == "score.weight" else want
            draws = parameter.numel()
            assert parameter.std().item() == pytest.approx(want, rel=6 / math.sqrt(2 * draws)), name
            assert abs(parameter.mean().item()) < 6 * want / math.sqrt(draws), name
    projections = [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]
    assert len(projections) == 2 * 8


@torch.no_grad()
@pytest.mark.parametrize("width", [32, 128])
def test_an_untrained_model_knows_nothing_and_its_width_does_not_matter(width):
    # Hidden states leave the last norm with deviation 1, so that logits have 0.8, and random targets cost about half
    # its square more than the uniform log V.
    losses, deviations = [], []
    for seed in range(12):
        model = GPT(dataclasses.replace(CONFIG, n_embd=width))
        init_weights(model, seed)
        logits = model.logits(model(tokens_of(8, 24)))
        losses.append(-logits.log_softmax(-1).gather(2, tokens_of(8, 24, seed=1)[..., None]).mean())
        deviations.append(logits.std())
    assert torch.stack(losses).mean().item() == pytest.approx(math.log(CONFIG.vocab_size) + 0.8**2 / 2, abs=0.1)
    assert torch.stack(deviations).mean().item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_initial_weights_follow_from_the_seed_alone(kind):
    def drawn(seed):
        model = kind(CONFIG)
        before = torch.get_rng_state()
        init_weights(model, seed)
        assert torch.equal(torch.get_rng_state(), before)  # the global generator is not touched
        return model.state_dict()

    torch.manual_seed(1)
    one = drawn(0)
    torch.manual_seed(2)
    again, other = drawn(0), drawn(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one[next(iter(one))], other[next(iter(one))])


def test_a_fresh_head_leaves_the_trunk_alone(gpt):
    model = ScalarModel(CONFIG, clone(gpt))
    init_head(model, torch.Generator().manual_seed(5))
    one = model.score.weight.clone()
    init_head(model, torch.Generator().manual_seed(5))
    assert torch.equal(one, model.score.weight)
    assert 0 < one.abs().max() < 0.05  # scores start near 0
    assert all(torch.equal(a, b) for a, b in zip(model.trunk.parameters(), gpt.parameters()))


@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_every_parameter_is_in_one_decay_group(kind):
    model = kind(CONFIG)
    decayed, free = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = [names[id(p)] for group in (decayed, free) for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    assert {names[id(p)] for p in free["params"]} == {n for n in names.values() if n.endswith("bias") or "ln_" in n}
    assert all(p.dim() == 2 for p in decayed["params"])
    optimizer = adamw(model, 0.5, 0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(decayed["params"]), len(free["params"])]
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1), (0.5, 0.0)]
    assert all(g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)


def test_frozen_parameters_are_in_no_decay_group():
    model = ScalarModel(CONFIG)
    model.trunk.requires_grad_(False)
    decayed, free = decay_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(1, CONFIG.n_embd)]
    assert free["params"] == []


def test_a_clone_is_frozen_and_independent():
    model = rough(GPT(CONFIG)).train()
    twin = clone(model)
    assert not any(p.requires_grad for p in twin.parameters())
    assert not twin.training
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    tokens = tokens_of(1, 5)
    before = twin(tokens)
    torch.testing.assert_close(before, model(tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(twin(tokens), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_head": 3}, "n_head must divide n_embd, got 3 heads for a width of 32"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"vocab_size": -5}, "vocab_size must be at least 1, got -5"),
    ],
)
def test_impossible_shapes_are_refused(wrong, message):
    with pytest.raises(InputError) as caught:
        GPTConfig(**{"vocab_size": 61, "n_embd": 32, "n_head": 4, **wrong})
    assert str(caught.value) == message


# --- what cannot be loaded --------------------------------------------------------------------------------------------


def refused(folder, *parts, scalar=False):
    """load_model must refuse the folder in one line that holds all `parts`."""
    with pytest.raises(InputError) as caught:
        load_model(folder, scalar=scalar)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for part in parts:
        assert part in message


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_folder(tmp_path):
    refused(tmp_path / "nothing", "no such folder")


def test_missing_config(saved):
    (saved / "config.json").unlink()
    refused(saved, "config.json is missing")


def test_missing_weights(saved):
    (saved / "model.safetensors").unlink()
    refused(saved, "model.safetensors is missing")


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.01, 0.5, 0.999])
def test_cut_off_weights(saved, share):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(saved, "model.safetensors", "cut off or damaged")


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pth", "model.pkl"])
def test_a_pickle_instead_of_the_weights(saved, tmp_path, name):
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps({"wte.weight": Bomb(tmp_path / "exploded")}))
    refused(saved, name, "pickled weights are refused", "model.safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5, "torch", "torch legacy"])
def test_a_pickle_named_as_the_weights(saved, tmp_path, protocol):
    path, content = saved / "model.safetensors", {"wte.weight": Bomb(tmp_path / "exploded")}
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "torch")
    refused(saved, "model.safetensors", "damaged" if protocol == 0 else "holds a pickle")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt_neo", None])
def test_another_architecture(saved, kind):
    set_config(saved, model_type=kind)
    refused(saved, "config.json", f"model_type is {kind!r}")


@pytest.mark.parametrize("content", ["{", "[]", '"gpt2"', "", "null"])
def test_a_broken_config(saved, content):
    (saved / "config.json").write_text(content)
    refused(saved, "config.json")


def test_a_config_of_binary_bytes(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00{")
    refused(saved, "config.json", "not valid JSON")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_inner": 48}, "n_inner is 48"),
        ({"n_layer": "many"}, "the model's shape is not there"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"n_head": 5}, "n_head must divide n_embd"),
    ],
)
def test_another_gpt2(saved, changes, what):
    set_config(saved, **changes)
    refused(saved, "config.json", what)


def test_a_config_without_the_shape(saved):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    del config["n_embd"]
    path.write_text(json.dumps(config))
    refused(saved, "config.json", "n_embd")


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"n_embd": 64}, "wte.weight"), ({"n_positions": 48}, "wpe.weight"), ({"vocab_size": 62}, "wte.weight")],
)
def test_shapes_that_do_not_fit(saved, changes, name):
    set_config(saved, **changes)
    refused(saved, "model.safetensors", f"transformer.{name} has shape", "config.json asks for")


def test_a_tensor_too_few(saved):
    set_config(saved, n_layer=4)
    refused(saved, "model.safetensors", "transformer.h.3.", "is missing")


def test_language_model_and_reward_model_are_not_mixed_up(saved, scalar, tmp_path):
    refused(saved, "a language model, not a reward model", scalar=True)
    save_model(scalar, tmp_path / "rm", EOT)
    refused(tmp_path / "rm", "a reward model, not a language model")


def test_a_classifier_with_two_labels_is_refused(tmp_path):
    GPT2ForSequenceClassification(hf_config(num_labels=2)).save_pretrained(tmp_path)
    refused(tmp_path, "score.weight has shape (2, 32)", scalar=True)


def test_a_failed_save_leaves_the_old_files(gpt, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("minirlhf.model.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(rough(GPT(CONFIG), seed=9), saved, EOT)
    assert all((saved / name).read_bytes() == content for name, content in before.items())
    assert torch.equal(load_model(saved).wte.weight, gpt.wte.weight)


def test_a_copied_folder_is_as_good(gpt, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    assert torch.equal(load_model(str(tmp_path / "copy")).wte.weight, gpt.wte.weight)
