"""Random keys: everything random is a function of (seed, step, …), never of how much was drawn before."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def mix(*keys: int) -> int:
    """Keys (seed, step, …) as one number of 64 bits: neighbouring keys give unrelated ones."""
    mixed = 0
    for key in keys:  # splitmix64 (Steele et al. 2014)
        mixed = (mixed + key + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


def seeded(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on `keys` (seed, step, …) alone: what makes a resumed run draw the same numbers."""
    return torch.Generator(device).manual_seed(mix(*keys) & 0x7FFFFFFFFFFFFFFF)


def uniforms(seeds: Sequence[int], n: int, device: torch.device | str = "cpu") -> Float[Tensor, "B n"]:
    """Numbers on [0, 1) with 53 bits, the same on every device: row i's are a function of (seeds[i], place) alone.

    A generator's next number depends on all that were drawn before, for whichever row. These do not, so what a row is
    answered does not depend on the rows beside it, on their order, or on how many are computed at a time.

    Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", figure 15 (splitmix64: the state
    counts in steps of γ, and each number is a scrambled state). Differs: 64-bit arithmetic in torch's signed integers,
    which wrap around alike.

    Args:
        seeds: one per row.
        n: how many per row.
        device: where they are wanted.
    """
    state = torch.tensor([[_signed(seed)] for seed in seeds], device=device)  # (B, 1)
    z = state + torch.arange(1, n + 1, device=device) * _signed(0x9E3779B97F4A7C15)  # (B, n)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def _signed(x: int) -> int:
    """The 64 lowest bits, read as a signed number."""
    return (x + 2**63) % 2**64 - 2**63


def _shifted(z: Int[Tensor, "B n"], bits: int) -> Int[Tensor, "B n"]:
    """To the right with zeros coming in, where `>>` would bring copies of the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
