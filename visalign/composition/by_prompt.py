"""Weights from the prompts: routes to the rewards that matter for a prompt, and trade-offs chosen at run time (DPA).

    {"prompt": "a poster that says SALE", "reward_weights": {"ocr": 2.0, "clip": 0.5}}

A policy that sees the trade-off (``trainable.users``) can be asked for any of them later: with ``key: user`` the prompt's user is the
direction, its names are the rewards'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from visalign.composition.table import Combined, Plain, Table
from visalign.maths.composition_weights import normalise_weights
from visalign.types import Prompt

KEY = "reward_weights"


@dataclass(frozen=True)
class ByPrompt(Plain):
    """``sum_k v_k(c) z_k`` with the weights of the sample's prompt times the rewards' own.

    Attributes:
        key: where prompts keep their weights by reward; a name alone is that reward with weight 1.
        normalise: "unit" for directions (DPA), "sum" for shares, "none" for the weights as they are.
        default: rewards that a prompt does not name have this weight; ``null``: every prompt names all of them.
    """

    key: str = KEY
    normalise: Literal["none", "sum", "unit"] = "none"
    default: float | None = 0.0

    linear = True
    reads_prompts = True

    def check(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Any weights will do."""

    def check_prompts(self, names: Sequence[str], prompts: Sequence[Prompt]) -> None:
        for row, prompt in enumerate(prompts):
            found = self._given(prompt)
            problem = None
            if found is None:
                problem = (f"metadata '{self.key}' is {prompt.metadata.get(self.key)!r}; give finite weights by reward, such as "
                           f'{{"{names[0]}": 1.0}}')
            elif unknown := [name for name in found if name not in names]:
                problem = f"'{self.key}' weighs '{unknown[0]}', and the rewards are {', '.join(names)}"
            elif self.default is None and (lacking := [name for name in names if name not in found]):
                problem = f"'{self.key}' lacks {', '.join(lacking)}; add them, or set combine.default"
            elif not any(self._row(prompt, names)):
                problem = f"'{self.key}' gives every reward weight 0, so that nothing could be learnt"
            if problem is not None:
                raise ValueError(f"combine by_prompt, prompt {row} ({prompt.text[:60]!r}): {problem}")

    def combine(self, table: Table) -> Combined:
        own = torch.tensor([self._row(prompt, table.names) for prompt in table.prompts], dtype=torch.float64).T
        weights = normalise_weights(own * table.weight[:, None], self.normalise)[:, table.group] * table.present
        return Combined((weights * table.values).sum(dim=0), weights)

    def _row(self, prompt: Prompt, names: Sequence[str]) -> list[float]:
        given = self._given(prompt) or {}
        return [given.get(name, self.default or 0.0) for name in names]

    def _given(self, prompt: Prompt) -> dict[str, float] | None:
        value = prompt.metadata.get(self.key)
        if isinstance(value, str):
            return {value: 1.0}
        if not isinstance(value, Mapping) or not all(isinstance(w, Real) and math.isfinite(w) for w in value.values()):
            return None
        return {str(name): float(weight) for name, weight in value.items()}


def with_weights(prompts: Sequence[Prompt], names: Sequence[str], directions: Tensor, key: str = KEY) -> list[Prompt]:
    """Every prompt once for every direction, prompt by prompt.

    Args:
        directions: weights (D, K) of the K rewards in ``names``, for example ``maths.composition_weights.arc_directions``.
    Raises:
        ValueError: another number of columns than names.
    """
    if directions.dim() != 2 or directions.shape[1] != len(names):
        raise ValueError(f"{len(names)} rewards need directions of shape (D, {len(names)}), got {tuple(directions.shape)}")
    rows = [dict(zip(names, direction, strict=True)) for direction in directions.tolist()]
    return [replace(prompt, metadata={**prompt.metadata, key: row}) for prompt in prompts for row in rows]
