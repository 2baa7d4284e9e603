"""Responses that share a prompt in one row: the layout the network reads, and their log-probs."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from minirlhf.data.batches import Packed, may_look
from minirlhf.devices import upload
from minirlhf.kernels import flex
from minirlhf.model.gpt import GPT, attention


def packed_layout(model: GPT, packed: Packed) -> dict[str, Tensor | BlockMask]:
    """Packed rows as `GPT.forward` takes them, on the model's device.

    Who may look at whom is a dense mask; on a GPU, where rows are long and the kernel is not the reference, the blocks
    of `minirlhf.kernels.flex`.
    """
    device, (B, T), H = model.wte.weight.device, packed.parts.shape, model.config.n_head
    parts = upload(packed.parts, device)

    def trial() -> None:
        dtype = torch.bfloat16 if model.dtype == "bf16" else model.wte.weight.dtype
        qkv = torch.zeros(B, T, 3 * model.config.n_embd, dtype=dtype, device=device, requires_grad=True)
        with torch.enable_grad():
            attention(qkv, H, flex.blocks_of(parts), "reference").sum().backward()

    layout = {"tokens": upload(packed.tokens, device), "positions": upload(packed.positions, device)}
    wanted = device.type == "cuda" and model.kernel != "reference"
    in_blocks = wanted and flex.usable(T, model.config.n_embd // H, trial)
    return {**layout, "attend": flex.blocks_of(parts) if in_blocks else may_look(parts)}


def packed_logps(model: GPT, states: Float[Tensor, "M D"], packed: Packed) -> Float[Tensor, " N"]:
    """log π(y|x) = Σ_t log π(y_t|x, y_<t) of packed responses, in nats; 0 of those without predictors.

    Args:
        model: the policy, for its head.
        states: (M, D), those that `model` gave at `packed.predictors`.
        packed: N responses, see `batches.pack`.
    """
    targets, owners = upload(packed.targets, states.device), upload(packed.owners, states.device)
    logprobs = model.token_stats(states, targets).logprobs
    return logprobs.new_zeros(len(packed.ends)).index_add(0, owners, logprobs)
