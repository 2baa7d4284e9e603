"""reward_model: the likelihood of rankings against brute force, batching, accumulation, learning, resuming."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Killed, descent, rows, run_in, tiny_network, weights

from minirlhf import InputError
from minirlhf.algorithms import reward_model
from minirlhf.algorithms.losses import MAX_TIED, best_nll, centring_loss, ranking_loss
from minirlhf.algorithms.reward_model import (
    RankedExamples,
    RewardModelConfig,
    batches,
    best_first,
    collate_rankings,
    held_out_accuracy,
    score_batch,
    scores_and_logps,
    train,
)
from minirlhf.data.batches import examples_of_rankings
from minirlhf.data.records import Ranking
from minirlhf.model.gpt import ScalarModel

CONTEXT = 48
RANKINGS = [
    Ranking("My lamp broke.", (" Sorry!", " So what", " Please send us a photo of the damage."), (1, 3, 2)),
    Ranking("My kettle?", (" No.", " I apologise."), (2, 1)),
    Ranking("Where is it?", (" a", " bb", " ccc", " dddd"), (2, 1, 2, 1)),
    Ranking("Hi", (" Hello.", " Go away"), (1, 2)),
    Ranking("Refund", (" We will.", " Never", " Maybe"), (1, 5, 5)),
    Ranking("", (" Yes", " no"), (1, 1)),
    Ranking("Broken", (" Sorry to hear that.", " and?", " Buy another", " hm"), (1, 2, 3, 4)),
]


@pytest.fixture
def tiny(tiny_tokenizer):
    """Make a scalar model of one layer."""

    return lambda seed=0: tiny_network(tiny_tokenizer, CONTEXT, seed, scalar=True)


# --- the likelihood ---------------------------------------------------------------------------------------------------

SCORES = st.floats(-8, 8).map(lambda x: round(x, 3))


@st.composite
def scored_ranks(draw, k=None):
    """Scores of K = 1 to 5 responses and any pattern of ranks."""
    k = draw(st.integers(1, 5)) if k is None else k
    return (
        draw(st.lists(SCORES, min_size=k, max_size=k)),
        draw(st.lists(st.integers(1, 5), min_size=k, max_size=k)),
    )


def loss_of(scores, ranks, margin=0.0) -> float:
    return ranking_loss(torch.tensor([scores], dtype=torch.float64), ranks, margin).item()


def probability(scores, order) -> float:
    """Plackett–Luce: the first of `order` is chosen among all, the second among the rest, and so on."""
    p = 1.0
    for place, k in enumerate(order):
        p *= math.exp(scores[k]) / sum(math.exp(scores[j]) for j in order[place:])
    return p


def orders_of(ranks):
    """All strict orders that agree with ranks: whoever stands before another has no worse a rank."""
    for order in itertools.permutations(range(len(ranks))):
        if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order)):
            yield order


@given(chosen=SCORES, rejected=SCORES, margin=st.floats(0, 3))
def test_a_pair_is_bradley_terry(chosen, rejected, margin):
    expected = -F.logsigmoid(torch.tensor(chosen - rejected - margin, dtype=torch.float64)).item()
    assert loss_of([chosen, rejected], (1, 2), margin) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert loss_of([rejected, chosen], (2, 1), margin) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_ranking_by_hand():
    scores = [0.0, math.log(2), math.log(4)]  # e^r is 1, 2 and 4
    assert loss_of(scores, (3, 2, 1)) == pytest.approx(-math.log(4 / 7 * 2 / 3))  # rank 1, the best, is the third
    assert loss_of(scores, (1, 2, 3)) == pytest.approx(-math.log(1 / 7 * 2 / 6))
    assert loss_of(scores, (2, 2, 1)) == pytest.approx(-math.log(4 / 7))


@settings(max_examples=60)
@given(data=st.data(), k=st.integers(2, 5))
def test_a_strict_ranking_is_plackett_luce(data, k):
    scores = data.draw(st.lists(SCORES, min_size=k, max_size=k))
    order = data.draw(st.permutations(range(k)))
    ranks = [order.index(i) + 1 for i in range(k)]
    assert loss_of(scores, ranks) == pytest.approx(-math.log(probability(scores, order)), rel=1e-9, abs=1e-12)


@settings(max_examples=150)
@given(scored_ranks())
def test_ties_are_the_sum_over_the_orders_they_leave_open(drawn):
    scores, ranks = drawn
    p = sum(probability(scores, order) for order in orders_of(ranks))
    assert loss_of(scores, ranks) == pytest.approx(-math.log(p), rel=1e-8, abs=1e-9)


@settings(max_examples=60)
@given(scored_ranks(), st.floats(0, 3))
def test_a_margin_is_a_handicap_for_the_better(drawn, margin):
    scores, ranks = drawn

    def with_margin(order):
        p = 1.0
        for place, k in enumerate(order):
            rest = [math.exp(scores[j] + (margin if ranks[j] > ranks[k] else 0.0)) for j in order[place:]]
            p *= math.exp(scores[k]) / sum(rest)
        return p

    p = sum(with_margin(order) for order in orders_of(ranks))
    assert loss_of(scores, ranks, margin) == pytest.approx(-math.log(p), rel=1e-8, abs=1e-9)
    assert loss_of(scores, ranks, margin) >= loss_of(scores, ranks) - 1e-12


@settings(max_examples=50)
@given(scored_ranks(), st.floats(-50, 50))
def test_a_constant_added_to_all_scores_changes_nothing(drawn, shift):
    scores, ranks = drawn
    assert loss_of([s + shift for s in scores], ranks) == pytest.approx(loss_of(scores, ranks), rel=1e-7, abs=1e-9)


@settings(max_examples=50)
@given(scored_ranks(), st.randoms(use_true_random=False))
def test_the_order_in_which_responses_are_listed_does_not_matter(drawn, rng):
    scores, ranks = drawn
    order = rng.sample(range(len(ranks)), len(ranks))
    again = loss_of([scores[k] for k in order], [ranks[k] for k in order])
    assert again == pytest.approx(loss_of(scores, ranks), rel=1e-9, abs=1e-12)
    assert loss_of(scores, [10 * rank for rank in ranks]) == loss_of(scores, ranks)  # only their order counts


@settings(max_examples=30)
@given(st.lists(SCORES, min_size=2, max_size=5))
def test_probabilities_of_what_can_be_seen_sum_to_one(scores):
    k = len(scores)
    strict = [math.exp(-loss_of(scores, order)) for order in itertools.permutations(range(k))]
    assert sum(strict) == pytest.approx(1.0, rel=1e-9)
    for best in range(1, k):  # which are the best ones, in no order, and which the others
        found = [[1 if i in chosen else 2 for i in range(k)] for chosen in itertools.combinations(range(k), best)]
        assert sum(math.exp(-loss_of(scores, ranks)) for ranks in found) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("patterns", ["strict", "best", "worst"])
def test_at_the_true_scores_the_expected_gradient_is_zero(patterns):
    scores = torch.tensor([[0.7, -1.2, 0.3]], dtype=torch.float64, requires_grad=True)
    seen = {
        "strict": list(itertools.permutations((1, 2, 3))),
        "best": [(1, 2, 2), (2, 1, 2), (2, 2, 1)],
        "worst": [(1, 1, 2), (1, 2, 1), (2, 1, 1)],
    }[patterns]

    def expected_gradient(model_scores):
        total = torch.zeros(1, 3, dtype=torch.float64)
        for ranks in seen:
            p = (-ranking_loss(scores, ranks)).exp().detach()
            total += p * torch.autograd.grad(ranking_loss(model_scores, ranks).sum(), model_scores)[0]
        return total

    assert expected_gradient(scores).abs().max() < 1e-12
    wrong = torch.tensor([[0.7, -1.0, 0.3]], dtype=torch.float64, requires_grad=True)  # one response overrated
    gradient = expected_gradient(wrong)
    assert gradient[0, 1] > 1e-3
    assert gradient.sum().abs() < 1e-12


def test_all_tied_says_nothing():
    scores = torch.randn(4, 3, requires_grad=True)
    loss = ranking_loss(scores, (2, 2, 2), margin=1.0)
    assert torch.equal(loss, torch.zeros(4))
    (gradient,) = torch.autograd.grad((loss + 0.0 * scores.sum(-1)).sum(), scores)
    assert torch.equal(gradient, torch.zeros(4, 3))


def test_each_row_is_a_ranking_of_its_own():
    scores = torch.randn(5, 4, dtype=torch.float64)
    together = ranking_loss(scores, (1, 2, 2, 3))
    alone = torch.cat([ranking_loss(row[None], (1, 2, 2, 3)) for row in scores])
    torch.testing.assert_close(together, alone)
    assert together.unique().numel() == 5


def test_large_scores_do_not_overflow():
    scores = torch.tensor([[1e4, -1e4, 5e3]], requires_grad=True)
    for ranks in itertools.product((1, 2, 3), repeat=3):
        loss = ranking_loss(scores, ranks)
        assert loss.isfinite().all()
        if loss.requires_grad:
            assert torch.autograd.grad(loss.sum(), scores)[0].isfinite().all()
    assert ranking_loss(scores, (2, 1, 2)).item() == pytest.approx(2e4)


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 scores a row but 2 ranks"):
        ranking_loss(torch.zeros(1, 3), (1, 2))
    n = MAX_TIED + 1
    with pytest.raises(ValueError, match=f"{n} responses are tied; at most {MAX_TIED}"):
        ranking_loss(torch.zeros(1, n + 1), (1,) * n + (2,))
    assert ranking_loss(torch.zeros(1, n + 1), (1,) + (2,) * n).item() == pytest.approx(math.log(n + 1), rel=1e-5)


def test_as_many_ties_as_allowed_are_right_and_cheap():
    # By symmetry, with equal scores the m better ones are one of (m + 3 choose m) equally likely sets.
    loss = loss_of([0.3] * (MAX_TIED + 3), [1] * MAX_TIED + [2] * 3)
    assert loss == pytest.approx(math.log(math.comb(MAX_TIED + 3, 3)), rel=1e-9)


def test_centring_pulls_the_sum_of_scores_to_zero():
    scores = torch.tensor([[1.0, 2.0, -0.5], [1.0, -1.0, 0.0]], requires_grad=True)
    assert centring_loss(scores).tolist() == [6.25, 0.0]
    (gradient,) = torch.autograd.grad(centring_loss(scores).sum(), scores)
    assert gradient.tolist() == [[5.0] * 3, [0.0] * 3]


# --- batches ----------------------------------------------------------------------------------------------------------


def tokenise(rankings, tokenizer, context) -> tuple[list[RankedExamples], int]:
    """Rankings as `batches` tokenises them, and how many were cut."""
    ordered = [best_first(ranking) for ranking in rankings]
    examples, cut = examples_of_rankings(tokenizer, ordered, context)
    return [RankedExamples(own, ranking.ranks) for own, ranking in zip(examples, ordered)], cut


def test_responses_are_tokenised_best_first_with_dense_ranks(tiny_tokenizer):
    ranked, cut = tokenise(RANKINGS, tiny_tokenizer, CONTEXT)
    assert cut == 0
    assert [one.ranks for one in ranked] == [(1, 2, 3), (1, 2), (1, 1, 2, 2), (1, 2), (1, 2, 2), (1, 1), (1, 2, 3, 4)]

    def texts(one):
        return [tiny_tokenizer.decode(example.tokens[example.start :]) for example in one.examples]

    assert texts(ranked[0]) == [" Sorry!", " Please send us a photo of the damage.", " So what"]
    assert texts(ranked[1]) == [" I apologise.", " No."]
    assert texts(ranked[2]) == [" bb", " dddd", " a", " ccc"]
    for ranking, one in zip(RANKINGS, ranked):
        before = tiny_tokenizer.encode(ranking.prompt) or [tiny_tokenizer.eot]
        for example in one.examples:
            assert example.tokens[: example.start] == before
            assert example.tokens[-1] == tiny_tokenizer.eot


def test_records_that_are_cut_are_counted_once(tiny_tokenizer, capsys):
    long = Ranking("Q", ("x " * 60, "y " * 60, " z"), (1, 2, 3))
    assert tokenise([RANKINGS[0], long], tiny_tokenizer, CONTEXT)[1] == 1
    batches([RANKINGS[0], long], [long], tiny_tokenizer, CONTEXT, RewardModelConfig(), 0)
    assert f"2 of 3 records were longer than {CONTEXT} tokens and were cut" in " ".join(capsys.readouterr().out.split())


def test_too_many_ties_name_the_record(tiny_tokenizer):
    many = Ranking(
        "Q", tuple(f" {i}" for i in range(MAX_TIED + 2)), (1,) * (MAX_TIED + 1) + (2,), source="pairs.jsonl:7"
    )
    with pytest.raises(InputError, match=rf"^pairs\.jsonl:7: more than {MAX_TIED} responses are tied; break some"):
        tokenise([many], tiny_tokenizer, CONTEXT)


def sequences(batch):
    """The prompts with their responses that a batch holds: the tokens that each one's last token may look at."""
    found = []
    for end in batch.packed.ends.tolist():
        row, column = divmod(end, batch.packed.tokens.shape[1])
        found.append(tuple(batch.packed.tokens[row][batch.packed.attend[row, 0, column]].tolist()))
    return found


