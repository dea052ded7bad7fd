"""Any image reward on video: evenly spaced frames, their mean or their worst.

    value = mean_k f(frame_k, c)      or      value = min_k f(frame_k, c)

Blind to the order of frames: a shuffled video scores the same, a still one is not punished. Train it beside a reward of motion
(``flow_smoothness``). The minimum is what a viewer remembers, and a harder target; its gradient reaches one frame per video.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from visalign.media import evenly_spaced
from visalign.protocols import DifferentiableReward, Remembers, Reward, RewardSpec
from visalign.scoring import ChecksPrompts
from visalign.types import Media, Prompt, Scores


class FrameWise:
    """A pointwise image reward as a reward of video; an image is one frame.

    Details: the image reward's own, averaged, and ``worst_frame``, which of the frames looked at is worst.
    """

    spec = RewardSpec(name="framewise", modality=frozenset({"image", "video"}))

    def __init__(self, image: Reward, num_frames: int = 8, reduce: Literal["mean", "min"] = "mean", name: str | None = None) -> None:
        """
        Args:
            image: scores single images, pointwise.
            num_frames: how many evenly spaced frames, the first and the last among them; all of a shorter video.
            reduce: "mean", or "min": the frame that is worst in the reward's own direction.
            name: by default the image reward's.
        Raises:
            ValueError: the reward does not score single images, or no frame is asked for.
        """
        if not isinstance(image, Reward) or image.spec.arity != "pointwise" or "image" not in image.spec.modality:
            raise ValueError(f"framewise needs a pointwise reward of images, got {type(image).__name__}; write "
                             "image: {reward: pickscore} or another that scores every image by itself")
        if num_frames < 1:
            raise ValueError(f"num_frames {num_frames} must be at least 1; 8 is usual")
        if reduce not in ("mean", "min"):
            raise ValueError(f"reduce '{reduce}' is neither 'mean' nor 'min'")
        self.image = image
        self.num_frames = num_frames
        self.reduce = reduce
        self.spec = replace(image.spec, name=name or image.spec.name, modality=frozenset({"image", "video"}),
                            version=f"{image.spec.version}-{num_frames}-frames-{reduce}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per video; a video with an invalid frame is invalid for that frame's reason."""
        frames = [_images(sample, self.num_frames) for sample in media]
        counts = [len(sample) for sample in frames]
        row = torch.arange(len(media)).repeat_interleave(torch.tensor(counts)).tolist()
        scores = self.image.score([frame for sample in frames for frame in sample], [prompts[i] for i in row],
                                  [group_id[i] for i in row])
        values = scores.value.split(counts)
        valid = torch.stack([part.all() for part in scores.valid.split(counts)])
        value = torch.stack([self._reduce(part) for part in values])  # NaN where one frame is
        details = {key: torch.stack([part.mean() for part in detail.split(counts)]) for key, detail in scores.details.items()}
        starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        details["worst_frame"] = torch.stack([part.argmin() for part in values]).float()
        reasons = tuple(next((reason for reason in scores.reasons[start:end] if reason), None)
                        for start, end in itertools.pairwise(starts))
        return Scores(raw=self.spec.direction * value, value=value, valid=valid, reasons=reasons, details=details)

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Values with gradients to the pixels, float32 (B,): of images (B, 3, H, W) or video (B, frames, 3, H, W) in [0, 1].

        Raises:
            ValueError: the image reward has no gradient, or another shape.
        """
        if not (self.spec.differentiable and isinstance(self.image, DifferentiableReward)):
            raise ValueError(f"reward '{self.spec.name}' has no gradient: {type(self.image).__name__} scores without one")
        if media.dim() == 4:
            return self.image.score_tensor(media, prompts)
        if media.dim() != 5:
            raise ValueError(f"{self.spec.name}: media are {tuple(media.shape)}; expected (B, frames, 3, H, W) or (B, 3, H, W)")
        frames = media[:, evenly_spaced(media.shape[1], self.num_frames)]
        repeated = [prompt for prompt in prompts for _ in range(frames.shape[1])]
        values = self.image.score_tensor(frames.flatten(0, 1), repeated).unflatten(0, frames.shape[:2])
        return values.mean(dim=1) if self.reduce == "mean" else values.min(dim=1).values

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """As the image reward does."""
        if isinstance(self.image, ChecksPrompts):
            self.image.check_prompts(prompts)

    def state_dict(self) -> Mapping[str, Tensor]:
        """The image reward's memory, where it has one."""
        return self.image.state_dict() if isinstance(self.image, Remembers) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Give it back."""
        if isinstance(self.image, Remembers):
            self.image.load_state_dict(state)

    def _reduce(self, values: Tensor) -> Tensor:
        return values.mean() if self.reduce == "mean" else values.min()


def _images(sample: Media, num_frames: int) -> list[Media]:
    """Frames of a video as images; an image as it is."""
    if sample.kind == "image":
        return [sample]
    return [Media("image", frame) for frame in sample.data[evenly_spaced(len(sample.data), num_frames)]]
