"""The tokenizer: equal to tiktoken and to Hugging Face's tokenizers, loses nothing, and refuses what it cannot read."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer

from minirlhf import InputError
from minirlhf.data.tokenizer import SPLIT_PATTERN, Tokenizer

CORPUS = [
    "My order hasn't arrived. What should I do? I'm sorry to hear that; please check your tracking number.",
    "Where is it?\n\nYou're told we'll look, they've looked, I'd look: 123 times, 4567 times!!! ...",
    "Привет, мир! 你好，世界。 naïve café, ñandú — “quotes” 👩‍👩‍👧‍👦 🙂 def f(x):\n    return x ** 2\t# tabs",
    "aaaa aaa aa a ababab abab   spaces    and more     spaces",
] * 4

# Whitespace, contractions, digits and repetitions, where the split pattern and the order of merging can go wrong.
PIECES = [
    "a",
    "b",
    "aa",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'ll",
    "'LL",
    "’",
    "order",
    " order",
    "12",
    "½",
    "é",
    "你",
    "🙂",
]
tricky = st.lists(st.sampled_from([*PIECES, "\u3000", "\x85", "\x1c", "\0", "!?", "<|endoftext|>"])).map("".join)
anything = st.text(st.characters(exclude_categories=["Cs"])) | tricky


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 400)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFTokenizer:
    return HFTokenizer.from_file(str(folder / "tokenizer.json"))


# --- text to ids and back ---


@given(text=anything)
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips_and_never_holds_end_of_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(text=anything)
@settings(max_examples=300, deadline=None)
def test_same_ids_as_hugging_face(tokenizer: Tokenizer, theirs: HFTokenizer, text: str) -> None:
    text = text.replace(Tokenizer.EOT, "")  # the one string that they read as the special token, and we as text
    assert theirs.encode(text).ids == tokenizer.encode(text)


@given(seed=st.integers(0, 10**6), alphabet=st.sampled_from(["a", "ab", "abc", "aé", " a", "ab \n"]))
@settings(max_examples=40, deadline=None)
def test_same_ids_as_hugging_face_for_other_vocabularies(
    tmp_path_factory: pytest.TempPathFactory, seed: int, alphabet: str
) -> None:
    """Few letters and many merges: the merges found again from the ranks must be those that were learned."""
    rng = random.Random(seed)
    texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(60))) for _ in range(5)]
    ours, path = Tokenizer.train(texts, 257 + rng.randrange(40)), tmp_path_factory.mktemp("small")
    ours.save(path)
    theirs = HFTokenizer.from_file(str(path / "tokenizer.json"))
    for text in [*texts, "".join(rng.choice(alphabet) for _ in range(100))]:
        assert theirs.encode(text).ids == ours.encode(text)
    assert Tokenizer.load(path) == ours


def test_every_character_has_the_same_ids_in_hugging_face(tokenizer: Tokenizer, theirs: HFTokenizer) -> None:
    """Both libraries must agree on what a letter, a digit and a space is."""
    # Only assigned ones: the two libraries may know different versions of Unicode.
    chars = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    assert len(chars) > 140_000
    for start in range(0, len(chars), 1000):
        text = "".join(f"a{c}1 {c}\n" for c in chars[start : start + 1000])
        assert theirs.encode(text).ids == tokenizer.encode(text)


def test_text_cannot_spell_end_of_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("before<|endoftext|>after")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "before<|endoftext|>after"


def test_training_on_the_spelled_token_does_not_make_it_special() -> None:
    tokenizer = Tokenizer.train(["<|endoftext|>" * 50], 400)
    assert tokenizer.eot == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode("x<|endoftext|>")) == "x<|endoftext|>"


def test_decode_drops_end_of_text_and_marks_broken_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi")
    assert tokenizer.decode([tokenizer.eot, *ids, tokenizer.eot]) == "hi"
    half = Tokenizer.train([], 257).encode("é")[:1]  # the first of its two bytes
    assert Tokenizer.train([], 257).decode([*half, *half]) == "\ufffd\ufffd"


@pytest.mark.parametrize("bad", [-1, 400, 10**6])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([0, bad])


def test_encode_batch_is_encode_of_each(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(CORPUS) == [tokenizer.encode(text) for text in CORPUS]
    assert tokenizer.encode_batch([]) == []


# --- training ---


def test_vocabulary_is_bytes_then_merges_then_end_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 400 == tokenizer.encoding.n_vocab
    assert tokenizer.eot == 399 == tokenizer.encoding.eot_token
    lengths = [len(tokenizer.encoding.decode_single_token_bytes(i)) for i in range(399)]
    assert set(lengths[:256]) == {1}
    assert min(lengths[256:]) == 2


def test_training_is_deterministic_and_learns_what_is_frequent(tokenizer: Tokenizer) -> None:
    again = Tokenizer.train(iter(CORPUS), 400)
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again.fingerprint == tokenizer.fingerprint
    assert len(tokenizer.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    assert Tokenizer.train(["abab abab"], 258).encode("ab") == [256]


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    tokenizer = Tokenizer.train(["ab"], 5000)
    assert tokenizer.vocab_size == 258
    assert Tokenizer.train([], 300).vocab_size == 257


def test_vocab_size_must_hold_the_bytes() -> None:
    with pytest.raises(InputError, match="at least 257"):
        Tokenizer.train(CORPUS, 256)


def test_different_vocabularies_differ(tokenizer: Tokenizer) -> None:
    other = Tokenizer.train(CORPUS, 399)
    assert other != tokenizer
    assert other.fingerprint != tokenizer.fingerprint
    assert tokenizer != "a tokenizer"
    same_size = [Tokenizer.train([word], 258) for word in ("ab", "ba")]
    assert same_size[0] != same_size[1]
    assert same_size[0].fingerprint != same_size[1].fingerprint
    assert len(tokenizer.fingerprint) == 16
    int(tokenizer.fingerprint, 16)


# --- GPT-2's files ---


def test_gpt2_format_files_give_the_same_ids_in_tiktoken(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """A small vocab.bpe and encoder.json, as GPT-2 published them, read by tiktoken's own loader."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    (tmp_path / "encoder.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    ranks = data_gym_to_mergeable_bpe_ranks(str(tmp_path / "vocab.bpe"), str(tmp_path / "encoder.json"))
    published = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    reference = tiktoken.Encoding("published", pat_str=published, mergeable_ranks=ranks, special_tokens={})
    assert Tokenizer(ranks) == tokenizer

    @given(text=anything)
    @settings(max_examples=300, deadline=None)
    def equal(text: str) -> None:
        assert tokenizer.encode(text) == reference.encode_ordinary(text)

    equal()


