"""LoRA on an encoder's network: injected once, its tensors exchanged for those of whoever is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraSettings:
    """
    Attributes:
        rank, alpha: the update is scaled by alpha / rank; ``alpha`` None means rank.
        target_modules: names (suffixes) of adapted layers; ``None`` adapts every linear layer outside ``nn.MultiheadAttention``.
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None


class EncoderAdapter:
    """The adapter of one network.

    Raises:
        ValueError: no layer has one of the names.
    """

    def __init__(self, network: nn.Module, settings: LoraSettings) -> None:
        names = _targets(network, settings.target_modules)
        alpha = settings.rank if settings.alpha is None else settings.alpha
        inject_adapter_in_model(LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=names), network)  # type: ignore[arg-type]
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if parameter.requires_grad:
                self.parameters[name] = parameter

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Back to the encoder as it was: B = 0, and A uniform in +-1 / sqrt(inputs) as peft draws it."""
        for name, parameter in self.parameters.items():
            if "lora_B" in name:
                parameter.zero_()
            else:
                drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(drawn / parameter.flatten(1).shape[1] ** 0.5)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the adapter's tensors by name."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``tensors`` gave.

        Raises:
            ValueError: tensors of other layers.
        """
        if tensors.keys() != self.parameters.keys():
            raise ValueError(f"the adapter has {len(self.parameters)} tensors, {len(tensors)} were given, for example "
                             f"{sorted(tensors.keys() ^ self.parameters.keys())[:2]}; it belongs to another network or rank")
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])


def _targets(network: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Full names of the layers to adapt. The projections inside ``nn.MultiheadAttention`` are read as weights, not called as layers."""
    attention = [name for name, module in network.named_modules() if isinstance(module, nn.MultiheadAttention)]
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)
              and not any(name.startswith(f"{inside}.") for inside in attention)]
    found = linear if names is None else [name for name in linear if any(name == n or name.endswith(f".{n}") for n in names)]
    if not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
        raise ValueError(f"target_modules {list(names or [])}: no linear layer of the encoder has such a name; there are {known}")
    return found
