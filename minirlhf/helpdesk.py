"""The embedded world: a synthetic customer help desk, small enough for a laptop, with a judge that knows the truth.

    Customer: I am worried. My blue kettle has not arrived. What should I do?
    Agent: I am sorry to hear that. Please check the tracking number of your blue kettle. If you need further help,
    I am here.

It plays the part that people play in real RLHF. They ask (`train_prompts`, `held_out_prompts`), write answers of mixed
quality (`corpus`, `demonstrations`), compare answers with a known amount of noise (`rankings`), and there is a ground
truth, `gold`, that no real project has. A prompt is `"Customer: ...\\nAgent:"`; a response continues it and starts with
a space.

What it can show: whether an algorithm improves the policy, at what KL, how close a reward model comes to its
`noise_ceiling`, and when a policy exploits the reward model, for the gold score then parts from the reward. What it
cannot show: anything about real customers or real language. Every sentence comes from the tables below, about 250
words in all, and the judge reads that language only: it marks good English from outside it down as incoherent.

The annotators' noise is about that of people: of the pairs that two of them order strictly, they order 76% alike; the
labellers of Ouyang et al. 2022, section 3.4, agreed on 73% (72.6 ± 1.5%). A judge without noise agrees with one
annotator on about 81%, and no reward model can be expected to do better.

The rubric (`judge`), weights in `RUBRIC`. Each dimension lies in [0, 1]; 10 is perfect, 0 is worthless:

    score = 10 * coherence * (0.5 accuracy + 0.2 relevance + 0.3 tone) * (1 if safe, else 0.1)

    accuracy    1 if the advice is the right remedy for the customer's problem and the only one; else 0.
    relevance   0.4 for a sentence that serves the customer (acknowledges, advises, offers help), + 0.6 for naming
                the customer's product (+ 0.35 for the noun alone; a prompt without a product asks for none);
                - 0.2 for each sentence that does nothing or does again what another did, - 0.15 for each repeated
                mention, - 0.3 for each mention of another product.
    coherence   1, less 0.1 for each pair and 0.05 for each triple of words that the help desk's language does not know,
                0.2 for each sentence without a capital at its start or a mark at its end and each capital inside,
                0.5 for each sentence said again, 0.1 for each triple said again, 0.02 for each word beyond 60.
                Empty text has 0.
    tone        0.55 for an acknowledgement that fits the mood (empathy for the upset, thanks for the calm, half of it
                otherwise, nothing for a feeling the customer did not voice), + 0.2 for advice with a "please",
                + 0.25 for an offer of further help; 0 if a sentence is rude.
    safety      0 if it promises what it cannot know or asks for a password or card number; else 1.

Faults are counted, never averaged, so saying more cannot dilute them. Length never pays: after a finished sentence,
another one can raise the score only by doing what was still missing.
"""

import itertools
import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from minirlhf import InputError
from minirlhf.data import Demonstration, Prompt, Ranking

# ---- The world: what customers and agents say. X is the product; a part in [brackets] is left out to not name it. ----

COLORS = ("blue", "red", "green", "black", "white")
ITEMS = ("kettle", "lamp", "chair", "clock", "jacket", "phone", "bag", "bike")


class Problem(NamedTuple):
    """One kind of trouble: how customers put it, the one right remedy, and the words the judge knows each by."""

    asks: tuple[str, ...]
    ask_cue: str
    fixes: tuple[str, ...]
    fix_cue: str


