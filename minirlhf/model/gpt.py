"""GPT-2: the policy, the reference, the reward model and the critic are all this one network.

`GPT` maps tokens to hidden states and stops there: the head is a separate call, so that logits are only computed for
the positions a loss needs. `ScalarModel` is the same trunk under a head with one output, for scores and for values.
Which kernel and which precision a network runs with is said once, on the network: see `GPT.run_with`.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 (pre-norm blocks, a
final layer norm, initialisation scaled by depth), after Vaswani et al. 2017 (attention) and Press & Wolf 2017 (the
head shares the token embedding's weights). `minirlhf.model.checkpoints` has the files.
Differs: no dropout anywhere. PPO's ratio compares two passes over the same tokens: with dropout π would differ from
π_old before any update. Small models trained for few epochs do not need it either.
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from minirlhf import InputError
from minirlhf.devices import upload
from minirlhf.kernels.network import fast_attention, fast_gelu
from minirlhf.model.token_stats import TokenStats, linear_token_stats


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
    """Attention heads per block; they divide the width."""
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
        kernel: auto, fused or reference, see `kernels.network`.
    """
    fast = fast_attention(qkv, n_head, attend, kernel)
    if fast is not None:
        return fast
    q, k, v = qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=attend is None)
    return mixed.transpose(1, 2).flatten(2)


def gelu(x: Float[Tensor, "*n"], kernel: str = "auto") -> Float[Tensor, "*n"]:
    """x Φ(x), smooth at 0 where ReLU has a corner; in the tanh form of GPT-2.

        ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))

    Source: Hendrycks & Gimpel 2016, section 2.
    """
    fast = fast_gelu(x, kernel)
    return F.gelu(x, approximate="tanh") if fast is None else fast


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    kernel = "auto"  # of attention and GELU, see `GPT.run_with`

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
        self.kernel, self.dtype = "auto", "fp32"  # see `run_with`
        self.checkpointing = False  # True: keep a block's input only, and compute the block again for its gradient
        self.compiled = False  # True: decode through torch.compile, on a CPU

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

        with self.precision():
            # Without a layout the t-th token of each row stands at position t.
            x = self.wte(tokens) + (self.wpe.weight[:T] if positions is None else self.wpe(positions))  # (B, T, D)
            for layer, block in enumerate(self.h):
                rows = at if layer + 1 == len(self.h) else None
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, attend, rows, use_reentrant=False)
                else:
                    x = block(x, attend, rows)
            return self.ln_f(x)

    def run_with(self, kernel: str | None = None, dtype: str | None = None) -> None:
        """Set how everything that runs this network computes: training, sampling, and its head's statistics.

        Args:
            kernel: fused (compiled), reference (plain PyTorch throughout), auto (fused where it can be); None = as is.
            dtype: of the matrix products: fp32 takes the weights as they are, bf16 rounds them; all that sums stays
                float32. None = as is.
        """
        self.kernel, self.dtype = kernel or self.kernel, dtype or self.dtype
        for block in self.h:
            block.kernel = self.kernel

    def precision(self):
        """The context in which its products run in `dtype`."""
        return torch.autocast(self.wte.weight.device.type, torch.bfloat16) if self.dtype == "bf16" else nullcontext()

    def token_stats(
        self,
        hidden: Float[Tensor, "N D"],
        targets: Int[Tensor, " N"],
        ref_hidden: Float[Tensor, "N E"] | None = None,
        ref_weight: Float[Tensor, "W E"] | None = None,
        temperature: float = 1.0,
    ) -> TokenStats:
        """`linear_token_stats` of N hidden states under this network's head: log-probs of the targets, entropy, KL."""
        with self.precision():
            return linear_token_stats(
                hidden, self.wte.weight, targets, ref_hidden, ref_weight,
                vocab_size=self.config.vocab_size, temperature=temperature, kernel=self.kernel,
            )  # fmt: skip

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
        """One number per position; for a reward model the one that counts stands at the last real token.

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


def clone(model: nn.Module) -> nn.Module:
    """A frozen copy: the reference of PPO and DPO."""
    twin = copy.deepcopy(model)
    twin.requires_grad_(False)
    return twin.eval()
