"""The JSON heads. Unknown keys are errors: what one side says and the other does not understand needs another version."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from visalign.protocols import Arity, RewardSpec
from visalign.types import MediaKind
from visalign.wire.body import VERSION

Encoding = Literal["raw", "png", "flac"]
Index = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpecPart(Part):
    """A ``RewardSpec``; infinite ends of ``raw_range`` are ``null``. Gradients do not travel."""

    name: str
    arity: Arity
    modality: tuple[MediaKind, ...]
    direction: Literal[1, -1]
    requires: tuple[str, ...]
    deterministic: bool
    raw_range: tuple[Finite | None, Finite | None]
    model_ids: tuple[str, ...]
    licence: str
    version: str
    convention: str

    @staticmethod
    def of(spec: RewardSpec) -> SpecPart:
        low, high = (value if math.isfinite(value) else None for value in spec.raw_range)
        return SpecPart(name=spec.name, arity=spec.arity, modality=tuple(sorted(spec.modality)), direction=spec.direction,
                        requires=tuple(sorted(spec.requires)), deterministic=spec.deterministic, raw_range=(low, high),
                        model_ids=spec.model_ids, licence=spec.licence, version=spec.version, convention=spec.convention)

    def spec(self) -> RewardSpec:
        low, high = self.raw_range
        return RewardSpec(name=self.name, arity=self.arity, modality=frozenset(self.modality), direction=self.direction,
                          requires=frozenset(self.requires), deterministic=self.deterministic,
                          raw_range=(-math.inf if low is None else low, math.inf if high is None else high), model_ids=self.model_ids,
                          licence=self.licence, version=self.version, convention=self.convention)


class LimitsPart(Part):
    """How much one request may hold: bytes (as sent, and decoded) and samples or pairs; ``max_batch`` of them are scored together."""

    max_bytes: Index
    max_samples: Index
    max_batch: Index


class RewardPart(Part):
    """One reward of a server; ``checks_prompts``: it reads more of a prompt than its spec says, ask /check."""

    spec: SpecPart
    checks_prompts: bool


class Catalogue(Part):
    """What a server offers."""

    version: Literal[1] = VERSION
    rewards: dict[str, RewardPart]
    limits: LimitsPart
    encodings: tuple[Encoding, ...]


class PromptPart(Part):
    """A prompt; its condition images are named by their place in the request's media."""

    text: str
    negative: str | None
    images: tuple[Index, ...]
    metadata: dict[str, Any]


class MediaPart(Part):
    """What the array ``media.N`` is; meshes have ``media.N.faces`` beside it, latents may have ``media.N.prompt_embeds``."""

    kind: MediaKind
    encoding: Encoding
    rate: Finite | None
    convention: str


class Request(Part):
    """What is asked.

    Attributes:
        rows: score: (media, prompt, group) per sample; compare: (first, second, prompt) per pair; check: none, all prompts are meant.
    """

    version: Literal[1] = VERSION
    prompts: tuple[PromptPart, ...]
    media: tuple[MediaPart, ...]
    rows: tuple[tuple[Index, Index, Index], ...]


class Answer(Part):
    """What came of it: per row why there is no score, or ``null``; arrays ``raw``, ``value``, ``valid`` and ``details.AXIS``.

    The axes are listed because a safetensors file has no order.
    """

    version: Literal[1] = VERSION
    spec: SpecPart
    reasons: tuple[str | None, ...]
    axes: tuple[str, ...]
