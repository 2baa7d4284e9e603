"""GPT-2 checkpoints in and out: Hugging Face's files, from a folder or from the hub.

    config.json                       the network's shape
    model.safetensors                 the weights, under Hugging Face's names; what is large comes in parts, which
    model.safetensors.index.json      lists: {"weight_map": {tensor: file}}

A run's folder holds the first two, so that transformers opens it as it lies; anybody's GPT-2 comes in the same way.
Weights are never unpickled. The rows that pad our vocabulary (`GPTConfig.padded_vocab_size`) are not stored.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minirlhf import InputError
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, named_weights

# OpenAI's five, which the hub knows by a bare name; all others are ORG/NAME.
GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
INDEX = "model.safetensors.index.json"
WANTED = ["*.safetensors", INDEX, "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]

# Their GPT-2 keeps OpenAI's Conv1D: these weights are stored as (in, out), the transpose of nn.Linear's (out, in).
_TRANSPOSED = ("c_attn.weight", "attn_proj.weight", "c_fc.weight", "mlp_proj.weight")
_NAMES = {"c_attn": "attn.c_attn", "attn_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}


def _hf_name(name: str) -> str:
    """Our parameter name to Hugging Face's: h.0.attn_proj.weight -> transformer.h.0.attn.c_proj.weight."""
    if name == "score.weight":
        return name
    parts = name.removeprefix("trunk.").split(".")
    return ".".join(["transformer", *(_NAMES.get(part, part) for part in parts)])


# --- out --------------------------------------------------------------------------------------------------------------


def save_model(model: GPT | ScalarModel, folder: Path, eot: int) -> None:
    """Write `config.json` and `model.safetensors` as Hugging Face's GPT-2, each under a temporary name first."""
    scalar = isinstance(model, ScalarModel)
    config = {
        "architectures": ["GPT2ForSequenceClassification" if scalar else "GPT2LMHeadModel"],
        "model_type": "gpt2",
        **asdict(model.config),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": "float32",
    }
    if scalar:  # no pad_token_id: theirs would take end-of-text for padding and score the token before it
        config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    weights = {}
    for name, tensor in named_weights(model).items():
        weights[_hf_name(name)] = (tensor.t() if name.endswith(_TRANSPOSED) else tensor).contiguous().cpu().float()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    write_tensors(weights, partial, {"format": "pt"})
    partial.replace(folder / "model.safetensors")
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(folder / "config.json")


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file with the mode of any new file: safetensors gives its own 0600, whatever the umask."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


# --- in ---------------------------------------------------------------------------------------------------------------


def find_model(name: str | Path) -> Path:
    """The folder of a model that a command line names: a local one, or the hub's, downloaded once and then cached.

    A local folder wins. Only `GPT2`'s five and ORG/NAME, where ORG is no folder here (and not `runs`, where ours
    are), are looked for on the hub; whatever else is no folder is left to whoever opens it. Without a network what
    was downloaded before is used.

    Raises:
        InputError: a name of the hub, and huggingface_hub is absent, the hub has or gives no such model or cannot be
            reached, or the model is not a GPT-2 in safetensors.
    """
    folder = Path(name)
    if folder.exists() or not _is_hub_name(folder.as_posix() if isinstance(name, Path) else name):
        return folder
    name = str(name)
    # The config first: whoever names another architecture should not download all of it to learn that.
    _read_config(_download(name, ["config.json"]))
    folder = _download(name, ["config.json", *WANTED])
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{name}: holds no weights in safetensors format, and pickled ones are refused (loading one can run any "
            "code); choose another model, or convert it and give its folder"
        )
    return folder


def _is_hub_name(name: str) -> bool:
    organisation, slash, _ = name.partition("/")
    if not slash:
        return name in GPT2
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII)
    return named is not None and organisation != "runs" and not Path(organisation).exists()


