"""Admission checks and the one place where rewards are called: whole groups in, one ``Scores`` per reward out.

Rewards of decoded media and of latents are asked alike; each gets the samples in its own space.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from visalign.notes import noting
from visalign.protocols import AnyReward, LatentSource, Reports, Reward, RewardSpec, SetReward
from visalign.types import Media, MediaKind, Prompt, Scores

logger = logging.getLogger(__name__)

_SHAPES: Mapping[MediaKind, tuple[torch.dtype, int, str]] = {
    "image": (torch.uint8, 3, "uint8 (3, H, W) RGB"),
    "video": (torch.uint8, 4, "uint8 (frames, 3, H, W) RGB"),
    "audio": (torch.float32, 2, "float32 (channels, samples) in [-1, 1]"),
    "mesh": (torch.float32, 2, "float32 (V, 3) vertices"),
}


def score(rewards: Mapping[str, Reward | SetReward], media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int],
          latents: Sequence[Media] = (), seconds: MutableMapping[str, float] | None = None) -> dict[str, Scores]:
    """Ask every reward about all samples, in the order given.

    Args:
        rewards: by the name under which their scores are reported.
        media, prompts, group_id: one entry per sample; samples of one group are consecutive or not, but all here.
        latents: the same samples before decoding, for the rewards that read those; ``media`` may be empty if all do.
        seconds: gets the wall-clock time of each reward's call, by name.
    Raises:
        ValueError: an input a reward does not admit, a group with two prompts, or an answer that is not one score per sample.
        Exception: whatever a reward raises, with its name in a note; failures a reward expects come back as invalid samples.
    """
    _check_groups(media or latents, prompts, group_id)
    for name, reward in rewards.items():
        if not isinstance(reward, Reward | SetReward):
            raise ValueError(f"'{name}' is a {type(reward).__name__} without score(); a pairwise judge becomes a reward through "
                             "win_rate: {name: win_rate, params: {judge: {reward: ...}}}")
        check_inputs(reward.spec, _read_by(reward, media, latents), prompts, name)
    scores = {}
    for name, reward in rewards.items():
        started = time.perf_counter()
        samples = _read_by(reward, media, latents)
        with noting(f"while reward '{name}' scored {len(samples)} samples"):
            answer = reward.score(samples, prompts, group_id) if isinstance(reward, Reward) else _features(reward, samples, prompts)
        if not isinstance(answer, Scores) or len(answer.valid) != len(samples):
            got = f"{len(answer.valid)} scores" if isinstance(answer, Scores) else type(answer).__name__
            raise ValueError(f"reward '{name}' returned {got} for {len(samples)} samples; expected Scores with one entry each")
        if seconds is not None:
            seconds[name] = time.perf_counter() - started
        scores[name] = answer
    return scores


def spaces(rewards: Iterable[Reward | SetReward]) -> frozenset[str]:
    """The spaces in which these rewards read samples, "media" or "latent": what need not be decoded and what need not be kept."""
    return frozenset(reward.spec.space for reward in rewards)


def latent_media(latents: Tensor, prompts: Sequence[Prompt], source: LatentSource, rewards: Iterable[Reward | SetReward]) -> list[Media]:
    """Clean latents (n, ...) as samples of rewards that read latents, on the CPU; prompts are embedded if one of them reads that."""
    rows: Sequence[Tensor | None] = [None] * len(prompts)
    if any("prompt_embeds" in reward.spec.requires for reward in rewards):
        rows = list(source.embed(prompts).detach().cpu().float())
    return [Media("latent", latent, convention=source.convention, prompt_embeds=row)
            for latent, row in zip(latents.detach().cpu().float(), rows, strict=True)]


def _read_by(reward: Reward | SetReward, media: Sequence[Media], latents: Sequence[Media]) -> Sequence[Media]:
    return latents if reward.spec.space == "latent" else media


def _features(reward: SetReward, media: Sequence[Media], prompts: Sequence[Prompt]) -> Scores:
    """A set-level reward's features, not yet judged: value 0, invalid where a feature is not finite."""
    features = reward.features(media, prompts)
    if features.dim() != 2 or len(features) != len(media):
        raise ValueError(f"reward '{reward.spec.name}' returned features {tuple(features.shape)} for {len(media)} samples; expected "
                         f"({len(media)}, d)")
    valid = torch.isfinite(features).all(dim=1)
    pending = torch.where(valid, 0.0, torch.nan)
    reasons = tuple(None if ok else "nonfinite" for ok in valid.tolist())
    return Scores(raw=pending, value=pending.clone(), valid=valid, reasons=reasons, features=features.double())


def telemetry(rewards: Mapping[str, Reward | SetReward]) -> dict[str, float]:
    """``judge/<reward>/<what>`` of every reward that tells how its latest call went; wall-clock numbers, so they are no metrics."""
    return {f"judge/{name}/{key}": value for name, reward in rewards.items() if isinstance(reward, Reports)
            for key, value in reward.telemetry().items()}


@runtime_checkable
class ChecksPrompts(Protocol):
    """A reward that reads more from a prompt than the keys its spec names."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, naming the row, for a prompt this reward cannot use."""


def admit(rewards: Mapping[str, AnyReward], prompts: Sequence[Prompt]) -> None:
    """Check a whole prompt file against all rewards and judges before anything is generated.

    Raises:
        ValueError: names the reward, the row and the fix.
    """
    for name, reward in rewards.items():
        check_prompts(reward.spec, prompts, name)
        if isinstance(reward, ChecksPrompts):
            reward.check_prompts(prompts)


