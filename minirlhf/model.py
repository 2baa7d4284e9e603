"""GPT-2: the policy, the reference, the reward model and the critic are all this one network.

`GPT` maps tokens to hidden states and stops there: the head is a separate call, so that logits are only computed for
the positions a loss needs. `ScalarModel` is the same trunk under a head with one output, for scores and for values.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 (pre-norm blocks, a
final layer norm, initialisation scaled by depth), after Vaswani et al. 2017 (attention) and Press & Wolf 2017 (the
head shares the token embedding's weights). Names and shapes on disk are those of Hugging Face's GPT-2.
Differs: no dropout anywhere (RL wants none, and small models trained for few epochs do not need it).
"""

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minirlhf import InputError
from minirlhf.data import Packed
from minirlhf.token_stats import TokenStats, linear_token_stats


@dataclass(frozen=True)
class GPTConfig:
    """The network's shape, in GPT-2's own names."""

    vocab_size: int
    """Distinct tokens, end-of-text included."""
    n_positions: int = 128
    """The context: the longest sequence, prompt and response together."""
    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads a block; they divide the width."""
    n_embd: int = 128
    """Width of the hidden states."""

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.n_embd % self.n_head:
            raise InputError(f"n_head must divide n_embd, got {self.n_head} heads for a width of {self.n_embd}")


class KVCache:
    """Keys and values of the tokens seen so far, so that each new token costs one position and not the whole prefix.

    Buffers are allocated once for `capacity` positions; `length` says how many are filled.
    """

    def __init__(self, config: GPTConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, 2, batch_size, config.n_head, capacity, config.n_embd // config.n_head)
        self.buffer = torch.empty(shape, device=device, dtype=dtype)
        self.mask = torch.zeros(batch_size, capacity, dtype=torch.bool, device=device)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values (B, H, T, D/H); return all of them so far (B, H, length + T, D/H)."""
        end = self.length + keys.shape[2]
        for new, store in zip((keys, values), self.buffer[layer]):
            store[:, :, self.length : end] = new
        return self.buffer[layer, 0, :, :, :end], self.buffer[layer, 1, :, :, :end]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.attn_proj = nn.Linear(config.n_embd, config.n_embd)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.mlp_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        # Softmax(q kᵀ / √(D/H)) v (Vaswani et al. 2017, eq. 1); without a mask of our own, plain causal attention.
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=attend is None and T > 1)
        x = x + self.attn_proj(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens (B, T) to hidden states (B, T, D); `logits` applies the tied head where it is wanted."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None = None,
        cache: KVCache | None = None,
        *,
        positions: Int[Tensor, "B T"] | None = None,
        attend: Bool[Tensor, "B 1 T T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the final norm.

        Padding may stand anywhere, left or right: positions count the real tokens only and no real token attends to
        padding, so the states at real tokens do not depend on it. The states at padding mean nothing.

        Args:
            tokens: (B, T) ids; with a cache, only the new ones.
            mask: (B, T), True = a real token. None = all are real, or padding stands on the right only: causal
                attention cannot see what follows, so right padding needs no mask (and costs less without).
            cache: keys and values of the tokens before; filled in place.
            positions, attend: both or neither, in place of a mask: rows laid out by `data.pack`.

        Raises:
            ValueError: more tokens than positions.
        """
        B, T = tokens.shape
        start = cache.length if cache is not None else 0
        if positions is None and (cache is not None or mask is not None):
            new = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            if cache is not None:
                cache.mask[:, start : start + T] = new
                real = cache.mask[:, : start + T]  # (B, S)
            else:
                real = new
            positions = (real.cumsum(-1) - 1).clamp(min=0)[:, start:]  # (B, T)
            if not (T == 1 and bool(real.all())):
                attend = _attention_mask(real, T)
        elif positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        if positions.numel() and int(positions.max()) >= self.config.n_positions:
            raise ValueError(f"{int(positions.max()) + 1} tokens exceed the context of {self.config.n_positions}")

        x = self.wte(tokens) + self.wpe(positions)
        for layer, block in enumerate(self.h):
            x = block(x, attend, cache, layer)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Next-token logits: the head is the token embedding, transposed (Press & Wolf 2017)."""
        return F.linear(hidden, self.wte.weight)


class ScalarModel(nn.Module):
    """A GPT trunk under a linear head with one output a position: a reward model's score, a critic's value."""

    def __init__(self, config: GPTConfig, trunk: GPT | None = None):
        super().__init__()
        self.config = config
        self.trunk = GPT(config) if trunk is None else trunk
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    def forward(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None, **layout: Tensor
    ) -> Float[Tensor, "B T"]:
        """One number a position; for a reward model the one that counts stands at the last real token.

        Arguments as for `GPT`.
        """
        return self.score(self.trunk(tokens, mask, **layout)).squeeze(-1)


def last_token(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """The value at each row's last real token, wherever the padding stands: (B, T) -> (B,)."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1)  # (B,)
    return values.gather(1, last[:, None]).squeeze(1)


def _attention_mask(real: Bool[Tensor, "B S"], T: int) -> Bool[Tensor, "B 1 T S"]:
    """True where the last T tokens may look: at real tokens, not ahead.

    A token always sees itself, padding too: a row of softmax over nothing would be NaN and spread through the batch.
    """
    S = real.shape[1]
    causal = torch.ones(T, S, dtype=torch.bool, device=real.device).tril(S - T)
    itself = torch.eye(S, dtype=torch.bool, device=real.device)[S - T :]
    return ((causal & real[:, None, :]) | itself)[:, None]


def response_stats(
    model: GPT,
    tokens: Int[Tensor, "B T"],
    counted: Bool[Tensor, "B T"],
    ref_model: GPT | None = None,
    *,
    mask: Bool[Tensor, "B T"] | None = None,
    temperature: float = 1.0,
    kernel: str = "auto",
) -> TokenStats:
    """Log-prob, entropy and (given a reference) exact KL of the counted tokens, each given all tokens before it.

    The head runs on the positions that predict a counted token and on no others.

    Args:
        model: the policy.
        tokens: (B, T) prompts with their responses.
        counted: (B, T), True where the token's own statistics are wanted; the first token of a row never counts,
            since nothing predicts it.
        ref_model: the reference, read without gradient.
        mask: (B, T), True = a real token; None when padding stands on the right only.
        temperature: divides the logits of both.
        kernel: which `token_stats`.

    Returns:
        `TokenStats` of shape (N,), N = counted tokens, row after row; `scatter_counted` puts them back in place.
    """
    predicts, targets = counted[:, 1:], tokens[:, 1:][counted[:, 1:]]  # (B, T-1), (N,)
    before = tokens[:, :-1]
    real = None if mask is None else mask[:, :-1]
    ref = (None, None)
    if ref_model is not None:
        with torch.no_grad():
            ref = ref_model(before, real)[predicts], ref_model.wte.weight.detach()  # (N, D), (V, D)
    hidden = model(before, real)[predicts]  # (N, D)
    return linear_token_stats(hidden, model.wte.weight, targets, *ref, temperature=temperature, kernel=kernel)


def packed_logps(
    model: GPT,
    hidden: Float[Tensor, "B T D"],
    packed: Packed,
    which: Bool[Tensor, " N"] | None = None,
    kernel: str = "auto",
) -> Float[Tensor, " N"]:
    """log π(y|x) = Σ_t log π(y_t|x, y_<t) of packed responses, in nats, from the states that `model` gave them.

    Args:
        model: the policy, for its head.
        hidden: (B, T, D) states at the tokens of `packed`.
        packed: N responses, see `data.pack`.
        which: (N,), the responses that are wanted; the head runs on these, and the others get 0. None = all.
        kernel: which `token_stats`.
    """
    predictors, targets, owners = (part.to(hidden.device) for part in packed[4:])
    if which is not None:
        wanted = which.to(hidden.device)[owners]
        predictors, targets, owners = predictors[wanted], targets[wanted], owners[wanted]
    states = hidden.flatten(0, 1).index_select(0, predictors)  # (M, D)
    logprobs = linear_token_stats(states, model.wte.weight, targets, kernel=kernel).logprobs  # (M,)
    return logprobs.new_zeros(len(packed.ends)).index_add(0, owners, logprobs)


def scatter_counted(values: Float[Tensor, " N"], counted: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(N,) values of the counted tokens back into (B, T), 0 elsewhere."""
    return values.new_zeros(counted.shape).masked_scatter(counted, values)


def init_weights(model: GPT | ScalarModel, seed: int) -> None:
    """Draw fresh weights: normal with deviation 0.8/√D, projections into the residual stream by 1/√(2 n_layer) less.

    Source: Radford et al. 2019, section 2.3 (the scaling by depth), and OpenAI's released code (deviation 0.02, biases
    0), as in nanoGPT. Differs: 0.02 is what 0.8/√D gives at their largest width, 1600. At width 128 the same 0.02 would
    make the variance of every product twelve times smaller, and the model takes about twice as many steps to learn
    to copy a word from its prompt. A scalar head starts near 0 (0.01, see `init_head`).
    """
    g = torch.Generator().manual_seed(seed)
    std = 0.8 / math.sqrt(model.config.n_embd)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)  # layer norms; biases
        elif name == "score.weight":
            init_head(model, g)
        else:
            scale = 1 / math.sqrt(2 * model.config.n_layer) if name.endswith("proj.weight") else 1.0
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, std * scale, generator=g))


