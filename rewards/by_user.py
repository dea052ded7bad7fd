"""Synthetic users: every user a reward, so that users may disagree about one and the same sample.

    value = sum_i w_i r_i(x, c)        w: the prompt's users (``metadata["user"]``), one with weight 1 or a mixture

    ByUser({"bold": FunctionReward(saturation), "quiet": FunctionReward(saturation, direction=-1)})

Only the rewards of the users that are asked for are computed. Mixtures add the rewards on their own scales.
Source: PPD, arXiv:2501.06655.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch

from visalign.protocols import ALL_MEDIA, Reward, RewardSpec
from visalign.types import Media, Prompt, Scores
from visalign.users import KEY, mixture_of


class ByUser:
    """Scores each sample by the reward of its prompt's user."""

    spec = RewardSpec(name="by_user", modality=ALL_MEDIA)

    def __init__(self, users: Mapping[str, Reward], nobody: Reward | None = None, name: str = "by_user") -> None:
        """
        Args:
            users: a reward per sample for every user.
            nobody: scores samples of prompts without a user; without it every prompt needs one.
            name: key of its logs.
        Raises:
            ValueError: no users, a judge of pairs or of sets, or rewards that read no common kind of media.
        """
        if not users:
            raise ValueError("by_user needs at least one user: users: {ann: {reward: clip, ...}}")
        rewards = [*users.values(), *([] if nobody is None else [nobody])]
        for user, reward in zip([*users, "nobody"], rewards, strict=False):
            if not isinstance(reward, Reward):
                raise ValueError(f"by_user: {user}'s {type(reward).__name__} gives no score per sample; wrap a judge of pairs "
                                 "with win_rate")
        modality = reduce(frozenset.intersection, (reward.spec.modality for reward in rewards))
        if not modality:
            kinds = "; ".join(f"{user} {', '.join(sorted(reward.spec.modality))}" for user, reward in users.items())
            raise ValueError(f"by_user: its rewards read no common kind of media ({kinds})")
        self.users, self.nobody = {str(user): reward for user, reward in users.items()}, nobody
        groupwise = any(reward.spec.arity == "groupwise" for reward in rewards)
        self.spec = replace(
            self.spec, name=name, arity="groupwise" if groupwise else "pointwise", modality=modality,
            requires=frozenset({KEY} if nobody is None else ()), deterministic=all(reward.spec.deterministic for reward in rewards),
            model_ids=tuple(dict.fromkeys(model for reward in rewards for model in reward.spec.model_ids)),
            licence=", ".join(dict.fromkeys(reward.spec.licence for reward in rewards if reward.spec.licence)))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse, naming the row, a user without a reward and metadata that the user's reward lacks.

        Raises:
            ValueError: names the users there are.
        """
        for row, prompt in enumerate(prompts):
            for user, reward, _ in self._judges(prompt):
                needed = reward.spec.requires - {"prompt"}
                if missing := sorted(key for key in needed if key not in prompt.metadata):
                    raise ValueError(f"reward '{self.spec.name}', prompt {row} ({prompt.text[:60]!r}): the reward of {user} needs "
                                     f"{', '.join(missing)} in the prompt's metadata")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per sample, larger is better; invalid where one of its users' rewards is.

        Raises:
            ValueError: a prompt's user has no reward.
        """
        total = torch.zeros(len(media), dtype=torch.float64)
        reasons: list[str | None] = [None] * len(media)
        asked: dict[str, list[tuple[int, float]]] = {}
        judges: dict[str, Reward] = {}
        for row, prompt in enumerate(prompts):
            for user, reward, weight in self._judges(prompt):
                judges[user] = reward
                asked.setdefault(user, []).append((row, weight))
        for user, own in asked.items():
            rows = [row for row, _ in own]
            found = judges[user].score([media[row] for row in rows], [prompts[row] for row in rows], [group_id[row] for row in rows])
            total[rows] += torch.tensor([weight for _, weight in own], dtype=torch.float64) * found.value.double()
            for row, reason in zip(rows, found.reasons, strict=True):
                reasons[row] = reasons[row] or reason
        value = total.float()
        valid = torch.isfinite(value)
        value = torch.where(valid, value, torch.nan)
        why = tuple(None if ok else reason or "nonfinite" for ok, reason in zip(valid.tolist(), reasons, strict=True))
        return Scores(raw=value, value=value.clone(), valid=valid, reasons=why)

    def _judges(self, prompt: Prompt) -> list[tuple[str, Reward, float]]:
        mixture = mixture_of(prompt)
        if not mixture and self.nobody is not None:
            return [("", self.nobody, 1.0)]
        if unknown := [user for user, _ in mixture if user not in self.users] or ([] if mixture else ["nobody"]):
            raise ValueError(f"reward '{self.spec.name}', prompt {prompt.text[:60]!r}: no reward for {unknown[0]}; there are rewards for "
                             f"{', '.join(sorted(self.users))}")
        return [(user, self.users[user], weight) for user, weight in mixture]
