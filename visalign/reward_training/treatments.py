"""What is done about wrong labels before and while a head is trained.

    none             labels as they are
    smoothing        every label is right with probability 1 - amount
    flip_corrected   the loss whose expectation over flips is the clean one
    posterior        every label is right with the probability that other prompts' models give it (one step of expectation maximisation)
    voting           several models vote on each label: the worst are flipped, the next smoothed, clear ones asked for a margin
    co_filter        two models choose for each other the pairs of each batch that look right

Whoever judges a label must not have learnt from it: ``crossfit`` trains on the other prompts' judgements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from visalign.maths.reward_noise import Flips, fit_flips, preference_strength, treat_labels
from visalign.reward_training.examples import Examples
from visalign.reward_training.objectives import Targets

# (number of folds, which repetition) -> log-odds (n,) of each training pair by a model of other prompts.
CrossFit = Callable[[int, int], Tensor]
Rate = float | Literal["estimate"]


@dataclass(frozen=True)
class Treated:
    """The outcome.

    Attributes:
        targets: for the training pairs.
        flip_rate: of labels, as given or estimated; the temperature is fitted under it. 0 where nothing is assumed.
        metrics: what was found, for ``evaluation.json``.
        co_filter: how two models filter for each other, or ``None``.
    """

    targets: Targets
    flip_rate: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    co_filter: CoFilter | None = None


@dataclass(frozen=True)
class NoTreatment:
    needs_pairs = False

    def treat(self, examples: Examples, crossfit: CrossFit) -> Treated:
        """Nothing is done."""
        return Treated(Targets.of(examples.label))


@dataclass(frozen=True)
class Smoothing:
    """``amount`` in [0, 0.5]: the share of labels thought to be wrong, each as likely as the others."""

    amount: float = 0.1
    needs_pairs = True

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 0.5:
            raise ValueError(f"amount must lie in [0, 0.5], got {self.amount}")

    def treat(self, examples: Examples, crossfit: CrossFit) -> Treated:
        targets = Targets.of(examples.label)
        return Treated(replace(targets, prob=targets.prob * (1 - 2 * self.amount) + self.amount))


@dataclass(frozen=True)
class _Estimates:
    """``rate`` in [0, 0.5), or ``estimate``: by expectation maximisation on ``folds`` folds of prompts."""

    rate: Rate = "estimate"
    folds: int = 5
    needs_pairs = True

    def __post_init__(self) -> None:
        if self.rate != "estimate" and not (isinstance(self.rate, int | float) and 0 <= self.rate < 0.5):
            raise ValueError(f"rate must lie in [0, 0.5) or be 'estimate', got {self.rate!r}")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}")

    def estimate(self, examples: Examples, crossfit: CrossFit) -> float:
        return _explain(examples, crossfit(self.folds, 0)).rate if self.rate == "estimate" else self.rate


@dataclass(frozen=True)
class FlipCorrected(_Estimates):
    def treat(self, examples: Examples, crossfit: CrossFit) -> Treated:
        rate = self.estimate(examples, crossfit)
        return Treated(replace(Targets.of(examples.label), flip_rate=rate), rate, {"noise/flip_rate": rate})


@dataclass(frozen=True)
class Posterior(_Estimates):
    def treat(self, examples: Examples, crossfit: CrossFit) -> Treated:
        flips = _explain(examples, crossfit(self.folds, 0), None if self.rate == "estimate" else self.rate)
        prob = Targets.of(examples.label).prob
        decided = examples.label != 0
        prob[decided] = torch.where(examples.label[decided] > 0, flips.posterior, 1 - flips.posterior).float()
        return Treated(replace(Targets.of(examples.label), prob=prob), flips.rate,
                       {"noise/flip_rate": flips.rate, "noise/doubted": float((flips.posterior < 0.5).double().mean())})


@dataclass(frozen=True)
class Voting:
    """``models`` models per pair. ``flip`` and ``smooth`` are shares of the pairs, ``flip: estimate`` takes the estimated flip rate."""

    models: int = 3
    folds: int = 5
    flip: Rate = "estimate"
    smooth: float = 0.1
    smoothing: float = 0.3
    margin: float = 0.0
    needs_pairs = True

    def __post_init__(self) -> None:
        if self.models < 2 or self.folds < 2:
            raise ValueError(f"models and folds must be at least 2, got {self.models} and {self.folds}")
        given = 0.0 if self.flip == "estimate" else self.flip
        shares = isinstance(given, int | float) and 0 <= given <= 1 and 0 <= self.smooth <= 1 - given
        if not (shares and 0 <= self.smoothing <= 0.5 and self.margin >= 0):
            raise ValueError(f"flip {self.flip!r} and smooth {self.smooth} are shares of sum at most 1, smoothing {self.smoothing} lies in "
                             f"[0, 0.5], margin {self.margin} is >= 0")

    def treat(self, examples: Examples, crossfit: CrossFit) -> Treated:
        odds = torch.stack([crossfit(self.folds, k) for k in range(self.models)])
        decided = examples.label != 0
        label = examples.label[decided]
        votes = preference_strength(odds[:, decided] * label)
        rate = _explain(examples, odds.mean(dim=0)).rate
        treated = treat_labels(votes, rate if self.flip == "estimate" else self.flip, self.smooth, self.smoothing, self.margin)
        targets = Targets.of(examples.label)
        targets.prob[decided] = torch.where(label > 0, treated.prob_chosen, 1 - treated.prob_chosen).float()
        targets.margin[decided] = treated.margin.float()
        return Treated(targets, rate, {"noise/flip_rate": rate, "noise/flipped": float(treated.flipped.double().mean()),
                                       "noise/disagreement": float(votes.std.mean())})


@dataclass(frozen=True)
class CoFilter(_Estimates):
    """``rate`` of the pairs of a batch are left out, fewer during the first ``warmup`` of the training."""

    warmup: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.warmup <= 1:
            raise ValueError(f"warmup must lie in (0, 1], got {self.warmup}")

    def treat(self, examples: Examples, crossfit: CrossFit) -> Treated:
        rate = self.estimate(examples, crossfit)
        return Treated(Targets.of(examples.label), rate, {"noise/flip_rate": rate}, replace(self, rate=rate))


Treatment = NoTreatment | Smoothing | FlipCorrected | Posterior | Voting | CoFilter
TREATMENTS: Mapping[str, type[Treatment]] = {"none": NoTreatment, "smoothing": Smoothing, "flip_corrected": FlipCorrected,
                                             "posterior": Posterior, "voting": Voting, "co_filter": CoFilter}


def _explain(examples: Examples, odds: Tensor, rate: float | None = None) -> Flips:
    """Flip rate, temperature and posterior of the pairs with a winner.

    Raises:
        ValueError: the models say nothing about the labels.
    """
    decided = examples.label != 0
    try:
        return fit_flips(odds[decided] * examples.label[decided], rate)
    except ValueError as error:
        raise ValueError(f"noise: models of other prompts do not tell right from wrong labels ({error}); use a better encoder or more "
                         "judgements, or noise: none") from error
