"""What customers ask, what agents write, how annotators rank it: everything that is sampled from the help desk."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from minirlhf import InputError
from minirlhf.data.helpdesk.judge import gold, parse
from minirlhf.data.helpdesk.words import (
    ANNOTATOR_TEMPERATURE,
    APOLOGIES,
    CALM,
    COLORS,
    CONTRACTIONS,
    DETAILS,
    FEELINGS,
    GREETINGS,
    HEADS,
    ITEMS,
    JOINED_OFFER,
    MOODS,
    OFF_TOPIC,
    OFFERS,
    PROBLEMS,
    QUESTIONS,
    RAMBLING,
    RUDE,
    THANKS,
    TIE_MARGIN,
    UNDERSTANDING,
    UNSAFE,
    Scenario,
    fill,
)
from minirlhf.data.records import Demonstration, Prompt, Ranking


def _scenario(rng: random.Random, held_out: bool) -> Scenario:
    while True:
        color, item = ("", "") if rng.random() < 0.1 else (rng.choice(COLORS), rng.choice(ITEMS))
        scenario = Scenario(color, item, rng.choice(tuple(PROBLEMS)), rng.choice(tuple(MOODS)))
        if scenario.held_out == held_out:
            return scenario


def _contract(text: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        for long, short in CONTRACTIONS.items():
            text = text.replace(long, short)
    return text


def _ask(scenario: Scenario, rng: random.Random) -> str:
    """Write what the customer says: greeting, mood, problem, detail, question; most of them optional."""
    problem = rng.choice(PROBLEMS[scenario.problem].asks).replace("X", scenario.product or "order")
    middle = [rng.choice(MOODS[scenario.mood]), problem]
    if rng.random() < 0.25:
        middle.reverse()
    parts = [rng.choice(GREETINGS), *middle, rng.choice(DETAILS), rng.choice(QUESTIONS)]
    return _contract(" ".join(filter(None, parts)), rng)


def _transcript(ask: str) -> str:
    return f"Customer: {ask}\nAgent:"


def _prompts(n: int, rng: random.Random, held_out: bool) -> list[tuple[str, Scenario]]:
    drawn: dict[str, Scenario] = {}  # keyed by the prompt, so that none comes twice
    while len(drawn) < n:
        scenario = _scenario(rng, held_out)
        drawn[_transcript(_ask(scenario, rng))] = scenario
    return list(drawn.items())


def train_prompts(n: int, seed: int) -> list[Prompt]:
    """Draw `n` distinct prompts to train on."""
    return [Prompt(text) for text, _ in _prompts(n, random.Random(f"prompts {seed}"), held_out=False)]


def held_out_prompts(n: int, seed: int = 0) -> list[Prompt]:
    """Draw `n` distinct prompts about combinations of product, problem and mood that no training function uses."""
    return [Prompt(text) for text, _ in _prompts(n, random.Random(f"held out {seed}"), held_out=True)]


class Mix(NamedTuple):
    """How often each part appears in a reply; the parts are drawn independently."""

    acknowledge: float = 0.6
    fitting: float = 0.85  # of the acknowledgements, how many suit the mood
    right: float = 0.72  # the right remedy
    missing: float = 0.1  # no remedy; what remains is another problem's remedy
    please: float = 0.6
    named: float = 0.58  # the product in full
    noun: float = 0.12  # only its noun
    offer: float = 0.6
    fault: float = 0.27


DEMONSTRATED = Mix()


CARELESS = Mix(acknowledge=0.4, fitting=0.6, right=0.4, missing=0.2, please=0.4, named=0.4, offer=0.4, fault=0.5)


IDEAL = Mix(acknowledge=1, fitting=1, right=1, missing=0, please=1, named=1, noun=0, offer=1, fault=0)


def _acknowledgement(mood: str, fitting: bool, rng: random.Random) -> str:
    others = [feeling for feeling in FEELINGS if feeling != mood]
    presumed = mood if fitting and mood in FEELINGS else rng.choice(others)
    understanding = tuple(template.replace("FEELING", presumed) for template in UNDERSTANDING)
    if mood in FEELINGS:
        return rng.choice(APOLOGIES + understanding if fitting else THANKS + understanding)
    if mood in CALM:
        return rng.choice(THANKS if fitting else APOLOGIES + understanding)
    return rng.choice(APOLOGIES + THANKS if fitting else understanding)


def _advice(problem: str, fate: float, mix: Mix, rng: random.Random) -> str:
    """Write the sentence with the remedy: the right one if `fate`, uniform in [0, 1], falls below `mix.right`."""
    if fate >= mix.right:
        problem = rng.choice([other for other in PROBLEMS if other != problem])
    text = ("Please " if rng.random() < mix.please else rng.choice(HEADS)) + rng.choice(PROBLEMS[problem].fixes)
    return text[0].upper() + text[1:] + "."


def _reply(scenario: Scenario, mix: Mix, rng: random.Random) -> str:
    """Write one reply: draw each part, then perhaps spoil it."""
    parts = []
    if rng.random() < mix.acknowledge:
        parts.append(_acknowledgement(scenario.mood, rng.random() < mix.fitting, rng))
    fate = rng.random()
    advised = fate < 1 - mix.missing
    if advised:
        parts.append(_advice(scenario.problem, fate, mix, rng))
    # The name goes into one of the sentences that have a place for it, not into all.
    naming = rng.random()
    name = scenario.product if naming < mix.named else scenario.item if naming < mix.named + mix.noun else ""
    places = [i for i, part in enumerate(parts) if "[" in part]
    place = rng.choice(places) if places else -1
    parts = [fill(part, name if i == place else "") for i, part in enumerate(parts)]
    if rng.random() < mix.offer:
        if advised and rng.random() < 0.3:
            parts[-1] = parts[-1].removesuffix(".") + JOINED_OFFER
        else:
            parts.append(rng.choice(OFFERS))
    if rng.random() < mix.fault or not parts:
        parts = _spoil(parts, rng)
    return " " + _contract(" ".join(parts), rng)


def _spoil(parts: list[str], rng: random.Random) -> list[str]:
    """Add one fault: off-topic, salad, stutter, lost words, unsafe, rambling or rude."""
    fault = rng.choice(("off-topic", "salad", "stutter", "lost words", "unsafe", "unsafe", "ramble", "ramble", "rude"))
    if fault == "off-topic" or not parts:
        return rng.sample(OFF_TOPIC, 2)
    words = " ".join(parts).split()
    if fault == "salad":
        rng.shuffle(words)
        return words
    if fault == "lost words":
        return [w for w in words if rng.random() < 0.8] or words[:1]
    if fault == "stutter":
        return parts + rng.choices(parts, k=rng.randint(1, 2))
    if fault == "ramble":
        extra = rng.sample(RAMBLING, rng.randint(1, 3))
    else:
        extra = [rng.choice(UNSAFE if fault == "unsafe" else RUDE)]
    at = rng.randint(0, len(parts))
    return parts[:at] + extra + parts[at:]


def ideal_reply(prompt: str, seed: int = 0) -> str:
    """Write a reply to `prompt` that the judge gives full marks: every good part, no fault."""
    scenario = parse(prompt)
    if not scenario.problem:
        raise InputError(f"{prompt!r}: not a help desk's prompt; take one from train_prompts or held_out_prompts")
    rng = random.Random(f"ideal {seed}")
    while True:
        reply = _reply(scenario, IDEAL, rng)
        if not scenario.item or scenario.product in reply:
            return reply


def demonstrations(n: int, seed: int) -> list[Demonstration]:
    """Write `n` answered prompts of mixed quality: about two in three right, one in sixteen perfect."""
    rng = random.Random(f"demonstrations {seed}")
    pairs = _prompts(n, rng, held_out=False)
    return [Demonstration(prompt, _reply(scenario, DEMONSTRATED, rng)) for prompt, scenario in pairs]


def corpus(n: int, seed: int) -> list[str]:
    """Write `n` plain texts to pre-train on: questions with their answers, careless transcripts, loose talk.

    The answers hold what the help desk knows (which remedy helps, for which product), but not how an agent speaks.
    """
    rng = random.Random(f"corpus {seed}")
    texts = []
    for _ in range(n):
        scenario = _scenario(rng, held_out=False)
        kind = rng.random()
        if kind < 0.7:
            fix = fill(rng.choice(PROBLEMS[scenario.problem].fixes), scenario.product)
            text = f"Question: {_ask(scenario, rng)}\nAnswer: You can {fix}."
        elif kind < 0.9:
            text = _transcript(_ask(scenario, rng)) + _reply(scenario, CARELESS, rng)
            if rng.random() < 0.6:
                text += "\nCustomer: " + rng.choice(("Thank you.", "That does not help me.", *filter(None, QUESTIONS)))
        else:
            talk = (_ask(scenario, rng), _reply(scenario, CARELESS, rng).strip(), *OFF_TOPIC, *RAMBLING, *OFFERS)
            text = " ".join(rng.sample(talk, 3))
        texts.append(text)
    return texts


def rankings(n: int, seed: int, k: int = 4, held_out: bool = False) -> list[Ranking]:
    """Let simulated annotators rank `k` replies to each of `n` prompts.

    An annotator feels `u = gold + ANNOTATOR_TEMPERATURE * g`, g ~ Gumbel(0, 1), and ranks by u: the Plackett-Luce
    model, in which A beats B with probability sigmoid((gold_A - gold_B) / ANNOTATOR_TEMPERATURE). Replies within
    TIE_MARGIN of the best of their group share its rank.
    """
    rng = random.Random(f"rankings {seed} {held_out}")
    out = []
    for prompt, scenario in _prompts(n, rng, held_out):
        mixes = rng.choices((DEMONSTRATED, CARELESS, IDEAL), weights=(6, 2, 2), k=k)
        replies = tuple(_reply(scenario, mix, rng) for mix in mixes)
        felt = [g + ANNOTATOR_TEMPERATURE * -math.log(rng.expovariate(1.0)) for g in gold([prompt] * k, replies)]
        out.append(Ranking(prompt, replies, _ranks(felt)))
    return out


def rank_again(rankings: Sequence[Ranking], seed: int) -> list[Ranking]:
    """Let other annotators rank the same replies: the same equation as in `rankings`, fresh noise.

    How far two who see the same agree is what noise leaves of any label.
    """
    rng = random.Random(f"rank again {seed}")
    out = []
    for ranking in rankings:
        scores = gold([ranking.prompt] * len(ranking.responses), ranking.responses)
        felt = [g + ANNOTATOR_TEMPERATURE * -math.log(rng.expovariate(1.0)) for g in scores]
        out.append(replace(ranking, ranks=_ranks(felt)))
    return out


def _ranks(felt: Sequence[float]) -> tuple[int, ...]:
    """Rank from best (1); whoever is within TIE_MARGIN of the best of the group above joins it."""
    ranks, best = [0] * len(felt), math.inf
    for place, i in enumerate(sorted(range(len(felt)), key=lambda i: -felt[i]), start=1):
        if best - felt[i] > TIE_MARGIN:
            best, rank = felt[i], place
        ranks[i] = rank
    return tuple(ranks)


def noise_ceiling(rankings: Sequence[Ranking]) -> float:
    """Share of the annotators' untied pairs that the gold judge itself orders as they did; its own ties count half.

    No reward model can be expected to do better on pairs labelled with this noise.
    """
    agreed, pairs = 0.0, 0
    for ranking in rankings:
        scores = gold([ranking.prompt] * len(ranking.responses), ranking.responses)
        for a, b in itertools.permutations(range(len(scores)), 2):
            if ranking.ranks[a] < ranking.ranks[b]:
                agreed += 0.5 + 0.5 * ((scores[a] > scores[b]) - (scores[a] < scores[b]))
                pairs += 1
    return agreed / max(pairs, 1)
