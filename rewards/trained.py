"""A reward that ``visalign reward-train`` made, by the folder it made it in.

    {name: trained, params: {path: runs/reward}}                                 alone, mean of its members
    {name: trained, params: {path: runs/reward, member: 2}}                      one member of an ensemble: give each its own line for
                                                                                 combine: uncertainty or worst
    {name: win_rate, params: {judge: {reward: trained, path: runs/reward}}}      compared in pairs

Scalar objectives give calibrated log-odds: ``P(i beats j) = sigmoid(raw_i - raw_j)``, what the shapes ``lsc`` and ``par`` assume.
A general preference has no scalar: its score is the mean probability of beating the other samples of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.protocols import RewardSpec
from visalign.reward_models.adapter import EncoderAdapter
from visalign.reward_models.encoder import AdaptableEncoder, DifferentiableEncoder
from visalign.reward_models.heads import GatedHead
from visalign.reward_models.stored import load_reward_file
from visalign.rewards.feature_encoders import load_encoder
from visalign.rewards.weights import weights_hash
from visalign.types import Comparisons, Media, Prompt, Scores

NO_EMBEDDING = "no embedding"
Embedded = tuple[Tensor, Tensor | None]  # of the samples (n, d), of their prompts (n, e)


class TrainedReward:
    """Heads on the embeddings of the encoder they were trained on. Details: ``member_k`` and their ``disagreement`` (standard deviation)
    in an ensemble, and the ratings of a gated reward by aspect."""

    spec = RewardSpec(name="trained", modality=frozenset({"image", "video", "audio"}))

    def __init__(self, path: str | Path, *, member: int | None = None, encoder: Any = None, device: str | None = None,
                 name: str = "trained") -> None:
        """
        Args:
            path: the folder of ``visalign reward-train``, or its ``reward.safetensors``.
            member: of an ensemble, counted from 0; ``None`` averages all.
            encoder: where the encoder is on this machine, ``{reward: clip, model: ...}``; ``None`` takes the one named in training.
            device: of the encoder; ``None`` leaves it to the encoder.
        Raises:
            ValueError: no trained reward there, no such member, or another encoder than it was trained on.
        """
        stored = load_reward_file(path)
        if member is not None and not 0 <= member < len(stored.members):
            raise ValueError(f"reward '{name}': member {member} of {path}, which has {len(stored.members)}, counted from 0")
        self.encoder = load_encoder(stored.encoder if encoder is None else encoder, device)
        stored.check_encoder(self.encoder.name, self.encoder.hash)
        chosen = range(len(stored.members)) if member is None else [member]
        self.members = [stored.members[k].to(self.encoder.device) for k in chosen]
        self._adapters = [stored.adapters[k] for k in chosen] if stored.lora else []
        self._adapter: EncoderAdapter | None = None
        if stored.lora is not None:
            assert isinstance(self.encoder, AdaptableEncoder), "training put an adapter into it"
            self._adapter = EncoderAdapter(self.encoder.network, stored.lora)
            self._adapter.load(self._adapters[0])
            self.encoder.network.requires_grad_(False)
        head = self.members[0]
        self.scalar, self.reads_text = head.scalar, head.shape.reads_text
        differentiable = self.scalar and isinstance(self.encoder, DifferentiableEncoder) and len(self._adapters) < 2
        digest = weights_hash("", {f"{k}.{key}": value for k, one in enumerate(self.members) for key, value in one.state_dict().items()})
        self.spec = replace(
            self.spec, name=name, arity="pointwise" if self.scalar else "groupwise", modality=self.encoder.modality,
            requires=frozenset({"prompt"} if self.reads_text else ()), differentiable=differentiable, model_ids=(self.encoder.name,),
            raw_range=(float("-inf"), float("inf")) if self.scalar else (0.0, 1.0), version=f"{stored.objective}-{digest[:12]}")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Mean over the members of each sample's reward, or of its probability of beating another sample of its group."""
        embedded = self._embed(media, prompts)
        outputs, known = self._outputs(embedded), _known(embedded)
        if not self.scalar:
            return self._against_group(outputs, known, group_id)
        rewards, details = outputs.squeeze(-1), self._ratings(embedded)
        if len(rewards) > 1:
            details |= {f"member_{k}": row for k, row in enumerate(rewards)} | {"disagreement": rewards.std(dim=0, correction=0)}
        return _scores(rewards.mean(dim=0), known, details, NO_EMBEDDING)

    @torch.no_grad()
    def compare(self, first: Sequence[Media], second: Sequence[Media], prompts: Sequence[Prompt]) -> Comparisons:
        """``sigmoid`` of the members' mean log-odds; each distinct sample is embedded once."""
        asked = list(zip([*first, *second], [*prompts, *prompts], strict=True))
        distinct = {(id(sample), id(prompt)): (sample, prompt) for sample, prompt in asked}
        row = {key: index for index, key in enumerate(distinct)}
        embedded = self._embed(*zip(*distinct.values(), strict=True))
        outputs, known = self._outputs(embedded), _known(embedded)
        i, j = torch.tensor([row[id(sample), id(prompt)] for sample, prompt in asked]).chunk(2)
        valid = known[i] & known[j]
        prob = torch.sigmoid(self._log_odds(outputs[:, i], outputs[:, j]))
        return Comparisons(prob_first=torch.where(valid, prob, torch.nan), valid=valid,
                           reasons=tuple(None if ok else NO_EMBEDDING for ok in valid.tolist()))

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards with gradients to the pixels, float32 (B,): ``protocols.DifferentiableReward``.

        Raises:
            ValueError: this reward has no gradient, or media of another shape or type.
        """
        if not (self.spec.differentiable and isinstance(self.encoder, DifferentiableEncoder)):
            why = "the members of an ensemble with adapters share one network; name one: member: 0" if len(self._adapters) > 1 else (
                "it compares samples and scores none" if not self.scalar else f"{self.encoder.name} has no gradient to the media")
            raise ValueError(f"reward '{self.spec.name}' has no gradient: {why}")
        embedded, text = self.encoder.pixels(media), self._text(prompts)
        return torch.stack([head(embedded, text).squeeze(-1) for head in self.members]).mean(dim=0)

    def _embed(self, media: Sequence[Media], prompts: Sequence[Prompt]) -> list[Embedded]:
        """Embeddings of samples and prompts for every member: the same for all, unless each has an adapter of its own."""
        if self._adapter is None or len(self._adapters) == 1:
            return [(self.encoder.media(media), self._text(prompts))] * len(self.members)
        found = []
        for tensors in self._adapters:
            self._adapter.load(tensors)
            found.append((self.encoder.media(media), self._text(prompts)))
        return found

    def _text(self, prompts: Sequence[Prompt]) -> Tensor | None:
        return self.encoder.texts([prompt.text for prompt in prompts]) if self.reads_text else None

    def _outputs(self, embedded: Sequence[Embedded]) -> Tensor:
        """What every member says of each sample, (M, n, q) on the CPU."""
        return torch.stack([head(*given).cpu() for head, given in zip(self.members, embedded, strict=True)])

    def _ratings(self, embedded: Sequence[Embedded]) -> dict[str, Tensor]:
        """Mean over the members of every aspect's rating; empty for rewards without aspects."""
        found = [head.ratings(*given).cpu() for head, given in zip(self.members, embedded, strict=True) if isinstance(head, GatedHead)]
        return dict(zip(self.members[0].aspects, torch.stack(found).mean(dim=0).T, strict=True)) if found else {}

    def _log_odds(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([head.log_odds(a, b) for head, a, b in zip(self.members, first, second, strict=True)]).mean(dim=0)

    def _against_group(self, outputs: Tensor, known: Tensor, group_id: Sequence[int]) -> Scores:
        wins = torch.full((len(known),), torch.nan)
        group = torch.tensor([int(one) for one in group_id])
        for one in group.unique():
            rows = ((group == one) & known).nonzero().squeeze(1)
            if len(rows) > 1:
                i, j = (part.reshape(-1) for part in torch.meshgrid(rows, rows, indexing="ij"))
                prob = torch.sigmoid(self._log_odds(outputs[:, i], outputs[:, j])).reshape(len(rows), len(rows))
                wins[rows] = (prob.sum(dim=1) - 0.5) / (len(rows) - 1)  # against itself it is 0.5
        return _scores(wins, torch.isfinite(wins), {}, "no comparison")


def _known(embedded: Sequence[Embedded]) -> Tensor:
    """Which samples have an embedding, bool (n,)."""
    return torch.stack([torch.isfinite(media).all(dim=1).cpu() for media, _ in embedded]).all(dim=0)


def _scores(raw: Tensor, known: Tensor, details: dict[str, Tensor], reason: str) -> Scores:
    values = [value if ok else None for value, ok in zip(raw.tolist(), known.tolist(), strict=True)]
    return Scores.from_values(values, details={key: torch.where(known, value, torch.nan) for key, value in details.items()}, reason=reason)