def init_head(model: ScalarModel, generator: torch.Generator) -> None:
    """A fresh scalar head: normal with deviation 0.01, so that scores start near 0, all about alike.

    Differs: Stiennon et al. 2020, section C.1, take 1/√(D + 1).
    """
    model.score.weight.data.copy_(torch.empty(model.score.weight.shape).normal_(0.0, 0.01, generator=generator))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's two groups: matrices and embeddings decay, biases and layer norms do not (as nanoGPT does)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with GPT-3's β₂ = 0.95 (Brown et al. 2020, appendix B)."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=lr, betas=(0.9, 0.95), fused=True)


def clone(model: nn.Module) -> nn.Module:
    """A frozen copy: the reference of PPO and DPO."""
    twin = copy.deepcopy(model)
    twin.requires_grad_(False)
    return twin.eval()


# --- Hugging Face's layout --------------------------------------------------------------------------------------------

# Their GPT-2 keeps OpenAI's Conv1D: these weights are stored as (in, out), the transpose of nn.Linear's (out, in).
_TRANSPOSED = ("c_attn.weight", "attn_proj.weight", "c_fc.weight", "mlp_proj.weight")
_NAMES = {"c_attn": "attn.c_attn", "attn_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}


def _hf_name(name: str) -> str:
    """Our parameter name to Hugging Face's: h.0.attn_proj.weight -> transformer.h.0.attn.c_proj.weight."""
    if name == "score.weight":
        return name
    parts = name.removeprefix("trunk.").split(".")
    return ".".join(["transformer", *(_NAMES.get(part, part) for part in parts)])


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
    for name, tensor in model.state_dict().items():
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


def load_model(folder: str | Path, *, scalar: bool = False) -> GPT | ScalarModel:
    """Read a model from a folder in Hugging Face's GPT-2 layout: one of our runs, or any GPT-2.

    Args:
        folder: holds `config.json` and `model.safetensors`. Weights are never unpickled.
        scalar: True = a `ScalarModel`, whose folder must hold a score head; False = a `GPT`, whose folder must not
            (a reward model is no policy).

    Raises:
        InputError: a file is missing, cut off, of another architecture, or its tensors do not fit the config.
    """
    folder = Path(folder)
    config = _read_config(folder)
    weights = _read_weights(folder)
    model = ScalarModel(config) if scalar else GPT(config)
    # OpenAI's own files lack the "transformer." prefix; causal-mask buffers and the tied head carry nothing new.
    given = {
        n if n == "score.weight" or n.startswith("transformer.") else f"transformer.{n}": w for n, w in weights.items()
    }
    if scalar and "score.weight" not in given:
        raise InputError(
            f"{folder}: a language model, not a reward model (no score.weight); train one with train_rm.py"
        )
    if not scalar and "score.weight" in given:
        raise InputError(
            f"{folder}: a reward model, not a language model; name a run of train_sft, train_ppo or train_dpo"
        )
    state = {}
    for name, tensor in model.state_dict().items():
        stored = given.get(_hf_name(name))
        if stored is None:
            raise InputError(
                f"{folder / 'model.safetensors'}: tensor {_hf_name(name)} is missing; save the model again"
            )
        stored = stored.t() if name.endswith(_TRANSPOSED) else stored
        if stored.shape != tensor.shape:
            raise InputError(
                f"{folder / 'model.safetensors'}: {_hf_name(name)} has shape {tuple(stored.shape)}, config.json asks "
                f"for {tuple(tensor.shape)}; the two files are not from the same model"
            )
        state[name] = stored.float()
    model.load_state_dict(state)
    return model


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


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    if not path.is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder / pickles[0]}: pickled weights are refused (loading one can run any code); "
                "convert it to model.safetensors first"
            )
        raise InputError(f"{path} is missing; finish the run (--resume) or name another folder")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            why = "holds a pickle, which is refused (loading one can run any code); convert it to safetensors"
        else:
            why = f"cut off or damaged ({error}); copy or train it again"
        raise InputError(f"{path}: {why}") from error
