"""What rewards of latents have to know about a captured pipeline's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from visalign.samplers.identity import pipeline_identity
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.reward_head import Embed, pooled_prompts
from visalign.types import Prompt


@dataclass(frozen=True)
class PipelineLatents:
    """``protocols.LatentSource`` of a captured pipeline. Under other call arguments of the same size it is the same source."""

    policy: PipelinePolicy

    @cached_property
    def convention(self) -> str:
        """The key under which latents are cached and stored (`pipeline_identity`); computed once."""
        return pipeline_identity(self.policy)

    @cached_property
    def _embed(self) -> Embed:
        return pooled_prompts(self.policy)

    def embed(self, prompts: Sequence[Prompt]) -> Tensor:
        """See `pooled_prompts`."""
        return self._embed(prompts)
