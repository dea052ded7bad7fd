"""Probabilities of a one-word verdict from the alternatives a server lists for the first token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MAX_UNCERTAINTY = 0.01


def share(first_token: Mapping[str, float] | None, wanted: Sequence[str], against: Sequence[str], min_mass: float = 0.1) -> float | str:
    """``P(wanted) / (P(wanted) + P(against))`` in (0, 1), or the reason it cannot be told, see ``masses``."""
    found = masses(first_token, wanted, against, min_mass)
    return found if isinstance(found, str) else found[0] / (found[0] + found[1])


def probability(first_token: Mapping[str, float] | None, wanted: Sequence[str], against: Sequence[str],
                min_mass: float = 0.1) -> float | str:
    """``P(wanted)`` itself, in (0, 1), or the reason it cannot be told; another number than the share where neither is said."""
    found = masses(first_token, wanted, against, min_mass)
    return found if isinstance(found, str) else min(found[0], 1.0)


def masses(first_token: Mapping[str, float] | None, wanted: Sequence[str], against: Sequence[str],
           min_mass: float = 0.1) -> tuple[float, float] | str:
    """``P(wanted)`` and ``P(against)``, both above 0.

    Spellings that differ in case and surrounding space are added up. A word that is not listed is less likely than anything listed:
    it counts as the least listed probability if that changes the share by at most 0.01, and otherwise it is unknown.

    Args:
        first_token: log-probability by token text, untempered.
        wanted, against: words, e.g. ("yes",) and ("no",).
        min_mass: what both must have together; below, the judge was about to say something else ("<think>", "The").
    Returns:
        Both, or "no logprobs", "degenerate logprobs" (one alternative holds everything: the server reports probabilities after its
        temperature of 0), "parse" (too little mass, or one is not resolved).
    """
    if not first_token:
        return "no logprobs"
    if not all(math.isfinite(value) and value < 1e-3 for value in first_token.values()):
        return "degenerate logprobs"
    if len(first_token) < 2:
        return "degenerate logprobs"
    mass = {"wanted": 0.0, "against": 0.0}
    for token, value in first_token.items():
        word = token.replace("▁", " ").replace("Ġ", " ").strip().casefold()
        side = "wanted" if word in wanted else "against" if word in against else None
        if side:
            mass[side] += math.exp(value)
    total = sum(mass.values())
    if total < min_mass:
        return "parse"
    least = math.exp(min(first_token.values()))
    if min(mass.values()) == 0.0 and least / (total + least) > MAX_UNCERTAINTY:
        return "parse"
    return mass["wanted"] or least, mass["against"] or least


def log_odds(probability: float) -> float:
    """``log p - log(1 - p)``, finite for p in [0, 1] as far as float64 tells p from 0 and 1."""
    p = min(max(probability, 1e-15), 1 - 1e-15)
    return math.log(p) - math.log1p(-p)