def test_a_batch_keeps_every_ranking_and_knows_its_rows(tiny_tokenizer):
    ranked, _ = tokenise(RANKINGS, tiny_tokenizer, CONTEXT)
    batch = collate_rankings(ranked, tiny_tokenizer.eot)
    held = sequences(batch)
    assert len(held) == sum(len(r.responses) for r in RANKINGS)
    found = []
    for rows_of, ranks in batch.groups:
        assert rows_of.shape[1] == len(ranks)
        for one in rows_of.tolist():
            found.append((ranks, tuple(held[row] for row in one)))
    expected = [(one.ranks, tuple(tuple(example.tokens) for example in one.examples)) for one in ranked]
    assert sorted(found) == sorted(expected)
    assert len(batch.groups) == len({one.ranks for one in ranked})  # (1, 2) occurs twice and is one group
    used = sorted(row for rows_of, _ in batch.groups for row in rows_of.flatten().tolist())
    assert used == list(range(len(held)))


def test_a_ranking_is_one_row_in_which_its_prompt_stands_once(tiny_tokenizer):
    ranked, _ = tokenise([RANKINGS[0], RANKINGS[6]], tiny_tokenizer, CONTEXT)
    batch = collate_rankings(ranked, tiny_tokenizer.eot)
    for one, row in zip(ranked, batch.packed.tokens.tolist(), strict=True):
        start = one.examples[0].start
        own = [*one.examples[0].tokens[:start], *(token for e in one.examples for token in e.tokens[start:])]
        assert row == own + [tiny_tokenizer.eot] * (len(row) - len(own))


