"""model: padding, packing, the head, initialisation; test_checkpoints.py asks transformers."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import InputError
from minirlhf.algorithms.logprobs import response_stats, scatter_counted
from minirlhf.algorithms.training import adamw, decay_groups
from minirlhf.data.batches import Example, pack
from minirlhf.model.generate import generate
from minirlhf.model.gpt import (
    GPT,
    GPTConfig,
    ScalarModel,
    _attention_mask,
    clone,
    init_head,
    init_weights,
    last_token,
    named_weights,
)
from minirlhf.model.packed import packed_logps
from minirlhf.model.token_stats import token_stats

CONFIG = GPTConfig(vocab_size=61, n_positions=24, n_layer=3, n_head=4, n_embd=32)
EOT = 60
few = settings(deadline=None, max_examples=25)


def rough(model, seed=0):
    """Weights far from their start, biases and norms too, so that every one of them matters to the result."""
    g = torch.Generator().manual_seed(seed)
    ours = isinstance(model, (GPT, ScalarModel))  # or one of transformers', which has no padding
    for name, weight in (named_weights(model) if ours else {n: p.data for n, p in model.named_parameters()}).items():
        noise = torch.randn(weight.shape, generator=g)
        weight.copy_(noise * 0.2 + (1.0 if "ln_" in name and name.endswith("weight") else 0.0))
    return model.eval()


def tokens_of(*shape, seed=0, vocab=CONFIG.vocab_size):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gpt():
    return rough(GPT(CONFIG))


@pytest.fixture(scope="module")
def scalar():
    return rough(ScalarModel(CONFIG), seed=1)


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
    looks = _attention_mask(real)
    assert looks.shape == (2, 1, 4, 4)
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
            parts=F.pad(packed.parts, (0, columns), value=-1),
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


# --- causality --------------------------------------------------------------------------------------------------------


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


# --- the rows that pad the vocabulary ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "rows"), [(1, 64), (61, 64), (64, 64), (65, 128), (50257, 50304)])
def test_the_vocabulary_is_padded_to_a_multiple_of_64(vocab, rows):
    config = GPTConfig(vocab, n_positions=1, n_layer=1, n_head=1, n_embd=1)
    assert (config.vocab_size, config.padded_vocab_size) == (vocab, rows)
    model = GPT(config)
    assert model.wte.weight.shape == (rows, 1)
    assert (model.wte.weight[:vocab] != 0).any()
    assert (model.wte.weight[vocab:] == 0).all()
    init_weights(model, seed=0)
    assert (model.wte.weight[vocab:] == 0).all()
    weights = named_weights(model)
    assert list(weights) == [name for name, _ in model.named_parameters()]
    assert weights["wte.weight"].shape == (vocab, 1)
    assert weights["wte.weight"].data_ptr() == model.wte.weight.data_ptr()  # a view


@pytest.mark.parametrize("kernel", ["fused", "reference"])
@torch.no_grad()
def test_what_pads_the_vocabulary_is_never_read(gpt, kernel):
    """Whatever stood in those rows: no logit, no probability, no draw depends on it."""
    policy, reference = clone(gpt), rough(GPT(CONFIG), seed=5)
    policy.run_with(kernel)
    tokens = tokens_of(3, 12)
    packed = lay_out(MADE_UP, EOT)

    def seen():
        stats = response_stats(policy, tokens, torch.ones_like(tokens, dtype=torch.bool), reference)
        logps = packed_logps(policy, packed_states(policy, packed)[packed.predictors], packed)
        drawn = generate(policy, tokens.tolist(), EOT, 12, 0)[:4]
        return [policy.logits(policy(tokens)), *stats, logps, *drawn]

    clean = seen()
    assert clean[0].shape == (3, 12, CONFIG.vocab_size)
    for model, spoilt in ((policy, math.nan), (reference, math.inf)):
        model.wte.weight.data[CONFIG.vocab_size :] = spoilt
    for a, b in zip(seen(), clean, strict=True):
        assert torch.equal(a, b)
    assert torch.isfinite(torch.cat(clean[1:5])).all()


@pytest.mark.parametrize("kernel", ["fused", "reference"])
def test_what_pads_the_vocabulary_stays_zero_in_training(kernel):
    """Through every loss on the logits, through Adam's moments and through a decay that nothing else survives."""
    model, reference = rough(GPT(CONFIG)), rough(GPT(CONFIG), seed=5)
    model.run_with(kernel)
    optimizer = adamw(5.0, (model, 0.01))
    tokens = tokens_of(3, 12)
    before = model.wte.weight.detach().clone()
    for _ in range(5):
        stats = response_stats(model, tokens, torch.ones_like(tokens, dtype=torch.bool), reference)
        loss = (
            stats.kl.mean()
            - stats.logprobs.mean()
            - stats.entropy.mean()
            + model.logits(model(tokens)).logsumexp(-1).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        assert (model.wte.weight.grad[: CONFIG.vocab_size] != 0).all()
        optimizer.step()
    padding = [model.wte.weight.grad, model.wte.weight, *optimizer.state[model.wte.weight].values()]
    for tensor in (tensor for tensor in padding if tensor.dim()):
        assert (tensor[CONFIG.vocab_size :] == 0).all()
    assert (model.wte.weight[: CONFIG.vocab_size] != before[: CONFIG.vocab_size]).all()


# --- the head, initialisation, decay, copies --------------------------------------------------------------------------


def test_the_head_is_the_token_embedding(gpt):
    hidden = torch.randn(2, 3, CONFIG.n_embd, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gpt.logits(hidden), hidden @ gpt.wte.weight[: CONFIG.vocab_size].T)
    assert not any("head" in name for name, _ in gpt.named_parameters())
    grad = torch.autograd.grad(gpt.logits(hidden).sum(), gpt.wte.weight)[0]
    assert (grad[: CONFIG.vocab_size] != 0).all()


def test_parameter_count():
    # GPT-2's smallest model has 124,439,808 parameters.
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_embd=768))
    assert sum(weight.numel() for weight in named_weights(model).values()) == 124_439_808
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + (50304 - 50257) * 768


