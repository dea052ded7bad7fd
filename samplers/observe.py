"""Watch a pipeline run its own call, and answer for its denoiser and its scheduler.

An `Observer` stands between a diffusers pipeline and two things it calls: the ``forward`` of its modules and ``scheduler.step``.
Everything else (prompt encoding, latents, guidance, packing, decoding) is the pipeline's own code. Because the observer decides
what the denoiser and the scheduler *return*, the pipeline becomes a function that can be probed: feed chosen values, see where they go.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class CaptureError(ValueError):
    """A pipeline was observed doing something that cannot be expressed as a policy. The message says what and what to change."""


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends an observed call early; never leaves this module."""


@dataclass
class ObservedCall:
    """One call of a module: its bound arguments by parameter name and what it returned."""

    module: str
    arguments: dict[str, Any]
    output: Any

    @property
    def signature(self) -> tuple[Any, ...]:
        """Module and argument structure: calls with equal signatures are the same slot of the loop."""
        leaves, spec = pytree.tree_flatten(self.arguments)
        return self.module, str(spec), tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves)

    def output_tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(self.output) if isinstance(leaf, Tensor)]


@dataclass
class ObservedStep:
    """One iteration of the denoising loop: the calls since the previous step, and what ``scheduler.step`` was given."""

    timestep: float
    sample: Tensor
    model_output: Tensor
    calls: list[ObservedCall]
    returned: Tensor


@dataclass
class Observation:
    """What one run of the pipeline did. ``result`` is ``None`` when the run was stopped early."""

    steps: list[ObservedStep] = field(default_factory=list)
    after_loop: list[ObservedCall] = field(default_factory=list)
    result: Any = None


AnswerState = Callable[[int, Tensor, Tensor], Tensor]  # (step, sample, model output) -> next state
AnswerOutput = Callable[[int, ObservedCall], Any]