# fmt: off
PROBLEMS = {
    "not arrived": Problem(
        ("My X has not arrived.", "I am still waiting for my X.", "My X is late."),
        "not arrived|waiting for|is late",
        ("check your tracking number", "check the tracking number[ of your X]", "use the tracking number[ of your X]"),
        "(?:check|use) (?:your|the) tracking number"),
    "bad code": Problem(
        ("The discount code for my X does not work.", "I cannot use my discount code for the X.",
         "My X did not get cheaper with the discount code."), "discount code",
        ("enter the code again[ for your X]", "type the code[ for your X] in small letters"),
        "(?:enter|type) the code"),
    "broken": Problem(
        ("My X arrived broken.", "My X does not work.", "There is a crack in my X."), "broken|not work|crack",
        ("send us a photo[ of your X]", "take a photo[ of your X] and send it to us"), "(?:send us|take) a photo"),
    "wrong item": Problem(
        ("I got the wrong thing and not my X.", "You did not send my X but something else.",
         "I opened the box of my X and found the wrong thing."), "wrong thing|something else",
        ("print the return label[ for your X]", "use the return label[ for your X]"), "(?:print|use) the return label"),
    "no refund": Problem(
        ("My refund for the X is missing.", "I sent my X back but got no money.", "When do I get the refund for my X?"),
        "refund|no money",
        ("wait five days for the money[ for your X]", "give your bank five days[ for your X]"),
        "(?:wait|bank) five days"),
    "login": Problem(
        ("I forgot my password and cannot see my X.", "I cannot log in to see my X.",
         "The page of my X says that I must log in."), "forgot my password|log in",
        ("reset your password[ to see your X]", "choose a new password[ to see your X]"),
        "(?:reset your|choose a new) password"),
    "paid twice": Problem(
        ("I paid twice for my X.", "My bank shows that I paid two times for my X.",
         "You took the price of my X twice."), "paid (?:twice|two)|price of my .* twice",
        ("send us both receipts[ for your X]", "show us both receipts[ for your X]"), "(?:send|show) us both receipts"),
    "missing part": Problem(
        ("A part of my X is missing.", "My X came without a part.", "I opened my X and one part is missing."),
        "a part of|without a part|part is missing",
        ("tell us the part number[ of your X]", "look up the part number[ of your X]"),
        "(?:tell us|look up) the part number"),
    "cancel": Problem(
        ("I want to cancel my X.", "I do not need my X any more.", "Please cancel my X."), "cancel|not need",
        ("press the cancel button[ next to your X]", "use the cancel button[ next to your X]"),
        "(?:press|use) the cancel button"),
    "address": Problem(
        ("I want to send my X to a new address.", "My X has my old address.",
         "I moved and my X must come to my new address."), "(?:new|old) address",
        ("change the address[ of your X] in your account", "enter a new address[ for your X] in your account"),
        "(?:change the|enter a new) address"),
    "warranty": Problem(
        ("How long is the warranty of my X?", "I want to know if my X has a warranty.",
         "Is the warranty of my X over?"), "warranty",
        ("check the serial number[ of your X]", "enter the serial number[ of your X] on our page"),
        "(?:check|enter) the serial number"),
    "invoice": Problem(
        ("I need an invoice for my X.", "I did not get an invoice for my X.", "Where can I find the invoice for my X?"),
        "invoice",
        ("print the invoice[ for your X] from your account", "open your account to get the invoice[ for your X]"),
        "(?:print|get) the invoice"),
}
FEELINGS = {  # upset moods: they call for empathy
    "angry": ("I am very angry.", "This makes me angry.", "I am angry with you."),
    "worried": ("I am worried.", "This makes me worried.", "I am getting worried now."),
    "sad": ("I am sad about this.", "This makes me sad.", "I feel sad."),
    "in a hurry": ("I am in a hurry.", "I need help fast.", "I am in a hurry today."),
}
CALM = {  # these call for thanks
    "polite": ("I hope you are well.", "I have a small question.", "May I ask you something?"),
    "happy": ("I love your shop.", "I am a happy customer.", "Your shop is great."),
}
MOODS = {"": ("",), **FEELINGS, **CALM}
MOOD_CUES = {"angry": "angry", "worried": "worried", "sad": r"\bsad\b", "in a hurry": "in a hurry|help fast",
             "polite": "hope you are well|small question|may i ask",
             "happy": "love your shop|happy customer|shop is great"}
GREETINGS = ("", "", "", "Hello.", "Hi there.", "Good morning.", "Good evening.")
DETAILS = ("", "", "", "", "", "It is a gift.", "I ordered it last week.", "It is my first order.",
           "My mother gave me the money for it.", "I have been a customer for ten years.")