def test_initial_weights():
    model = ScalarModel(GPTConfig(vocab_size=500, n_positions=64, n_layer=8, n_head=4, n_embd=256))
    init_weights(model, seed=0)
    for name, parameter in named_weights(model).items():
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


@pytest.mark.parametrize("vocab", [1, 61, 128])
def test_initial_weights_do_not_know_of_the_padding(vocab):
    """The numbers are drawn as for a model without it, in the order of the parameters."""
    model = ScalarModel(dataclasses.replace(CONFIG, vocab_size=vocab))
    init_weights(model, seed=4)
    g, std = torch.Generator().manual_seed(4), 0.8 / math.sqrt(32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            deviation = 0.01 if name == "score.weight" else std / math.sqrt(6) if "proj" in name else std
            shape = (vocab, 32) if name == "trunk.wte.weight" else parameter.shape
            assert torch.equal(parameter[: shape[0]], torch.empty(shape).normal_(0.0, deviation, generator=g)), name


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
    optimizer = adamw(0.1, (model, 0.5))
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


@pytest.mark.parametrize("layout", ["causal", "mask"])
def test_under_autocast_torchs_attention_on_a_cpu_is_in_float32(gpt, monkeypatch, layout):
    """Its gradient in bfloat16 takes several times as long there."""
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return fused(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    tokens = tokens_of(2, 12)
    mask = None if layout == "causal" else torch.ones_like(tokens, dtype=torch.bool)
    gpt.run_with("reference")  # torch's operator, which runs where ours cannot be built
    with torch.autocast("cpu", torch.bfloat16):
        gpt(tokens, mask)
    assert seen
    assert set(seen) == {(torch.float32, False)}


def test_packed_states_asked_for_are_those_of_all_picked_out(gpt):
    packed = lay_out(MADE_UP, EOT)
    layout = {"positions": packed.positions, "attend": packed.attend}
    some = gpt(packed.tokens, **layout, at=packed.predictors)
    torch.testing.assert_close(some, packed_states(gpt, packed)[packed.predictors], rtol=0, atol=1e-5)
