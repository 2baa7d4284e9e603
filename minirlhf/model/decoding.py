"""The network as sampling runs it: one new token a row and step, keys and values kept, and nothing computed twice.

`gpt.GPT` is the definition, and what training differentiates. This is the same function of the same weights, arranged
for rows that grow by one token at a time. A step of a small model is a hundred small operations, so what counts is how
few they are, and that none of them copies what is already in place. On a CPU the whole step is one operation, written
in C++ (csrc/cpu/decode_step.cpp), and multiplies with weights that are laid out for it at the start (`packing_of`);
`_forward` is it, too, operation by operation, for everywhere else. In both:

    - a token at position p of its row has its key and value in slot p, whatever the lengths of the prompts: nothing is
      padded on the left, and attention reads as many slots as the longest row has filled;
    - the query, key and value of a head stand side by side in the product that makes them, so that one operation
      stores both, and the query is used where it lies;
    - rows that are done leave, and the last rows move into their places (`move`, which beam search uses, too);
    - memory is kept from one call to the next: fresh pages cost more than the step that fills them.

Where a step is compiled (torch.compile, on a CPU) or captured (`minirlhf.kernels.graphs`, on a GPU), its shapes are
few: rows are a power of two, and attention reads a multiple of 64 slots.
"""

import contextlib
import functools
import math
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minirlhf import InputError
from minirlhf.devices import upload
from minirlhf.kernels import graphs
from minirlhf.kernels.choice import use_fused
from minirlhf.model.gpt import GPT, attention, gelu

SLOTS = 64  # of static steps: attention reads a multiple of so many slots
PREFILL_TOKENS = 8192  # of prompts that are read at a time
LEAVE = 0.25  # rows that are done leave once they are this share: moving the others costs as much as a step or two
CACHED = 1 << 25  # bytes of a model whose weights each thread reads by itself
Packing = Literal["none", "ours", "mkldnn"]
DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # of the products; None = the weights' own


class Layer(NamedTuple):
    """A block's weights and biases."""

    ln_1: tuple[Tensor, Tensor]
    attn: tuple[Tensor, Tensor]  # (3D, D), (3D,): head after head, and in a head query, key, value
    proj: tuple[Tensor, Tensor]
    ln_2: tuple[Tensor, Tensor]
    fc: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]


class Weights(NamedTuple):
    """A model's weights as decoding wants them: what products take in the products' type, the rest as it is."""

    layers: list[Layer]
    wte: Tensor  # (V', D), the vocabulary padded as in the model
    wpe: Tensor  # (P, D)
    ln_f: tuple[Tensor, Tensor]
    head: Tensor  # (V', D), wte once more


class Rows(NamedTuple):
    """Where each row stands; everything here is changed in place."""

    stores: list[Float[Tensor, "2 C S d"]]  # a layer's keys and values, C = heads of all rows that there is memory for
    ahead: Float[Tensor, "N 1 S"]  # N = heads of the rows that there are; -inf at slots not filled yet, 0 at the others
    first: Int[Tensor, "2 B H"]  # slot 0 of the row's keys and of its values, counted through the whole store
    positions: Int[Tensor, " B"]  # of the token that comes next
    last: Int[Tensor, " B"]  # where a row stops to move on, though it may be computed further