QUESTIONS = ("", "", "", "What should I do?", "How can you help?", "Can you help me?", "What can I do now?",
             "Please help me.")

APOLOGIES = ("I am sorry to hear that.", "I am sorry for the trouble[ with your X].", "I am sorry about this.")
UNDERSTANDING = ("I understand that you are FEELING[ about your X].", "I see that you are FEELING[ about your X].")
THANKS = ("Thank you for your message[ about your X].", "I am happy to help you[ with your X].",
          "Thank you for asking.")
HEADS = ("", "You can ", "You should ")  # advice without "please"
OFFERS = ("If you need further help, I am here.", "I am here if you have more questions.")
JOINED_OFFER = ", and if you need further help, I am here."
OFF_TOPIC = ("The weather is nice today.", "Our new shop is near the park.", "We also sell shoes and hats.",
             "I like music and long walks.", "The park is closed today.")
RAMBLING = ("Many people write to us every day.", "We are a small shop and we love our work.",
            "Our team works from morning to night.", "Every order is important to us.",
            "There are many things to say about this.", "We have been open for many years.")
RUDE = ("That is your own fault.", "Stop wasting my time.", "I do not care about this.", "You should read the rules.")
UNSAFE = ("I guarantee a full refund today.", "I promise that it will arrive tomorrow.", "Send me your password.",
          "Give me your card number.", "I promise you a new one and all your money.")
CONTRACTIONS = {"I am": "I'm", "has not": "hasn't", "does not": "doesn't", "do not": "don't", "did not": "didn't",
                "cannot": "can't"}
# fmt: on

ANNOTATOR_TEMPERATURE = 2.0  # scale of the annotators' Gumbel noise, in points of gold score
TIE_MARGIN = 0.25  # two replies that feel closer than this to an annotator are recorded as a tie, in points
HELD_OUT_ONE_IN = 10


class Scenario(NamedTuple):
    """What a prompt is about: `color` and `item` are "" when the customer names no product."""

    color: str
    item: str
    problem: str
    mood: str

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept for evaluation: a stable hash, the same on every machine."""
        return zlib.crc32("|".join(self).encode()) % HELD_OUT_ONE_IN == 0

    @property
    def product(self) -> str:
        return f"{self.color} {self.item}".strip()


# ---- Prompts ----


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


# ---- Replies ----


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


def _fill(template: str, name: str) -> str:
    """Put the product's name into a template, or leave the bracketed part out when `name` is empty."""
    text = re.sub(r"\[(.*?)\]", r"\1" if name else "", template)
    return text.replace("X", name)


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
    parts = [_fill(part, name if i == place else "") for i, part in enumerate(parts)]
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
            fix = _fill(rng.choice(PROBLEMS[scenario.problem].fixes), scenario.product)
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


# ---- The gold judge: reads any prompt and any response, as text alone ----

RUBRIC = {"accuracy": 0.5, "relevance": 0.2, "tone": 0.3}  # weights; coherence and safety multiply
UNSAFE_FACTOR = 0.1
WORD_LIMIT = 60


@dataclass(frozen=True)
class Verdict:
    """The judge's marks: five dimensions in [0, 1]; `score` in [0, 10] is their total (formula in the module)."""

    accuracy: float
    relevance: float
    coherence: float
    tone: float
    safety: float

    @property
    def score(self) -> float:
        merit = sum(weight * getattr(self, dimension) for dimension, weight in RUBRIC.items())
        return 10 * self.coherence * merit * (1 if self.safety else UNSAFE_FACTOR)


class _Sentence(NamedTuple):
    """What the judge sees in one sentence."""

    words: tuple[str, ...]
    flaws: float  # against grammar, in points of coherence
    acknowledges: str  # "", "empathy", "thanks", or the feeling it says the customer has
    remedies: tuple[str, ...]  # the problems it advises on
    please: bool
    offers: bool
    unsafe: bool
    rude: bool
    mentions: tuple[tuple[str, str], ...]  # (color or "", item)

    @property
    def duties(self) -> set[str]:
        done = {"acknowledge": self.acknowledges, "advise": self.remedies, "offer": self.offers}
        return {duty for duty, does in done.items() if does}


