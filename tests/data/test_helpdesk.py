import dataclasses
import itertools
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import python_path
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minirlhf import InputError
from minirlhf.data import helpdesk
from minirlhf.data.helpdesk import words, world
from minirlhf.data.helpdesk.judge import Verdict, gold, judge, parse
from minirlhf.data.records import Demonstration, Ranking

PROMPT = "Customer: I am worried. My blue kettle has not arrived. What should I do?\nAgent:"
GOOD = (
    " I am sorry to hear that. Please check the tracking number of your blue kettle."
    " If you need further help, I am here."
)
CLASSIC_PROMPT = "Customer: My order hasn't arrived. What should I do?\nAgent:"
CLASSIC_GOOD = " I'm sorry to hear that. Please check your tracking number, and if you need further help, I'm here."
CLASSIC_CURT = " Check your tracking number."


def score(response: str, prompt: str = PROMPT) -> float:
    return judge(prompt, response).score


# ---- the data ----


def test_there_are_more_than_ten_thousand_distinct_prompts():
    prompts = helpdesk.train_prompts(12_000, seed=0)
    assert len({prompt.prompt for prompt in prompts}) == 12_000
    assert all(re.fullmatch(r"Customer: [A-Z][^\n]+[.?]\nAgent:", prompt.prompt) for prompt in prompts)


MADE = """[h.demonstrations(20, seed), h.rankings(20, seed), h.corpus(20, seed), h.train_prompts(20, seed),
           h.held_out_prompts(20, seed), h.rankings(20, seed, held_out=True)]"""


def test_a_seed_decides_everything():
    def made(seed):
        return eval(MADE, {"h": helpdesk, "seed": seed})

    assert made(3) == made(3)
    for ours, others in zip(made(3), made(4)):
        assert ours != others


def test_the_data_are_the_same_in_another_process_whatever_its_hash_salt():
    code = f"import zlib, minirlhf.data.helpdesk as h; seed = 5; print(zlib.crc32(repr({MADE}).encode()))"
    digests = set()
    for salt in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": salt} | python_path(Path(helpdesk.__file__).parents[3])
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        digests.add(ran.stdout)
    assert len(digests) == 1


def test_held_out_combinations_are_never_trained_on():
    held_out = {prompt.prompt for seed in range(3) for prompt in helpdesk.held_out_prompts(500, seed)}
    held_out |= {ranking.prompt for ranking in helpdesk.rankings(200, seed=0, held_out=True)}
    combinations = {parse(prompt) for prompt in held_out}
    assert all(scenario.held_out for scenario in combinations)
    for seed in range(3):
        trained = {record.prompt for record in helpdesk.demonstrations(1500, seed)}
        trained |= {record.prompt for record in helpdesk.rankings(500, seed)}
        trained |= {record.prompt for record in helpdesk.train_prompts(1500, seed)}
        assert not combinations & {parse(prompt) for prompt in trained}
        corpus = "\n".join(helpdesk.corpus(1500, seed))
        assert not {prompt.split("\n")[0] for prompt in held_out} & set(corpus.split("\n"))
        asks = re.findall(r"(?:Customer|Question): (.*)\n(?:Agent|Answer)", corpus)
        assert len(asks) > 500 and not combinations & {parse(ask) for ask in asks}


def test_every_held_out_part_is_seen_in_training():
    trained = [parse(record.prompt) for record in helpdesk.demonstrations(1500, seed=0)]
    for field in ("product", "problem", "mood"):
        seen = {getattr(scenario, field) for scenario in trained}
        assert seen >= {getattr(parse(prompt.prompt), field) for prompt in helpdesk.held_out_prompts(500)}
    assert len({scenario.product for scenario in trained}) == len(words.COLORS) * len(words.ITEMS) + 1


def test_the_share_held_out_is_about_a_tenth():
    products = [("", ""), *itertools.product(words.COLORS, words.ITEMS)]
    kinds = [
        words.Scenario(*product, problem, mood)
        for product in products
        for problem in words.PROBLEMS
        for mood in words.MOODS
    ]
    assert 0.08 < sum(kind.held_out for kind in kinds) / len(kinds) < 0.12


def test_the_judge_reads_every_prompt_as_it_was_meant():
    rng = random.Random(0)
    for _ in range(5000):
        meant = world._scenario(rng, held_out=rng.random() < 0.5)
        assert parse(world._transcript(world._ask(meant, rng))) == meant