def test_gpt2_wraps_what_tiktoken_calls_gpt2(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tokenizer.encoding
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": stand_in}[name])
    assert Tokenizer.gpt2() == tokenizer


def test_the_split_pattern_is_the_one_tiktoken_has_for_gpt2() -> None:
    from tiktoken_ext import openai_public

    assert openai_public.r50k_pat_str == SPLIT_PATTERN


def test_gpt2_without_its_files_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(path: str) -> bytes:
        raise ConnectionError("no network\nat all")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", offline)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR") as error:
        Tokenizer.gpt2()
    assert "\n" not in str(error.value)


# --- files ---


def test_save_and_load(tokenizer: Tokenizer, folder: Path) -> None:
    loaded = Tokenizer.load(folder)
    assert loaded == tokenizer
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.eot, loaded.vocab_size) == (tokenizer.eot, tokenizer.vocab_size)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("config", [None, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}])
def test_transformers_opens_the_folder(tokenizer: Tokenizer, tmp_path: Path, config: dict | None) -> None:
    tokenizer.save(tmp_path)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(CORPUS) + " isn 't , this . spaced ?"
    assert auto(text)["input_ids"] == tokenizer.encode(text)
    assert auto.decode(tokenizer.encode(text)) == text
    assert auto.eos_token_id == auto.bos_token_id == tokenizer.eot
    assert len(auto) == tokenizer.vocab_size
    # And what transformers saves, we open.
    auto.save_pretrained(tmp_path / "theirs")
    assert Tokenizer.load(tmp_path / "theirs") == tokenizer


def test_merges_written_as_strings_load_too(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """As in older files, e.g. the one published with GPT-2."""
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path) == tokenizer


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, "no such file"),
        (b"", "copy or save it again"),
        (b'{"model": {"type": "BPE", "vocab"', "copy or save it again"),
        (b"\x80\x04\x95\xff", "copy or save it again"),
        (b"[" * 100_000, "copy or save it again"),
        (b"[]", "not the content of a tokenizer.json"),
        (b'{"model": {}}', "not the content of a tokenizer.json"),
    ],
)
def test_a_missing_or_broken_file_is_named(tmp_path: Path, raw: bytes | None, words: str) -> None:
    if raw is not None:
        (tmp_path / "tokenizer.json").write_bytes(raw)
    _refused(tmp_path, words)