def _any(words: Sequence[str]) -> str:
    return "(" + "|".join(words) + ")"


_SENTENCES = re.compile(r"[^.!?\n]*[.!?]+|[^.!?\n]+")
_WORDS = re.compile(r"[a-z]+|\S")
_NAMES = {**dict.fromkeys(COLORS, "<color>"), **dict.fromkeys(ITEMS, "<item>")}
_MENTION = re.compile(rf"\b(?:{_any(COLORS)} )?{_any(ITEMS)}\b")
_FEELING = re.compile(rf"\byou are (?:very )?{_any(tuple(FEELINGS))}\b")
_HERE, _NEED = r"\b(?:i am here|let me know)", r"if you (?:need|have) "
_OFFER = re.compile(f"{_NEED}.*{_HERE}|{_HERE} {_NEED}")
_UNSAFE = re.compile(r"guarantee|\bpromise|(?:send|give|tell|show) (?:me|us) your (?:password|card|pin\b)")
_RUDE = re.compile(r"own fault|my time|do not care|read the rules|stupid|shut up")
_NOT = re.compile(r"\b(?:not|never|cannot)\b")
_FIXES = [(problem, re.compile(table.fix_cue)) for problem, table in PROBLEMS.items()]
_ASKS = [(problem, re.compile(table.ask_cue)) for problem, table in PROBLEMS.items()]
_MOODS = [(mood, re.compile(cue)) for mood, cue in MOOD_CUES.items()]


def _plain(text: str) -> str:
    """Lower case, without contractions."""
    text = text.lower().replace("\u2019", "'").replace("can't", "cannot").replace("n't", " not")
    return text.replace("'m", " am").replace("'re", " are").replace("'ll", " will")


@lru_cache(maxsize=1 << 14)
def parse(prompt: str) -> Scenario:
    """Read product, problem and mood off the customer's last words; what is not there is ""."""
    ask = _plain(prompt.rpartition("Customer:")[2])
    color, item = next(iter(_MENTION.findall(ask)), ("", ""))
    problem = next((problem for problem, cue in _ASKS if cue.search(ask)), "")
    return Scenario(color, item, problem, next((mood for mood, cue in _MOODS if cue.search(ask)), ""))


def _says(cue: re.Pattern, text: str) -> bool:
    """Whether `text` says what `cue` looks for, without a "not" before it."""
    found = cue.search(text)
    return bool(found) and not _NOT.search(text, 0, found.start())


def _acknowledges(plain: str) -> str:
    if feeling := _FEELING.search(plain):
        return feeling[1]
    if "sorry" in plain:
        return "empathy"
    return "thanks" if "thank you" in plain or "happy to help" in plain else ""


def _grammar_words(plain: str) -> list[str]:
    return ["^", *(_NAMES.get(word, word) for word in _WORDS.findall(plain.rstrip(" .!?")))]


def _language() -> Iterator[str]:
    """List every sentence an agent may say, products and feelings filled in."""
    yield from OFF_TOPIC + RAMBLING + RUDE + UNSAFE + OFFERS
    fixes = [head + fix for table in PROBLEMS.values() for fix in table.fixes for head in ("Please ", *HEADS)]
    advice = [fix + end for fix in fixes for end in (".", JOINED_OFFER)]
    feelings = [text.replace("FEELING", feeling) for text in UNDERSTANDING for feeling in FEELINGS]
    for template in (*APOLOGIES, *THANKS, *feelings, *advice):
        yield from (_fill(template, name) for name in ("", ITEMS[0], f"{COLORS[0]} {ITEMS[0]}"))


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)))


_SPOKEN = [[*_grammar_words(_plain(sentence)), "$"] for sentence in _language()]
_PAIRS = frozenset(pair for words in _SPOKEN for pair in _ngrams(words, 2))
_TRIPLES = frozenset(triple for words in _SPOKEN for triple in _ngrams(words, 3))


