"""dpo: the losses, the log-probs they are made of, the reference's cache, accumulation, learning, resuming."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loops import Killed, descent, rows, run_in, tiny_network, weights

from minirlhf import InputError
from minirlhf.algorithms import dpo
from minirlhf.algorithms.dpo import (
    Compared,
    DPOConfig,
    batches,
    collate_records,
    held_out_metrics,
    pair_metrics,
    pairs_of,
    response_logps,
    train,
    with_reference,
)  # fmt: skip
from minirlhf.algorithms.losses import chosen_nll, preference_loss
from minirlhf.algorithms.training import cosine_lr
from minirlhf.data.batches import examples_of_rankings, pack
from minirlhf.data.records import Ranking
from minirlhf.model.gpt import GPT, clone

CONTEXT = 48
RANKINGS = [
    Ranking("My lamp broke.", (" Sorry!", " So what", " Please send us a photo of the damage."), (1, 3, 2)),
    Ranking("My kettle?", (" No.", " I apologise."), (2, 1)),
    Ranking("Where is it?", (" a", " bb", " ccc", " dddd"), (2, 1, 2, 1)),
    Ranking("Hi", (" Hello.", " Go away"), (1, 2)),
    Ranking("", (" Yes", " no"), (1, 1)),
]


@pytest.fixture
def tiny(tiny_tokenizer):
    """Make a model of one layer."""

    return lambda seed=0: tiny_network(tiny_tokenizer, CONTEXT, seed)


# --- the losses -------------------------------------------------------------------------------------------------------

LOGPS = st.floats(-40, 0)


def loss_of(chosen, rejected, ref_chosen, ref_rejected, *options) -> float:
    given_logps = (torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, ref_chosen, ref_rejected))
    return preference_loss(*given_logps, *options).item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


@given(LOGPS, LOGPS, st.floats(0.01, 5), st.floats(0, 0.5))
def test_at_the_reference_the_loss_is_ln_2(chosen, rejected, beta, smoothing):
    assert loss_of(chosen, rejected, chosen, rejected, beta, "sigmoid", smoothing) == pytest.approx(math.log(2))
    assert loss_of(chosen, rejected, chosen, rejected, beta, "ipo") == pytest.approx(1 / (2 * beta) ** 2)
    assert loss_of(chosen, rejected, chosen, rejected, beta, "hinge") == 1.0


@given(LOGPS, LOGPS, LOGPS, LOGPS, st.floats(0.01, 0.5), st.floats(0, 0.5))
def test_the_losses_are_their_formulas(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
    four = (chosen, rejected, ref_chosen, ref_rejected)
    h = math.log(math.exp(chosen - ref_chosen) / math.exp(rejected - ref_rejected))
    right, wrong = math.log(sigmoid(beta * h)), math.log(sigmoid(-beta * h))
    expected = -(1 - smoothing) * right - smoothing * wrong
    assert loss_of(*four, beta, "sigmoid", smoothing) == pytest.approx(expected, rel=1e-9)
    assert loss_of(*four, beta, "sigmoid") == pytest.approx(-right, rel=1e-9)
    assert loss_of(*four, beta, "ipo") == pytest.approx((h - 0.5 / beta) ** 2, rel=1e-9, abs=1e-12)
    assert loss_of(*four, beta, "hinge") == pytest.approx(max(0.0, 1 - beta * h), rel=1e-9, abs=1e-12)


@given(LOGPS, LOGPS, LOGPS, LOGPS, st.floats(0.01, 0.5))
def test_swapping_the_pair_turns_the_loss_around(chosen, rejected, ref_chosen, ref_rejected, beta):
    one = loss_of(chosen, rejected, ref_chosen, ref_rejected, beta)
    other = loss_of(rejected, chosen, ref_rejected, ref_chosen, beta)
    assert math.exp(-one) + math.exp(-other) == pytest.approx(1.0)  # the two are all that can be preferred
    half = loss_of(chosen, rejected, ref_chosen, ref_rejected, beta, "sigmoid", 0.5)
    assert half == pytest.approx(loss_of(rejected, chosen, ref_rejected, ref_chosen, beta, "sigmoid", 0.5))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_gradients_raise_the_chosen_and_lower_the_rejected(loss):
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-5.0, -6.0))
    value = preference_loss(chosen, rejected, torch.tensor([-5.5]), torch.tensor([-5.0]), 0.1, loss).sum()
    up, down = torch.autograd.grad(value, (chosen, rejected))
    assert up < 0 < down
    assert up == -down  # only their difference is seen
    if loss == "sigmoid":  # β σ(-β h) (Rafailov et al. 2023, section 4), h = 0.5 + 1
        assert down.item() == pytest.approx(0.1 * sigmoid(-0.1 * 1.5))


def test_a_bounded_aim_is_left_behind_no_further():
    # Where β h is beyond its aim, hinge is content, IPO pulls back, and so does label smoothing; plain DPO goes on.
    def slope(*options):
        chosen = torch.tensor([60.0], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.autograd.grad(preference_loss(chosen, zero, zero, zero, 0.1, *options).sum(), chosen)[0].item()

    assert slope("hinge") == 0.0
    assert slope("ipo") > 0
    assert slope("sigmoid", 0.1) > 0 > slope("sigmoid")


@given(st.lists(st.tuples(LOGPS, st.integers(1, 50)), min_size=1, max_size=5))
def test_the_chosen_response_is_learnt_token_by_token(rows_given):
    logps, lengths = zip(*rows_given)
    got = chosen_nll(torch.tensor(logps, dtype=torch.float64), torch.tensor(lengths))
    assert got.tolist() == pytest.approx([-logp / length for logp, length in rows_given])


# --- log-probs --------------------------------------------------------------------------------------------------------


PREFERENCES = [ranking for ranking in RANKINGS if len(set(ranking.ranks)) > 1]


def made(tokenizer, rankings=PREFERENCES):
    examples, _ = examples_of_rankings(tokenizer, rankings, CONTEXT)
    return [Compared(own, pairs_of(ranking.ranks)) for own, ranking in zip(examples, rankings)]


def logp_by_hand(model: GPT, example, average: bool = False) -> torch.Tensor:
    """log π(y|x): one row without padding, one token after the other."""
    logits = model.logits(model(torch.tensor([example.tokens])))[0]
    counted = range(example.start, len(example.tokens))
    total = sum(F.log_softmax(logits[t - 1], dim=-1)[example.tokens[t]] for t in counted)
    return total / len(counted) if average else total


def pairs_by_hand(model: GPT, records, average: bool = False) -> list[torch.Tensor]:
    """Log-probs of the chosen and of the rejected response of every pair, record after record."""
    return [
        torch.stack(
            [logp_by_hand(model, record.examples[pair[which]], average) for record in records for pair in record.pairs]
        )
        for which in (0, 1)
    ]


@pytest.mark.parametrize("average", [False, True])
def test_a_response_is_worth_the_sum_of_its_tokens(tiny, tiny_tokenizer, average):
    model, records = tiny(), made(tiny_tokenizer)
    with torch.no_grad():
        got = response_logps(model, pack([record.examples for record in records], tiny_tokenizer.eot), average)
        expected = [logp_by_hand(model, example, average) for record in records for example in record.examples]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_responses_that_begin_alike_have_their_own_log_probs_and_gradients(tiny, tiny_tokenizer):
    # What they share stands once in the row, and counts for each of them.
    rankings = [Ranking("Q", (" sorry a", " sorry a", " sorry bc", " sorr"), (1, 2, 3, 4))]
    model, (record,) = tiny(), made(tiny_tokenizer, rankings)
    got = response_logps(model, pack([record.examples], tiny_tokenizer.eot))
    expected = torch.stack([logp_by_hand(model, example) for example in record.examples])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight = torch.tensor([1.0, -2.0, 3.0, 5.0])
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), list(model.parameters())) for x in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_company_changes_no_log_prob_and_no_gradient(tiny, tiny_tokenizer):
    model, records = tiny(), made(tiny_tokenizer)
    parameters = list(model.parameters())
    plain = response_logps(model, pack([record.examples for record in records], tiny_tokenizer.eot))
    apart = torch.cat([response_logps(model, pack([record.examples], 7)) for record in records])
    torch.testing.assert_close(apart, plain, rtol=1e-6, atol=1e-5)
    weight = torch.arange(1.0, len(plain) + 1)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), parameters) for x in (plain, apart))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_every_strictly_ordered_pair_of_a_ranking_is_one():
    assert pairs_of((1, 3, 2)) == [(0, 1), (0, 2), (2, 1)]
    assert pairs_of((2, 1)) == [(1, 0)]
    assert sorted(pairs_of((2, 1, 2, 1))) == [(1, 0), (1, 2), (3, 0), (3, 2)]  # and none of two that are tied
    assert pairs_of((1, 1)) == []


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_pairs_of_any_ranking(ranks):
    ordered = {(i, j): a for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b}
    best = {pair for pair, rank in ordered.items() if rank == min(ranks)}  # of several best, each against the worse
    for which, expected in (("all", set(ordered)), ("best", best)):
        pairs = pairs_of(ranks, which)
        assert len(pairs) == len(expected)
        assert set(pairs) == expected


def test_a_run_takes_the_pairs_that_it_was_told_to(tiny, tiny_tokenizer, tmp_path, capsys):
    for which, n in (("all", 9), ("best", 8)):  # the first ranking has a pair without its best response
        config = DPOConfig(steps=1, batch_size=4, pairs=which)
        train_tiny(tmp_path / which, tiny(), tiny_tokenizer, config)
        told = " ".join(capsys.readouterr().out.split())
        assert f"4 records with a preference, of which this run sees 4 ({n} pairs); 2 held out" in told


def test_a_batch_names_its_pairs_and_its_responses(tiny, tiny_tokenizer):
    data = with_reference(clone(tiny()), made(tiny_tokenizer), tiny_tokenizer.eot, 4, False)
    batch = collate_records([data[2], data[0]], tiny_tokenizer.eot)
    assert torch.equal(batch.ref_logps, torch.cat([data[2].ref_logps, data[0].ref_logps]))
    assert list(zip(batch.chosen.tolist(), batch.rejected.tolist())) == [*data[2].pairs, (4, 5), (4, 6), (6, 5)]
    alone = pack([data[2].examples, data[0].examples], tiny_tokenizer.eot)
    assert all(torch.equal(a, b) for a, b in zip(batch.packed, alone, strict=True))


def test_records_that_are_cut_are_counted_once(tiny, tiny_tokenizer, capsys):
    long = [
        Ranking("Q", responses, (1, 2))
        for responses in ((" yes", " no"), (" yes " * 60, " no"), (" y" * 90, " n" * 90))
    ]
    config = DPOConfig(steps=1, batch_size=3)
    data = batches(long, long[1:], tiny_tokenizer, clone(tiny()), config, 0)
    told = " ".join(capsys.readouterr().out.split())
    assert f"4 of these were longer than {CONTEXT} tokens and were cut" in told
    assert all(piece.packed.positions.max() < CONTEXT for piece in (*data.at(0), *data.held_out))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_the_reference_is_kept_response_by_response(tiny, tiny_tokenizer, size, average):
    ref, records = clone(tiny(3)), made(tiny_tokenizer)
    data = with_reference(ref, records, tiny_tokenizer.eot, size, average)
    expected = torch.stack([logp_by_hand(ref, example, average) for record in records for example in record.examples])
    kept = torch.cat([record.ref_logps for record in data])
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)
    assert len(expected.unique()) == len(expected)  # any other order would show
    assert [record._replace(ref_logps=None) for record in data] == records
    assert not kept.requires_grad


def test_metrics_of_pairs_by_hand(tiny, tiny_tokenizer):
    model, ref, records = tiny(0), clone(tiny(3)), made(tiny_tokenizer)
    config = DPOConfig(beta=0.3, label_smoothing=0.1, sft_coef=0.4)
    data = with_reference(ref, records, tiny_tokenizer.eot, 3, False)
    index = [2, 0]  # the batch is in another order than the data
    losses, metrics = pair_metrics(model, collate_records([data[i] for i in index], tiny_tokenizer.eot), config)
    pairs = [[records[i].examples[k] for k in pair] for i in index for pair in records[i].pairs]
    assert len(pairs) == len(losses) == 7
    beaten = [records[i].examples[worse] for i in index for _, worse in records[i].pairs]
    assert any(chosen in beaten for chosen, _ in pairs)  # a second best, which is not learnt
    for place, pair in enumerate(pairs):
        chosen, rejected = (logp_by_hand(model, e).item() for e in pair)
        ref_chosen, ref_rejected = (logp_by_hand(ref, e).item() for e in pair)
        margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
        expected = {
            "loss": -0.9 * math.log(sigmoid(margin)) - 0.1 * math.log(sigmoid(-margin)),
            "chosen_nll": -logp_by_hand(model, pair[0], average=True).item(),
            "accuracy": float(margin > 0),
            "margin": margin,
            "chosen_reward": 0.3 * (chosen - ref_chosen),
            "rejected_reward": 0.3 * (rejected - ref_rejected),
            "chosen_logps": chosen,
            "rejected_logps": rejected,
        }
        assert {name: values[place].item() for name, values in metrics.items()} == pytest.approx(expected, abs=1e-4)
        learnt = 0.0 if pair[0] in beaten else 0.4 * expected["chosen_nll"]
        assert losses[place].item() == pytest.approx(expected["loss"] + learnt, abs=1e-5)
    assert losses.requires_grad
    assert not any(values.requires_grad for values in metrics.values())


def test_at_the_reference_every_pair_is_undecided(tiny, tiny_tokenizer):
    model, records = tiny(), made(tiny_tokenizer)
    data = with_reference(clone(model), records, tiny_tokenizer.eot, len(records), False)
    got = held_out_metrics(model, [collate_records(data, tiny_tokenizer.eot)], DPOConfig())
    assert got["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    batch = collate_records([data[1]], tiny_tokenizer.eot)
    batch = batch._replace(ref_logps=response_logps(model, batch.packed).detach())
    _, metrics = pair_metrics(model, batch, DPOConfig())
    assert metrics["margin"].item() == 0.0
    assert metrics["accuracy"].item() == 0.5


# --- training ---------------------------------------------------------------------------------------------------------

CONFIG = DPOConfig(steps=7, batch_size=4, lr=5e-3, warmup_steps=2, eval_every=3)


def train_tiny(folder, model, tokenizer, config=CONFIG, rankings=RANKINGS, held_out=RANKINGS[:2], ref=None, **kwargs):
    run = run_in(folder, config.steps, "train_dpo.py", **kwargs)
    return train(model, batches(rankings, held_out, tokenizer, ref or clone(model), config, 5), config, run)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.0},
        {"loss": "sigmoid", "label_smoothing": 0.2},
        {"loss": "ipo", "average": True},
        {"loss": "hinge"},
        {"sft_coef": 0.7},
        {"loss": "ipo", "average": True, "sft_coef": 0.7},
    ],
    ids=["sigmoid", "cdpo", "ipo", "hinge", "sft", "ipo-sft"],
)
@pytest.mark.parametrize("size", [0, 1, 2, 4, 100])
def test_accumulated_gradients_are_those_of_one_big_batch(tiny, tiny_tokenizer, tmp_path, monkeypatch, size, options):
    # With plain gradient descent, the step is the gradient. Records of one pair and of four weigh by their pairs.
    monkeypatch.setattr(dpo, "adamw", descent)
    records, average = made(tiny_tokenizer), options.get("average", False)
    config = DPOConfig(
        steps=1, batch_size=4, microbatch_size=size, lr=1.0, warmup_steps=0, max_grad_norm=1e6, beta=0.5,
        **{"sft_coef": 0.0, **options},
    )  # fmt: skip
    by_hand, ref = tiny(0), clone(tiny(3))
    four = [*pairs_by_hand(by_hand, records, average), *pairs_by_hand(ref, records, average)]
    loss = preference_loss(*four, 0.5, config.loss, config.smoothing).mean()
    nll = -pairs_by_hand(by_hand, records, average=True)[0]
    best = [ranking.ranks[i] == min(ranking.ranks) for ranking in PREFERENCES for i, _ in pairs_of(ranking.ranks)]
    assert 0 < sum(best) < len(best)  # a second best is preferred to a third, and not learnt
    total = loss + config.sft_coef * (nll * torch.tensor(best)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(by_hand.parameters()))])
    assert expected.abs().max() > 1e-2

    model = tiny(0)
    metrics = train_tiny(tmp_path / "run", model, tiny_tokenizer, config, held_out=[], ref=ref)
    torch.testing.assert_close(weights(by_hand) - weights(model), expected, rtol=0, atol=2e-6)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)  # of the preferences alone
    assert metrics["chosen_nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert metrics["chosen_logps"] == pytest.approx(four[0].mean().item(), rel=1e-5)
    assert metrics["rejected_logps"] == pytest.approx(four[1].mean().item(), rel=1e-5)


def test_only_what_the_run_sees_is_read_by_the_reference_and_in_its_place(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    rankings = [Ranking(f"Order {i}", (f" yes{i}", f" no {i} " * (i % 4 + 1)), (1, 2)) for i in range(30)]
    ref, read, seen = clone(tiny(3)), [], []

    def reference(ref, records, *rest):
        read.append(records)
        return with_reference(ref, records, *rest)

    def metrics(model, batch, *rest):
        seen.append(batch)
        return pair_metrics(model, batch, *rest)

    monkeypatch.setattr(dpo, "with_reference", reference)
    monkeypatch.setattr(dpo, "pair_metrics", metrics)
    config = DPOConfig(steps=3, batch_size=4, microbatch_size=3)
    train_tiny(tmp_path / "run", tiny(), tiny_tokenizer, config, rankings, held_out=[], ref=ref)
    assert len(read[0]) == 12 and not read[1]  # three batches of four out of thirty
    assert len(seen) == 6
    examples = {
        tuple(example.tokens): example for record in made(tiny_tokenizer, rankings) for example in record.examples
    }
    trained = []
    for batch in seen:
        for place, end in enumerate(batch.packed.ends.tolist()):
            row, column = divmod(end, batch.packed.tokens.shape[1])
            own = tuple(batch.packed.tokens[row, batch.packed.attend[row, 0, column]].tolist())
            trained.append(own)
            torch.testing.assert_close(batch.ref_logps[place], logp_by_hand(ref, examples[own]), rtol=1e-5, atol=1e-5)
    assert len(set(trained)) == len(trained) == 24  # of one epoch, each response is trained on once


def test_batches_are_of_any_lengths_and_sorted_inside(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    # Drawn by length, a batch of 4 out of these would hold long pairs only, or short ones.
    rankings = [Ranking(f"{i:03}", (" a" * (1 + i % 20), " b"), (1, 2)) for i in range(200)]
    lengths = []

    def metrics(model, batch, *rest):
        lengths.append(batch.packed.owners.bincount()[batch.chosen].tolist())
        return pair_metrics(model, batch, *rest)

    monkeypatch.setattr(dpo, "pair_metrics", metrics)
    config = DPOConfig(steps=20, batch_size=4, microbatch_size=2)
    train_tiny(tmp_path / "run", tiny(), tiny_tokenizer, config, rankings, held_out=[])
    steps = [lengths[i] + lengths[i + 1] for i in range(0, 40, 2)]
    assert all(step == sorted(step) and len(step) == 4 for step in steps)
    assert sum(step[-1] - step[0] for step in steps) / 20 > 8  # of 19; by length, about 0


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_training_learns_the_preference(tiny, tiny_tokenizer, tmp_path, loss):
    def rankings(start, n):
        return [Ranking(f"Order {i}:", (" Go away.", " I apologise."), (2, 1)) for i in range(start, start + n)]

    config = DPOConfig(steps=25, batch_size=8, lr=5e-3, warmup_steps=2, loss=loss, beta=0.3, eval_every=10, sft_coef=0)
    metrics = train_tiny(tmp_path / "run", tiny(), tiny_tokenizer, config, rankings(10, 60), rankings(70, 20))
    logged = rows(tmp_path / "run")
    assert abs(logged[0]["margin"]) < 1e-4  # the policy starts as the reference
    assert metrics["accuracy"] == 1.0
    assert metrics["margin"] > 0.9 * (0.5 if loss == "ipo" else 1.0)  # IPO's aim is β h = 1/2
    assert metrics["chosen_reward"] > metrics["rejected_reward"] + 0.4
    assert metrics["held_out_accuracy"] == 1.0
    assert metrics["held_out_loss"] < 0.5 * logged[0]["loss"]
    assert [row["step"] for row in logged if "held_out_loss" in row] == [9, 19, 24]
    assert [row["lr"] for row in logged] == [cosine_lr(step, 25, 5e-3, 2) for step in range(25)]
    names = {
        "loss",
        "chosen_nll",
        "accuracy",
        "margin",
        "chosen_reward",
        "rejected_reward",
        "chosen_logps",
        "rejected_logps",
        "grad_norm",
    }
    for row in logged:
        assert names <= row.keys()
        assert all(row[name] is not None for name in names)  # null is what a number that is none becomes


def test_learning_the_chosen_response_holds_it_up(tiny, tiny_tokenizer, tmp_path):
    rankings = [Ranking(f"Order {i}:", (" Go away.", " I apologise."), (2, 1)) for i in range(60)]

    def chosen_logps(sft_coef):
        config = DPOConfig(steps=25, batch_size=8, lr=5e-3, warmup_steps=2, beta=0.3, sft_coef=sft_coef)
        metrics = train_tiny(tmp_path / str(sft_coef), tiny(), tiny_tokenizer, config, rankings, held_out=[])
        assert metrics["accuracy"] == 1.0
        return metrics["chosen_logps"]

    assert chosen_logps(2.0) > chosen_logps(0.0) + 1.0


def test_held_out_metrics_weigh_every_pair_alike(tiny, tiny_tokenizer):
    model, ref, records = tiny(0), clone(tiny(3)), made(tiny_tokenizer)
    config = DPOConfig(beta=0.3)
    data, eot = with_reference(ref, records, tiny_tokenizer.eot, 4, False), tiny_tokenizer.eot
    got = [
        held_out_metrics(model, [collate_records(data[i : i + size], eot) for i in range(0, 4, size)], config)
        for size in (1, 2, 3, 4)
    ]
    four = [*pairs_by_hand(model, records), *pairs_by_hand(ref, records)]
    assert len(four[0]) == 9
    h = (four[0] - four[2]) - (four[1] - four[3])
    expected = {
        "held_out_loss": preference_loss(*four, 0.3, "sigmoid", 0.1).mean().item(),  # unless said otherwise
        "held_out_accuracy": (h > 0).float().mean().item(),
    }
    assert 0 < expected["held_out_accuracy"] < 1
    for one in got:
        assert one == pytest.approx(expected, rel=1e-4)


def test_under_bf16_the_held_out_loss_is_ln_2_too_where_nothing_was_learned(
    tiny, tiny_tokenizer, tmp_path, monkeypatch
):
    # The reference's log-probs and the policy's must come from the same arithmetic.
    monkeypatch.setattr(dpo, "adamw", lambda _, *networks: descent(_, *((network, 0.0) for network, _ in networks)))
    monkeypatch.setattr(dpo, "schedule", lambda *_: 0.0)
    model, config = tiny(), DPOConfig(steps=1, batch_size=4, beta=5.0)
    model.run_with(dtype="bf16")
    run = run_in(tmp_path / "run", 1, "train_dpo.py")
    got = train(model, batches(RANKINGS, RANKINGS[:1], tiny_tokenizer, clone(model), config, 0), config, run)
    assert got["held_out_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert got["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_the_same_seed_twice_gives_the_same_bits(tiny, tiny_tokenizer, tmp_path):
    one, two = tiny(), tiny()
    train_tiny(tmp_path / "one", one, tiny_tokenizer)
    torch.rand(3)
    train_tiny(tmp_path / "two", two, tiny_tokenizer)
    assert torch.equal(weights(one), weights(two))
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


@pytest.mark.parametrize("dies_at", [1, 4, 6])
def test_a_killed_run_resumes_to_the_same_bits(tiny, tiny_tokenizer, tmp_path, dies_at):
    whole, ref = tiny(), clone(tiny())
    train_tiny(tmp_path / "whole", whole, tiny_tokenizer, ref=ref)
    with pytest.raises(Killed):
        train_tiny(tmp_path / "killed", tiny(), tiny_tokenizer, ref=ref, dies_at=dies_at)
    resumed = tiny() if dies_at < 2 else tiny(seed=9)  # a checkpoint brings its own weights
    train_tiny(tmp_path / "killed", resumed, tiny_tokenizer, ref=ref, resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_a_loss_that_is_not_a_number_stops(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    model = tiny()
    before = weights(model)
    monkeypatch.setattr(dpo, "preference_loss", lambda chosen, *rest: chosen * math.nan)
    with pytest.raises(InputError, match=r"loss became nan at step 0 of train_dpo\.py"):
        train_tiny(tmp_path / "run", model, tiny_tokenizer)
    assert torch.equal(weights(model), before)
    assert not (tmp_path / "run").exists()


def test_data_without_any_preference_is_refused(tiny, tiny_tokenizer, tmp_path):
    tied = [Ranking("Q", (" a", " b"), (1, 1), source="pairs.jsonl:1")]
    with pytest.raises(InputError, match=r"^pairs\.jsonl: all responses are tied"):
        train_tiny(tmp_path / "run", tiny(), tiny_tokenizer, rankings=tied)
    metrics = train_tiny(tmp_path / "run", tiny(), tiny_tokenizer, held_out=tied)  # held out, they only say nothing
    assert "held_out_loss" not in metrics


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("microbatch_size", -1), ("lr", -1e-3), ("lr", math.nan), ("warmup_steps", -1),
        ("weight_decay", -0.1), ("max_grad_norm", 0.0), ("beta", 0.0), ("beta", -1.0), ("beta", math.nan),
        ("sft_coef", -0.1), ("sft_coef", math.nan),
        ("label_smoothing", 0.6), ("label_smoothing", -0.1), ("label_smoothing", math.nan), ("held_out", 1.5),
        ("eval_every", 0),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(InputError) as caught:
        DPOConfig(**{field: value})
    assert str(caught.value).startswith(f"--{field.replace('_', '-')} must ")
    assert str(caught.value).endswith(f"got {value}")


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
def test_label_smoothing_where_it_does_nothing_is_refused(loss):
    with pytest.raises(InputError) as caught:
        DPOConfig(loss=loss, label_smoothing=0.1)
    assert str(caught.value).startswith(f"--label-smoothing is not for --loss {loss}; use")
    assert DPOConfig(loss=loss).smoothing == DPOConfig(loss=loss, label_smoothing=0.0).smoothing == 0.0
    assert [DPOConfig(label_smoothing=given).smoothing for given in (None, 0.0, 0.3)] == [0.1, 0.0, 0.3]