def fill_like(template: Any, fill: Callable[[Tensor], Tensor]) -> Any:
    """The same nested structure with every floating-point tensor replaced by ``fill(tensor)``."""
    return pytree.tree_map(lambda leaf: fill(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, template)


class Observer:
    """Runs a pipeline's call under observation.

    Args:
        pipe: any object with diffusers' ``components`` mapping and a ``__call__``.
    Raises:
        CaptureError: no scheduler with ``step`` and ``set_timesteps`` among the components.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self.schedulers = {
            name: part
            for name, part in pipe.components.items()
            if hasattr(part, "step") and hasattr(part, "set_timesteps") and not isinstance(part, nn.Module)
        }
        if not self.schedulers:
            raise CaptureError(
                f"{type(pipe).__name__} has no scheduler component with step() and set_timesteps(): components are "
                f"{sorted(pipe.components)}. visalign aligns samplers that denoise step by step"
            )
        self.denoisers: set[str] = set()
        self._templates: dict[tuple[Any, ...], Any] = {}
        self._forwards = {name: inspect.signature(module.forward) for name, module in self.modules.items()}

    def run(
        self,
        call: Mapping[str, Any],
        *,
        answer_state: AnswerState | None = None,
        answer_output: AnswerOutput | None = None,
        stop_after: int | None = None,
        grad: bool = False,
        freeze_encoders: bool = False,
    ) -> Observation:
        """Run ``pipe(**call)`` and record its loop.

        Args:
            call: keyword arguments of the pipeline.
            answer_state: ``(step, sample, model output) -> state`` returned by ``scheduler.step`` instead of its own.
            answer_output: ``(step, call) -> output`` returned instead of running a denoiser; ``call.output`` is a template.
            stop_after: end the call once that many steps were taken.
            grad: run the undecorated call, so that decoding is differentiable.
            freeze_encoders: answer modules outside the loop from an earlier run with the same shapes (when only latents matter).
        Raises:
            CaptureError: more than one scheduler steps in the loop (several latent streams), or the scheduler's step has no sample.
        """
        seen = Observation()
        pending: list[ObservedCall] = []
        stepping: set[int] = set()

        def on_call(name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = self._forwards[name].bind(*args, **kwargs)
            observed = ObservedCall(name, dict(bound.arguments), None)
            in_loop = name in self.denoisers
            key = observed.signature
            replace = (answer_output is not None and in_loop) or (freeze_encoders and not in_loop and not seen.steps)
            if replace and key in self._templates:
                observed.output = self._templates[key]
            else:
                observed.output = forward(*args, **kwargs)
                self._templates[key] = _detached(observed.output)
            if in_loop and answer_output is not None:
                observed.output = answer_output(len(seen.steps), observed)
            pending.append(observed)
            return observed.output

        def on_step(scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stepping.add(id(scheduler))
            if len(stepping) > 1:
                raise CaptureError(
                    f"{type(self.pipe).__name__} steps more than one scheduler in its loop (several latent streams, such as "
                    "video with audio); visalign aligns one latent stream"
                )
            given = inspect.signature(step).bind(*args, **kwargs).arguments
            if not isinstance(given.get("sample"), Tensor) or not isinstance(given.get("model_output"), Tensor):
                raise CaptureError(
                    f"{type(scheduler).__name__}.step was called without tensors 'model_output' and 'sample' "
                    f"(got {sorted(given)}); such a scheduler has no state that other dynamics could continue"
                )
            if not given["sample"].is_floating_point():
                raise CaptureError(
                    f"{type(scheduler).__name__} steps {given['sample'].dtype} tokens, not a continuous state; masked and "
                    "autoregressive generators have no diffusion trajectory to align"
                )
            if seen.steps:
                self.denoisers.update(call.module for call in pending)
            _unshare(pending, given["sample"])
            sample, model_output = given["sample"].detach().clone(), given["model_output"]
            out = step(*args, **kwargs)
            own = out[0] if isinstance(out, tuple) else out.prev_sample
            new = own if answer_state is None else answer_state(len(seen.steps), sample, model_output)
            seen.steps.append(ObservedStep(float(given["timestep"]), sample, model_output, list(pending), new))
            pending.clear()
            if stop_after is not None and len(seen.steps) >= stop_after:
                raise _Stop
            if isinstance(out, tuple):
                if answer_state is None:
                    return out
                # A second state-shaped return is the x0 prediction, which some pipelines decode instead of the last state.
                return (new, *(new if isinstance(other, Tensor) and other.shape == new.shape else other for other in out[1:]))
            out.prev_sample = new
            return out

        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with self._patched(on_call, on_step), torch.set_grad_enabled(grad), torch.random.fork_rng(devices), contextlib.suppress(_Stop):
            torch.manual_seed(0)  # some pipelines draw condition latents without a generator
            seen.result = inspect.unwrap(type(self.pipe).__call__)(self.pipe, **call) if grad else self.pipe(**call)
        seen.after_loop = list(pending)
        for step in seen.steps:
            step.calls = [call for call in step.calls if call.module in self.denoisers]
        return seen

    @contextmanager
    def _patched(self, on_call: Callable[..., Any], on_step: Callable[..., Any]) -> Iterator[None]:
        """Instance-level wrappers around every module's ``forward`` and every scheduler's ``step``, removed afterwards."""
        before: list[tuple[Any, str, Any]] = []

        def patch(owner: Any, attribute: str, wrapper: Callable[..., Any]) -> None:
            before.append((owner, attribute, owner.__dict__.get(attribute)))
            object.__setattr__(owner, attribute, functools.wraps(getattr(owner, attribute))(wrapper))

        def forward_wrapper(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: on_call(name, forward, args, kwargs)

        def step_wrapper(scheduler: Any, step: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: on_step(scheduler, step, args, kwargs)

        try:
            for name, module in self.modules.items():
                patch(module, "forward", forward_wrapper(name, module.forward))
            for scheduler in self.schedulers.values():
                patch(scheduler, "step", step_wrapper(scheduler, scheduler.step))
            yield
        finally:
            for owner, attribute, original in reversed(before):
                if original is None:
                    object.__delattr__(owner, attribute)
                else:
                    object.__setattr__(owner, attribute, original)


def _unshare(calls: list[ObservedCall], state: Tensor) -> None:
    """Copy recorded arguments that share memory with the state: some loops write the next state in place."""
    memory = state.untyped_storage().data_ptr()

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == memory else leaf

    for call in calls:
        call.arguments = {name: pytree.tree_map(copied, value) for name, value in call.arguments.items()}


def _detached(output: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, output)