def _download(name: str, files: list[str]) -> Path:
    """A snapshot of some of a repository's files, in huggingface_hub's cache."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise InputError(
            f"{name}: no such folder, and models of the hub need huggingface_hub; pip install 'minirlhf[hf]', or give "
            "a local folder"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except errors.GatedRepoError:
        why = "the hub gives it only to those who were granted access; log in there"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        why = "no such folder, and the hub has no such model for you; check the name"
    except errors.LocalEntryNotFoundError:
        why = "no such folder, and the hub cannot be reached, nor is all of it in its cache; connect to the network"
    except Exception as error:  # of the libraries below it: HTTP, TLS, a full disk
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        why = f"cannot be downloaded ({said}); try again"
    raise InputError(f"{name}: {why}, or give a local folder")


def load_model(folder: str | Path, *, scalar: bool = False) -> GPT | ScalarModel:
    """Read a model from a folder in Hugging Face's GPT-2 layout: one of our runs, or any GPT-2.

    Weights in half precision become float32. They are read one tensor at a time, straight into the model: beside the
    model itself no more than one tensor is in memory.

    Args:
        folder: holds `config.json` and `model.safetensors`, or the latter's parts and their index.
        scalar: True = a `ScalarModel`, whose folder must hold a score head; False = a `GPT`, whose folder must not
            (a reward model is no policy).

    Raises:
        InputError: a file is missing, cut off, of another architecture, or its tensors do not fit the config.
    """
    folder = Path(folder)
    config = _read_config(folder)
    files = _find_tensors(folder)  # {name in the file: file}
    # OpenAI's own files lack the "transformer." prefix; causal-mask buffers and the tied head carry nothing new.
    stored = {n if n == "score.weight" or n.startswith("transformer.") else f"transformer.{n}": n for n in files}
    if scalar and "score.weight" not in stored:
        raise InputError(
            f"{folder}: a language model, not a reward model (no score.weight); train one with train_rm.py"
        )
    if not scalar and "score.weight" in stored:
        raise InputError(
            f"{folder}: a reward model, not a language model; name a run of train_sft, train_ppo or train_dpo"
        )
    with torch.device("meta"):  # no memory, and no random numbers, for weights that are about to be overwritten
        model = ScalarModel(config) if scalar else GPT(config)
    wanted = {_hf_name(name): name for name in named_weights(model)}
    for name in wanted:
        if name not in stored:
            listed = folder / ("model.safetensors" if (folder / "model.safetensors").is_file() else INDEX)
            raise InputError(f"{listed}: tensor {name} is missing; save the model again")
    model.to_empty(device="cpu")
    (model.trunk if scalar else model).wte.weight.data[config.vocab_size :] = 0.0
    weights = named_weights(model)
    for theirs, ours in wanted.items():
        path = files[stored[theirs]]
        with _opened(path) as file:  # anew for each: what was read of a file stays in memory until it is closed
            tensor = file.get_tensor(stored[theirs])
        turned = ours.endswith(_TRANSPOSED) and tensor.dim() == 2
        _fill(weights[ours], tensor.t() if turned else tensor, f"{path}: {theirs}")
    return model


def _fill(weight: Tensor, stored: Tensor, what: str) -> None:
    if stored.shape != weight.shape:
        raise InputError(
            f"{what} has shape {tuple(stored.shape)}, config.json asks for {tuple(weight.shape)}; the two files are "
            "not from the same model"
        )
    if not stored.is_floating_point():
        raise InputError(f"{what} is stored as {stored.dtype}, not as floating point; choose another folder")
    weight.copy_(stored)


def _read_config(folder: Path) -> GPTConfig:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a run, or any folder in Hugging Face's GPT-2 format")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; {folder} is not a finished run or a GPT-2 folder")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); save the model again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "gpt2":
        raise InputError(f"{path}: model_type is {kind!r}, but only 'gpt2' can be loaded; choose a GPT-2 folder")
    wanted = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    wanted |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise InputError(f"{path}: {key} is {config[key]!r}, this GPT-2 needs {value!r}; choose another folder")
    try:
        shape = GPTConfig(**{key: int(config[key]) for key in GPTConfig.__dataclass_fields__})
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(f"{path}: the model's shape is not there ({error}); save the model again") from error
    if config.get("n_inner") not in (None, 4 * shape.n_embd):
        raise InputError(f"{path}: n_inner is {config['n_inner']}, this GPT-2 needs {4 * shape.n_embd}")
    return shape


def _find_tensors(folder: Path) -> dict[str, Path]:
    """Which file each stored tensor lies in, by its name there; one file wins over parts, as with transformers."""
    path = folder / "model.safetensors"
    if path.is_file():
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    index = folder / INDEX
    if index.is_file():
        return _read_index(index)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder / pickles[0]}: pickled weights are refused (loading one can run any code); "
            "convert it to model.safetensors first"
        )
    raise InputError(f"{path} is missing; finish the run (--resume) or name another folder")


def _read_index(index: Path) -> dict[str, Path]:
    """The same from the index of a model in parts, each of which must hold what it is said to hold."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{index}: cut off or corrupt, not valid JSON; copy or save it again") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    # A part lies beside its index: a name that leads elsewhere is not one.
    if not isinstance(places, dict) or any(not _is_file_name(p) for p in places.values()):
        raise InputError(f"{index}: holds no weight_map from tensors to files beside it; copy or save it again")
    for part in sorted(set(places.values())):
        if not (index.parent / part).is_file():
            raise InputError(f"{index.parent / part} is missing, but {index.name} lists it; copy or save it again")
        with _opened(index.parent / part) as file:
            held = set(file.keys())
        for name in (name for name, place in places.items() if place == part and name not in held):
            raise InputError(
                f"{index.parent / part}: tensor {name} is not in it, but {index.name} says so; save both again"
            )
    return {name: index.parent / part for name, part in places.items()}


def _is_file_name(part: Any) -> bool:
    return isinstance(part, str) and part != "" and Path(part).name == part


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            why = "holds a pickle, which is refused (loading one can run any code); convert it to safetensors"
        else:
            why = f"cut off or damaged ({error}); copy or train it again"
        raise InputError(f"{path}: {why}") from error
