"""Simulator stability: does a generated object stay standing when it is put on the floor?

    angle = tilt of the object, in degrees, after ``seconds`` of simulated time from its generated pose
    binary       1 where angle < threshold, else 0      (stable below 20 degrees in the source)
    linear       max(0, 1 - angle / threshold)
    exponential  exp(-angle / threshold)

The tilt is blind to yaw: an object that turned on the spot stands. The source takes the whole rotation, ``measure="rotation"``, and
pushes nothing, ``push=0``. A mesh that no simulation can judge (``meshes.InvalidMeshError``, a diverged or crashed simulation) is an
invalid sample with its reason, not an unstable object; loose parts move as one body, as in the source.

Source: Direct Simulation Optimization, arXiv:2503.22677. Simulator: MuJoCo (see ``tumble``).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from visalign.protocols import RewardSpec
from visalign.rewards import tumble
from visalign.rewards.meshes import Axis, InvalidMeshError, rigid_body
from visalign.rewards.simulators import Simulators
from visalign.types import Media, Prompt, Scores

logger = logging.getLogger(__name__)

Shape = Literal["binary", "linear", "exponential"]
Measure = Literal["tilt", "rotation"]


class SimulatorStability:
    """Scores meshes by how little they tip over; ``details`` hold "tilt" and "rotation" in degrees."""

    spec = RewardSpec(name="simulator_stability", modality=frozenset({"mesh"}), raw_range=(0.0, 1.0))

    def __init__(self, up: Axis, *, shape: Shape = "binary", threshold: float = 20.0, measure: Measure = "tilt", size: float | None = 1.0,
                 seconds: float = 10.0, timestep: float = 1e-3, push: float = 1.0, workers: int | None = None,
                 timeout: float = 60.0, name: str = "simulator_stability") -> None:
        """
        Args:
            up: the axis of the meshes that points up ("y" in glTF).
            shape: how the angle becomes a score.
            threshold: degrees.
            measure: "tilt", or "rotation" for the angle that counts yaw too.
            size: longest side of the bounding box in metres to scale to (contacts are softer for small objects); ``None`` where the
                meshes are in metres.
            seconds, timestep: simulated time and its step; their quotient is the work a mesh may cost.
            push: degrees per second at which the object starts to tip, so that a cone does not stand on its tip; 0 for none. A ball
                rolls on by ``push * seconds``.
            workers: processes; ``None`` takes one per core of this process, 8 at most.
            timeout: seconds of wall clock after which a simulation is given up ("timeout"): a safety, not a part of the score.
        Raises:
            ValueError: values out of range, all of them.
        """
        _check(up=up, shape=shape, measure=measure, threshold=threshold, size=size, seconds=seconds, timestep=timestep, push=push,
               workers=workers, timeout=timeout)
        self.up, self.shape, self.threshold, self.measure, self.size = up, shape, threshold, measure, size
        self.num_steps, self.timestep, self.push = round(seconds / timestep), timestep, push
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._simulators = Simulators(Path(tumble.__file__), min(cores, 8) if workers is None else workers, timeout)
        self.spec = replace(
            self.spec, name=name,
            version=f"{up}-up-{shape}-{measure}{threshold:g}-{size or 'metres'}-{seconds:g}s-{timestep:g}-push{push:g}-{tumble.SIMULATOR}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One simulation per mesh, in parallel; the number of workers changes nothing but the time."""
        answers: list[dict[str, Any]] = [{} for _ in media]
        requests: dict[int, bytes] = {}
        for row, sample in enumerate(media):
            try:
                requests[row] = self._request(sample)
            except InvalidMeshError as error:
                answers[row] = {"failed": str(error), "message": "not simulated"}
        for row, answer in zip(requests, self._simulators.ask(list(requests.values())), strict=True):
            answers[row] = answer
        for row, answer in enumerate(answers):
            if "failed" in answer:
                logger.warning("%s: sample %d: %s (%s)", self.spec.name, row, answer["failed"], answer["message"])
        return self._scores([answer.get("quaternion") for answer in answers], [answer.get("failed") for answer in answers])

    def close(self) -> None:
        """End the workers; they start again when they are needed."""
        self._simulators.close()

    def _request(self, sample: Media) -> bytes:
        if sample.faces is None:
            raise InvalidMeshError("empty mesh")
        vertices, faces = rigid_body(sample.data.cpu().numpy(), sample.faces.cpu().numpy(), up=self.up, size=self.size)
        return tumble.request(vertices, faces, num_steps=self.num_steps, timestep=self.timestep, push=self.push)

    def _scores(self, quaternions: Sequence[Sequence[float] | None], reasons: Sequence[str | None]) -> Scores:
        angles = {"tilt": [math.nan if q is None else tumble.tilt(q) for q in quaternions],
                  "rotation": [math.nan if q is None else tumble.rotation_angle(q) for q in quaternions]}
        values = torch.tensor([self._value(angle) for angle in angles[self.measure]], dtype=torch.float32)
        return Scores(raw=values, value=values.clone(), valid=torch.isfinite(values), reasons=tuple(reasons),
                      details={key: torch.tensor(column, dtype=torch.float32) for key, column in angles.items()})

    def _value(self, angle: float) -> float:
        """NaN for NaN."""
        if math.isnan(angle):
            return angle
        if self.shape == "binary":
            return float(angle < self.threshold)
        return max(0.0, 1 - angle / self.threshold) if self.shape == "linear" else math.exp(-angle / self.threshold)


def _check(*, up: str, shape: str, measure: str, threshold: float, size: float | None, seconds: float, timestep: float, push: float,
           workers: int | None, timeout: float) -> None:
    problems = [f"{key} '{value}' is none of {', '.join(allowed)}"
                for key, value, allowed in (("up", up, get_args(Axis)), ("shape", shape, get_args(Shape)),
                                            ("measure", measure, get_args(Measure))) if value not in allowed]
    problems += [f"{key} {value} must be positive and finite"
                 for key, value in (("threshold", threshold), ("size", 1.0 if size is None else size), ("seconds", seconds),
                                    ("timestep", timestep), ("timeout", timeout)) if not 0 < value < math.inf]
    if not 0 <= push <= 10:
        problems.append(f"push {push} must lie in [0, 10] degrees per second; more would knock over what stands")
    if not problems and not timestep <= min(0.01, seconds):
        problems.append(f"timestep {timestep} s must be at most 0.01 s and no longer than {seconds} s; 0.001 is usual")
    if workers is not None and workers < 1:
        problems.append(f"workers {workers} must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))
