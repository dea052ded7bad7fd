"""Bounds on means that hold with a stated probability, and the test of constraints on held-out prompts.

The unit of chance is the prompt: average the samples of a prompt first, samples of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bound = Literal["student", "hoeffding", "bernstein"]


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, to 1e-10.

    Its distribution function is half a regularised incomplete beta integral; bisection inverts it.

    Raises:
        ValueError: probability outside (0, 1) or degrees < 1.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"a t quantile needs a probability in (0, 1) and degrees >= 1, got {probability} and {degrees}")
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)

    def above(t: float) -> float:
        return 0.5 * _incomplete_beta(degrees / (degrees + t * t), 0.5 * degrees, 0.5)

    low, high = 0.0, 1.0
    while above(high) > 1 - probability:
        high *= 2
    while high - low > 1e-11 * max(1.0, high):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if above(middle) > 1 - probability else (low, middle)
    return 0.5 * (low + high)


def lower_bound(values: Tensor, confidence: float = 0.95, method: Bound = "student", support: tuple[float, float] | None = None) -> float:
    """A number the true mean exceeds with probability ``confidence``; minus infinity with too few values to say.

        student     mean - t_{confidence, n-1} s / sqrt(n)                            exact for Gaussian means, good for many prompts
        hoeffding   mean - (b - a) sqrt(log(1/d) / (2 n))                             for any distribution on [a, b], d = 1 - confidence
        bernstein   mean - s sqrt(2 log(2/d) / n) - 7 (b - a) log(2/d) / (3 (n - 1))  likewise, sharper where the spread is small

    Args:
        values: one per prompt, (n,); entries that are not finite are left out.
        support: (a, b), required by "hoeffding" and "bernstein".
    Raises:
        ValueError: confidence outside (0.5, 1), an unknown method, or values outside the support.
    Sources: Hoeffding (1963); empirical Bernstein: Maurer & Pontil, arXiv:0907.3740, Theorem 4.
    """
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must lie in (0.5, 1), got {confidence}")
    known = values[torch.isfinite(values)].double()
    n = len(known)
    if method == "student":
        return -math.inf if n < 2 else float(known.mean() - student_quantile(confidence, n - 1) * known.std() / math.sqrt(n))
    if method not in ("hoeffding", "bernstein"):
        raise ValueError(f"method must be 'student', 'hoeffding' or 'bernstein', got {method!r}")
    if support is None or not support[0] < support[1] or bool(((known < support[0]) | (known > support[1])).any()):
        raise ValueError(f"method '{method}' needs support=(a, b), a < b, that holds every value; got {support}; "
                         "method 'student' needs none")
    if n < 2:
        return -math.inf
    width = support[1] - support[0]
    if method == "hoeffding":
        return float(known.mean()) - width * math.sqrt(-math.log(1 - confidence) / (2 * n))
    surprise = math.log(2 / (1 - confidence))
    return float(known.mean() - known.std() * math.sqrt(2 * surprise / n)) - 7 * width * surprise / (3 * (n - 1))


@dataclass(frozen=True)
class Verdict:
    """One constraint's held-out evidence: ``mean`` over ``count`` prompts, the ``bound`` it exceeds with confidence, the ``threshold``;
    ``count_invalid`` prompts had no score."""

    mean: float
    bound: float
    threshold: float
    count: int
    count_invalid: int

    @property
    def holds(self) -> bool:
        return self.bound >= self.threshold


def judge_constraints(values: Mapping[str, Tensor], thresholds: Mapping[str, float], confidence: float = 0.95, method: Bound = "student",
                     support: tuple[float, float] | None = None) -> dict[str, Verdict]:
    """Whether each constraint ``E[r_k] >= t_k`` is shown on held-out prompts; they hold *jointly* with probability ``confidence``.

    Each of the K bounds gets ``1 - (1 - confidence) / K`` (union bound), so that a policy that breaks some constraint passes them all with
    probability at most ``1 - confidence``. Prompts that steered the training, and repeated looks at the same prompts, void that promise.

    Args:
        values: mean reward per held-out prompt by constraint, (n,) each, larger is better; not finite where there is none.
        thresholds: t_k by constraint.
    Raises:
        ValueError: no constraint, or one without values.
    Source: the safety test of Seldonian algorithms, Thomas et al., Science 2019; for RLHF: arXiv:2506.08266.
    """
    missing = [name for name in thresholds if name not in values]
    if not thresholds or missing:
        raise ValueError(f"no held-out values for {', '.join(missing) or 'any constraint'}; there are values for "
                         f"{', '.join(values) or 'none'}")
    each = 1 - (1 - confidence) / len(thresholds)
    verdicts = {}
    for name, threshold in thresholds.items():
        known = values[name][torch.isfinite(values[name])].double()
        verdicts[name] = Verdict(mean=float(known.mean()) if len(known) else math.nan, bound=lower_bound(known, each, method, support),
                                 threshold=threshold, count=len(known), count_invalid=len(values[name]) - len(known))
    return verdicts


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta ``I_x(a, b)`` by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        k = a + 2 * m
        for coefficient in (m * (b - m) * x / ((k - 1) * k), -(a + m) * (a + b + m) * x / (k * (k + 1))):
            d = 1 / (1 + coefficient * d)
            c = 1 + coefficient / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction
