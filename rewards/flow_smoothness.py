"""Smooth motion, and motion: optical flow that changes little from frame to frame, in a video that moves at all.

With F_t the flow from frame t to t + 1 in pixels, |.| its length at a pixel, means over pixels and t:

    smoothness  S = 1 - mean |F_{t+1} - F_t| / (mean |F_{t+1}| + mean |F_t|)      in [0, 1]
    motion      m = mean_t (mean of the largest 5 % of |F_t|) * rate / 8         pixels per 1/8 s
    dynamics    D = min(1, m / (tau * min(H, W)))                                 in [0, 1]
    raw           = S * D                                                         in [0, 1]

S is 1 for constant velocity and 0 for a picture that trembles to and fro (F_{t+1} = -F_t); the triangle inequality keeps it above 0.
S alone is maximised by a frozen video, as every published smoothness metric is; D is 0 there, so the product is. Motion faster than the
threshold earns nothing more, which leaves its amount to the prompt.

tau = 6/256 and 8 frames per second are the threshold at which VBench calls a video dynamic. Flow comes from ``maths.optical_flow`` (no
weights), or from RAFT where its checkpoint is given.

Source: VBench, arXiv:2311.17982 (motion smoothness and dynamic degree, there two numbers); RAFT, arXiv:2003.12039.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms.functional import resize

from visalign.maths.optical_flow import fastest_motion, lucas_kanade, motion_smoothness
from visalign.protocols import RewardSpec
from visalign.rewards.dual_encoder import default_device
from visalign.rewards.weights import read_tensors, weights_file
from visalign.types import Media, Prompt, Scores

REFERENCE_RATE = 8.0  # frames per second at which VBench's threshold is meant
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class FlowSmoothness:
    """Smoothness of a video's motion times how far it reaches the motion asked for. Details: ``smoothness``, ``motion``, ``dynamics``."""

    spec = RewardSpec(name="flow_smoothness", modality=frozenset({"video"}), raw_range=(0.0, 1.0))

    def __init__(self, weights: str | None = None, *, architecture: Literal["raft_large", "raft_small"] = "raft_large", size: int = 256,
                 threshold: float = 6 / 256, batch_size: int = 8, device: str | torch.device | None = None, cache_dir: str | None = None,
                 name: str = "flow_smoothness") -> None:
        """
        Args:
            weights: a checkpoint of torchvision's RAFT (path or ORG/REPO/FILE on the hub); ``None`` takes Lucas-Kanade, which needs none.
            architecture: what the checkpoint is of.
            size: larger videos are shrunk until their shorter side has so many pixels.
            threshold: motion that counts as full, in shorter sides per 1/8 s.
            batch_size: pairs of frames per pass; does not change the scores.
        Raises:
            ValueError: threshold not above 0, a size below 16, or weights that are not found.
        """
        if not threshold > 0:
            raise ValueError(f"threshold {threshold} must be above 0: without one, a frozen video has the smoothest motion; "
                             "6/256 (0.0234) is usual")
        if size < 16:
            raise ValueError(f"size {size} leaves too few pixels to see motion in; 256 is usual")
        self.device = default_device(device)
        self.raft: Any = None
        if weights is not None:
            from torchvision.models import optical_flow

            self.raft = getattr(optical_flow, architecture)(weights=None, progress=False)
            self.raft.load_state_dict(read_tensors(weights_file(weights, reward=name, cache_dir=cache_dir)))
            self.raft.to(self.device).requires_grad_(False).eval()
        self.size = size
        self.threshold = threshold
        self.batch_size = batch_size
        self.spec = replace(self.spec, name=name, model_ids=() if weights is None else (architecture, weights),
                            version=f"{'lucas-kanade' if weights is None else architecture}-{size}-{threshold:.4g}")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per video; fewer than 3 frames have no change of motion and are invalid.

        Raises:
            ValueError: a video without a rate.
        """
        values: list[float | None] = []
        details: dict[str, list[float]] = {"smoothness": [], "motion": [], "dynamics": []}
        for sample in media:
            if not sample.rate:
                raise ValueError(f"reward '{self.spec.name}': a video without a rate; set Media.rate to its frames per second")
            parts = self._judge(sample.data, sample.rate) if len(sample.data) >= 3 else dict.fromkeys(details, float("nan"))
            for key, column in details.items():
                column.append(parts[key])
            values.append(parts["smoothness"] * parts["dynamics"] if len(sample.data) >= 3 else None)
        return Scores.from_values(values, reason="fewer than 3 frames", details={key: torch.tensor(of) for key, of in details.items()})

    def _judge(self, video: Tensor, rate: float) -> dict[str, float]:
        frames = self._shrink(video)
        flows = torch.cat([self._flow(frames[i:i + self.batch_size], frames[i + 1:i + 1 + self.batch_size])
                           for i in range(0, len(frames) - 1, self.batch_size)])
        motion = fastest_motion(flows).item() * rate / REFERENCE_RATE / min(frames.shape[-2:])
        return {"smoothness": motion_smoothness(flows).item(), "motion": motion, "dynamics": min(1.0, motion / self.threshold)}

    def _shrink(self, video: Tensor) -> Tensor:
        """Frames in [0, 1], float32, shorter side at most ``size``; RAFT wants sides of 128 at least that 8 divides."""
        sides = video.shape[-2:]
        scale = min(1.0, self.size / min(sides))
        if self.raft is None:
            target = [round(side * scale) for side in sides]
        else:
            scale = max(scale, 128 / min(sides))
            target = [max(128, round(side * scale / 8) * 8) for side in sides]
        frames = video.to(self.device).float() / 255
        return frames if tuple(target) == tuple(sides) else resize(frames, target, antialias=True)

    def _flow(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow from ``first[:len(second)]`` to ``second``, (n, 2, H, W)."""
        first = first[:len(second)]
        if self.raft is not None:
            return self.raft(2 * first - 1, 2 * second - 1)[-1]
        weights = torch.tensor(GREY, device=first.device)[:, None, None]
        return lucas_kanade((first * weights).sum(dim=1), (second * weights).sum(dim=1))
