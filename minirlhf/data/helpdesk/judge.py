"""The gold judge: reads any prompt and any response, as text alone. The rubric is in `minirlhf.data.helpdesk`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from minirlhf.data.helpdesk.words import (
    APOLOGIES,
    CALM,
    COLORS,
    FEELINGS,
    HEADS,
    ITEMS,
    JOINED_OFFER,
    MOOD_CUES,
    OFF_TOPIC,
    OFFERS,
    PROBLEMS,
    RAMBLING,
    RUDE,
    THANKS,
    UNDERSTANDING,
    UNSAFE,
    Scenario,
    fill,
)

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
        yield from (fill(template, name) for name in ("", ITEMS[0], f"{COLORS[0]} {ITEMS[0]}"))


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
