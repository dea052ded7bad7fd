"""Preference losses by name: what there is, what each one reads, and a loss with its parameters bound and checked.

    loss = bind_loss("conservative_dpo", label_smoothing=0.05)       # or "my_package.losses:my_loss"
    loss.needs.reference                                             # what has to be computed
    loss(LossInput(policy=..., reference=..., kappa=2500.0))         # (P,)
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from visalign.maths import preference_exploration as exploration
from visalign.maths import preference_labels as labels
from visalign.maths import preference_lists as lists
from visalign.maths import preference_margins as margins
from visalign.maths import preference_pairs as pairs
from visalign.maths import preference_weights as weights
from visalign.maths.preference_declaration import LossNeeds, PreferenceLoss, check_parameter, preference_loss
from visalign.maths.preference_inputs import LossInput

__all__ = ["LOSSES", "BoundLoss", "LossInput", "LossNeeds", "PreferenceLoss", "bind_loss", "find_loss", "preference_loss"]

_BUILTIN: Iterable[PreferenceLoss[Any]] = (
    pairs.dpo, pairs.conservative_dpo, pairs.robust_dpo, pairs.npo, pairs.ipo, pairs.hinge, pairs.brier, pairs.exo, pairs.bco, pairs.nca,
    pairs.apo, pairs.rpo, pairs.mapo, pairs.sppo, pairs.sppo_soft, pairs.inpo, pairs.spo,
    margins.smpo, margins.odpo, margins.modpo, exploration.xpo, exploration.vpo, labels.kto, labels.dro, lists.plackett_luce,
    lists.rankdpo, lists.gpo, weights.sft, weights.best_of_group, weights.rwr,
)

LOSSES: Mapping[str, PreferenceLoss[Any]] = MappingProxyType({**{loss.name: loss for loss in _BUILTIN}, "dmpo": pairs.exo})
"""Every built-in loss by name; "dmpo" is the diffusion literature's name of "exo"."""


@dataclass(frozen=True)
class BoundLoss:
    """A loss with its parameters: ``loss(inputs) -> (P,)``; ``needs`` says what ``inputs`` must hold."""

    name: str
    loss: PreferenceLoss[Any]
    parameters: Mapping[str, Any]

    @property
    def needs(self) -> LossNeeds:
        return self.loss.needs

    def __call__(self, inputs: LossInput) -> Tensor:
        return self.loss(inputs, **self.parameters)

    def statistic(self, name: str, inputs: LossInput) -> Tensor:
        """Values (P, K) without gradient whose mean over the optimizer step, on all processes, is ``statistics[name]``.

        Raises:
            ValueError: the loss declares no such statistic.
        """
        if name not in self.needs.statistics:
            raise ValueError(f"the loss '{self.name}' declares no statistic '{name}'; it declares {self.needs.statistics}")
        if name == "kl":
            return inputs.delta.detach()
        return weights.exponential_weights(inputs, self.parameters["temperature"])


def find_loss(name: str) -> PreferenceLoss[Any]:
    """The built-in loss ``name``, or the one that ``package.module:function`` defines with :func:`preference_loss`.

    Raises:
        ValueError: no such name, module or function, or a function without declared needs.
    """
    if name in LOSSES:
        return LOSSES[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"unknown preference loss '{name}'{_did_you_mean(name, LOSSES)}; there are {', '.join(sorted(LOSSES))}, "
                         "and your own as 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"the preference loss '{name}' cannot be loaded: {error}; the part before ':' is a module on the import path"
                         ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise ValueError(f"module '{module_name}' has no '{attribute}'{_did_you_mean(attribute, vars(module))}")
    if not isinstance(found, PreferenceLoss):
        raise ValueError(f"'{name}' is a {type(found).__name__} without declared needs; put @preference_loss(group=...) from "
                         "visalign.maths.preference above the function")
    return found


def bind_loss(name: str, /, **parameters: Any) -> BoundLoss:
    """The loss ``name`` with checked parameters; those left out keep their defaults.

    Raises:
        ValueError: unknown loss or parameter, a required parameter left out, or a value out of range.
    """
    loss = find_loss(name)
    known = loss.parameters
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(f"the loss '{name}' has no parameter '{key}'{_did_you_mean(key, known)}; "
                             f"it takes {', '.join(known) or 'none'} (its strength is kappa)")
        check_parameter(name, key, value, loss.hints.get(key))
    missing = [key for key, default in known.items() if default is inspect.Parameter.empty and key not in parameters]
    if missing:
        raise ValueError(f"the loss '{name}' has no default for {', '.join(missing)}; give a value: its docstring says how to choose it")
    defaults = {key: default for key, default in known.items() if key not in missing and default is not inspect.Parameter.empty}
    return BoundLoss(name, loss, MappingProxyType({**defaults, **parameters}))


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
