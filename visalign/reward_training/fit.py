"""The loop: heads, alone or two that filter for each other, learn from judgements in a seeded order."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from visalign.maths.calibration import log_loss, ranking_accuracy
from visalign.maths.reward_noise import co_filter, keep_fraction
from visalign.maths.seeds import derive_seed
from visalign.reward_models.heads import Head, Shape
from visalign.reward_training.config import AdapterConfig, OptimizationConfig
from visalign.reward_training.examples import Examples
from visalign.reward_training.objectives import BATCH, Batch, Objective, Stage, Targets
from visalign.reward_training.sources import FrozenSource, Source, batches
from visalign.reward_training.treatments import CoFilter

Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Member:
    """What training gives: a head, and the tensors of the encoder's adapter (empty without one)."""

    head: Head
    adapter: Mapping[str, Tensor]


@dataclass(frozen=True)
class Fitting:
    """All that the members of an ensemble share.

    Attributes:
        shape, objective, source: what is built, taught, and fed with.
        frozen: embeddings of the encoder as it is, which features are standardised by.
        settings: of the optimiser.
        lora: of the adapter; ``None`` for a frozen encoder.
        calibration: pairs that are logged, and choose the epoch where ``settings.keep`` is "best"; may be empty.
    """

    shape: Shape
    objective: Objective
    source: Source
    frozen: FrozenSource
    settings: OptimizationConfig
    lora: AdapterConfig | None
    calibration: Examples

    def fit(self, examples: Examples, targets: Targets, seed: int, filtering: CoFilter | None = None) -> tuple[Member, Rows]:
        """A member from training judgements, and one row of metrics per epoch; the same for the same seed.

        Args:
            examples: pairs, or lists where the objective reads lists.
            targets: of the pairs.
            filtering: train a second head as well; the first is returned.
        """
        rows: Rows = []
        device = self.source.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(seed, 0))
            heads = [self._head(examples) for _ in range(1 if filtering is None else 2)]
            if self.source.adapter is not None:
                self.source.adapter.reset(torch.Generator().manual_seed(derive_seed(seed, 1)))
            *before, last = self.objective.stages()
            for number, stage in enumerate([*before, last]):
                for head in heads:
                    stage.begin(head, self.source, examples)
                order = torch.Generator().manual_seed(derive_seed(seed, 2, number))
                data = samples_of(examples) if stage.of_samples else examples
                goals = Targets.of(torch.zeros(len(data))) if stage.of_samples else targets
                rows += self._epochs(heads, stage, data, goals, order, filtering if stage is last else None, chooses=stage is last)
        adapter = {} if self.source.adapter is None else self.source.adapter.tensors()
        head = heads[0].requires_grad_(False).eval()
        return Member(head, adapter), [{"epoch": float(epoch), **row} for epoch, row in enumerate(rows, 1)]

    @torch.no_grad()
    def log_odds(self, member: Member, examples: Examples) -> Tensor:
        """Of every pair that its first sample is better, float64 (n,) on the CPU."""
        if self.source.adapter is not None:
            self.source.adapter.load(member.adapter)
        return self._log_odds(member.head, examples)

    @torch.no_grad()
    def _log_odds(self, head: Head, examples: Examples) -> Tensor:
        head.eval()
        found = [head.log_odds(*head(*self.source(part)).unbind(1)).double().cpu() for part in batches(examples, BATCH)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)

    @torch.no_grad()
    def _head(self, examples: Examples) -> Head:
        head = self.objective.build(self.shape).to(self.source.device)
        given = (self.frozen(part) for part in batches(examples, BATCH))
        head.standardise((media.flatten(0, 1), None if text is None else text.flatten(0, 1)) for media, text in given)
        head.eval().start(*self.frozen(examples.select(torch.arange(min(BATCH, len(examples))))))
        return head

    def _epochs(self, heads: Sequence[Head], stage: Stage, examples: Examples, targets: Targets, order: torch.Generator,
                filtering: CoFilter | None, chooses: bool) -> Rows:
        """All epochs of a stage. ``chooses``: its best epoch is kept, where that is wanted."""
        size = self.settings.batch
        rows: Rows = []
        best: _Best | None = None
        num_steps = self.settings.epochs * math.ceil(len(examples) / size)
        learners = [self._learner(stage, head, num_steps, adapts=number == 0) for number, head in enumerate(heads)]
        for epoch in range(self.settings.epochs):
            for head in heads:
                head.train()
            losses: list[tuple[float, float]] = []
            for number, part in enumerate(torch.randperm(len(examples), generator=order).split(size)):
                progress = (epoch + number * size / len(examples)) / self.settings.epochs
                losses.append(self._step(heads, stage, learners, examples.select(part), targets.select(part), filtering, progress))
            rows.append({"loss": sum(a for a, _ in losses) / sum(b for _, b in losses), **self._watch(heads[0])})
            if chooses and self.settings.keep == "best" and (best is None or rows[-1]["calibration/loss"] < best.loss):
                best = _Best.of(rows[-1]["calibration/loss"], heads[0], self.source)
        if best is not None:
            best.restore(heads[0], self.source)
        return rows

    def _step(self, heads: Sequence[Head], stage: Stage, learners: Sequence[_Learner], examples: Examples, targets: Targets,
              filtering: CoFilter | None, progress: float) -> tuple[float, float]:
        """One batch; the first head's loss, summed with weights, and the weights' sum."""
        batch = Batch(examples, targets, *self.source(examples))
        losses = [stage.loss(head, batch) for head in heads]
        weight = examples.weight.to(losses[0].device)
        kept: tuple[Tensor, ...] = (torch.ones_like(weight),) * len(heads)
        if filtering is not None:
            assert isinstance(filtering.rate, float), "it was estimated before"
            kept = co_filter(losses[0].detach(), losses[1].detach(), keep_fraction(progress, filtering.rate, filtering.warmup))
        for learner, loss, keep in zip(learners, losses, kept, strict=True):
            learner.step((loss * weight * keep).sum() / (weight * keep).sum())
        return float((losses[0].detach() * weight).sum()), float(weight.sum())

    def _learner(self, stage: Stage, head: Head, num_steps: int, adapts: bool) -> _Learner:
        settings = self.settings
        groups = [{"params": stage.parameters(head), "lr": settings.learning_rate, "weight_decay": settings.weight_decay}]
        if self.source.adapter is not None and self.lora is not None and stage.adapts and adapts:
            groups.append({"params": list(self.source.adapter.parameters.values()), "weight_decay": 0.0,
                           "lr": self.lora.learning_rate or settings.learning_rate})
        return _Learner(groups, settings, num_steps)

    def _watch(self, head: Head) -> dict[str, float]:
        """Log-loss and accuracy on the calibration pairs, if there are some with a winner."""
        if not bool((self.calibration.label != 0).any()):
            return {}
        odds, label = self._log_odds(head, self.calibration), self.calibration.label
        return {"calibration/loss": log_loss(odds, label), "calibration/accuracy": ranking_accuracy(odds, label)}


