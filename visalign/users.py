"""Whose taste a prompt asks for: ``Prompt.metadata["user"]``, a name or the weights of several, ``{"ann": 0.3, "bob": 0.7}``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

from visalign.types import Prompt

KEY = "user"
Mixture = tuple[tuple[str, float], ...]  # users and their weights; empty: nobody


def mixture_of(prompt: Prompt) -> Mixture:
    """Users and weights of a prompt, () for nobody; whole numbers are names too.

    Raises:
        ValueError: the user is neither a name nor finite weights by name.
    """
    user = prompt.metadata.get(KEY)
    if user is None:
        return ()
    if isinstance(user, str | int) and not isinstance(user, bool):
        return ((str(user), 1.0),)
    if isinstance(user, Mapping) and user and all(isinstance(weight, Real) and math.isfinite(weight) for weight in user.values()):
        return tuple((str(name), float(weight)) for name, weight in user.items())
    raise ValueError(f"prompt {prompt.text[:60]!r}: user is {user!r}; give a name, or finite weights by name such as "
                     '{"ann": 0.3, "bob": 0.7}, or leave it out for nobody')


def users_in(prompts: Sequence[Prompt]) -> list[str]:
    """Every user that is asked for, sorted.

    Raises:
        ValueError: see `mixture_of`.
    """
    return sorted({name for prompt in prompts for name, _ in mixture_of(prompt)})


def asking(prompt: Prompt, user: str | Mapping[str, float] | None) -> Prompt:
    """The prompt for this user, or for nobody."""
    metadata = {key: value for key, value in prompt.metadata.items() if key != KEY}
    return replace(prompt, metadata=metadata if user is None else {**metadata, KEY: user})


def with_users(prompts: Sequence[Prompt], users: Sequence[str | Mapping[str, float] | None]) -> list[Prompt]:
    """Every prompt once for every user, prompt by prompt: groups whose users disagree share their text.

    Raises:
        ValueError: no users.
    """
    if not users:
        raise ValueError("with_users needs at least one user; None stands for nobody")
    return [asking(prompt, user) for prompt in prompts for user in users]
