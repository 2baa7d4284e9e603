"""GPT-2: the policy, the reference, the reward model and the critic are all this one network.

`GPT` maps tokens to hidden states and stops there: the head is a separate call, so that logits are only computed for
the positions a loss needs. `ScalarModel` is the same trunk under a head with one output, for scores and for values.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 (pre-norm blocks, a
final layer norm, initialisation scaled by depth), after Vaswani et al. 2017 (attention) and Press & Wolf 2017 (the
head shares the token embedding's weights). `minirlhf.checkpoints` has the files.
Differs: no dropout anywhere (RL wants none, and small models trained for few epochs do not need it).
"""

import copy
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from minirlhf import InputError, flex
from minirlhf.data import Packed, may_look, upload
from minirlhf.token_stats import TokenStats, _use_fused, linear_token_stats


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

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: `vocab_size` rounded up to a multiple of 64.

        A matrix product is fast where its sizes are such multiples, and GPT-2's 50257 is odd. The rows beyond are zero
        and stay so: no token has their ids, their logits are cut off, so they get no probability and no gradient, and
        what decays is zero. Files do not hold them.
        """
        return -(-self.vocab_size // 64) * 64


def attention(
    qkv: Float[Tensor, "B T E"],
    n_head: int,
    attend: Bool[Tensor, "B 1 T T"] | BlockMask | None = None,
    kernel: str = "auto",
) -> Float[Tensor, "B T D"]:
    """softmax(q kᵀ / √d) v in each head: each token mixes the values of those it looks at.

    Source: Vaswani et al. 2017, eq. 1.

    Args:
        qkv: (B, T, E = 3D), queries, keys and values, in each of them head after head.
        n_head: heads; each has d = D / n_head of a token's D numbers.
        attend: (B, 1, T, T), True where a token (third axis) looks at one (fourth), and somewhere for each; or the same
            as `packed_layout` gives it on a GPU. None = every token at itself and back.
        kernel: as for `token_stats`; the fused one is for a CPU, see `_fused_here`.
    """
    B, T, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if _fused_here(qkv, kernel):
        from minirlhf.fused import Attention  # importing it builds the kernels

        mask = None if attend is None else attend[:, 0]
        return (Attention.apply if torch.is_grad_enabled() else torch.ops.minirlhf.attention)(qkv, n_head, mask)
    if qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu":  # its gradient takes up to five times as long there
        with torch.autocast("cpu", enabled=False):  # which would turn it back
            return attention(qkv.float(), n_head, attend, "reference").to(qkv.dtype)
    q, k, v = qkv.view(B, T, 3, n_head, D // n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
    if attend is None or isinstance(attend, Tensor):
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=attend is None)
    else:
        mixed = flex.attention(q, k, v, attend)
    return mixed.transpose(1, 2).reshape(B, T, D)


def gelu(x: Float[Tensor, "*n"], kernel: str = "auto") -> Float[Tensor, "*n"]:
    """x Φ(x), smooth at 0 where ReLU has a corner; in the tanh form of GPT-2.

        ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))

    Source: Hendrycks & Gimpel 2016, section 2.

    Args:
        x: any shape.
        kernel: as for `token_stats`; the fused one is for a CPU, see `_fused_here`.
    """
    if _fused_here(x, kernel):
        from minirlhf.fused import Gelu

        return (Gelu.apply if torch.is_grad_enabled() else torch.ops.minirlhf.gelu)(x)
    return F.gelu(x, approximate="tanh")


def _fused_here(x: Tensor, kernel: str) -> bool:
    """Whether the network's fused kernels take x: float32 and bfloat16 on a CPU, where torch's own operators take up
    to five times as long; and not where torch.compile makes operators of its own.
    """
    here = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()
    return here and _use_fused(kernel, "cpu")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    kernel = "auto"  # of attention and GELU, see `GPT.use_kernel`

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.attn_proj = nn.Linear(config.n_embd, config.n_embd)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.mlp_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: Tensor | BlockMask | None, at: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D), or to (N, D) at the places `at` alone: what nobody reads is not computed."""
        mixed = attention(self.c_attn(self.ln_1(x)), self.n_head, attend, self.kernel)  # (B, T, D)
        if at is not None:
            x, mixed = x.flatten(0, 1).index_select(0, at), mixed.flatten(0, 1).index_select(0, at)  # (N, D)
        x = x + self.attn_proj(mixed)
        return x + self.mlp_proj(gelu(self.c_fc(self.ln_2(x)), self.kernel))


