"""Range checks of command-line options and configurations: a wrong number is named by its flag, in one line."""

import math

from minirlhf import InputError


def check_at_least(minimum: float, **values: float) -> None:
    """Refuse numbers below `minimum`, NaN too, by their flag's name."""
    for name, value in values.items():
        if not value >= minimum:
            raise InputError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")


def check_positive(**values: float) -> None:
    """Refuse numbers that are not positive and finite, by their flag's name."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be a positive number, got {value}")


def check_share(**values: float) -> None:
    """Refuse numbers outside [0, 1], by their flag's name."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {value}")


def check_multiple(batch_size: int, **parts: int) -> None:
    """Refuse a --batch-size that is no multiple of these, by their flags' names."""
    if any(batch_size % part for part in parts.values()):
        flags = " and of ".join(f"--{name.replace('_', '-')} {part}" for name, part in parts.items())
        raise InputError(f"--batch-size {batch_size} must be a multiple of {flags}")


def parse_range(flag: str, text: str) -> tuple[int, int]:
    """'8' → (8, 8), '2:8' → (2, 8)."""
    low, _, high = text.partition(":")
    try:
        limits = int(low), int(high or low)
    except ValueError as error:
        raise InputError(f"{flag} must be a number or LOW:HIGH, got {text!r}") from error
    if not 1 <= limits[0] <= limits[1]:
        raise InputError(f"{flag} must hold 1 <= LOW <= HIGH, got {text!r}")
    return limits
