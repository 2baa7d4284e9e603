"""Records in and out: read, checked, chosen. `minirlhf.data.batches` makes batches of them.

A file holds one record per line (``.jsonl``, ``.jsonl.gz``), or is one plain text (``.txt``). The keys of a record say
what kind it is:

======================================================  =================  ================================
keys                                                    becomes            for
======================================================  =================  ================================
``text``                                                `Text`             pre-training
``text``, ``label`` (1 = wanted, 0 = not)               `Text`             pre-training, reward model
``prompt``, ``response``                                `Demonstration`    fine-tuning
``messages``: a list of ``role``, ``content``           `Demonstration`    fine-tuning
``prompt``, ``chosen``, ``rejected``                    `Ranking`          reward model, DPO
``chosen``, ``rejected`` (whole HH transcripts)         `Ranking`          reward model, DPO
``prompt``, ``responses``, ``ranking`` (1 = best)       `Ranking`          reward model, DPO
``prompt``                                              `Prompt`           PPO, sampling
======================================================  =================  ================================

Other keys are ignored. A line that is wrong stops the reading with an error that names it: a file is used whole or
not at all.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from minirlhf import InputError


@dataclass(frozen=True)
class Text:
    """A text to learn to write; with a label, 1 if such texts are wanted and 0 if not."""

    text: str
    label: int | None = None
    source: str = field(default="", compare=False)  # "file:line", for error messages


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to learn."""

    prompt: str
    response: str
    source: str = field(default="", compare=False)


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt and their ranks: 1 is best, equal ranks are ties. A pair is ranked (1, 2)."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str = field(default="", compare=False)


@dataclass(frozen=True)
class Prompt:
    """A prompt to respond to."""

    prompt: str
    source: str = field(default="", compare=False)


Record: TypeAlias = Text | Demonstration | Ranking | Prompt


_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


KINDS = {
    Text: '{"text"}',
    Demonstration: '{"prompt", "response"} or {"messages"}',
    Ranking: '{"prompt", "chosen", "rejected"}, {"chosen", "rejected"} or {"prompt", "responses", "ranking"}',
    Prompt: '{"prompt"}',
}


# --- files in ---------------------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> list[Record]:
    """Read a ``.jsonl``, ``.jsonl.gz`` or ``.txt`` file. A ``.txt`` is one `Text`; blank lines are skipped.

    Raises:
        InputError: the file, or a line of it, is not what it should be.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".txt")):
        raise InputError(f"{path}: unknown kind of file; give a .jsonl, .jsonl.gz or .txt")
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the name") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; give a file in it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: the gzip data is cut off or corrupt; copy or compress the file again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    content = content.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark, which some editors put first
    binary = 0 if content.startswith(b"\x1f\x8b") else content.find(b"\0")
    if binary >= 0:
        number = content.count(b"\n", 0, binary) + 1
        raise InputError(f"{path}:{number}: holds binary bytes; give UTF-8 text, and name a compressed file .jsonl.gz")
    # Only "\n" ends a line: JSON may hold other line separators as they are.
    lines = [_utf8(line, f"{path}:{number}") for number, line in enumerate(content.split(b"\n"), start=1)]
    if not any(line.strip() for line in lines):
        raise InputError(f"{path}: holds no records; give a file with at least one")
    if path.name.endswith(".txt"):
        return [Text("\n".join(lines), source=f"{path}:1")]
    return [_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _utf8(line: bytes, source: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise InputError(f"{source}: not valid UTF-8 ({what}); save the file as UTF-8") from error


def _record(line: str, source: str) -> Record:
    """One line of JSON as the record that its keys say it is."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise InputError(f"{source}: not valid JSON ({what}); fix or delete this line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise InputError(f"{source}: not valid JSON (too long or too deep); fix or delete this line") from error
    if not isinstance(entry, dict):
        raise InputError(f"{source}: not a JSON object but {_type(entry)}; write one {{...}} a line")
    # The key that only one kind has decides, so that a missing partner is noticed.
    if "responses" in entry or "ranking" in entry:
        return _ranking(entry, source)
    if "chosen" in entry or "rejected" in entry:
        return _pair(entry, source)
    if "response" in entry:
        return Demonstration(_string(entry, "prompt", source), _string(entry, "response", source, full=True), source)
    if "messages" in entry:
        return _conversation(entry, source)
    if "text" in entry:
        return _text(entry, source)
    if "prompt" in entry:
        return Prompt(_string(entry, "prompt", source), source)
    keys = ", ".join(map(json.dumps, entry)) or "none"
    raise InputError(f"{source}: no known kind of record (keys: {keys}); write one of {', '.join(KINDS.values())}")


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")


