"""Seeds derived from what they are for, so that a sample is the same on one process or eight, today or after a resume."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def derive_seed(*values: int) -> int:
    """A 63-bit seed that depends on every value and on their order, e.g. ``derive_seed(run_seed, iteration, sample_index)``.

    Chained splitmix64 steps: no salted ``hash()``, no platform integer, so the result is stable across processes and versions.

    Raises:
        ValueError: no value, or one that does not fit into 64 bits.
    Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    if not values:
        raise ValueError("derive_seed needs at least one integer, got none")
    state = 0
    for value in values:
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"derive_seed takes 64-bit integers, got {value}")
        # Mixing the running state before adding keeps (1, 2) and (2, 1), and (1,) and (1, 0), apart.
        state = _splitmix64(_splitmix64(state) ^ (value & _MASK))
    return state >> 1


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
