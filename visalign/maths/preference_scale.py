"""One strength for all codes, and one error in all prediction spaces.

Published betas are not comparable: some codes write ``sigmoid(-0.5 beta ...)``, others leave out the half, and errors of different
prediction targets differ by a function of the noise level. Here ``kappa`` multiplies a *mean* squared error, always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

ErrorSpace = Literal["epsilon", "x0", "sample", "velocity", "flow", "v_prediction", "edm"]
"""What an error compares; "sample" is "x0" and "flow" is "velocity" (``x1 - x0``), the names of prediction kinds."""


def beta_to_kappa(beta: float, half: bool) -> float:
    """``beta / 2`` for codes that write ``0.5 beta`` inside the sigmoid, else ``beta``."""
    return 0.5 * beta if half else beta


@dataclass(frozen=True)
class Preset:
    """A published strength: ``beta`` as its authors count it, whether their formula has the factor 1/2, and the error's space."""

    beta: float
    half: bool
    space: ErrorSpace

    @property
    def kappa(self) -> float:
        return beta_to_kappa(self.beta, self.half)


PRESETS: Mapping[str, Preset] = MappingProxyType({
    "diffusion_dpo": Preset(5000.0, True, "epsilon"),          # arXiv:2311.12908, authors' SD 1.5 and SDXL launchers
    "diffusers_dpo_sd15": Preset(2500.0, False, "epsilon"),    # diffusers research project
    "smpo_sd15": Preset(2000.0, True, "epsilon"),              # arXiv:2506.02698
    "smpo_sdxl": Preset(5000.0, True, "epsilon"),
    "npo_sd15": Preset(500.0, False, "epsilon"),               # arXiv:2505.11245
    "npo_sdxl": Preset(2000.0, True, "epsilon"),
    "dmpo": Preset(2000.0, True, "epsilon"),                   # arXiv:2507.07510
    "diffusion_kto": Preset(1000.0, False, "epsilon"),         # arXiv:2404.04465
    "align_anything": Preset(2500.0, False, "epsilon"),        # its image, audio and video scripts
    "dso": Preset(500.0, True, "velocity"),                    # arXiv:2503.22677
    "flow_grpo_dpo": Preset(100.0, True, "velocity"),          # SD 3.5 script
    "flow_factory_dpo": Preset(2000.0, True, "velocity"),      # default
})
"""Strengths of public codes, to start from; all take the mean over the latent's elements."""


def space_weight(source: ErrorSpace, target: ErrorSpace, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """``w`` with ``e_target = w e_source`` exactly, element by element, for predictions of the same ``x = alpha x0 + sigma x1``.

    Both end points move on one line, ``alpha d_x0 = -sigma d_x1``, so a prediction's residual is a level's amplitude times one number:

        epsilon: alpha     x0: sigma     velocity: alpha + sigma     v_prediction: r     edm: r_d / d        (times a common factor)

    with ``r = sqrt(alpha^2 + sigma^2)`` (1 for VP models), ``r_d = sqrt(sigma^2 + alpha^2 d^2)``, ``d = sigma_data``, and
    ``w = (amplitude_target / amplitude_source)^2``. So VP ``e_epsilon = alpha^2 e_v``, rectified flow ``e_epsilon = (1 - t)^2 e_v``.

    Args:
        alpha, sigma: noise levels, any common shape; the result has it.
    Raises:
        ValueError: an unknown space, a negative level, or a level at which the source determines no other error (epsilon at alpha 0).
    """
    for space in (source, target):
        if space not in get_args(ErrorSpace):
            raise ValueError(f"unknown error space {space!r}; use one of {', '.join(get_args(ErrorSpace))}")
    if (alpha < 0).any() or (sigma < 0).any():
        raise ValueError("noise levels alpha and sigma must be >= 0")
    below, above = (_amplitude(space, alpha, sigma, sigma_data) for space in (source, target))
    if (below == 0).any():
        raise ValueError(f"an error in the space '{source}' says nothing about '{target}' where "
                         f"{'alpha' if source == 'epsilon' else 'sigma'} is 0; draw times inside the range")
    return (above / below).square()


def _amplitude(space: str, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    if space == "epsilon":
        return alpha
    if space in ("x0", "sample"):
        return sigma
    if space in ("velocity", "flow"):
        return alpha + sigma
    if space == "v_prediction":
        return torch.sqrt(alpha.square() + sigma.square())
    return torch.sqrt(sigma.square() + (alpha * sigma_data).square()) / sigma_data