def test_a_folder_in_place_of_the_file_and_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    _refused(tmp_path, "cannot be read")
    (tmp_path / "file").write_text("")
    _refused(tmp_path / "file", "no such file")


@pytest.fixture
def older(folder: Path, tmp_path: Path) -> Path:
    """The same tokenizer as GPT-2's own two files hold it."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + lines, "utf-8")
    return tmp_path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_vocab_and_merges_load_too(tokenizer: Tokenizer, older: Path, end: str) -> None:
    merges = older / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", end.encode()))
    assert Tokenizer.load(older) == tokenizer
    (older / "tokenizer_config.json").write_text('{"model_max_length": 1024}')  # as published with GPT-2
    assert Tokenizer.load(older) == tokenizer
    (older / "tokenizer.json").write_text("{")  # the newer file counts where there is one
    _refused(older, "not valid JSON")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vocab.json", b"{", "not valid JSON"),
        ("vocab.json", b"[]", "not the content of a vocab.json"),
        ("vocab.json", b"{}", "not its last id"),
        ("vocab.json", b'{"<|endoftext|>": 0}', "not 256 bytes"),
        ("merges.txt", b"\xff\xfe", "not valid UTF-8"),
        ("merges.txt", b"", "order of its ids"),
        ("merges.txt", b"#version: 0.2\nonly\n", "not the content of a vocab.json"),
        ("merges.txt", None, "no such file; name a folder that holds a tokenizer.json, or vocab.json and merges.txt"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b'{"add_prefix_space": true}', "splits text in another way"),
        ("tokenizer_config.json", b'{"add_bos_token": true}', "adds tokens to a text"),
    ],
)
def test_broken_vocab_and_merges_are_named(older: Path, name: str, content: bytes | None, words: str) -> None:
    (older / name).unlink(missing_ok=True)
    if content is not None:
        (older / name).write_bytes(content)
    unread = "not valid" in words or "no such file" in words
    _refused(older, words, name if unread else "vocab.json")


def _change(where: str, value: object) -> object:
    """A function that sets one entry, e.g. "model.type", in the content of a tokenizer.json."""

    def change(content: dict) -> None:
        *path, last = where.split(".")
        for key in path:
            content = content[key]
        content[last] = value

    return change


def _swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _swap_ids(content: dict) -> None:
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[-2], list(vocab)[-3]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _end_of_text_first(content: dict) -> None:
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: (i + 1) % len(vocab) for token, i in vocab.items()}
    content["added_tokens"][0]["id"] = 0


PAD = {"id": 400, "content": "[PAD]", "special": True}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}, {"Sequence": {"id": "A"}}]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_change("model.type", "WordPiece"), "WordPiece, not BPE"),
        (_change("model.ignore_merges", True), "ignore_merges"),
        (_change("model.dropout", 0.1), "dropout"),
        (_change("normalizer", {"type": "NFC"}), "changes the text"),
        (_change("pre_tokenizer", None), "splits text in another way"),
        (_change("pre_tokenizer", {"type": "Metaspace"}), "splits text in another way"),
        (_change("pre_tokenizer.add_prefix_space", True), "splits text in another way"),
        (_change("pre_tokenizer.use_regex", False), "splits text in another way"),
        (_change("post_processor", TEMPLATE), "adds tokens"),
        (_change("post_processor", {"type": "RobertaProcessing"}), "adds tokens"),
        (_change("added_tokens", []), "special tokens are none"),
        (lambda content: content["added_tokens"].append(PAD), "PAD"),
        (_end_of_text_first, "not its last id"),
        (lambda content: content["model"]["vocab"].pop("a"), "not its last id"),
        (_swap_merges, "order of its ids"),
        (_swap_ids, "order of its ids"),
        (lambda content: content["model"]["merges"].pop(), "order of its ids"),
        (lambda content: content["model"].pop("merges"), "not the content of a tokenizer.json"),
    ],
)
def test_other_tokenizers_are_refused_by_name(folder: Path, tmp_path: Path, change, words: str) -> None:
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    _refused(tmp_path, words)


def _refused(folder: Path, words: str, name: str = "tokenizer.json") -> None:
    with pytest.raises(InputError) as error:
        Tokenizer.load(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / name}: ")
    assert words in message
    assert "; " in message, "a cure follows"
    assert "\n" not in message