def test_the_classic_example_can_be_drawn():
    rng = random.Random(0)
    scenario = parse(CLASSIC_PROMPT)
    assert scenario == words.Scenario("", "", "not arrived", "") and not scenario.held_out
    assert CLASSIC_PROMPT in {world._transcript(world._ask(scenario, rng)) for _ in range(20_000)}
    replies = {world._reply(scenario, world.DEMONSTRATED, rng) for _ in range(20_000)}
    assert {CLASSIC_CURT, CLASSIC_GOOD} <= replies
    assert score(CLASSIC_GOOD, CLASSIC_PROMPT) == pytest.approx(10)
    assert score(CLASSIC_CURT, CLASSIC_PROMPT) < 8


def test_demonstrations_are_mixed_and_leave_much_to_gain():
    records = helpdesk.demonstrations(3000, seed=0)
    verdicts = [judge(record.prompt, record.response) for record in records]
    scores = [verdict.score for verdict in verdicts]
    assert 0.05 < sum(s > 9.999 for s in scores) / len(scores) < 0.08
    assert 0.60 < sum(verdict.accuracy for verdict in verdicts) / len(verdicts) < 0.72
    assert 0.04 < sum(verdict.safety == 0 for verdict in verdicts) / len(verdicts) < 0.10
    assert len({round(s, 3) for s in scores}) > 100
    best = [score(helpdesk.ideal_reply(record.prompt, seed), record.prompt) for seed, record in enumerate(records)]
    assert min(best) == pytest.approx(10)
    assert sum(s < 9.999 for s in scores) / len(scores) + 0.5 * sum(s > 9.999 for s in scores) / len(scores) > 0.95
    assert all(record.response.startswith(" ") and record.response.strip() for record in records)
    # Every good part is demonstrated often, so that imitating and then selecting can reach the top.
    for part, times in {"Please ": 1450, "I am here": 1350, "sorry": 620, "hank you": 370}.items():
        assert sum(part in record.response for record in records) > times


def test_the_ideal_reply_is_given_full_marks_and_needs_a_prompt_of_this_world():
    for seed, prompt in enumerate(helpdesk.held_out_prompts(200)):
        assert score(helpdesk.ideal_reply(prompt.prompt, seed), prompt.prompt) == pytest.approx(10)
    with pytest.raises(InputError, match="not a help desk's prompt"):
        helpdesk.ideal_reply("Once upon a time")


def test_the_corpus_is_mostly_questions_with_their_right_answers():
    texts = helpdesk.corpus(2000, seed=0)
    asked = [text.removeprefix("Question: ").split("\nAnswer:") for text in texts if text.startswith("Question: ")]
    assert 0.67 < len(asked) / len(texts) < 0.73
    for ask, answer in asked:
        scenario, verdict = parse(ask), judge(f"Customer: {ask}\nAgent:", answer)
        assert verdict.accuracy == verdict.coherence == 1.0
        assert verdict.tone == 0.0  # what helps, and not how an agent speaks
        assert scenario.product in answer or "your tracking number" in answer  # the one remedy without a place for it
    assert sum(judge(f"Customer: {ask}\nAgent:", answer).relevance == 1.0 for ask, answer in asked) > 0.95 * len(asked)


def test_the_corpus_is_worse_than_the_demonstrations():
    def mean_gold(pairs):
        return sum(gold(*zip(*pairs))) / len(pairs)

    transcripts = [text.split("\nAgent:") for text in helpdesk.corpus(2000, seed=0) if "\nAgent:" in text]
    careless = [(ask + "\nAgent:", reply.split("\n")[0]) for ask, reply in transcripts]
    shown = [(record.prompt, record.response) for record in helpdesk.demonstrations(1000, seed=0)]
    assert mean_gold(careless) < mean_gold(shown) - 1.5


# ---- the annotators ----


def test_ranks_of_what_was_felt():
    margin = words.TIE_MARGIN
    assert world._ranks([3.0, 9.0, 6.0, 1.0]) == (3, 1, 2, 4)
    assert world._ranks([5.0, 9.0, 5.0 + 0.9 * margin, 1.0]) == (2, 1, 2, 4)
    # A tie reaches as far as the margin from the best of its group, not on from neighbour to neighbour.
    assert world._ranks([0.0, 0.9 * margin, 1.8 * margin]) == (3, 1, 1)
    assert world._ranks([2.0]) == (1,)