def admit_latents(rewards: Mapping[str, AnyReward], source: LatentSource | None) -> None:
    """Refuse rewards of latents that would read other latents than they were made for, before anything is generated.

    Raises:
        ValueError: names the reward, and the latents there are and those it reads.
    """
    for name, reward in rewards.items():
        if reward.spec.space != "latent":
            continue
        if source is None:
            raise ValueError(f"reward '{name}' reads latents, and this policy does not say what its latents mean; use a reward of decoded "
                             "media")
        if reward.spec.convention not in ("", source.convention):
            raise ValueError(f"reward '{name}' reads latents '{reward.spec.convention}', this run's are '{source.convention}': another "
                             "autoencoder, scale, shift, layout or size. Use a reward made for these latents, or the pipeline and size it "
                             "was made for")


def check_inputs(spec: RewardSpec, media: Sequence[Media], prompts: Sequence[Prompt], name: str | None = None) -> None:
    """Refuse what a reward cannot read: a wrong kind, dtype, shape or range, or metadata it needs and a prompt lacks.

    Raises:
        ValueError: names the reward, the row, what is wrong and what would be right.
    """
    if spec.space == "latent" and not media and prompts:
        raise ValueError(f"reward '{name or spec.name}' reads latents, which only a run has while it samples: files of media hold none. "
                         "Train with it, or watch it as a guard")
    if len(media) != len(prompts):
        raise ValueError(f"reward '{name or spec.name}': {len(media)} media for {len(prompts)} prompts; pass one per sample")
    check_prompts(spec, prompts, name)
    for row, sample in enumerate(media):
        problem = _media_problem(spec, sample)
        if problem:
            raise ValueError(f"reward '{name or spec.name}', sample {row}: {problem}")


def check_prompts(spec: RewardSpec, prompts: Sequence[Prompt], name: str | None = None) -> None:
    """The part of ``check_inputs`` that needs no sample."""
    for row, prompt in enumerate(prompts):
        missing = sorted(key for key in spec.requires - {"prompt", "prompt_embeds"} if key not in prompt.metadata)
        if missing:
            raise ValueError(f"reward '{name or spec.name}', prompt {row} ({prompt.text[:60]!r}): metadata lacks "
                             f"{', '.join(map(repr, missing))} (it has: {', '.join(sorted(prompt.metadata)) or 'none'}); "
                             f'add it to the line in the prompt file: {{"prompt": ..., "{missing[0]}": ...}}')
        if "prompt" in spec.requires and not prompt.text.strip():
            raise ValueError(f"reward '{name or spec.name}', prompt {row}: the text is empty, and this reward reads it")


def _media_problem(spec: RewardSpec, sample: Media) -> str | None:
    if sample.kind not in spec.modality:
        return f"it reads {' and '.join(sorted(spec.modality))}, not {sample.kind}; use another reward for this model"
    if sample.kind == "latent":
        return _latent_problem(spec, sample)
    dtype, dims, expected = _SHAPES[sample.kind]
    data = sample.data
    got = f"got {str(data.dtype).removeprefix('torch.')} {tuple(data.shape)}, expected {expected}"
    if data.dtype != dtype:
        hint = "; convert with (x.clamp(0, 1) * 255).round().to(torch.uint8)" if dtype == torch.uint8 else ""
        return got + hint
    channel_axis = {"image": 0, "video": 1, "mesh": 1}.get(sample.kind)
    if data.dim() != dims or (0 in data.shape and sample.kind != "mesh") or (channel_axis is not None and data.shape[channel_axis] != 3):
        return got
    if sample.kind == "audio" and not bool((data.abs() <= 1).all()):
        return f"values reach {float(data.abs().max()):.3g}, expected [-1, 1]; divide by the peak or clamp"
    if sample.kind in ("audio", "video") and not sample.rate:
        unit = "frames" if sample.kind == "video" else "samples"
        return f"{sample.kind} without a rate; set Media.rate to its {unit} per second"
    if sample.kind == "mesh" and sample.faces is None:
        return "a mesh without faces; set Media.faces to int64 (F, 3)"
    return None


def _latent_problem(spec: RewardSpec, sample: Media) -> str | None:
    data, embeds = sample.data, sample.prompt_embeds
    if data.dtype != torch.float32 or data.dim() < 1 or not bool(torch.isfinite(data).all()):
        return f"got a latent {str(data.dtype).removeprefix('torch.')} {tuple(data.shape)}, expected float32 without infinity or NaN"
    if spec.convention not in ("", sample.convention):
        return f"it reads latents '{spec.convention}', not '{sample.convention}'; use a reward made for this pipeline's latents"
    if "prompt_embeds" in spec.requires and (embeds is None or embeds.dim() != 1 or not bool(torch.isfinite(embeds).all())):
        return f"it reads the prompt's embedding; expected finite prompt_embeds (D,), got {None if embeds is None else tuple(embeds.shape)}"
    return None


def _check_groups(media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> None:
    if not len(media) == len(prompts) == len(group_id):
        raise ValueError(f"{len(media)} media, {len(prompts)} prompts and {len(group_id)} group ids; pass one of each per sample")
    first: dict[int, Prompt] = {}
    for row, (prompt, group) in enumerate(zip(prompts, group_id, strict=True)):
        if first.setdefault(group, prompt).text != prompt.text:
            raise ValueError(f"sample {row} of group {group} has the prompt {prompt.text[:60]!r}, the group's first has "
                             f"{first[group].text[:60]!r}; a group shares one prompt")

