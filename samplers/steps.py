"""Which steps of a sampler are stored for training: stochastic ones, or the deterministic one that back-propagation starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from visalign.maths.seeds import derive_seed
from visalign.samplers.named import build_named


class StepSelection(Protocol):
    """Which steps of a sampler are stored, and therefore trained."""

    @property
    def stochastic(self) -> bool:
        """Whether the selected steps follow the dynamics and must add noise; if not, every step is one of the ODE."""

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        """Ascending indices in ``0 .. num_steps - 1``, a stochastic one never the last. A pure function: the same on every rank."""


@dataclass(frozen=True)
class NoSteps:
    """Nothing is stochastic and nothing is stored: for algorithms that learn from clean samples."""

    stochastic: ClassVar[bool] = True

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class AllSteps:
    """Every step but the last."""

    stochastic: ClassVar[bool] = True

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        return tuple(range(_num_trainable(num_steps)))


@dataclass(frozen=True)
class Window:
    """Steps ``start .. end - 1``, the same in every iteration."""

    stochastic: ClassVar[bool] = True
    start: int
    end: int

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        start, end = _check_window(self, self.start, self.end, num_steps)
        return tuple(range(start, end))


@dataclass(frozen=True)
class RandomWindow:
    """``size`` consecutive steps inside ``start .. end - 1``, drawn anew per iteration. Source: Flow-GRPO-Fast, arXiv:2505.05470.

    Attributes:
        size: number of stochastic steps.
        start, end: where the window may lie, ``end`` exclusive; ``None`` means up to the last trainable step.
    """

    stochastic: ClassVar[bool] = True
    size: int
    start: int = 0
    end: int | None = None

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        start, end = _check_window(self, self.start, self.end, num_steps, self.size)
        first = start + derive_seed(seed, iteration) % (end - start - self.size + 1)
        return tuple(range(first, first + self.size))


@dataclass(frozen=True)
class SingleStep:
    """One stochastic step: ``index``, or with ``None`` a random one per iteration. Source: TempFlow-GRPO, arXiv:2508.04324."""

    stochastic: ClassVar[bool] = True
    index: int | None = None

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        if self.index is None:
            return RandomWindow(size=1).select(num_steps, iteration, seed)
        _check_window(self, self.index, self.index + 1, num_steps)
        return (self.index,)


@dataclass(frozen=True)
class ProgressiveWindow:
    """MixGRPO's window: ``size`` steps that move from noise to data as training goes on, then start over.

    Positions are 0, ``stride``, ``2 stride``, ... and always the one that ends at the last trainable step T - 2, which
    the published code never trains. A position ``l`` lasts

        progressive   interval iterations
        decay         interval -> final_interval, linear in l / (T - 2)
        exp_decay     ceil(interval exp(-decay_rate max(0, l - decay_start)))
        random        interval iterations, then l is drawn anew from all positions (stride does not apply)

    Source: MixGRPO, arXiv:2507.21802.
    """

    stochastic: ClassVar[bool] = True
    size: int = 4
    interval: int = 25
    stride: int = 1
    strategy: Literal["progressive", "random", "decay", "exp_decay"] = "progressive"
    final_interval: int = 1
    decay_rate: float = 0.1
    decay_start: int = 13

    def __post_init__(self) -> None:
        for name in ("size", "interval", "stride", "final_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"ProgressiveWindow.{name} must be at least 1, got {getattr(self, name)}")
        if self.strategy not in ("progressive", "random", "decay", "exp_decay"):
            raise ValueError(f"unknown ProgressiveWindow.strategy {self.strategy!r}; use progressive, random, decay or exp_decay")

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        _, end = _check_window(self, 0, None, num_steps, self.size)
        last = end - self.size
        if self.strategy == "random":
            first = derive_seed(seed, iteration // self.interval) % (last + 1)
            return tuple(range(first, first + self.size))
        positions = [*range(0, last, self.stride), last]
        durations = [self._duration(position, num_steps) for position in positions]
        remaining = iteration % sum(durations)
        for position, duration in zip(positions, durations, strict=True):
            if remaining < duration:
                return tuple(range(position, position + self.size))
            remaining -= duration
        raise AssertionError("unreachable: the remainder is below the sum of the durations")

    def _duration(self, position: int, num_steps: int) -> int:
        if self.strategy == "decay":
            return max(1, round(self.interval + (self.final_interval - self.interval) * position / max(num_steps - 2, 1)))
        if self.strategy == "exp_decay":
            return math.ceil(self.interval * math.exp(-self.decay_rate * max(0, position - self.decay_start)))
        return self.interval


@dataclass(frozen=True)
class Tail:
    """The state from which ``last`` steps remain, without any noise: rewards are differentiated through those steps.

    Source: DRaFT-K, arXiv:2309.17400.
    """

    stochastic: ClassVar[bool] = False
    last: int = 1

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        if not 1 <= self.last <= num_steps:
            raise ValueError(f"{self} does not fit {num_steps} sampler steps: it needs 1 <= last <= {num_steps}")
        return (num_steps - self.last,)


@dataclass(frozen=True)
class RandomTail:
    """As :class:`Tail`, from a step drawn anew per iteration out of ``start .. end - 1``; ``end=None`` is the number of steps.

    Uniform over all steps is AlignProp's random truncation; 30 .. 39 of 40 steps is ReFL's range.
    Sources: AlignProp, arXiv:2310.03739; ReFL, arXiv:2304.05977.
    """

    stochastic: ClassVar[bool] = False
    start: int = 0
    end: int | None = None

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        end = num_steps if self.end is None else self.end
        if not 0 <= self.start < end <= num_steps:
            raise ValueError(f"{self} does not fit {num_steps} sampler steps: it needs 0 <= start < end <= {num_steps}")
        return (self.start + derive_seed(seed, iteration) % (end - self.start),)


STEP_SELECTIONS: Mapping[str, type[Any]] = {
    "none": NoSteps,
    "all": AllSteps,
    "window": Window,
    "random_window": RandomWindow,
    "single": SingleStep,
    "progressive_window": ProgressiveWindow,
    "tail": Tail,
    "random_tail": RandomTail,
}


def build_selection(name: str, **params: Any) -> StepSelection:
    """The step selection called ``name`` in :data:`STEP_SELECTIONS`, e.g. ``build_selection("window", start=0, end=3)``.

    Raises:
        ValueError: an unknown name, an unknown or missing parameter, or a value out of range.
    """
    return build_named("step selection", STEP_SELECTIONS, name, params)


def _num_trainable(num_steps: int) -> int:
    if num_steps < 2:
        raise ValueError(f"{num_steps} sampler steps leave none to train: the last step is always deterministic; use at least 2")
    return num_steps - 1


def _check_window(owner: object, start: int, end: int | None, num_steps: int, size: int = 1) -> tuple[int, int]:
    trainable = _num_trainable(num_steps)
    end = trainable if end is None else end
    if size < 1 or start < 0 or end > trainable or end - start < size:
        raise ValueError(
            f"{owner} does not fit {num_steps} sampler steps: it needs 0 <= start, start + size <= end and end <= {trainable} "
            f"(the last step is always deterministic), got start {start}, end {end}, size {size}"
        )
    return start, end
