"""One sample before one judge, by one of these templates:

    unified_reward_point, unified_reward_point_video       UnifiedReward: one score, of 5 and of 10
    unified_reward_acs, unified_reward_aps_video           alignment, coherence (or physics) and style
    unified_reward_edit_quality, unified_reward_edit_instruction     edits: their looks; whether they do as told, beside their source
    human_preference, video_axes                           the axes of HPSv3 and of VideoReward, asked of any judge
    vqa, vqascore                                          the probabilities of "yes" and "no" as the answer's first token
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from visalign.protocols import RewardSpec
from visalign.rewards.judges.asking import ask_about, check_source, sources
from visalign.rewards.judges.backends import backend_from
from visalign.rewards.judges.images import files
from visalign.rewards.judges.inquiry import Inquiry, scores_of
from visalign.rewards.judges.question import Backend
from visalign.rewards.judges.templates import template as named
from visalign.types import Media, Prompt, Scores


class PointwiseJudge:
    """A vision-language model's rating of each sample, mapped from its scale to [0, 1]; its own numbers are the details."""

    spec = RewardSpec(name="pointwise_judge", modality=frozenset({"image", "video"}), requires=frozenset({"prompt"}), raw_range=(0.0, 1.0))

    def __init__(self, backend: Backend | Mapping[str, Any], template: str = "unified_reward_point", *, wording: str | None = None,
                 max_tokens: int | None = None, top_logprobs: int | None = None, num_frames: int = 8,
                 max_side: int | None = None, repairs: int = 1, rechecks: int = 2, name: str = "pointwise_judge") -> None:
        """
        Args:
            backend: {base_urls: ..., model: ...} (see ``judges.server:ChatServer``) or {folder: ...} (``judges.local:LocalModel``).
            template: how to ask and read, see ``templates``.
            wording: other words for the template, with ``{prompt}``.
            max_tokens, top_logprobs: of an answer, other than the template's; some servers give 5 alternatives at most.
            num_frames: shown of a video.
            max_side: pictures are reduced to it; ``None`` sends them as they are.
            repairs: how often an unreadable answer is asked about again.
            rechecks: questions of a call that are asked twice, past any cache, to see whether the judge repeats itself.
        Raises:
            ValueError: a parameter is wrong.
        """
        self.template = named(template, "one", wording, max_tokens, top_logprobs)
        self.inquiry = Inquiry(backend_from(backend), repairs, rechecks)
        self.num_frames, self.max_side = num_frames, max_side
        self.spec = replace(
            self.spec, name=name, modality=frozenset({self.template.modality}), version=self.template.version,
            requires=frozenset({"prompt"} if "{prompt}" in self.template.wording else ()), model_ids=(self.inquiry.backend.model,))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without the source image that an edit is judged against."""
        check_source(self.template, prompts, self.spec.name)

    def telemetry(self) -> dict[str, float]:
        """Of the latest ``score``: questions, valid rate, reasons, latency."""
        return dict(self.inquiry.telemetry)

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One rating per sample, invalid with its reason where there is none.

        Raises:
            ValueError: the back end's set-up is wrong, or a prompt lacks its source image.
        """
        self.check_prompts(prompts)
        before = sources(self.template, prompts, self.max_side)
        images = [(*source, *files(sample, self.num_frames, self.max_side)) for source, sample in zip(before, media, strict=True)]
        return scores_of(ask_about(self.inquiry, self.template, images, prompts))
