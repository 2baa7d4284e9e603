"""Text to token ids and back: a thin wrapper over ``tiktoken``, with a vocabulary of its own or GPT-2's.

Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) over bytes, as in GPT-2 (Radford et
al. 2019, section 2.2): a text is split into words by a regular expression, every word starts as its bytes, and the
adjacent pair that was learned first is merged until none is left. There is no unknown token: any string round-trips.

One id is not made of bytes: end-of-text. It closes every response and every training text, and it is also what
GPT-2 puts before the first word. No text can spell it: ``encode("<|endoftext|>")`` gives ordinary tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from minirlhf import InputError

# GPT-2's way to cut text into words, written so that it runs fast (tiktoken's form of the published expression):
# contractions, letters, digits, other signs, each with the space before it; then what white space remains.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# GPT-2's files spell bytes as visible characters: printable ones as themselves, the others from U+0100 on. Printable
# bytes first is also the order of the first 256 ids.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_TO_CHAR = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_CHAR_TO_BYTE = {char: byte for byte, char in _BYTE_TO_CHAR.items()}


class Tokenizer:
    """Byte-level BPE with one special token.

    Attributes:
        encoding: the ``tiktoken.Encoding`` that does the work.
        eot: id of the end-of-text token, always the last one.
        vocab_size: number of ids, end-of-text included.
    """

    EOT = "<|endoftext|>"

    def __init__(self, ranks: dict[bytes, int], name: str = "minirlhf") -> None:
        """Wrap merge ranks: a dict from a token's bytes to its id, where the lower id was merged first."""
        self.eot = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._ranks = ranks
        self.encoding = tiktoken.Encoding(
            name,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={self.EOT: self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    # --- where a vocabulary comes from ---

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary from texts: 256 bytes, the most frequent merges, end-of-text.

        The same texts give the same vocabulary. If they are too small to fill ``vocab_size``, it is smaller.

        Args:
            texts: what to learn from.
            vocab_size: number of ids wanted, at least 257.

        Raises:
            InputError: ``vocab_size`` leaves no room for the bytes and end-of-text.
        """
        if vocab_size < 257:
            raise InputError(f"vocab size {vocab_size} is too small; give at least 257 (256 bytes and end-of-text)")
        learner = HFTokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=list(_CHAR_TO_BYTE), special_tokens=[], show_progress=False
        )
        learner.train_from_iterator(texts, trainer)
        # The learner's own ids start with its sorted alphabet; ours follow GPT-2's order, then the order of merging.
        ranks = {bytes([byte]): i for i, byte in enumerate(_PRINTABLE + _OTHERS)}
        for left, right in json.loads(learner.to_str())["model"]["merges"]:
            ranks[_to_bytes(left + right)] = len(ranks)
        return cls(ranks)

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """GPT-2's own vocabulary of 50,257 ids, from tiktoken's cache or, the first time, its download.

        Raises:
            InputError: the files are neither in the cache nor to be had.
        """
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise InputError(
                f"GPT-2's vocabulary cannot be had ({type(error).__name__}); connect to the network, or set "
                "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copy of it"
            ) from error
        return cls({encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}, name="gpt2")

    # --- text to ids and back ---

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. End-of-text is never among them, whatever the text says."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        return [self.encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; end-of-text is dropped, bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = list(ids)
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size}")
        return self.encoding.decode([i for i in ids if i != self.eot], errors="replace")

    # --- files ---

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer`` opens.

        Opened there, it gives the same ids but for one thing: it reads a spelled-out ``<|endoftext|>`` as the token.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        end_of_text = {"id": self.eot, "content": self.EOT, "special": True, "normalized": False}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end_of_text | {"single_word": False, "lstrip": False, "rstrip": False}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {_to_chars(token): i for token, i in self._ranks.items()} | {self.EOT: self.eot},
                "merges": [[_to_chars(left), _to_chars(right)] for left, right in _merges(self._ranks)],
            },
        }
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": self.EOT,
            "eos_token": self.EOT,
            "unk_token": self.EOT,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        for name, what in (("tokenizer.json", content), ("tokenizer_config.json", config)):
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_text(json.dumps(what, ensure_ascii=False), encoding="utf-8")
            temporary.replace(folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``: ours, or that of any folder with a GPT-2 style tokenizer.

        Where there is none, GPT-2's own two files do as well: ``vocab.json`` and ``merges.txt``.

        Raises:
            InputError: a file is missing, broken, or of another kind of tokenizer.
        """
        path, older = Path(folder) / "tokenizer.json", Path(folder) / "vocab.json"
        if older.is_file() and not path.exists():
            path = older
        try:
            return cls(_ranks_from(_older_content(path) if path is older else _read(path, json.loads)))
        except _Unfit as error:
            raise InputError(f"{path}: not a tokenizer like GPT-2's: {error}; use one that is") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not the content of a {path.name}; copy or save it again") from error

    # --- identity ---

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._ranks == other._ranks

    def __hash__(self) -> int:
        return int(self.fingerprint, 16)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that two tokenizers share only if they give the same ids."""
        digest = hashlib.sha256()
        for token in sorted(self._ranks, key=self._ranks.__getitem__):
            digest.update(len(token).to_bytes(4, "big") + token)
        return digest.hexdigest()[:16]


def tokenizer_named(name: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """What a command line names: train (on the texts), gpt2, or a folder with a tokenizer.json."""
    if name == "gpt2":
        return Tokenizer.gpt2()
    return Tokenizer.train(texts, vocab_size) if name == "train" else Tokenizer.load(Path(name))


class TokenText(str):
    """Decoded text that still carries the tokens it was decoded from.

    Decoding is not always undone by encoding: a policy may draw "ord" + "er" where the tokenizer would write "order".
    A reward model must score what was drawn, so the tokens travel with the text; functions that ask for text read it
    as the plain string it also is.

    Attributes:
        tokens: the ids; of a response, those drawn, with the end-of-text that the string does not show.
    """

    tokens: list[int]

    def __new__(cls, text: str, tokens: list[int]) -> TokenText:
        self = super().__new__(cls, text)
        self.tokens = tokens
        return self


class _Unfit(ValueError):
    """A tokenizer.json of a kind that tiktoken cannot reproduce."""


def _to_chars(token: bytes) -> str:
    return "".join(_BYTE_TO_CHAR[byte] for byte in token)


def _to_bytes(chars: str) -> bytes:
    return bytes(_CHAR_TO_BYTE[char] for char in chars)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each longer token is merged from, in order of rank.

    tiktoken keeps only the merged bytes. Merging a token's own bytes with all lower ranks leaves its two parts.
    """
    return [_parts(token, rank, ranks) for token, rank in sorted(ranks.items(), key=lambda x: x[1]) if len(token) > 1]


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
        if found >= rank:
            raise _Unfit(f"no lower merges lead to token {rank}")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _read(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        beside = "a tokenizer.json, or vocab.json and merges.txt"
        raise InputError(f"{path}: no such file; name a folder that holds {beside}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check what it is and who may read it") from error
    except (ValueError, RecursionError) as error:
        kind = "JSON" if parse is json.loads else "UTF-8"
        raise InputError(f"{path}: cut off or corrupt, not valid {kind}; copy or save it again") from error


def _older_content(vocab: Path) -> dict:
    """What ``vocab.json`` and the files beside it say, as a tokenizer.json would."""
    ids, config = _read(vocab, json.loads), vocab.with_name("tokenizer_config.json")
    merges = _read(vocab.with_name("merges.txt"), bytes.decode).replace("\r\n", "\n").split("\n")
    options = _read(config, json.loads) if config.is_file() else {}
    if options.get("add_bos_token"):
        raise _Unfit("it adds tokens to a text")
    eot = ids.pop(Tokenizer.EOT, None)
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": options.get("add_prefix_space", False)},
        "post_processor": None,
        "added_tokens": [{"content": Tokenizer.EOT, "id": eot}],
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": [pair for pair in merges if pair and not pair.startswith("#version")],
        },
    }


def _ranks_from(content: dict) -> dict[bytes, int]:
    """Ranks from the content of a tokenizer.json, which must mean exactly what tiktoken makes of them."""
    model, before, after = content["model"], content["pre_tokenizer"] or {}, content["post_processor"] or {}
    if model["type"] != "BPE":
        raise _Unfit(f"its model is {model['type']}, not BPE")
    if content["normalizer"]:
        raise _Unfit("it changes the text before it splits it")
    if before.get("type") != "ByteLevel" or before["add_prefix_space"] or not before.get("use_regex", True):
        raise _Unfit("it splits text in another way")
    template = after.get("single", [])  # transformers writes a template that adds nothing
    if after.get("type", "ByteLevel") not in ("ByteLevel", "TemplateProcessing") or len(template) > 1:
        raise _Unfit("it adds tokens to a text")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(option):
            raise _Unfit(f"its option {option} is set")
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    if set(added) != {Tokenizer.EOT}:
        raise _Unfit(f"its special tokens are {', '.join(map(json.dumps, added)) or 'none'}, not just {Tokenizer.EOT}")
    vocab = model["vocab"] | added
    if vocab.pop(Tokenizer.EOT) != len(vocab):
        raise _Unfit(f"{Tokenizer.EOT} is not its last id")
    ranks = dict(sorted(((_to_bytes(chars), i) for chars, i in vocab.items()), key=lambda x: x[1]))
    if list(ranks.values()) != list(range(len(ranks))) or sum(len(token) == 1 for token in ranks) != 256:
        raise _Unfit("its ids are not 256 bytes and then one for each merge")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if [(_to_bytes(left), _to_bytes(right)) for left, right in pairs] != _merges(ranks):
        raise _Unfit("its merges are not in the order of its ids")
    return ranks