class Decoder:
    """Rows of tokens that grow together: `start` reads the prompts, each `step` a token a row, `move` rearranges rows.

    All of it under `torch.no_grad()`. One model's decoder is kept by `decoder_for`.
    """

    def __init__(self, dtype: str = "fp32", compiled: bool = False):
        self.dtype, self.compile = DTYPES[dtype], compiled
        self.kept: dict[str, Tensor] = {}  # what must stay where it is for static steps
        self.captured = graphs.Steps()
        self.capacity = self.slots = 0
        self.memory: Tensor | None = None  # keys and values live here, in whatever shape a call has

    def start(
        self, model: GPT, prompts: Sequence[Sequence[int]], ends: Sequence[int], copies: int = 1
    ) -> Float[Tensor, "B V"]:
        """`begin`, and the first step: the logits of each row's first new token, (B, V)."""
        self.begin(model, prompts, ends, copies)
        tokens = torch.tensor([prompt[-1] for prompt in prompts])
        return self.step(upload(tokens, model.wte.weight.device))

    def begin(self, model: GPT, prompts: Sequence[Sequence[int]], ends: Sequence[int], copies: int = 1) -> None:
        """Read the prompts but for the last token of each, with which the first step begins.

        Args:
            model: whose weights; they are read anew at each start. With its kernel: whether a step is one operation, on
                packed weights if they are small.
            prompts: B lists of at least one token, best with like lengths side by side.
            ends: how long each row may become, prompt included.
            copies: rows that `move` may make of each.
        """
        config, device, kernel = model.config, model.wte.weight.device, model.kernel
        self.static = self.compile or device.type == "cuda" or graphs.can_capture(device, kernel)
        self.forward = _compiled() if self.compile and device.type == "cpu" else _forward
        self.kernel, self.vocab_size = kernel, config.vocab_size
        packing = "none" if self.compile else packing_of(model, self.dtype)
        self.weights = self._keep_weights(_weights(model, self.dtype, packing))
        B, H, S = len(prompts), config.n_head, max(ends)
        capacity = B * copies
        if self.static:  # and never less than the last time, so that tables stay where they are
            capacity = max(_power_of_two(capacity), self.capacity)
            S = max(self.rounded(S), self.slots)
        self.capacity, rows = capacity, range(capacity)
        self.spans = [(len(prompts[i]), ends[i]) if i < B else (1, 1) for i in rows]  # row by row: prompt, end
        self.steps, self.slots = 0, S

        dtype = _store_dtype(self.weights.head.dtype, device)
        shape = (config.n_layer, 2, capacity * H, S, config.n_embd // H)
        size = math.prod(shape)
        if (
            self.memory is None
            or self.memory.numel() < size
            or (self.memory.dtype, self.memory.device) != (dtype, device)
        ):
            self.memory = _huge_pages(size, dtype, device)
        # A slot that is not filled yet has weight 0, which would not hide the NaN of an earlier call.
        stores = self.memory[:size].view(shape).zero_()
        positions = upload(torch.tensor([length - 1 for length, _ in self.spans]), device)
        ahead = torch.full((capacity, S), -math.inf, dtype=dtype, device=device)
        ahead.masked_fill_(torch.arange(S, device=device) < positions[:, None], 0.0)
        self.all = Rows(
            stores=[self.keep(f"store {i}", store) if self.compile else store for i, store in enumerate(stores)],
            ahead=self.keep("ahead", ahead.repeat_interleave(H, dim=0)[:, None]),
            first=self.keep("first", (torch.arange(2 * capacity * H, device=device) * S).view(2, capacity, H)),
            positions=self.keep("positions", positions),
            last=self.keep("last", upload(torch.tensor([end - 1 for _, end in self.spans]), device)),
        )
        for part in _alike([len(prompt) - 1 for prompt in prompts]):
            self._read(prompts[part], part)
        self._narrow(B)

    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """The logits after one more token a row: (B,) -> (B, V), float32 or wider."""
        if self.static:
            tokens = F.pad(tokens, (0, self.width - len(tokens)))
        logits = self.logits(tokens, self.reach)[: self.rows]
        self.steps += 1
        return logits

    def logits(self, tokens: Int[Tensor, " W"], reach: int) -> Float[Tensor, "W V"]:
        """What a step is on the device, for all the rows that it computes; attention reads `reach` slots."""
        logits = self.forward(self.weights, self.now, tokens, reach, self.kernel)[:, : self.vocab_size]
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def rounded(self, slots: int) -> int:
        """For static steps the next multiple of `SLOTS`."""
        return -(-slots // SLOTS) * SLOTS if self.static else slots

    @property
    def width(self) -> int:
        """Rows that a step computes."""
        return len(self.now.positions)

    @property
    def reach(self) -> int:
        """Slots that the next step's attention reads."""
        return min(self.rounded(self.longest + self.steps), self.slots)

    def addresses(self) -> tuple[int, ...]:
        """Where all that a step reads or writes lies, and how the stores are cut."""
        layers = [part for layer in self.weights.layers for pair in layer for part in pair]
        rows = [*self.all.stores, *self.all[1:]]
        weights = (*layers, self.weights.wte, self.weights.wpe, *self.weights.ln_f, self.weights.head)
        return (self.capacity, self.slots, *(x.data_ptr() for x in (*weights, *rows)))

    def too_wide_for(self, rows: int) -> bool:
        """Whether so few rows are left that it pays to drop the others."""
        if self.static:
            return _power_of_two(rows) < _power_of_two(self.rows)
        return rows < self.rows and rows <= (1 - LEAVE) * self.rows

    def move(self, to: Int[Tensor, " M"], source: Int[Tensor, " M"], rows: int) -> None:
        """Row source[i] goes, or goes too, to row to[i]; then the first `rows` rows are those that there are."""
        reach = min(self.longest + self.steps, self.slots)
        H = self.all.first.shape[-1]
        for store in self.all.stores:
            by_row = store.unflatten(1, (-1, H))  # (2, rows, H, S, d)
            by_row[:, to, :, :reach] = by_row[:, source, :, :reach]
        for table in (self.all.ahead.unflatten(0, (-1, H)), self.all.positions, self.all.last):
            table[to] = table[source]
        if rows != self.rows:
            spans = list(self.spans)
            for i, j in zip(to.tolist(), source.tolist()):
                spans[i] = self.spans[j]
            self.spans = spans
            self._narrow(rows)

    def _narrow(self, rows: int) -> None:
        """From now on, steps compute the first `rows` rows."""
        self.rows = rows
        self.longest = max(length for length, _ in self.spans[:rows])
        width, H = _power_of_two(rows) if self.static else rows, self.all.first.shape[-1]
        _, ahead, first, positions, last = self.all
        self.now = Rows(self.all.stores, ahead[: width * H], first[:, :width], positions[:width], last[:width])

    def _read(self, prompts: Sequence[Sequence[int]], part: slice) -> None:
        """Keys and values of all but the last token of some prompts, which are padded on the right.

        What stands in a padded slot is overwritten before anything looks at it, and the last token's step is a step
        like any other: nothing here is computed for logits that nobody needs.
        """
        (layers, wte, wpe, *_), device = self.weights, self.all.positions.device
        T, B, D = max(len(prompt) for prompt in prompts) - 1, len(prompts), wpe.shape[1]
        if T == 0:
            return
        H = self.all.first.shape[-1]
        padded = [[*prompt[:-1], *[0] * (T - len(prompt) + 1)] for prompt in prompts]
        x = F.embedding(upload(torch.tensor(padded), device), wte) + wpe[:T]  # (B, T, D)
        for layer, store in zip(layers, self.all.stores):
            qkv = _linear(F.layer_norm(x, (D,), *layer.ln_1), *layer.attn)
            parted = qkv.view(B, T, H, 3, D // H).transpose(2, 3)  # (B, T, 3, H, d)
            for new, kept in zip(parted.permute(2, 0, 3, 1, 4)[1:], store.unflatten(1, (-1, H))):  # (B, H, T, d)
                kept[part, :, :T] = new
            if layer is layers[-1]:
                break
            _finish(x, attention(parted.reshape(B, T, 3 * D), H, None, self.kernel), layer, self.kernel)

    def keep(self, name: str, new: Tensor) -> Tensor:
        """Static steps are compiled or captured with the addresses they use: the values go where they went."""
        if not self.static:
            return new
        old = self.kept.get(name)
        if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            if self.compile:
                torch._dynamo.mark_static_address(new)
            self.kept[name] = old = new
        elif old.data_ptr() != new.data_ptr():
            old.copy_(new)
        return old

    def _keep_weights(self, new: Weights) -> Weights:
        def keep(name: str, part):
            if isinstance(part, Tensor):
                return self.keep(name, part)
            kept = [keep(f"{name} {i}", child) for i, child in enumerate(part)]
            return type(part)(*kept) if hasattr(part, "_fields") else type(part)(kept)

        return keep("weights", new)


def _forward(weights: Weights, rows: Rows, tokens: Tensor, reach: int, kernel: str) -> Tensor:
    """One token a row through the network: (B,) -> (B, V')."""
    (layers, wte, wpe, ln_f, head), (stores, ahead, first, positions, last) = weights, rows
    _, B, H = first.shape
    D, d = wpe.shape[1], wpe.shape[1] // H
    if _fused(stores[0], kernel):
        flat = [part for layer in layers for pair in layer for part in pair]
        logits = torch.ops.minirlhf.decode_step_(flat, [wte, wpe, *ln_f, head], stores, tokens, positions)
        positions.copy_(torch.minimum(positions + 1, last))
        return logits
    slots = (first + positions[:, None]).view(2, B * H)  # where the new keys and values go
    ahead.view(-1).index_fill_(0, slots[0], 0.0)
    ahead = ahead[:, :, :reach]
    x = F.embedding(tokens, wte) + F.embedding(positions, wpe)  # (B, D)
    for layer, store in zip(layers, stores):
        qkv = _linear(F.layer_norm(x, (D,), *layer.ln_1), *layer.attn).view(B * H, 3, d).to(store.dtype)
        store.view(-1, d).index_put_((slots,), qkv[:, 1:].transpose(0, 1))
        keys, values = store[:, : B * H, :reach].unbind()  # each (B·H, reach, d)
        mixed = (_mixed_in_fp32 if store.device.type == "cuda" else _mixed)(qkv, keys, values, ahead)
        _finish(x, mixed.view(B, D), layer, kernel)
    positions.copy_(torch.minimum(positions + 1, last))
    return _linear(F.layer_norm(x, (D,), *ln_f), head)


def _finish(x: Float[Tensor, "... D"], mixed: Float[Tensor, "... D"], layer: Layer, kernel: str) -> None:
    """What a block does with the values that attention has mixed, in place: `gpt.Block` after its attention."""
    x.add_(_linear(mixed, *layer.proj))
    inner = _linear(F.layer_norm(x, (x.shape[-1],), *layer.ln_2), *layer.fc)  # (..., 4D)
    x.add_(_linear(gelu(inner, kernel), *layer.out))


def _fused(store: Tensor, kernel: str) -> bool:
    """Whether the step is one fused operation: on a CPU, with keys and values in float32, and not where torch.compile
    makes a step of its own.
    """
    wanted = store.device.type == "cpu" and store.dtype == torch.float32 and not torch.compiler.is_compiling()
    return wanted and use_fused(kernel, "cpu")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = x.to(weight.dtype)
    if weight.dim() > 2:  # packed by ours
        return torch.ops.minirlhf.packed_linear(x, weight, bias)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """`_forward` for fixed shapes, one graph each; on a CPU, where there is nothing to capture."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(_forward, fullgraph=True, dynamic=False)


def _mixed(
    qkv: Float[Tensor, "N 3 d"], keys: Float[Tensor, "N S d"], values: Float[Tensor, "N S d"],
    ahead: Float[Tensor, "N 1 S"],
) -> Float[Tensor, "N 1 d"]:  # fmt: skip
    """One query a head over the slots behind it, N = heads of all rows."""
    scores = torch.baddbmm(ahead, qkv[:, :1], keys.transpose(1, 2), alpha=qkv.shape[-1] ** -0.5)  # (N, 1, S)
    return torch.bmm(scores.softmax(-1), values)


def _mixed_in_fp32(
    qkv: Float[Tensor, "N 3 d"], keys: Float[Tensor, "N S d"], values: Float[Tensor, "N S d"],
    ahead: Float[Tensor, "N 1 S"],
) -> Float[Tensor, "N 1 d"]:  # fmt: skip
    """The same with scores in float32, whatever the type: rounded to bfloat16 they would be another policy's than that
    which training reads. By the same operator as in training, of the kind that takes a mask.
    """
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        mixed = F.scaled_dot_product_attention(qkv[None, :, :1], keys[None], values[None], attn_mask=ahead[None])
    return mixed[0]


def packing_of(model: GPT, dtype: torch.dtype | None) -> Packing:
    """Who lays out the weights for products of this type (None: their own): ours (csrc/cpu/packed.h) for a model that a
    CPU's cache holds, else the library that torch ships, which does so for bfloat16.
    """
    weight = model.wte.weight
    itemsize = weight.dtype.itemsize if dtype is None else dtype.itemsize
    if _fused(weight, model.kernel) and itemsize * sum(p.numel() for p in model.parameters()) <= CACHED:
        return "ours"
    packs = weight.device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return "mkldnn" if packs and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "none"


def _weights(model: GPT, dtype: torch.dtype | None, packing: Packing) -> Weights:
    """References where nothing changes; copies of what is turned around, cast or packed.

    Each product of a few rows would spend more time on laying out its weights as the processor multiplies them,
    bfloat16 in pairs, than on multiplying; packed, they are laid out once.
    """
    packed, given = packing == "ours", model.wte.weight.dtype

    def cast(weight: Tensor) -> Tensor:
        weight = weight if dtype is None else weight.to(dtype)
        if packed:
            return torch.ops.minirlhf.pack_weight(weight)
        return torch.ops.mkldnn._reorder_linear_weight(weight, 0) if packing == "mkldnn" else weight

    def pair(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
        return module.weight.detach(), module.bias.detach()

    def product(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        bias = bias if dtype is None else bias.to(dtype)
        return cast(weight), bias.to(given) if packed else bias  # rounded, but kept as it is added

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(0, (3, model.config.n_head, -1)).transpose(0, 1).flatten(0, 2)

    layers = []
    for block in model.h:
        attn = product(*map(by_head, pair(block.c_attn)))
        proj, fc, out = (product(*pair(module)) for module in (block.attn_proj, block.c_fc, block.mlp_proj))
        layers.append(Layer(pair(block.ln_1), attn, proj, pair(block.ln_2), fc, out))
    wte = model.wte.weight.detach()
    return Weights(layers, wte, model.wpe.weight.detach(), pair(model.ln_f), cast(wte))


def _alike(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbours of about the same length, so that padding them to the longest of them costs little."""
    start, short, long = 0, math.inf, 0
    for i, length in enumerate(lengths):
        short, long = min(short, length), max(long, length)
        if i > start and (long > 1.25 * short or (i + 1 - start) * long > PREFILL_TOKENS):
            yield slice(start, i)
            start, short, long = i, length, length
    yield slice(start, len(lengths))


def _store_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of keys and values. On a CPU, products of single rows are slower in bfloat16 than in float32."""
    return torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" else dtype


def _huge_pages(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for keys and values; on Linux in huge pages.

    A step touches all of it once, a few hundred bytes here and there. In pages of 4 KiB, looking up where each of them
    lies takes as long as reading them.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    try:
        block = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size * dtype.itemsize:,} bytes for keys and values") from error
    with contextlib.suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=dtype)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def check_context(model: GPT, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    """Refuse what would not fit into the context, and a prompt of nothing."""
    for prompt, limit in zip(prompts, limits):
        if not prompt:
            raise InputError("a prompt holds no token; begin it with end-of-text, as documents begin")
        if len(prompt) + limit > model.config.n_positions:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {limit} new ones exceed the model's context of "
                f"{model.config.n_positions}; shorten the prompt or the response"
            )


# --- kept from call to call -------------------------------------------------------------------------------------------

_decoders: weakref.WeakKeyDictionary[GPT, dict] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def decoder_for(model: GPT) -> Iterator[Decoder]:
    """The model's decoder with its memory from the last time, as long as the model lives.

    While it is in use nobody else gets it: a second caller gets one of his own, and an error drops it.
    """
    kept, how = _decoders.setdefault(model, {}), (model.dtype, model.compiled)
    decoder = kept.pop(how, None) or Decoder(*how)
    yield decoder
    kept[how] = decoder
