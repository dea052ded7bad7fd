"""Who judges in ``visalign eval``: rewards, judges of pairs, and the ruler of diversity, from names or from a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from visalign.build import unique_names
from visalign.commands.exemplars import parse_encoder
from visalign.commands.score import parse_reward
from visalign.compare.measurement import Panel, Spread
from visalign.config import Config, GuardConfig, RewardConfig, resolve_path
from visalign.diversity import DIFFERENCE, VENDI, pixel_rows
from visalign.media import KIND, Sample
from visalign.plugins import load_reward
from visalign.protocols import PairwiseReward, Reward, SetReward
from visalign.rewards.encoders import Encoder, as_encoder, sample_features
from visalign.rewards.pairwise import WinRate


def build_panel(rewards: Sequence[str], judges: Sequence[str], config: Config | None) -> Panel:
    """Rewards and judges by name, or those of a configuration where none are named; a win rate within groups is asked as its judge.

    Raises:
        ValueError: nobody is named, or somebody does not do what he is named for.
    """
    named: list[RewardConfig | GuardConfig] = [parse_reward(text) for text in rewards]
    if not rewards and not judges and config is not None:
        named += [*config.rewards, *config.guards]
    pairwise: list[RewardConfig | GuardConfig] = [parse_reward(text) for text in judges]
    if not named and not pairwise:
        raise ValueError("which rewards? -r clip, -r '{name: clip, params: {model: ...}}', -r my_file.py:function, --config CONFIG, or "
                         "--judge '{name: pairwise_judge, params: {backend: ...}}'")
    entries = unique_names([*named, *pairwise])
    scoring: dict[str, Reward | SetReward] = {}
    comparing: dict[str, PairwiseReward] = {}
    for name, entry in entries.items():
        loaded = _load(entry)
        if isinstance(loaded, WinRate):  # within a group it says nothing about two models; its judge does
            comparing[name] = loaded.judge
        elif any(entry is one for one in pairwise):
            if not isinstance(loaded, PairwiseReward):
                raise ValueError(f"--judge '{name}' scores samples and compares nothing; name it with -r, which gives a win rate too")
            comparing[name] = loaded
        elif isinstance(loaded, Reward | SetReward):
            scoring[name] = loaded
        else:
            raise ValueError(f"'{name}' compares pairs; name it with --judge")
    return Panel(scoring, comparing)


def _load(entry: RewardConfig | GuardConfig) -> Reward | SetReward | PairwiseReward:
    return load_reward(entry.name, **resolve_path(dict(entry.params)))


def find_encoder(text: str | None, rewards: Mapping[str, Reward | SetReward]) -> Encoder | None:
    """What diversity is measured in: what ``--encoder`` names, or the first CLIP among the rewards."""
    from visalign.rewards.clip import ClipScore  # open_clip takes seconds to import

    if text is not None:
        return parse_encoder(text)
    clip = next((reward for reward in rewards.values() if isinstance(reward, ClipScore)), None)
    return None if clip is None else as_encoder(clip)


def spread_of(encoder: Encoder | None, samples: Sequence[Sample]) -> Spread | None:
    """How the samples' diversity is measured: in an encoder's features, or in pixels for images of one size; ``None`` for the others.

    Raises:
        ValueError: the encoder does not read these samples.
    """
    kinds = {KIND[sample.file.suffix.lower()] for sample in samples}
    if encoder is not None:
        if not kinds <= encoder.modality:
            raise ValueError(f"encoder {encoder.name} reads {' and '.join(sorted(encoder.modality))}, the samples are "
                             f"{' and '.join(sorted(kinds))}; give another --encoder")
        return Spread(VENDI, lambda media: sample_features(encoder, media), encoder.name)
    if kinds != {"image"}:
        return None
    sizes = set()
    for sample in samples:
        with Image.open(sample.file) as file:
            sizes.add(file.size)
    return Spread(DIFFERENCE, pixel_rows, "pixels") if len(sizes) == 1 else None
