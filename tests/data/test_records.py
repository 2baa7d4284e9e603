"""Records: every kind is read, every bad line is named; tokens, masks and batches are what the algorithms count on."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import InputError
from minirlhf.data.batches import (
    Example,
    batch_indices,
    collate,
    examples_from,
    make_example,
    pack,
    stream_batch,
    token_stream,
)
from minirlhf.data.records import (
    Demonstration,
    Prompt,
    Ranking,
    Text,
    as_dict,
    expect,
    labelled_pairs,
    read_records,
    split_held_out,
    write_records,
)
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.devices import upload

GOOD = '{"prompt": "Where is it?", "response": "On its way."}\n'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([], 257)  # one token a byte, so that lengths are plain to see


def read(tmp_path: Path, *entries: object) -> list:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return read_records(path)


# --- kinds ---


@pytest.mark.parametrize(
    ("entry", "record"),
    [
        ({"text": "a"}, Text("a", None)),
        ({"text": "a", "label": 1}, Text("a", 1)),
        ({"text": "a", "label": 0, "id": 7}, Text("a", 0)),
        ({"prompt": "p"}, Prompt("p")),
        ({"prompt": ""}, Prompt("")),
        ({"prompt": "p", "response": "r"}, Demonstration("p", "r")),
        ({"prompt": "", "response": "r", "text": "pr", "score": 0.5}, Demonstration("", "r")),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, Ranking("p", ("a", "b"), (1, 2))),
        ({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 2]}, Ranking("p", ("a", "b", "c"), (2, 1, 2))),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [1, 1]}, Ranking("p", ("a", "b"), (1, 1))),
    ],
)
def test_keys_decide_the_kind(tmp_path: Path, entry: dict, record: object) -> None:
    assert read(tmp_path, entry) == [record]


def test_messages_become_a_transcript(tmp_path: Path) -> None:
    def turn(role: str, content: str) -> dict:
        return {"role": role, "content": content, "name": "ignored"}

    one = {"messages": [turn("user", "Hi"), turn("assistant", "Hello")]}
    more = {"messages": [turn("system", "Be kind."), *one["messages"], turn("user", "A\nB"), turn("assistant", "C")]}
    opening = {"messages": [turn("assistant", "How can I help?")]}
    assert read(tmp_path, one, more, opening) == [
        Demonstration("\n\nHuman: Hi\n\nAssistant:", " Hello"),
        Demonstration("Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A\nB\n\nAssistant:", " C"),
        Demonstration("\n\nAssistant:", " How can I help?"),
    ]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", " Hello", " What?"),
        (
            "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: So\n\nAssistant:",
            " Well",
            " Well, no",
        ),  # one continues the other
        ("\n\nHuman: Hi\n\nAssistant:", " ", " What?"),  # a blank response is one, as in the published data
        ("\n\nHuman: Hi\n\nAssistant:", " Sh\n\nHuman: Go\n\nAssistant: No", " Sh\n\nHuman: Stay\n\nAssistant: Yes"),
        ("\n\nHuman: Hi\n\nAssistant:", " Same", " Same"),
    ],
)
def test_hh_transcripts_are_cut_at_the_last_shared_turn(
    tmp_path: Path, prompt: str, chosen: str, rejected: str
) -> None:
    (record,) = read(tmp_path, {"chosen": prompt + chosen, "rejected": prompt + rejected})
    assert record == Ranking(prompt, (chosen, rejected), (1, 2))


# --- files ---


def test_gzip_blank_lines_byte_order_mark_and_odd_separators(tmp_path: Path) -> None:
    """U+2028 ends a line for str.splitlines, but not in JSON lines; Windows ends lines with two characters."""
    content = b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n   \n{"text": "c"}'
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "data.jsonl").write_bytes(content)
    for name in ("data.jsonl", "data.jsonl.gz"):
        records = read_records(tmp_path / name)
        assert records == [Text("a\u2028b"), Text("c")]
        assert [record.source for record in records] == [f"{tmp_path / name}:1", f"{tmp_path / name}:4"]


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    text = 'First line.\n\n{"text": "not JSON here"}\r\né\n'
    (tmp_path / "play.txt").write_bytes(text.encode())
    assert read_records(str(tmp_path / "play.txt")) == [Text(text, None)]


def line(entry: object) -> bytes:
    return json.dumps(entry).encode()


def pair(chosen: str, rejected: str) -> bytes:
    return line({"chosen": chosen, "rejected": rejected})


def ranking(responses: object, ranks: object) -> bytes:
    return line({"prompt": "p", "responses": responses, "ranking": ranks})


def messages(*turns: object) -> bytes:
    return line({"messages": [dict(zip(("role", "content"), turn)) for turn in turns]})


HUMAN = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"prompt": "p" "response": "r"}', "not valid JSON (Expecting ',' delimiter at column 16); fix or delete"),
        (b'{"prompt": "p\t"}', "not valid JSON (Invalid control character at column 14); fix or delete"),
        (b'{"prompt": "p', "not valid JSON (Unterminated string starting at column 12); fix or delete"),
        (b"[" * 100_000, "not valid JSON (too long or too deep); fix or delete"),
        (b"9" * 10_000, "not valid JSON (too long or too deep); fix or delete"),
        (b'["prompt"]', "not a JSON object but a list; write one {...} a line"),
        (b'"prompt"', "not a JSON object but a string; write one"),
        (b"null", "not a JSON object but null; write one"),
        (b"1.5", "not a JSON object but a number; write one"),
        (b'{"promt": "p", "x\\ny": 1}', '(keys: "promt", "x\\ny"); write one of {"text"}'),
        (b"{}", "(keys: none); write one of"),
        (b'{"response": "r"}', 'the key "prompt" is missing; add it'),
        (b'{"prompt": "p", "chosen": "c"}', 'the key "rejected" is missing; add it'),
        (b'{"rejected": "c"}', 'the key "chosen" is missing; add it'),
        (b'{"prompt": "p", "responses": ["a", "b"]}', 'the key "ranking" is missing; add it'),
        (b'{"prompt": "p", "ranking": [1, 2]}', 'the key "responses" is missing; add it'),
        (b'{"responses": ["a", "b"], "ranking": [1, 2]}', 'the key "prompt" is missing; add it'),
        (b'{"prompt": 3}', '"prompt" must be a string, not a number; fix or delete'),
        (b'{"prompt": null, "response": "r"}', '"prompt" must be a string, not null; fix or delete'),
        (b'{"prompt": "p", "response": ["r"]}', '"response" must be a string, not a list; fix or delete'),
        (b'{"text": {}}', '"text" must be a string, not an object; fix or delete'),
        (b'{"text": "a", "label": true}', '"label" must be a whole number, not true or false; fix or delete'),
        (b'{"text": "a", "label": "good"}', '"label" must be a whole number, not a string; fix or delete'),
        (b'{"text": "a", "label": 2}', '"label" is 2; use 1 for wanted and 0 for not'),
        (b'{"text": ""}', '"text" is empty; fill it in or delete'),
        (b'{"prompt": "p", "response": ""}', '"response" is empty; fill it in or delete'),
        (b'{"prompt": "p", "chosen": "c", "rejected": ""}', '"rejected" is empty; fill it in or delete'),
        (b'{"text": "\\ud83d!"}', '"text" holds \\ud83d, half of a character; fix or delete'),
        (b'{"text": "caf\xe9"}', "not valid UTF-8 (byte 0xe9 at column 14); save the file as UTF-8"),
        (b"\x89PNG\r\0\0\0", "holds binary bytes; give UTF-8 text"),
        ('{"text": "a"}'.encode("utf-16-le"), "holds binary bytes; give UTF-8 text"),
        (pair("Hello", "Help"), "share no prompt; begin both with the same turns"),
        (pair("\n\nHuman: A\n\nAssistant: x", "\n\nHuman: B\n\nAssistant: x"), "share no prompt; begin both"),
        (pair(HUMAN + " ", HUMAN + " "), "ends in an empty response; fill it in"),
        (pair(HUMAN + " a", HUMAN), "ends in an empty response; fill it in"),
        (pair(HUMAN, HUMAN), "ends in an empty response; fill it in"),
        (ranking(["a", "b", "c"], [1, 2]), '3 responses but 2 ranks; give "ranking" one number for each'),
        (ranking(["a"], [1]), '"responses" holds 1; a ranking needs at least 2'),
        (ranking([], []), '"responses" holds 0; a ranking needs at least 2'),
        (ranking("ab", [1, 2]), '"responses" must be a list, not a string; fix or delete'),
        (ranking(["a", 1], [1, 2]), '"responses" holds a number; all of them must be strings'),
        (ranking(["a", ""], [1, 2]), '"responses" is empty; fill it in'),
        (ranking(["a", "b"], [0, 1]), '"ranking" holds 0; use whole numbers, 1 for the best'),
        (ranking(["a", "b"], [1.0, 2]), '"ranking" holds 1.0; use whole numbers'),
        (ranking(["a", "b"], [True, 2]), '"ranking" holds true; use whole numbers'),
        (ranking(["a", "b"], [1, None]), '"ranking" holds null; use whole numbers'),
        (line({"messages": "Hi"}), '"messages" must be a list, not a string; fix or delete'),
        (line({"messages": []}), "the last message is not the assistant's; end with the response"),
        (line({"messages": ["Hi"]}), "message 1 is not an object; write role and content"),
        (messages(("user", "Hi")), "the last message is not the assistant's; end with the response"),
        (messages(("user",), ("assistant", "a")), 'message 1: the key "content" is missing; add it'),
        (messages(("user", "Hi"), ("assistant", "")), 'message 2: "content" is empty; fill it in'),
        (messages(("user", "Hi"), ("assistant", [])), 'message 2: "content" must be a string, not a list; fix'),
        (messages(("user", "Hi"), ("system", "x")), 'message 2 has role "system"; use user or assistant'),
        (messages(("to\nol", "Hi"), ("assistant", "x")), 'message 1 has role "to\\nol"; use user or assistant'),
    ],
)
def test_a_bad_line_is_named_with_its_cure(tmp_path: Path, bad: bytes, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + bad + b"\n" + GOOD.encode())
    with pytest.raises(InputError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def _refused(path: Path, words: str) -> None:
    with pytest.raises(InputError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}: ") or str(error.value).startswith(f"{path}:1: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.jsonl", None, "no such file; check the name"),
        ("data.csv", b"a,b", "unknown kind of file; give a .jsonl, .jsonl.gz or .txt"),
        ("data.json", b"[]", "unknown kind of file; give a .jsonl"),
        ("data.jsonl", b"", "holds no records; give a file with at least one"),
        ("data.jsonl", b"\n \r\n\t", "holds no records; give a file"),
        ("data.jsonl", "\u00a0\n\u3000".encode(), "holds no records; give a file"),
        ("data.txt", b" \n", "holds no records; give a file"),
        ("data.txt", b"caf\xe9", "not valid UTF-8 (byte 0xe9 at column 4); save the file as UTF-8"),
        ("data.jsonl.gz", b"", "holds no records; give a file"),
        ("data.jsonl.gz", gzip.compress(b"", mtime=0), "holds no records; give a file"),
        ("data.jsonl.gz", GOOD.encode(), "gzip data is cut off or corrupt; copy or compress"),
        (
            "data.jsonl.gz",
            gzip.compress(GOOD.encode(), mtime=0) + b"more",
            "gzip data is cut off or corrupt; copy or compress",
        ),
        (
            "data.jsonl",
            gzip.compress(GOOD.encode(), mtime=0),
            "holds binary bytes; give UTF-8 text, and name a compressed file",
        ),
        ("data.jsonl.gz", gzip.compress(b"\0\1", mtime=0), "holds binary bytes; give UTF-8 text"),
    ],
)
def test_a_bad_file_is_named_with_its_cure(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    _refused(tmp_path / name, words)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").mkdir()
    _refused(tmp_path / "data.jsonl", "is a folder; give a file in it")


def test_a_gzip_cut_anywhere_or_with_any_byte_changed_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": str(i)}) + "\n" for i in range(20)).encode(), mtime=0)
    path = tmp_path / "data.jsonl.gz"
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        _refused(path, "cut off or corrupt")
    for changed in range(10, len(whole)):  # the first ten bytes are the header, whose date and system are free
        path.write_bytes(whole[:changed] + bytes([whole[changed] ^ 0x10]) + whole[changed + 1 :])
        _refused(path, "cut off or corrupt")


# --- writing ---

some_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
full_text = some_text.filter(bool)
ranked = st.lists(st.tuples(full_text, st.integers(1, 5)), min_size=2, max_size=5)
# Kinds and arguments; the records are made in the test, where beartype may use the global random numbers.
entries = st.one_of(
    st.tuples(st.just(Text), st.tuples(full_text, st.none() | st.integers(0, 1))),
    st.tuples(st.just(Demonstration), st.tuples(some_text, full_text)),
    st.tuples(st.just(Prompt), st.tuples(some_text)),
    st.tuples(st.just(Ranking), st.tuples(some_text, ranked).map(lambda drawn: (drawn[0], *zip(*drawn[1])))),
)


@given(entries=st.lists(entries, min_size=1, max_size=6), name=st.sampled_from(["data.jsonl", "data.jsonl.gz"]))
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, entries: list, name: str) -> None:
    records = [kind(*arguments) for kind, arguments in entries]
    path = tmp_path_factory.getbasetemp() / "round-trip" / name
    write_records(path, (as_dict(record) for record in records))
    read_again = read_records(path)
    assert read_again == records
    assert [record.source for record in read_again] == [f"{path}:{i}" for i in range(1, len(records) + 1)]


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    write_records(path, [{"text": "é"}])
    assert path.read_bytes() == '{"text": "é"}\n'.encode()

    def breaks() -> object:
        yield {"text": "new"}
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_records(path, breaks())

    def interrupted(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(InputError, match=r"out\.jsonl: cannot be written \(No space left on device\)"):
        write_records(path, [{"text": "new"}])
    assert path.read_bytes() == '{"text": "é"}\n'.encode()
    assert [item.name for item in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "out.jsonl", tmp_path / "file" / "out.jsonl"):
        with pytest.raises(InputError, match=r"cannot be written .*; give another place") as error:
            write_records(path, [{}])
        assert str(error.value).startswith(f"{path}: ")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "out.jsonl"]


# --- choosing records ---


def test_expect_hands_back_or_names_the_first_other_kind(tmp_path: Path) -> None:
    records = read(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p"}, {"text": "t"})
    path = tmp_path / "data.jsonl"
    assert expect(records, (Ranking, Prompt, Text), path, "train_rm.py") is records
    with pytest.raises(InputError) as error:
        expect(records, (Ranking, Text), path, "train_rm.py")
    message = str(error.value)
    assert message.startswith(f"{path}:2: this record is a prompt; train_rm.py needs ")
    assert '{"prompt", "chosen", "rejected"}' in message
    assert message.endswith(' or {"text"}')
    with pytest.raises(InputError, match=r"holds no records; train_dpo\.py needs"):
        expect([], (Ranking,), path, "train_dpo.py")
    with pytest.raises(InputError, match=r"data\.jsonl: this record is a prompt"):
        expect([Prompt("made up")], (Text,), path, "train_sft.py")


@given(
    prompts=st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda prompts: len(set(prompts)) > 1),
    fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_split_keeps_every_record_once_and_prompts_together(prompts: list[int], fraction: float, seed: int) -> None:
    records = [Demonstration(f"prompt {prompt}", f"response {i}") for i, prompt in enumerate(prompts)]
    train, held = split_held_out(records, fraction, seed)
    assert train
    assert held
    assert Counter(train) + Counter(held) == Counter(records)
    assert not {record.prompt for record in train} & {record.prompt for record in held}
    assert train == [record for record in records if record in train], "the order is kept"
    smallest = min(Counter(prompts).values())
    assert len(held) <= max(smallest, round(fraction * len(records)))
    assert (train, held) == split_held_out(records, fraction, seed)


def test_split_takes_the_fraction_and_another_one_for_another_seed() -> None:
    records = [Text(f"text {i}") for i in range(1000)]
    splits = [split_held_out(records, 0.05, seed)[1] for seed in range(3)]
    assert [len(held) for held in splits] == [50, 50, 50]
    assert splits[0] != splits[1] != splits[2]


def test_split_without_prompts_keeps_equal_texts_together() -> None:
    pairs = [Ranking("", (f"good {i % 50}", "bad"), (1, 2)) for i in range(200)]
    train, held = split_held_out(pairs, 0.1, 0)
    assert len(held) == 20
    assert not set(train) & set(held)


def test_split_of_one_prompt_is_refused(tmp_path: Path) -> None:
    records = read(tmp_path, *[{"prompt": "p", "response": f"r{i}"} for i in range(5)])
    with pytest.raises(InputError, match=r"data\.jsonl: too few different records .* at least 2"):
        split_held_out(records)
    with pytest.raises(InputError, match="at least 2"):
        split_held_out([])


def test_labelled_pairs_use_each_text_about_equally_often() -> None:
    texts = [Text(f"good {i}", 1) for i in range(7)] + [Text(f"bad {i}", 0) for i in range(18)]
    for n in (None, 5, 100):
        pairs = labelled_pairs(texts, seed=3, n=n)
        assert len(pairs) == (n or 18)
        for side, of_class in ((0, "good"), (1, "bad")):
            uses = Counter(record.responses[side] for record in pairs)
            assert all(text.startswith(of_class) for text in uses)
            counts = [uses[text.text] for text in texts if text.text.startswith(of_class)]
            assert max(counts) - min(counts) <= 1
        assert {(record.prompt, record.ranks) for record in pairs} == {("", (1, 2))}
    assert labelled_pairs(texts, 3) == labelled_pairs(texts, 3) != labelled_pairs(texts, 4)


def test_labelled_pairs_need_both_labels(tmp_path: Path) -> None:
    only = read(tmp_path, {"text": "a", "label": 1}, {"text": "b", "label": 1})
    with pytest.raises(InputError, match=r"data\.jsonl: no text has label 0; both 0 and 1 are needed"):
        labelled_pairs(only, 0)
    with pytest.raises(InputError, match=r'data\.jsonl:2: has no "label"; add 1 for wanted or 0 for not'):
        labelled_pairs(read(tmp_path, {"text": "a", "label": 1}, {"text": "b"}), 0)
    with pytest.raises(InputError, match="no text has label 1"):
        labelled_pairs([], 0)


# --- examples ---


def test_example_counts_the_response_and_its_end(tokenizer: Tokenizer) -> None:
    example, cut = make_example(tokenizer, "ab", "cd", context=10)
    assert example == Example([*tokenizer.encode("abcd"), tokenizer.eot], start=2)
    assert not cut


def test_example_without_a_prompt_starts_with_end_of_text(tokenizer: Tokenizer) -> None:
    example, cut = make_example(tokenizer, "", "cd", context=10)
    assert example == Example([tokenizer.eot, *tokenizer.encode("cd"), tokenizer.eot], start=1)
    assert not cut


def test_what_was_drawn_keeps_its_tokens(tokenizer: Tokenizer) -> None:
    # "cd" in two pieces, as a policy may draw it, and cut at a limit: neither put together nor ended.
    prompt, response = TokenText("ab", tokenizer.encode("ab")), TokenText("cd", [99, 100])
    example, cut = make_example(tokenizer, prompt, response, context=10)
    assert example == Example([*tokenizer.encode("ab"), 99, 100], start=len(prompt.tokens))
    assert not cut


@pytest.mark.parametrize(
    ("prompt", "response", "context", "kept"),
    [
        ("abcd", "xy", 7, ("abcd", "xy.")),
        ("abcd", "xy", 6, ("bcd", "xy.")),
        ("abcd", "xy", 4, ("d", "xy.")),
        ("abcd", "xy", 3, ("d", "xy")),
        ("abcd", "xy", 2, ("d", "x")),
        ("", "xy", 4, (".", "xy.")),
        ("", "xy", 3, (".", "xy")),
        ("", "wxyz", 2, (".", "w")),
    ],
)
def test_too_long_loses_the_prompts_beginning_then_the_responses_end(
    tokenizer: Tokenizer, prompt: str, response: str, context: int, kept: tuple[str, str]
) -> None:
    example, cut = make_example(tokenizer, prompt, response, context)
    shown = ["." if i == tokenizer.eot else tokenizer.decode([i]) for i in example.tokens]
    assert ("".join(shown[: example.start]), "".join(shown[example.start :])) == kept
    assert cut == (len(prompt or ".") + len(response) + 1 > context)


@given(prompt=st.text("ab", max_size=20), response=st.text("xy", min_size=1, max_size=20), context=st.integers(2, 30))
def test_an_example_fits_and_never_loses_its_response(prompt: str, response: str, context: int) -> None:
    tokenizer = Tokenizer.train([], 257)
    example, cut = make_example(tokenizer, prompt, response, context)
    assert len(example.tokens) <= context
    assert 1 <= example.start < len(example.tokens)
    assert cut or len(example.tokens) == len(prompt or ".") + len(response) + 1
    assert not cut or len(example.tokens) == context, "no more is cut than must be"
    assert (prompt or tokenizer.decode([])).endswith(tokenizer.decode(example.tokens[: example.start]))
    assert response.startswith(tokenizer.decode(example.tokens[example.start :]))


def test_a_context_of_one_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="context 1 is too short"):
        make_example(tokenizer, "a", "b", 1)


def test_examples_from_counts_what_was_cut(tokenizer: Tokenizer) -> None:
    demonstrations = [Demonstration("a", "b"), Demonstration("a" * 50, "b"), Demonstration("a", "b" * 50)]
    examples, cut = examples_from(tokenizer, demonstrations, context=10)
    assert cut == 2
    assert examples == [make_example(tokenizer, one.prompt, one.response, 10)[0] for one in demonstrations]


# --- streams and batches ---


def test_token_stream_puts_end_of_text_between_texts(tokenizer: Tokenizer) -> None:
    stream = token_stream(tokenizer, iter(["ab", "c"]))
    eot = tokenizer.eot
    assert stream.dtype == torch.long
    assert stream.tolist() == [eot, *tokenizer.encode("ab"), eot, *tokenizer.encode("c"), eot]
    assert token_stream(tokenizer, []).tolist() == [eot]


def test_stream_batch_is_windows_and_a_pure_function_of_seed_and_step() -> None:
    stream = torch.arange(100, 130)
    tokens = stream_batch(stream, batch_size=400, block=8, seed=1, step=5)
    assert tokens.shape == (400, 9)
    assert (tokens[:, 1:] == tokens[:, :-1] + 1).all()
    assert set(tokens[:, 0].tolist()) == set(range(100, 122)), "every window comes, the last one too"
    random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(tokens, stream_batch(stream, 400, 8, 1, 5))
    assert not torch.equal(tokens, stream_batch(stream, 400, 8, 1, 6))
    assert not torch.equal(tokens, stream_batch(stream, 400, 8, 2, 5))
    assert not torch.equal(tokens, stream_batch(stream, 400, 8, 2, 4)), "the next seed is not the next step"


def test_stream_batch_needs_one_window() -> None:
    assert stream_batch(torch.arange(9), 2, 8, 0, 0).tolist() == [list(range(9))] * 2
    with pytest.raises(InputError, match="have 8 tokens, fewer than a window of 9; give more text or a shorter"):
        stream_batch(torch.arange(8), 2, 8, 0, 0)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=200),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_an_epoch_holds_every_index_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    steps = max(1, len(lengths) // batch_size)
    batches = [batch_indices(lengths, batch_size, seed, epoch * steps + i) for i in range(steps)]
    seen = [i for batch in batches for i in batch]
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(range(len(lengths)))
    if len(lengths) < batch_size:
        assert sorted(seen) == list(range(len(lengths)))
    else:
        assert {len(batch) for batch in batches} == {batch_size}
        assert len(lengths) - len(seen) == len(lengths) % batch_size


def test_batch_indices_is_a_pure_function_of_seed_and_step() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(1, 300) for _ in range(1003)]
    forward = [batch_indices(lengths, 10, 7, step) for step in range(250)]  # two epochs and a half
    random.seed(1)
    backward = [batch_indices(lengths, 10, 7, step) for step in reversed(range(250))]
    assert forward == backward[::-1]
    assert forward[:100] != forward[100:200], "another order every epoch"
    assert {frozenset(batch) for batch in forward[:100]} != {frozenset(batch) for batch in forward[100:200]}
    assert forward[0] != batch_indices(lengths, 10, 8, 0)
    left_out = [set(range(1003)) - {i for batch in forward[j : j + 100] for i in batch} for j in (0, 100)]
    assert left_out[0] != left_out[1], "not always the same ones are left out"
    # What a caller does with a batch must not change the next call.
    first = list(forward[0])
    batch_indices(lengths, 10, 7, 0).clear()
    assert batch_indices(lengths, 10, 7, 0) == first


def test_batches_waste_little_on_padding() -> None:
    rng = random.Random(0)
    lengths = [min(512, int(rng.lognormvariate(4, 1)) + 2) for _ in range(5000)]

    def padding(batches: list[list[int]]) -> float:
        room = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        return 1 - sum(lengths[i] for batch in batches for i in batch) / room

    sorted_by_us = [batch_indices(lengths, 16, 0, step) for step in range(5000 // 16)]
    at_random = [[rng.randrange(5000) for _ in range(16)] for _ in range(300)]
    assert padding(sorted_by_us) < 0.10
    assert padding(at_random) > 0.5, "the lengths are broad enough for the first line to mean something"
    # Short and long batches come mixed: the first tenth of an epoch is about as long as the whole.
    first = [lengths[i] for batch in sorted_by_us[:31] for i in batch]
    assert 0.6 < (sum(first) / len(first)) / (sum(lengths) / len(lengths)) < 1.6


@pytest.mark.parametrize(("lengths", "batch_size"), [([], 4), ([1, 2], 0)])
def test_no_batch_from_nothing(lengths: list[int], batch_size: int) -> None:
    with pytest.raises(ValueError, match="no batch of"):
        batch_indices(lengths, batch_size, 0, 0)


def test_collate_pads_on_the_right() -> None:
    batch = collate([Example([5, 6, 7, 9], 2), Example([8, 9], 1)], fill=9)
    assert batch.tokens.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.tokens.dtype == torch.long
    assert batch.mask.dtype == batch.response_mask.dtype == torch.bool


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6))
def test_collate_loses_nothing_even_if_the_fill_is_a_real_token(sizes: list[tuple[int, int]]) -> None:
    examples = [Example(list(range(before + after)), before) for before, after in sizes]
    batch = collate(examples, fill=0)
    assert batch.tokens.shape == (len(sizes), max(map(sum, sizes)))
    for row, example in enumerate(examples):
        assert batch.tokens[row][batch.mask[row]].tolist() == example.tokens
        assert batch.tokens[row][batch.response_mask[row]].tolist() == example.tokens[example.start :]


# --- packing ---


def test_pack_by_hand() -> None:
    three = [Example([1, 2, 5, 9], 2), Example([1, 2, 6], 2), Example([1, 2, 5, 7, 9], 2)]
    packed = pack([three, [Example([3], 0)]], fill=9)
    assert packed.tokens.tolist() == [[1, 2, 5, 9, 6, 5, 7, 9], [3, 9, 9, 9, 9, 9, 9, 9]]
    assert packed.positions.tolist()[0] == [0, 1, 2, 3, 2, 2, 3, 4]
    assert packed.positions.tolist()[1][0] == 0
    assert packed.ends.tolist() == [3, 4, 7, 8]
    assert packed.predictors.tolist() == [1, 2, 1, 1, 5, 6]  # each after the common 1, 2, and after its own tokens
    assert packed.targets.tolist() == [5, 9, 6, 5, 7, 9]
    assert packed.owners.tolist() == [0, 0, 1, 2, 2, 2]
    assert packed.attend.shape == (2, 1, 8, 8)
    looks = packed.attend[0, 0].int().tolist()
    assert looks == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize(
    ("sequences", "row"),
    [
        ([[1, 2, 3], [4, 5]], [1, 2, 3, 4, 5]),  # nothing in common
        ([[1, 2], [1, 2, 3, 4]], [1, 2, 2, 3, 4]),  # one is the beginning of the other: both have an end of their own
        ([[1, 2, 3, 4], [1, 2]], [1, 2, 3, 4, 2]),
        ([[1, 2, 3], [1, 2, 3]], [1, 2, 3, 3]),
        ([[1], [1, 2]], [1, 1, 2]),
        ([[1, 2, 3]], [1, 2, 3]),
        ([[1, 2, 7, 8], [1, 2, 7, 9], [1, 2, 6, 9]], [1, 2, 7, 8, 7, 9, 6, 9]),  # common to all, not to some
    ],
)
def test_what_all_share_stands_once(sequences: list[list[int]], row: list[int]) -> None:
    packed = pack([[Example(sequence, 0) for sequence in sequences]], fill=0)
    assert packed.tokens.tolist() == [row]


tokens_drawn = st.lists(st.integers(0, 3), min_size=1, max_size=6)  # few tokens, so that many begin alike


@given(groups=st.lists(st.lists(tokens_drawn, min_size=1, max_size=4), min_size=1, max_size=4), fill=st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_a_packed_token_sees_its_own_sequence_and_nothing_else(groups: list[list[list[int]]], fill: int) -> None:
    # Responses begin anywhere: at once, within what all share, at the last token.
    starts = [[(sum(sequence) + k) % len(sequence) for k, sequence in enumerate(group)] for group in groups]
    packed = pack([[Example(*one) for one in zip(group, own)] for group, own in zip(groups, starts)], fill)
    _, width = packed.tokens.shape
    counted = list(zip(packed.owners.tolist(), packed.predictors.tolist(), packed.targets.tolist()))
    expected, flat_starts = [], [start for own in starts for start in own]
    assert packed.attend.any(-1).all(), "padding sees itself, or softmax would be NaN"
    ends = iter(packed.ends.tolist())
    for b, group in enumerate(groups):
        real = torch.zeros(width, dtype=torch.bool)
        for sequence in group:
            row, column = divmod(next(ends), width)
            assert row == b
            own = packed.attend[b, 0, column].nonzero().flatten()
            real[own] = True
            assert packed.tokens[b, own].tolist() == sequence
            assert packed.positions[b, own].tolist() == list(range(len(sequence)))
            n = len(packed.ends) - len(flat_starts)
            first = max(flat_starts.pop(0), 1)
            expected += [(n, b * width + int(own[at - 1]), sequence[at]) for at in range(first, len(sequence))]
            for at, where in enumerate(own.tolist()):  # and each of its tokens sees what came before it
                assert packed.attend[b, 0, where].nonzero().flatten().tolist() == own[: at + 1].tolist()
        assert not packed.attend[b, 0, real][:, ~real].any(), "padding is seen by nobody"
        assert not real[real.sum() :].any(), "padding stands on the right"
        assert (packed.tokens[b, ~real] == fill).all()
    assert next(ends, None) is None
    assert counted == expected, "a response token is predicted by the token before it in its own sequence"


def test_upload_asks_for_pinned_memory_and_does_not_wait(monkeypatch):
    """What a GPU would be asked, with the questions written down: there is none here."""
    asked = []

    class Here(torch.Tensor):
        def pin_memory(self):
            asked.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            asked.append((torch.device(device).type, non_blocking))
            return self

    x = torch.ones(3).as_subclass(Here)
    upload(x, torch.device("cuda"))
    assert asked == ["pinned", ("cuda", True)]
    asked.clear()
    upload(x, torch.device("cpu"))
    upload(torch.ones(0).as_subclass(Here), torch.device("cuda"))  # no memory to be pinned
    assert asked == [("cpu", False), ("cuda", False)]
