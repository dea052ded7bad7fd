"""Training, calibration and held-out judgements: a prompt is on one side only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.reward_training.config import RewardTrainingConfig
from visalign.reward_training.examples import Corpus, Examples


@dataclass(frozen=True)
class Split:
    """Judgements by what they are for, as pairs; ``train`` are whole lists where the objective reads lists."""

    train: Examples
    calibration: Examples
    heldout: Examples

    def counts(self) -> dict[str, dict[str, int]]:
        return {name: {"judgements": len(part), "prompts": len(part.cluster.unique())} for name, part in vars(self).items()}


def split(config: RewardTrainingConfig, corpus: Corpus, lists: bool) -> Split:
    """The three parts; ``lists`` keeps those of the training whole.

    Raises:
        ValueError: too few prompts, or judgements that prefer nothing.
    """
    part = split_prompts(corpus.keys, config.data.heldout, config.data.calibration, config.seed)[corpus.examples.cluster]
    train, calibration, heldout = (corpus.examples.select(part == k) for k in range(3))
    comparisons = [one if config.data.ties == "keep" else one.select(one.label != 0)
                   for one in (train.pairs(), calibration.pairs(), heldout.pairs())]
    for name, one in zip(("training", "calibration", "held-out"), comparisons, strict=True):
        if (name != "calibration" or config.data.calibration) and not bool((one.label != 0).any()):
            remedy = "nothing can be learnt from ties alone" if name == "training" else "raise the share of such prompts in data"
            raise ValueError(f"{corpus.dataset.source}: none of the {name} judgements has a winner; {remedy}")
    return Split(train if lists else comparisons[0], comparisons[1], comparisons[2])


def split_prompts(keys: Sequence[str], heldout: float, calibration: float, seed: int) -> Tensor:
    """Per prompt 0 (training), 1 (calibration) or 2 (held out), int64 (len(keys),), in the order of a hash of seed and prompt.

    Raises:
        ValueError: too few prompts for a part that is to have some.
    """
    num_heldout, num_calibration = (max(1, round(share * len(keys))) if share else 0 for share in (heldout, calibration))
    if len(keys) < num_heldout + num_calibration + 1:
        raise ValueError(f"{len(keys)} distinct prompt{'s' * (len(keys) != 1)} cannot be split into training, "
                         f"{'calibration and ' if calibration else ''}held-out prompts; judgements of more prompts are needed"
                         + (", or data.calibration=0" if calibration and len(keys) == 2 else ""))
    order = hash_order(keys, seed)
    part = torch.zeros(len(keys), dtype=torch.int64)
    part[order[:num_heldout]] = 2
    part[order[num_heldout:num_heldout + num_calibration]] = 1
    return part


def hash_order(keys: Sequence[str], seed: int) -> list[int]:
    """Positions in a random order that depends on the seed and on each key alone, not on the other keys or their order."""
    return sorted(range(len(keys)), key=lambda row: hashlib.sha256(f"{seed} {keys[row]}".encode()).hexdigest())