class GPT(nn.Module):
    """Tokens (B, T) to hidden states (B, T, D); `logits` applies the tied head where it is wanted."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wte.weight.data[config.vocab_size :] = 0.0
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.checkpointing = False  # True: keep a block's input only, and compute the block again for its gradient

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None = None,
        *,
        positions: Int[Tensor, "B T"] | None = None,
        attend: Bool[Tensor, "B 1 T T"] | BlockMask | None = None,
        at: Int[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "B T D"] | Float[Tensor, "N D"]:
        """Hidden states after the final norm.

        Padding may stand anywhere, left or right: positions count the real tokens only and no real token attends to
        padding, so the states at real tokens do not depend on it. The states at padding mean nothing.

        Args:
            tokens: (B, T) ids.
            mask: (B, T), True = a real token. None = all are real, or padding stands on the right only: causal
                attention cannot see what follows, so right padding needs no mask (and costs less without).
            positions, attend: both or neither, in place of a mask: see `packed_layout`.
            at: places in the flattened (B·T) whose states are wanted; None = all. The last block's second half, which
                no other position reads, runs on these alone. They may lie on the CPU, where they are known, while the
                tokens lie on a GPU.

        Returns:
            (B, T, D), or with `at` (N, D).

        Raises:
            ValueError: more tokens than positions.
        """
        T = tokens.shape[1]
        at = None if at is None else upload(at, tokens.device)
        if positions is None and mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
            attend = _attention_mask(mask)
        # Only where it could be too many are positions looked at: on a GPU the look waits for it.
        fits = positions is None or self.config.n_positions >= T
        longest = T if fits else int(positions.max()) + 1
        if longest > self.config.n_positions:
            raise ValueError(f"{longest} tokens exceed the context of {self.config.n_positions}")

        # Without a layout the t-th token of each row stands at position t.
        x = self.wte(tokens) + (self.wpe.weight[:T] if positions is None else self.wpe(positions))  # (B, T, D)
        for layer, block in enumerate(self.h):
            rows = at if layer + 1 == len(self.h) else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attend, rows, use_reentrant=False)
            else:
                x = block(x, attend, rows)
        return self.ln_f(x)

    def use_kernel(self, kernel: str) -> None:
        """auto, fused or reference, as for `token_stats`."""
        for block in self.h:
            block.kernel = kernel

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Next-token logits: the head is the token embedding, transposed (Press & Wolf 2017).

        A view: the columns that pad the vocabulary are computed and left out.
        """
        return F.linear(hidden, self.wte.weight)[..., : self.config.vocab_size]


class ScalarModel(nn.Module):
    """A GPT trunk under a linear head with one output a position: a reward model's score, a critic's value."""

    def __init__(self, config: GPTConfig, trunk: GPT | None = None):
        super().__init__()
        self.config = config
        self.trunk = GPT(config) if trunk is None else trunk
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    def forward(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None, **layout: Tensor
    ) -> Float[Tensor, "B T"] | Float[Tensor, " N"]:
        """One number a position; for a reward model the one that counts stands at the last real token.

        Arguments as for `GPT`; with `at`, (N,).
        """
        return self.head(self.trunk(tokens, mask, **layout))

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
        """w · h. Written as a sum, since a matrix product with one column rounds a row by where it stands."""
        return (hidden * self.score.weight[0]).sum(-1)