def _get(entry: dict, key: str, kind: type, source: str) -> object:
    if key not in entry:
        raise InputError(f'{source}: the key "{key}" is missing; add it or delete this line')
    if type(entry[key]) is not kind:  # not isinstance: true is not a number here
        wanted = {str: "a string", list: "a list", int: "a whole number"}[kind]
        raise InputError(f'{source}: "{key}" must be {wanted}, not {_type(entry[key])}; fix or delete this line')
    return entry[key]


def _string(entry: dict, key: str, source: str, full: bool = False) -> str:
    value = _get(entry, key, str, source)
    return _checked(value, key, source, full)


def _checked(value: str, key: str, source: str, full: bool) -> str:
    if full and not value:
        raise InputError(f'{source}: "{key}" is empty; fill it in or delete this line')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a pair, which is no character
        half = f"\\u{ord(value[error.start]):04x}"
        raise InputError(f'{source}: "{key}" holds {half}, half of a character; fix or delete this line') from error
    return value


def _text(entry: dict, source: str) -> Text:
    text = _string(entry, "text", source, full=True)
    label = _get(entry, "label", int, source) if "label" in entry else None
    if label not in (None, 0, 1):
        raise InputError(f'{source}: "label" is {label}; use 1 for wanted and 0 for not, or leave it out')
    return Text(text, label, source)


def _conversation(entry: dict, source: str) -> Demonstration:
    """Messages as an HH transcript, whose last turn is the response."""
    transcript, last = "", ""
    for position, message in enumerate(_get(entry, "messages", list, source), start=1):
        where = f"{source}: message {position}"
        if not isinstance(message, dict):
            raise InputError(f"{where} is not an object; write role and content")
        last, content = _string(message, "role", where), _string(message, "content", where, full=True)
        if last == "system" and position == 1:
            transcript = content
        elif last == "user":
            transcript += f"{_HUMAN} {content}"
        elif last == "assistant":
            transcript += f"{_ASSISTANT} {content}"
        else:
            raise InputError(f"{where} has role {json.dumps(last)}; use user or assistant, or system for the first")
    if last != "assistant":
        raise InputError(f"{source}: the last message is not the assistant's; end with the response to learn")
    return Demonstration(transcript[: -len(content) - 1], f" {content}", source)


def _pair(entry: dict, source: str) -> Ranking:
    chosen, rejected = (_string(entry, key, source, full=True) for key in ("chosen", "rejected"))
    if "prompt" in entry:
        return Ranking(_string(entry, "prompt", source), (chosen, rejected), (1, 2), source)
    # Two whole transcripts: the prompt is what they share, up to the last turn of the assistant.
    differ = (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
    shared = chosen[: next(differ, min(len(chosen), len(rejected)))]
    cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
    if cut < len(_ASSISTANT):
        cure = f"begin both with the same turns up to {json.dumps(_ASSISTANT)}, or give the prompt as a key"
        raise InputError(f"{source}: the two transcripts share no prompt; {cure}")
    responses = (chosen[cut:], rejected[cut:])
    if "" in responses or not "".join(responses).strip():
        raise InputError(f"{source}: a transcript ends in an empty response; fill it in or delete this line")
    return Ranking(chosen[:cut], responses, (1, 2), source)


def _ranking(entry: dict, source: str) -> Ranking:
    prompt = _string(entry, "prompt", source)
    responses, ranks = (_get(entry, key, list, source) for key in ("responses", "ranking"))
    if len(responses) < 2:
        raise InputError(f'{source}: "responses" holds {len(responses)}; a ranking needs at least 2')
    if len(ranks) != len(responses):
        what = f"{len(responses)} responses but {len(ranks)} ranks"
        raise InputError(f'{source}: {what}; give "ranking" one number for each response')
    for response in responses:
        if not isinstance(response, str):
            raise InputError(f'{source}: "responses" holds {_type(response)}; all of them must be strings')
        _checked(response, "responses", source, full=True)
    for rank in ranks:
        if type(rank) is not int or rank < 1:
            raise InputError(f'{source}: "ranking" holds {json.dumps(rank)}; use whole numbers, 1 for the best')
    return Ranking(prompt, tuple(responses), tuple(ranks), source)


def expect(records: Sequence[Record], kinds: tuple[type, ...], path: str | Path, script_hint: str) -> Sequence[Record]:
    """Hand the records back if all of them are of kinds that a script can use.

    Args:
        records: what was read.
        kinds: record classes, e.g. ``(Text, Demonstration)``.
        path: where the records are from.
        script_hint: who wants them, e.g. ``train_dpo.py``.

    Raises:
        InputError: a record is of another kind, or there is none.
    """
    wanted = " or ".join(KINDS[kind] for kind in kinds)
    if not records:
        raise InputError(f"{path}: holds no records; {script_hint} needs {wanted}")
    for record in records:
        if not isinstance(record, kinds):
            found = type(record).__name__.lower()
            raise InputError(f"{record.source or path}: this record is a {found}; {script_hint} needs {wanted}")
    return records


# --- files out --------------------------------------------------------------------------------------------------------


def as_dict(record: Record) -> dict:
    """The object that `read_records` turns into this record."""
    if isinstance(record, Text):
        return {"text": record.text} if record.label is None else {"text": record.text, "label": record.label}
    if isinstance(record, Demonstration):
        return {"prompt": record.prompt, "response": record.response}
    if isinstance(record, Prompt):
        return {"prompt": record.prompt}
    if record.ranks == (1, 2):
        return {"prompt": record.prompt, "chosen": record.responses[0], "rejected": record.responses[1]}
    return {"prompt": record.prompt, "responses": list(record.responses), "ranking": list(record.ranks)}


def write_records(path: str | Path, dicts: Iterable[dict]) -> None:
    """Write one JSON object per line, under a temporary name until the file is whole."""
    path = Path(path)
    content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in dicts).encode()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another place") from error
    finally:
        with contextlib.suppress(OSError):  # it is gone already, unless something went wrong above
            temporary.unlink()