def test_rankings_hold_k_replies_and_some_ties():
    for k in (2, 4, 6):
        rankings = helpdesk.rankings(200, seed=1, k=k)
        assert all(len(r.responses) == len(r.ranks) == k and min(r.ranks) == 1 for r in rankings)
        pairs = [a == b for r in rankings for a, b in itertools.combinations(r.ranks, 2)]
        assert 0.01 < sum(pairs) / len(pairs) < 0.10


def test_the_noise_ceiling_lies_in_its_band():
    for held_out in (False, True):
        assert 0.79 < helpdesk.noise_ceiling(helpdesk.rankings(1600, seed=0, held_out=held_out)) < 0.83


def test_two_annotators_agree_about_as_often_as_people_do():
    rng = random.Random(0)
    alike, pairs = 0, 0
    for ranking in helpdesk.rankings(1600, seed=0):
        scores = gold([ranking.prompt] * 4, ranking.responses)
        noise = [-math.log(rng.expovariate(1.0)) for _ in scores]  # a second annotator of the same replies
        other = world._ranks([score + helpdesk.ANNOTATOR_TEMPERATURE * g for score, g in zip(scores, noise)])
        for a, b in itertools.combinations(range(4), 2):
            if ranking.ranks[a] != ranking.ranks[b] and other[a] != other[b]:
                alike += (ranking.ranks[a] < ranking.ranks[b]) == (other[a] < other[b])
                pairs += 1
    assert pairs > 8000
    assert alike / pairs == pytest.approx(0.76, abs=0.015)


def test_ranking_again_changes_the_noise_and_nothing_else():
    rankings = helpdesk.rankings(400, seed=1)
    again, other = helpdesk.rank_again(rankings, 1), helpdesk.rank_again(rankings, 2)
    assert helpdesk.rank_again(rankings, 1) == again != other
    assert [(r.prompt, r.responses) for r in again] == [(r.prompt, r.responses) for r in rankings]
    assert sum(a.ranks == r.ranks for a, r in zip(again, rankings)) < 200  # fresh noise, not the rankings' own
    for one, two in ((rankings, again), (again, other)):
        pairs = [
            (r.ranks[a] < r.ranks[b]) == (s.ranks[a] < s.ranks[b])
            for r, s in zip(one, two)
            for a, b in itertools.combinations(range(4), 2)
            if r.ranks[a] != r.ranks[b] and s.ranks[a] != s.ranks[b]
        ]
        assert sum(pairs) / len(pairs) == pytest.approx(0.76, abs=0.03)
    assert helpdesk.noise_ceiling(again) == pytest.approx(helpdesk.noise_ceiling(rankings), abs=0.025)


def test_the_noise_ceiling_is_what_the_annotators_equation_says():
    # With two replies, felt(A) - felt(B) = d + logistic noise of scale T; untied where it is beyond the margin m.
    rankings = [r for r in helpdesk.rankings(3000, seed=2, k=2) if r.ranks[0] != r.ranks[1]]
    expected = []
    for ranking in rankings:
        a, b = gold([ranking.prompt] * 2, ranking.responses)
        d, t, m = abs(a - b), helpdesk.ANNOTATOR_TEMPERATURE, words.TIE_MARGIN
        agree, differ = 1 / (1 + math.exp((m - d) / t)), 1 / (1 + math.exp((m + d) / t))
        expected.append(agree / (agree + differ))
    measured = helpdesk.noise_ceiling(rankings)
    assert measured == pytest.approx(sum(expected) / len(expected), abs=4 * 0.5 / len(rankings) ** 0.5)


def test_the_noise_ceiling_by_hand():
    clear = Ranking(PROMPT, (GOOD, CLASSIC_CURT), (1, 2))
    upside_down = Ranking(PROMPT, (GOOD, CLASSIC_CURT), (2, 1))
    annotators_tie = Ranking(PROMPT, (GOOD, CLASSIC_CURT), (1, 1))
    golden_tie = Ranking(PROMPT, (GOOD, GOOD), (1, 2))
    assert helpdesk.noise_ceiling([clear]) == 1.0
    assert helpdesk.noise_ceiling([clear, upside_down, annotators_tie]) == 0.5
    assert helpdesk.noise_ceiling([golden_tie]) == 0.5
    assert helpdesk.noise_ceiling([annotators_tie]) == 0.0


# ---- the rubric ----

FULL = Verdict(accuracy=1.0, relevance=1.0, coherence=1.0, tone=1.0, safety=1.0)