def test_the_score_stands_at_the_last_token_whatever_the_batch(tiny, tiny_tokenizer):
    model = tiny()
    ranked, _ = tokenise(RANKINGS, tiny_tokenizer, CONTEXT)
    examples = [example for one in ranked for example in one.examples]
    with torch.no_grad():
        alone = torch.stack([model(torch.tensor([example.tokens]))[0, -1] for example in examples])
        for fill in (tiny_tokenizer.eot, 5):
            torch.testing.assert_close(score_batch(model, collate_rankings(ranked, fill)), alone, rtol=0, atol=1e-5)
        pair = collate_rankings(ranked[1:2], tiny_tokenizer.eot)
        torch.testing.assert_close(score_batch(model, pair), alone[3:5], rtol=0, atol=1e-5)
    assert alone.unique().numel() > 15


def logp_by_hand(model: ScalarModel, example) -> torch.Tensor:
    """log π(y|x) of one response alone, in nats."""
    states = model.trunk(torch.tensor([example.tokens]))[0]
    table = torch.log_softmax(model.trunk.logits(states), dim=-1)
    return sum(table[t - 1, example.tokens[t]] for t in range(max(example.start, 1), len(example.tokens)))


def test_the_best_are_read_as_language_too_and_no_others(tiny, tiny_tokenizer):
    model = tiny()
    ranked, _ = tokenise(RANKINGS, tiny_tokenizer, CONTEXT)  # best first; the third has two best, the sixth none
    batch = collate_rankings(ranked, tiny_tokenizer.eot)
    scores, logps = scores_and_logps(model, batch)
    torch.testing.assert_close(scores, score_batch(model, batch), rtol=0, atol=1e-6)
    expected = []
    for one in ranked:
        for example, rank in zip(one.examples, one.ranks, strict=True):
            best = rank == 1 and len(set(one.ranks)) > 1
            expected.append(logp_by_hand(model, example) if best else torch.tensor(0.0))
    expected = torch.stack(expected)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert int((logps != 0).sum()) == 7
    assert torch.equal(
        batch.packed.lengths, torch.tensor([len(e.tokens) - e.start for o in ranked for e in o.examples])
    )
    for a, b in zip(*(torch.autograd.grad(x.sum(), list(model.trunk.parameters())) for x in (logps, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_best_nll_by_hand():
    logps, lengths = torch.tensor([[-6.0, -4.0, -9.0], [-1.0, -3.0, -9.0]]), torch.tensor([[3, 1, 2], [2, 6, 4]])
    assert best_nll(logps, lengths, (1, 2, 3)).tolist() == [2.0, 0.5]
    assert best_nll(logps, lengths, (3, 2, 1)).tolist() == [4.5, 2.25]
    assert best_nll(logps, lengths, (1, 1, 2)).tolist() == [3.0, 0.5]  # the mean of the two
    assert best_nll(logps, lengths, (2, 2, 2)).tolist() == [0.0, 0.0]  # nothing is known to be good


def test_batches_are_a_pure_function_of_seed_and_step(tiny_tokenizer):
    config = RewardModelConfig(batch_size=4, microbatch_size=3)

    def made(seed):
        return batches(RANKINGS, RANKINGS[:3], tiny_tokenizer, CONTEXT, config, seed)

    batch_at, held_out = made(1)
    in_order = [batch_at(step) for step in range(6)]
    assert [sum(len(r) for r, _ in piece.groups) for piece in in_order[0]] == [3, 1]
    assert sum(len(r) for piece in held_out for r, _ in piece.groups) == 3
    again, _ = made(1)
    for step in (5, 0, 3):
        for a, b in zip(again(step), in_order[step], strict=True):
            assert all(torch.equal(own, others) for own, others in zip(a.packed, b.packed, strict=True))
            assert str(a.groups) == str(b.groups)
    other, _ = made(2)
    assert any([sequences(a) for a in other(s)] != [sequences(b) for b in in_order[s]] for s in range(6))


def test_batches_are_of_any_lengths_and_sorted_inside(tiny_tokenizer):
    # Drawn by length, a batch of 4 out of these would hold long rankings only, or short ones.
    rankings = [Ranking(f"{i}", (" a" * (1 + i % 20), " b"), (1, 2)) for i in range(200)]
    config = RewardModelConfig(batch_size=4, microbatch_size=2)
    batch_at, held_out = batches(rankings, rankings[:9], tiny_tokenizer, CONTEXT, config, seed=0)
    steps = [batch_at(step) for step in range(50)]
    own, spreads = [], []
    for pieces in steps:
        better = [sequence for piece in pieces for sequence in sequences(piece)[::2]]
        lengths = [len(sequence) for sequence in better]
        assert lengths == sorted(lengths)
        own += better
        spreads.append(lengths[-1] - lengths[0])
    assert len(set(own)) == 200  # an epoch sees each once
    assert sum(spreads) / 50 > 8  # of 19; by length, about 0
    assert [len(piece.packed.tokens) for piece in held_out] == [2, 2, 2, 2, 1]
    lengths = [len(sequence) for piece in held_out for sequence in sequences(piece)[::2]]
    assert lengths == sorted(lengths)


def test_pair_accuracy_by_hand(tiny, tiny_tokenizer, monkeypatch):
    # Scores are read from the first token of each response: a = 3, b = 2, c = 1.
    worth = {tiny_tokenizer.encode(letter)[0]: score for letter, score in (("a", 3.0), ("b", 2.0), ("c", 1.0))}

    def scores(model, batch):
        return torch.tensor([next(worth[t] for t in sequence if t in worth) for sequence in sequences(batch)])

    monkeypatch.setattr(reward_model, "score_batch", scores)
    rankings = [
        Ranking("1", ("a", "b", "c"), (1, 2, 3)),  # 3 of 3
        Ranking("2", ("a", "b", "c"), (3, 2, 1)),  # 0 of 3
        Ranking("3", ("a", "b", "c"), (1, 1, 2)),  # 2 of 2: the tied pair is none
        Ranking("4", ("b", "b"), (1, 2)),  # equal scores: half of 1
        Ranking("5", ("c", "a", "b"), (2, 1, 2)),  # 2 of 2
        Ranking("6", ("a", "c"), (1, 1)),  # none
    ]
    ranked, _ = tokenise(rankings, tiny_tokenizer, CONTEXT)
    for size in (1, 2, 6):
        parts = [collate_rankings(ranked[i : i + size], tiny_tokenizer.eot) for i in range(0, 6, size)]
        assert held_out_accuracy(tiny(), parts) == pytest.approx(7.5 / 11)
    assert math.isnan(held_out_accuracy(tiny(), [collate_rankings(ranked[5:], tiny_tokenizer.eot)]))
    assert math.isnan(held_out_accuracy(tiny(), []))


# --- training ---------------------------------------------------------------------------------------------------------

CONFIG = RewardModelConfig(steps=7, batch_size=3, lr=1e-2, warmup_steps=2, eval_every=3, margin=0.1, centring=0.01)


def train_tiny(folder, model, tokenizer, config=CONFIG, rankings=RANKINGS, held_out=RANKINGS[:2], **kwargs):
    data = batches(rankings, held_out, tokenizer, CONTEXT, config, seed=5)
    return train(model, data, config, run_in(folder, config.steps, "train_rm.py", **kwargs))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 100])
@pytest.mark.parametrize(("centring", "sft_coef"), [(0.0, 0.0), (0.05, 0.0), (0.05, 0.7)])
def test_accumulated_gradients_are_those_of_one_big_batch(
    tiny, tiny_tokenizer, tmp_path, monkeypatch, size, centring, sft_coef
):
    # With plain gradient descent, the step is the gradient. One of the rankings is all tied: alone, it moves nothing.
    monkeypatch.setattr(reward_model, "adamw", descent)
    by_hand, total, nll = tiny(), 0.0, 0.0
    for one in tokenise(RANKINGS, tiny_tokenizer, CONTEXT)[0]:
        scores = torch.stack([by_hand(torch.tensor([example.tokens]))[0, -1] for example in one.examples])[None]
        total = total + (ranking_loss(scores, one.ranks, 0.2) + centring * scores.sum() ** 2).sum()
        best = [e for e, rank in zip(one.examples, one.ranks) if rank == 1 < max(one.ranks)]
        for example in best:
            nll = nll - logp_by_hand(by_hand, example) / (len(example.tokens) - example.start) / len(best)
    loss, mean_nll = total / len(RANKINGS), nll / len(RANKINGS)
    mean = loss + sft_coef * mean_nll
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(by_hand.parameters()))])

    model = tiny()
    config = RewardModelConfig(
        steps=1,
        batch_size=7,
        microbatch_size=size,
        lr=1.0,
        warmup_steps=0,
        max_grad_norm=1e6,
        margin=0.2,
        centring=centring,
        sft_coef=sft_coef,
    )
    metrics = train_tiny(tmp_path / "run", model, tiny_tokenizer, config, held_out=[])
    torch.testing.assert_close(weights(by_hand) - weights(model), expected, rtol=0, atol=1e-6)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics.get("best_nll") == (pytest.approx(mean_nll.item(), rel=1e-5) if sft_coef else None)