class _Learner:
    """AdamW on some parameters, its schedule and the limit of its gradient's norm."""

    def __init__(self, groups: list[dict[str, object]], settings: OptimizationConfig, num_steps: int) -> None:
        self.optimizer = torch.optim.AdamW(groups)
        self.schedule = get_scheduler(settings.schedule, self.optimizer, num_warmup_steps=0, num_training_steps=num_steps)
        self.max_grad_norm = settings.max_grad_norm

    def step(self, loss: Tensor) -> None:
        """
        Raises:
            ValueError: the loss or its gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm, value = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)), float(loss.detach())
        if not math.isfinite(norm) or not math.isfinite(value):
            raise ValueError(f"the loss became {value:g} with a gradient norm of {norm:g}; lower optimization.learning_rate")
        self.optimizer.step()
        self.schedule.step()


@dataclass(frozen=True)
class _Best:
    """The best weights so far, and their loss."""

    loss: float
    head: Mapping[str, Tensor]
    adapter: Mapping[str, Tensor]

    @staticmethod
    def of(loss: float, head: Head, source: Source) -> _Best:
        return _Best(loss, copy.deepcopy(head.state_dict()), {} if source.adapter is None else source.adapter.tensors())

    def restore(self, head: Head, source: Source) -> None:
        head.load_state_dict(self.head)
        if source.adapter is not None:
            source.adapter.load(self.adapter)


def samples_of(examples: Examples) -> Examples:
    """Every candidate of every judgement as an example of its own, K = 1, for ratings."""
    size = examples.media.shape[1]
    each = torch.arange(len(examples)).repeat_interleave(size)

    def apart(values: Tensor) -> Tensor:
        return values.flatten(0, 1)[:, None]

    return replace(examples.select(each), media=apart(examples.media), scores=apart(examples.scores), gold=apart(examples.gold),
                   ratings=apart(examples.ratings))