# --- choosing records -------------------------------------------------------------------------------------------------


def split_held_out(
    records: Sequence[Record], fraction: float = 0.05, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Split records into training and held-out ones; records with the same prompt stay together.

    Args:
        records: at least two, of at least two prompts.
        fraction: share to hold out; at least one record is.
        seed: which ones.

    Returns:
        ``(train, held_out)``, each in the order of ``records``.

    Raises:
        InputError: all records share one prompt, so nothing can be held out.
    """
    groups: dict[object, list[int]] = {}
    for i, record in enumerate(records):
        # Where there is no prompt, the same text must still not be on both sides.
        key = record.text if isinstance(record, Text) else record.prompt or str(as_dict(record))
        groups.setdefault(key, []).append(i)
    if len(groups) < 2:
        where = records[0].source.rpartition(":")[0] + ": " if records and records[0].source else ""
        raise InputError(f"{where}too few different records to hold some out; at least 2 are needed")
    order = list(groups.values())
    random.Random(f"held out {seed}").shuffle(order)
    target, held = round(fraction * len(records)), set()
    for group in order:
        if len(held) + len(group) <= target:
            held.update(group)
    held = held or set(min(order, key=len))
    if len(held) == len(records):
        held -= set(min(order, key=len))
    train = [record for i, record in enumerate(records) if i not in held]
    return train, [record for i, record in enumerate(records) if i in held]


def read_one_kind(path: str | Path, kinds: tuple[type, ...], script: str) -> Sequence[Record]:
    """The records of a file, all of one kind, and of one that a script can use; see `expect`."""
    records = read_records(path)
    expect(records, (type(records[0]),), path, f"{script} (which takes one kind of record at a time)")
    return expect(records, kinds, path, script)


def best_demonstrations(rankings: Sequence[Ranking]) -> list[Demonstration]:
    """Of what people compared, the response they liked best, to be learnt."""
    return [Demonstration(r.prompt, r.responses[r.ranks.index(min(r.ranks))], r.source) for r in rankings]


def require_preference(rankings: Sequence[Ranking]) -> None:
    """Refuse rankings in which all responses are tied: there is nothing to learn from them."""
    if all(len(set(ranking.ranks)) == 1 for ranking in rankings):
        where = rankings[0].source.rpartition(":")[0] if rankings else ""
        raise InputError(f"{where or 'the rankings'}: all responses are tied; add some that are better than others")


def labelled_pairs(records: Sequence[Text], seed: int, n: int | None = None) -> list[Ranking]:
    """Pairs of a wanted text over an unwanted one, with no prompt, to train a reward model on labels.

    Args:
        records: texts with labels 0 and 1.
        seed: which text meets which.
        n: number of pairs; by default as many as the larger class has texts.

    Returns:
        Pairs; within a class, no text is used more than once oftener than another.

    Raises:
        InputError: a text has no label, or one of the labels does not occur.
    """
    for record in records:
        if record.label is None:
            raise InputError(f'{record.source or "a text"}: has no "label"; add 1 for wanted or 0 for not')
    wanted, unwanted = ([record for record in records if record.label == label] for label in (1, 0))
    for label, texts in ((1, wanted), (0, unwanted)):
        if not texts:
            where = records[0].source.rpartition(":")[0] if records else ""
            raise InputError(f"{where or 'the texts'}: no text has label {label}; both 0 and 1 are needed for pairs")
    rng = random.Random(f"labelled pairs {seed}")
    n = max(len(wanted), len(unwanted)) if n is None else n
    pairs = zip(_rounds(wanted, rng, n), _rounds(unwanted, rng, n))
    return [Ranking("", (good.text, bad.text), (1, 2), f"{good.source} and {bad.source}") for good, bad in pairs]


def _rounds(items: list[Text], rng: random.Random, n: int) -> list[Text]:
    """``n`` items: shuffle after shuffle of all of them."""
    rounds = (rng.sample(items, len(items)) for _ in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(rounds), n))