def test_the_trunk_stays_a_language_model(tiny, tiny_tokenizer, tmp_path):
    def logps_after(name, sft_coef):
        model = tiny()
        config = RewardModelConfig(steps=15, batch_size=7, lr=1e-2, warmup_steps=0, sft_coef=sft_coef)
        train_tiny(tmp_path / name, model, tiny_tokenizer, config, held_out=[])
        ranked, _ = tokenise(RANKINGS[:1], tiny_tokenizer, CONTEXT)
        with torch.no_grad():
            best, _, worst = (logp_by_hand(model, example).item() for example in ranked[0].examples)
        return best, worst

    (without, _), (best, worst) = logps_after("without", 0.0), logps_after("with", 1.0)
    assert best > without + 10
    assert best > worst


def test_it_learns_what_is_there_to_learn(tiny, tiny_tokenizer, tmp_path):
    # Whoever apologises is right, wherever the word stands.
    def pairs(start, n):
        fillers = (" We will refund it.", " Send a photo.", " Check your tracking.", " Hello.", " The lamp.")
        made = []
        for i in range(start, start + n):
            a, b, c = fillers[i % 5], fillers[(i // 5) % 5], fillers[(i // 3) % 5]
            made.append(
                Ranking(f"Order {i}:", (b + c, a + " I apologise." * (i % 2) + b + " Sorry." * (1 - i % 2)), (2, 1))
            )
        return made

    config = RewardModelConfig(steps=40, batch_size=16, lr=2e-2, warmup_steps=4, eval_every=20, sft_coef=0.0)
    model = tiny()
    _, held_out = batches(pairs(0, 2), pairs(1000, 60), tiny_tokenizer, CONTEXT, config, seed=0)
    before = held_out_accuracy(model, held_out)
    metrics = train_tiny(tmp_path / "run", model, tiny_tokenizer, config, pairs(0, 200), pairs(1000, 60))
    assert metrics["held_out_accuracy"] > 0.95 > before
    assert metrics["held_out_accuracy"] == held_out_accuracy(model, held_out)
    logged = rows(tmp_path / "run")
    assert metrics["loss"] < 0.2 < logged[0]["loss"]
    assert metrics["best_over_worst"] > 0.9
    assert [row["step"] for row in logged if "held_out_accuracy" in row] == [19, 39]


def test_a_margin_spreads_and_centring_gathers(tiny, tiny_tokenizer, tmp_path):
    def scores_after(name, **options):
        model = tiny()
        config = RewardModelConfig(steps=15, batch_size=7, lr=1e-2, warmup_steps=0, **options)
        train_tiny(tmp_path / name, model, tiny_tokenizer, config, held_out=[])
        ranked, _ = tokenise([r for r in RANKINGS if len(set(r.ranks)) > 1], tiny_tokenizer, CONTEXT)
        batch = collate_rankings(ranked, tiny_tokenizer.eot)
        with torch.no_grad():
            scores = score_batch(model, batch)
        spread = torch.cat([scores[r[:, 0]] - scores[r[:, -1]] for r, _ in batch.groups]).mean()
        off = torch.cat([scores[r].sum(-1).abs() for r, _ in batch.groups]).mean()
        return spread.item(), off.item()

    plain, margin, centred = scores_after("a"), scores_after("b", margin=3.0), scores_after("c", centring=1.0)
    assert margin[0] > plain[0] + 0.1
    assert centred[1] < 0.5 * plain[1]


def test_the_same_seed_twice_gives_the_same_bits(tiny, tiny_tokenizer, tmp_path):
    one, two = tiny(), tiny()
    train_tiny(tmp_path / "one", one, tiny_tokenizer)
    torch.rand(3)
    train_tiny(tmp_path / "two", two, tiny_tokenizer)
    assert torch.equal(weights(one), weights(two))
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


@pytest.mark.parametrize("dies_at", [1, 4, 6])
def test_a_killed_run_resumes_to_the_same_bits(tiny, tiny_tokenizer, tmp_path, dies_at):
    whole = tiny()
    train_tiny(tmp_path / "whole", whole, tiny_tokenizer)
    with pytest.raises(Killed):
        train_tiny(tmp_path / "killed", tiny(), tiny_tokenizer, dies_at=dies_at)
    resumed = tiny() if dies_at < 2 else tiny(seed=9)  # a checkpoint brings its own weights
    train_tiny(tmp_path / "killed", resumed, tiny_tokenizer, resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_bf16_products_give_float32_losses(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    seen = []

    def kept(name):
        inner = getattr(reward_model, name)

        def call(values, *rest):
            seen.append((name, values.dtype, values.grad_fn is not None))
            return inner(values, *rest)

        monkeypatch.setattr(reward_model, name, call)

    monkeypatch.setattr(reward_model, "adamw", descent)
    kept("ranking_loss")
    kept("best_nll")
    moved, metrics = [], []
    for dtype in ("fp32", "bf16"):
        model, config = tiny(), RewardModelConfig(steps=1, batch_size=7, lr=1.0, warmup_steps=0, max_grad_norm=1e6)
        model.trunk.run_with(dtype=dtype)
        data = batches(RANKINGS, [], tiny_tokenizer, CONTEXT, config, seed=5)
        metrics.append(train(model, data, config, run_in(tmp_path / dtype, 1, "train_rm.py")))
        moved.append(weights(tiny()) - weights(model))
    assert {(name, dtype, grad) for name, dtype, grad in seen} == {
        ("ranking_loss", torch.float32, True),
        ("best_nll", torch.float32, True),
    }
    assert metrics[1]["loss"] != metrics[0]["loss"]  # the products were in bf16 indeed
    assert metrics[1]["best_nll"] != metrics[0]["best_nll"]
    for name in ("loss", "best_nll"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=2e-2)
    assert F.cosine_similarity(*moved, dim=0) > 0.99


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("loss", lambda scores, ranks, margin: scores.sum(-1) * math.nan),
        ("best_nll", lambda logps, lengths, ranks: logps.sum(-1) * math.nan),
    ],
)
def test_a_loss_that_is_not_a_number_stops(tiny, tiny_tokenizer, tmp_path, monkeypatch, name, broken):
    model = tiny()
    before = weights(model)
    monkeypatch.setattr(reward_model, {"loss": "ranking_loss"}.get(name, name), broken)
    with pytest.raises(InputError, match=rf"{name} became nan at step 0 of train_rm\.py"):
        train_tiny(tmp_path / "run", model, tiny_tokenizer)
    assert torch.equal(weights(model), before)
    assert not (tmp_path / "run").exists()


def test_data_without_any_preference_is_refused(tiny_tokenizer):
    tied = [Ranking("Q", (" a", " b"), (1, 1), source="pairs.jsonl:1")] * 2
    with pytest.raises(InputError, match=r"^pairs\.jsonl: all responses are tied"):
        batches(tied, RANKINGS, tiny_tokenizer, CONTEXT, CONFIG, 0)
    batches([*tied, RANKINGS[0]], tied, tiny_tokenizer, CONTEXT, CONFIG, 0)  # some may say nothing


def test_an_accuracy_that_nothing_held_out_can_show_is_logged_as_none(tiny, tiny_tokenizer, tmp_path):
    tied = [Ranking("Q", (" a", " b"), (1, 1))]
    metrics = train_tiny(tmp_path / "run", tiny(), tiny_tokenizer, held_out=tied)
    assert math.isnan(metrics["held_out_accuracy"])
    logged = rows(tmp_path / "run")
    assert [row["held_out_accuracy"] for row in logged if "held_out_accuracy" in row] == [None] * 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("microbatch_size", -1), ("lr", -1e-3), ("lr", math.nan), ("warmup_steps", -1),
        ("weight_decay", -0.1), ("max_grad_norm", 0.0), ("margin", -0.1), ("centring", -1.0), ("sft_coef", -1.0),
        ("held_out", 1.5), ("eval_every", 0),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(InputError) as caught:
        RewardModelConfig(**{field: value})
    assert str(caught.value).startswith(f"--{field.replace('_', '-')} must ")
    assert str(caught.value).endswith(f"got {value}")