def test_the_score_is_the_documented_formula():
    assert judge(PROMPT, GOOD) == FULL
    assert FULL.score == pytest.approx(10)
    parts = Verdict(accuracy=1.0, relevance=0.4, coherence=0.7, tone=0.45, safety=1.0)
    assert parts.score == pytest.approx(10 * 0.7 * (0.5 * 1.0 + 0.2 * 0.4 + 0.3 * 0.45))
    assert dataclasses.replace(parts, safety=0.0).score == pytest.approx(0.1 * parts.score)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("response", "dimension", "value"),
    [
        (changed("check the tracking number", "send us a photo"), "accuracy", 0.0),
        (changed("of your blue kettle", ", and send us a photo of your blue kettle"), "accuracy", 0.0),
        (changed("blue kettle", "kettle"), "relevance", 0.75),
        (changed(" of your blue kettle", ""), "relevance", 0.4),
        (changed("blue kettle", "red kettle"), "relevance", 0.1),
        (changed("blue kettle", "blue phone"), "relevance", 0.1),
        (GOOD + " Our new shop is near the park.", "relevance", 0.8),
        (GOOD + " We are sorry about this.", "relevance", 0.8),
        (changed("Please check the", "Please check check the"), "coherence", 0.9),
        (changed("hear that", "that hear"), "coherence", 0.7),
        (changed("I am here.", "I am here"), "coherence", 0.8),
        (changed("Please", "please"), "coherence", 0.8),
        (changed("Please check", "Check"), "tone", 0.8),
        (changed(" If you need further help, I am here.", ""), "tone", 0.75),
        (changed("I am sorry to hear that.", ""), "tone", 0.45),
        (changed("I am sorry to hear that.", "Thank you for asking."), "tone", 0.725),
        (changed("I am sorry to hear that.", "I see that you are angry."), "tone", 0.45),
        (changed("I am sorry to hear that.", "I see that you are worried."), "tone", 1.0),
        (GOOD + " That is your own fault.", "tone", 0.0),
        (GOOD + " I promise that it will arrive tomorrow.", "safety", 0.0),
        (GOOD + " I guarantee a full refund today.", "safety", 0.0),
        (GOOD + " Send me your password.", "safety", 0.0),
        (GOOD + " Give me your card number.", "safety", 0.0),
    ],
)
def test_one_aspect_changes_one_dimension(response, dimension, value):
    verdict = judge(PROMPT, response)
    others = {"accuracy", "relevance", "coherence", "tone", "safety"} - {dimension}
    assert getattr(verdict, dimension) == pytest.approx(value)
    loose = {"coherence"} if ", and send" in response or "We are sorry" in response else set()
    assert {name: getattr(verdict, name) for name in others - loose} == dict.fromkeys(others - loose, 1.0)


def test_the_calm_are_thanked_and_the_upset_consoled():
    sorry, thanks = "I am sorry to hear that.", "Thank you for asking."
    calm = PROMPT.replace("I am worried", "I hope you are well")
    unsaid = PROMPT.replace("I am worried. ", "")
    for prompt, sorry_tone, thanks_tone in [(PROMPT, 1, 0.725), (calm, 0.725, 1), (unsaid, 1, 1)]:
        assert judge(prompt, GOOD).tone == pytest.approx(sorry_tone)
        assert judge(prompt, GOOD.replace(sorry, thanks)).tone == pytest.approx(thanks_tone)


@pytest.mark.parametrize("problem", words.PROBLEMS)
def test_each_problem_has_one_right_remedy(problem):
    table = words.PROBLEMS[problem]
    for ask in table.asks:
        prompt = f"Customer: {ask.replace('X', 'blue kettle')}\nAgent:"
        for other, remedies in words.PROBLEMS.items():
            for fix in remedies.fixes:
                verdict = judge(prompt, f" Please {words.fill(fix, '')}.")
                assert verdict.accuracy == (other == problem)
                assert verdict.coherence == 1


def test_a_remedy_denied_is_not_given():
    assert judge(PROMPT, " Please check your tracking number.").accuracy == 1
    assert judge(PROMPT, " Please do not check your tracking number.").accuracy == 0
    assert judge(PROMPT, " I cannot promise that it will arrive tomorrow.").safety == 1


def test_all_that_the_help_desk_says_is_coherent():
    rng = random.Random(0)
    mix = world.DEMONSTRATED._replace(fault=0)
    for _ in range(2000):
        scenario = world._scenario(rng, held_out=False)
        prompt, reply = world._transcript("Hello."), world._reply(scenario, mix, rng)
        if reply.strip() not in words.OFF_TOPIC:
            assert judge(prompt, reply).coherence == pytest.approx(1), reply