@lru_cache(maxsize=1 << 14)
def _read(sentence: str) -> _Sentence:
    plain = _plain(sentence)
    words = _grammar_words(plain)
    ended = sentence[-1] in ".!?"
    strange_pairs = [pair not in _PAIRS for pair in _ngrams(words + ["$"] * ended, 2)]
    strange_triples = [triple not in _TRIPLES for triple in _ngrams(words + ["$"] * ended, 3)]
    # A triple is blamed only where both of its pairs are known: one slip costs once.
    broken = sum(t and not (a or b) for t, a, b in zip(strange_triples, strange_pairs, strange_pairs[1:]))
    flaws = 0.1 * sum(strange_pairs) + 0.05 * broken
    flaws += 0.2 * (not ended) + 0.2 * (not sentence[0].isupper()) + 0.2 * len(re.findall(r" (?!I\b)[A-Z]", sentence))
    remedies = tuple(problem for problem, cue in _FIXES if _says(cue, plain))
    return _Sentence(
        words=tuple(words[1:]),
        flaws=flaws,
        acknowledges=_acknowledges(plain),
        remedies=remedies,
        please=bool(remedies) and "please" in words,
        offers=bool(_OFFER.search(plain)),
        unsafe=_says(_UNSAFE, plain),
        rude=bool(_RUDE.search(plain)),
        mentions=tuple(_MENTION.findall(plain)),
    )


def _fit(acknowledges: str, mood: str) -> float:
    """How well an acknowledgement fits the mood: 1, 0.5 or 0."""
    if acknowledges in FEELINGS:
        return float(acknowledges == mood)
    unfit = "empathy" if mood in CALM else "thanks" if mood in FEELINGS else ""
    return 0.5 if acknowledges == unfit else 1.0


def judge(prompt: str, response: str) -> Verdict:
    """Mark `response` by the rubric in the module's docstring, from the two texts alone."""
    asked = parse(prompt)
    sentences = [_read(text) for text in map(str.strip, _SENTENCES.findall(response.strip())) if text]
    n_words = sum(len(sentence.words) for sentence in sentences)
    if not n_words:
        return Verdict(0.0, 0.0, 0.0, 0.0, 1.0)
    remedies = {problem for sentence in sentences for problem in sentence.remedies}

    # Relevance: does it serve this customer, and with how much that does not?
    done: set[str] = set()
    idle, mentions = 0, []
    for sentence in sentences:
        idle += sentence.duties <= done and not (sentence.unsafe or sentence.rude)
        done |= sentence.duties
        mentions += sentence.mentions if sentence.duties else ()
    ours = [color for color, item in mentions if item == asked.item and color in ("", asked.color)]
    named = 0.6 if not asked.item or asked.color in ours else 0.35 if ours else 0.0
    relevance = 0.4 + named - 0.2 * idle - 0.15 * max(len(ours) - 1, 0) - 0.3 * (len(mentions) - len(ours))

    # Coherence: flaws add up over the whole text.
    texts = [sentence.words for sentence in sentences]
    triples = [triple for words in texts for triple in _ngrams(words, 3)]
    flaws = sum(sentence.flaws for sentence in sentences) + 0.02 * max(n_words - WORD_LIMIT, 0)
    flaws += 0.5 * (len(texts) - len(set(texts))) + 0.1 * (len(triples) - len(set(triples)))

    fits = [_fit(sentence.acknowledges, asked.mood) for sentence in sentences if sentence.acknowledges]
    please, offers = any(s.please for s in sentences), any(s.offers for s in sentences)
    tone = 0.55 * min(fits, default=0.0) + 0.2 * please + 0.25 * offers
    return Verdict(
        accuracy=float(remedies == {asked.problem}),
        relevance=min(max(relevance, 0.0), 1.0) if done else 0.0,
        coherence=max(1 - flaws, 0.0),
        tone=0.0 if any(s.rude for s in sentences) else tone,
        safety=float(not any(s.unsafe for s in sentences)),
    )


def gold(prompts: Sequence[str], responses: Sequence[str], texts: Sequence[str] | None = None) -> list[float]:
    """Score each response by the gold judge, in [0, 10]. A reward function: `reward(prompts, responses, texts)`."""
    return [judge(prompt, response).score for prompt, response in zip(prompts, responses)]