def last_token(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """The value at each row's last real token: (B, T) -> (B,)."""
    return values.flatten().index_select(0, upload(last_places(mask), values.device))


def last_places(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Where each row's last real token stands in the flattened (B·T), wherever the padding is: for `at`."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1)  # (B,)
    return torch.arange(len(mask), device=mask.device) * mask.shape[1] + last


def places(wanted: Bool[Tensor, "B T"]) -> Int[Tensor, " N"]:
    """Where True stands in the flattened (B·T), row after row: for `at`."""
    return wanted.flatten().nonzero().squeeze(1)


def _attention_mask(real: Bool[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True where a token may look: at real tokens, not ahead.

    A token always sees itself, padding too: a row of softmax over nothing would be NaN and spread through the batch.
    """
    T = real.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=real.device)
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
            since nothing predicts it. Best on the CPU, where it is made: a GPU would be waited for to find its places.
        ref_model: the reference, read without gradient.
        mask: (B, T), True = a real token; None when padding stands on the right only.
        temperature: divides the logits of both.
        kernel: which `token_stats`.

    Returns:
        `TokenStats` of shape (N,), N = counted tokens, row after row; `scatter_counted` puts them back in place.
    """
    predicts = counted[:, 1:]  # (B, T-1)
    before = tokens[:, :-1]
    at = upload(places(predicts), tokens.device)  # (N,)
    targets = tokens[:, 1:].flatten().index_select(0, at)  # (N,)
    real = None if mask is None else mask[:, :-1]
    ref = (None, None)
    if ref_model is not None:
        with torch.no_grad():
            ref = ref_model(before, real, at=at), ref_model.wte.weight.detach()  # (N, D), (V', D)
    hidden = model(before, real, at=at)  # (N, D)
    return linear_token_stats(
        hidden, model.wte.weight, targets, *ref,
        vocab_size=model.config.vocab_size, temperature=temperature, kernel=kernel,
    )  # fmt: skip


def packed_layout(model: GPT, packed: Packed) -> dict[str, Tensor | BlockMask]:
    """Packed rows as `GPT.forward` takes them, on the model's device.

    Who may look at whom is a dense mask; on a GPU, where rows are long and the kernel is not the reference, the blocks
    of `minirlhf.flex`.
    """
    device, (B, T), H = model.wte.weight.device, packed.parts.shape, model.config.n_head
    parts = upload(packed.parts, device)

    def trial() -> None:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.wte.weight.dtype
        qkv = torch.zeros(B, T, 3 * model.config.n_embd, dtype=dtype, device=device, requires_grad=True)
        with torch.enable_grad():
            attention(qkv, H, flex.blocks_of(parts), "reference").sum().backward()

    layout = {"tokens": upload(packed.tokens, device), "positions": upload(packed.positions, device)}
    wanted = device.type == "cuda" and model.h[0].kernel != "reference"
    in_blocks = wanted and flex.usable(T, model.config.n_embd // H, trial)
    return {**layout, "attend": flex.blocks_of(parts) if in_blocks else may_look(parts)}


def packed_logps(model: GPT, states: Float[Tensor, "M D"], packed: Packed, kernel: str = "auto") -> Float[Tensor, " N"]:
    """log π(y|x) = Σ_t log π(y_t|x, y_<t) of packed responses, in nats; 0 of those without predictors.

    Args:
        model: the policy, for its head.
        states: (M, D), those that `model` gave at `packed.predictors`.
        packed: N responses, see `data.pack`.
        kernel: which `token_stats`.
    """
    targets, owners = upload(packed.targets, states.device), upload(packed.owners, states.device)
    vocab_size = model.config.vocab_size
    logprobs = linear_token_stats(states, model.wte.weight, targets, vocab_size=vocab_size, kernel=kernel).logprobs
    return logprobs.new_zeros(len(packed.ends)).index_add(0, owners, logprobs)


def scatter_counted(values: Float[Tensor, " N"], counted: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(N,) values of the counted tokens back into (B, T), 0 elsewhere."""
    return values.new_zeros(counted.shape).masked_scatter(upload(counted, values.device), values)


def init_weights(model: GPT | ScalarModel, seed: int) -> None:
    """Draw fresh weights: normal with deviation 0.8/√D, projections into the residual stream by 1/√(2 n_layer) less.

    Source: Radford et al. 2019, section 2.3 (the scaling by depth), and OpenAI's released code (deviation 0.02, biases
    0), as in nanoGPT. Differs: 0.02 is what 0.8/√D gives at their largest width, 1600. At width 128 the same 0.02 would
    make the variance of every product twelve times smaller, and the model takes about twice as many steps to learn
    to copy a word from its prompt. A scalar head starts near 0 (0.01, see `init_head`).
    """
    g = torch.Generator().manual_seed(seed)
    std = 0.8 / math.sqrt(model.config.n_embd)
    for name, weight in named_weights(model).items():  # what pads the vocabulary stays zero, and draws nothing
        if weight.dim() < 2:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)  # layer norms; biases
        elif name == "score.weight":
            init_head(model, g)
        else:
            scale = 1 / math.sqrt(2 * model.config.n_layer) if name.endswith("proj.weight") else 1.0
            weight.copy_(torch.empty(weight.shape).normal_(0.0, std * scale, generator=g))


def named_weights(model: GPT | ScalarModel) -> dict[str, Tensor]:
    """Each parameter's data by name, a view without the rows that pad the vocabulary: what files hold."""
    return {
        name: parameter.data[: model.config.vocab_size] if name.endswith("wte.weight") else parameter.data
        for name, parameter in model.named_parameters()
    }


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