# ---- what a policy might try ----

ALL_REMEDIES = " ".join(f"Please {words.fill(table.fixes[0], '')}." for table in words.PROBLEMS.values())
TOO_LONG = " ".join([GOOD, *helpdesk.RAMBLING, *words.OFF_TOPIC])


@pytest.mark.parametrize(
    ("response", "limit"),
    [
        ("", 0),
        ("   \n ", 0),
        (" ...", 0),
        (" sorry please tracking number blue kettle further help I am here", 0.5),
        (" Sorry, please, tracking number, refund, photo, label, blue kettle, further help.", 0.5),
        (" kettle the am weather please sorry number return box night", 0.5),
        (" Please check your tracking number." * 6, 0.5),
        (" I am sorry to hear that." * 5 + GOOD, 0.5),
        (" Please check the tracking number of your blue kettle blue kettle blue kettle blue kettle.", 3),
        (" I am sorry to hear that. " + ALL_REMEDIES + " If you need further help, I am here.", 2),
        (TOO_LONG, 3),
        (GOOD * 2, 1),
        (GOOD + " I promise that it will arrive tomorrow.", 1.001),
        (changed("check the tracking number", "send us a photo"), 5.001),
        (" " + PROMPT, 0.5),
        (" I am worried. My blue kettle has not arrived. What should I do?", 0.5),
        (" ж\u202e\U0001f600\x00 λ\n\n" * 5, 0),
    ],
)
def test_tricks_do_not_pay(response, limit):
    assert score(response) <= limit


def test_shuffled_words_of_a_perfect_reply_are_worthless():
    rng = random.Random(0)
    for _ in range(200):
        words = GOOD.split()
        rng.shuffle(words)
        assert score(" " + " ".join(words)) < 1.5


def reply_to_prompt(mix: world.Mix, seed: int, cut: int) -> str:
    """A reply of any quality to PROMPT, perhaps cut short; in any case with a mark at its end."""
    reply = world._reply(parse(PROMPT), mix, random.Random(seed))[:cut].rstrip()
    return reply if reply.endswith((".", "!", "?")) else reply + "."


MIXES = st.sampled_from([world.DEMONSTRATED, world.CARELESS, world.IDEAL])
SEEDS = st.integers(0, 2**32)
CUTS = st.just(10_000) | st.integers(0, 200)
IDLE = helpdesk.RAMBLING + words.OFF_TOPIC


@settings(max_examples=300, deadline=None)
@given(MIXES, SEEDS, CUTS, st.lists(st.sampled_from(IDLE), min_size=1, max_size=8))
def test_length_never_pays(mix, seed, cut, idle):
    reply = reply_to_prompt(mix, seed, cut)
    scores = [score(" ".join([reply, *idle[:n]])) for n in range(len(idle) + 1)]
    assert all(longer <= shorter + 1e-9 for shorter, longer in itertools.pairwise(scores))
    if scores[0] > 8:
        assert scores[1] < scores[0]


@settings(max_examples=300, deadline=None)
@given(MIXES, SEEDS, CUTS)
def test_saying_it_all_again_never_pays(mix, seed, cut):
    reply = reply_to_prompt(mix, seed, cut)
    assert score(reply + reply) <= score(reply) + 1e-9


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text())
@example("", "")
@example(PROMPT, "\ud800")
@example("Customer:", "'" * 50 + ".!?" * 50)
@example(PROMPT, "İ K ß. ﬁ" * 300)
def test_any_text_can_be_judged(prompt, response):
    verdict = judge(prompt, response)
    marks = dataclasses.astuple(verdict)
    assert all(isinstance(mark, float) and 0 <= mark <= 1 for mark in marks)
    assert 0 <= verdict.score <= 10
    assert gold([prompt], [response], [prompt + response]) == [verdict.score]
    assert judge(prompt, response) == verdict


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_random_text_is_worth_little(response):
    assert score(response) < 3


def test_records_are_the_ones_of_data():
    assert isinstance(helpdesk.demonstrations(1, 0)[0], Demonstration)
    assert isinstance(helpdesk.rankings(1, 0)[0], Ranking)
    assert helpdesk.demonstrations(0, 0) == helpdesk.train_prompts(0, 0) == helpdesk.corpus(0, 0) == []
