"""One guarded optimizer step: sum over processes, unscale, clip, refuse what is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from visalign import checkpoint
from visalign.config import TrainConfig
from visalign.distributed import Processes

logger = logging.getLogger(__name__)


class TrainingStoppedError(RuntimeError):
    """Too many optimizer steps in a row were refused."""


@dataclass(frozen=True)
class Step:
    """What became of one optimizer step: the gradient's norm before clipping, whether it was applied, and its learning rate."""

    grad_norm: float
    applied: bool
    learning_rate: float

    @property
    def moved(self) -> bool:
        """Whether the weights moved along a gradient."""
        return self.applied and self.grad_norm > 0 and self.learning_rate > 0


class Optimization:
    """Optimizer, learning-rate schedule and loss scaler of a run.

    Attributes:
        num_steps: optimizer steps applied.
        num_skipped: steps refused, in all.
        consecutive: steps refused since the last applied one.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: TrainConfig, device: torch.device) -> None:
        if not parameters:
            raise ValueError("nothing to train: the policy has no trainable weights; check trainable.target_modules")
        self.parameters, self.settings, self.device = dict(parameters), settings, device
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.learning_rate, betas=settings.betas,
                                           weight_decay=settings.weight_decay)
        name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        self.scheduler = get_scheduler(name, self.optimizer, num_warmup_steps=settings.warmup,
                                       num_training_steps=settings.iterations * settings.updates)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self.num_steps = self.num_skipped = self.consecutive = 0

    def autocast(self, cache: bool = False) -> AbstractContextManager[Any]:
        """The precision of sampling and training.

        ``cache`` only where no gradient is wanted: a weight cast under ``no_grad`` must not serve a training pass. torch 2.15 knows
        the difference; a version that does not would train nothing without a word.
        """
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.settings.precision), cache_enabled=cache)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch."""
        self.scaler.scale(loss).backward()

    def step(self, loss: float, processes: Processes) -> Step:
        """Apply the accumulated gradient, or refuse it when ``loss`` (the whole batch's, over all processes) or its norm is not finite.

        Raises:
            TrainingStoppedError: more than ``max_skipped`` refusals in a row.
        """
        processes.sum_gradients(self.parameters.values())
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm))
        rate = float(self.scheduler.get_last_lr()[0])
        applied = math.isfinite(norm) and math.isfinite(loss)
        if applied:
            self.scaler.step(self.optimizer)
            self.scheduler.step()
            self.num_steps, self.consecutive = self.num_steps + 1, 0
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not applied:
            self._refuse(loss, norm)
        return Step(grad_norm=norm, applied=applied, learning_rate=rate)

    def _refuse(self, loss: float, norm: float) -> None:
        self.num_skipped, self.consecutive = self.num_skipped + 1, self.consecutive + 1
        logger.warning("optimizer step refused: loss %g, gradient norm %g (%d in a row)", loss, norm, self.consecutive)
        if self.consecutive > self.settings.max_skipped:
            scale = f"; the loss scale is down to {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
            raise TrainingStoppedError(
                f"{self.consecutive} optimizer steps in a row had a non-finite loss ({loss:g}) or gradient norm ({norm:g}){scale}; "
                "the weights are those of the last good step. Lower train.learning_rate, use train.precision=bfloat16 or float32, and "
                "look at the metrics before this iteration; then resume from the last checkpoint")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a bit-exact continuation needs besides the weights, as tensors and JSON."""
        tensors, optimizer = checkpoint.flatten_optimizer(self.optimizer)
        return tensors, {"optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(),
                         "parameters": list(self.parameters), "num_steps": self.num_steps, "num_skipped": self.num_skipped,
                         "consecutive": self.consecutive}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`.

        Raises:
            ValueError: the checkpoint belongs to other trainable weights.
        """
        if state["parameters"] != list(self.parameters):
            raise ValueError(f"the checkpoint trains {len(state['parameters'])} tensors, this run {len(self.parameters)}, or in another "
                             "order; resume with the trainable settings the run was started with")
        checkpoint.restore_optimizer(self.optimizer, tensors, state["optimizer"])
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        self.scaler.load_state_dict(dict(state["scaler"]))
        self.num_steps, self.num_skipped, self.consecutive = (int(state[key]) for key in ("num_steps", "num_skipped", "consecutive"))


def step_metrics(steps: Sequence[Step]) -> dict[str, float]:
    """``train/`` metrics of an iteration's optimizer steps: mean gradient norm, last learning rate."""
    if not steps:
        return {}
    return {"train/grad_norm": sum(step.grad_norm for step in steps) / len(steps), "train/learning_rate": steps[-1].learning_rate}
