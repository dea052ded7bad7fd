"""A trained reward as one safetensors file: the heads' tensors, and as metadata all that is needed to build and to refuse.

    RUN/reward.safetensors     "0.body.0.weight", ... of member 0, "1.body.0.weight", ...; an adapter's as "0.adapter.NAME"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from visalign.reward_models.adapter import LoraSettings
from visalign.reward_models.heads import Head, build_head, head_kind
from visalign.tensorfile import read_tensors, write_tensors

FILE = "reward.safetensors"
FORMAT = "visalign reward 1"
_KEY, _ADAPTER = "visalign", "adapter."


@dataclass(frozen=True)
class StoredReward:
    """What the file holds.

    Attributes:
        objective: what it was trained with, for messages and versions.
        encoder: as the configuration gave it, so that it can be loaded again: ``{"reward": name, ...}`` or ``package.module:attribute``.
        encoder_hash: of the encoder that was; embeddings of another one mean nothing to the heads.
        members: one head, or those of an ensemble.
        lora: the adapter's settings, ``None`` for a frozen encoder.
        adapters: the adapter's tensors by member; empty without.
    """

    objective: str
    encoder: Any
    encoder_hash: str
    members: tuple[Head, ...]
    lora: LoraSettings | None = None
    adapters: tuple[Mapping[str, Tensor], ...] = ()

    def check_encoder(self, name: str, digest: str) -> None:
        """Refuse another encoder.

        Raises:
            ValueError: the hashes differ.
        """
        if digest != self.encoder_hash:
            raise ValueError(f"this reward was trained on {self.encoder} ({self.encoder_hash[:12]}), and {name} has other weights or "
                             f"preprocessing ({digest[:12]}); give the encoder it was trained on, or train it again on this one")


def save_reward(path: Path, reward: StoredReward) -> None:
    """Write the file, complete or not at all."""
    tensors = {f"{k}.{name}": tensor for k, head in enumerate(reward.members) for name, tensor in head.state_dict().items()}
    tensors |= {f"{k}.{_ADAPTER}{name}": tensor for k, adapter in enumerate(reward.adapters) for name, tensor in adapter.items()}
    about = {"format": FORMAT, "objective": reward.objective, "encoder": reward.encoder, "encoder_hash": reward.encoder_hash,
             "members": len(reward.members), "head": head_kind(reward.members[0]),
             "arguments": reward.members[0].arguments(), "lora": None if reward.lora is None else asdict(reward.lora)}
    # One entry: safetensors writes several in any order, and equal trainings have equal files.
    write_tensors(path, tensors, {_KEY: json.dumps(about)})


def load_reward_file(location: str | Path) -> StoredReward:
    """What ``save_reward`` wrote, from the file or its folder; heads in evaluation mode, without gradients to their weights.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise ValueError(f"no trained reward at {location}: {path} is not there; visalign reward-train CONFIG --out DIR makes one, and a "
                         "run that was stopped is finished by the same command")
    tensors, metadata = read_tensors(path)
    about = json.loads(metadata.get(_KEY, "{}"))
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} holds no trained reward (format {about.get('format')!r}, expected {FORMAT!r}); visalign reward-train "
                         "writes one")
    lora = None if about["lora"] is None else LoraSettings(**{**about["lora"], "target_modules": _names(about["lora"]["target_modules"])})
    members = [_part(tensors, f"{k}.") for k in range(about["members"])]
    return StoredReward(about["objective"], about["encoder"], about["encoder_hash"],
                        tuple(_head(about, part) for part in members), lora,
                        () if lora is None else tuple(_part(part, _ADAPTER) for part in members))


def _head(about: Mapping[str, Any], part: Mapping[str, Tensor]) -> Head:
    head = build_head(about["head"], about["arguments"])
    head.load_state_dict({name: tensor for name, tensor in part.items() if not name.startswith(_ADAPTER)})
    return head.requires_grad_(False).eval()


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)
