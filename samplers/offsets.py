"""What training added to a model's weights, read from adapter folders, merged exactly and put back.

Low-rank offsets are merged by joining their factors, which is exact for any ranks:

    a B1 A1 + b B2 A2 = [a B1, b B2] [A1; A2]

Whole components become differences from the base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from visalign.samplers.policy import PipelinePolicy

_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<side>A|B)(\.default)?\.weight")


@dataclass(frozen=True)
class Factors:
    """A low-rank offset of one layer's weight, ``up @ down`` over the flattened axes, any scale inside ``up``; float32.

    Attributes:
        down: (rank, in, ...), up: (out, rank, ...).
    """

    down: Tensor
    up: Tensor

    def __mul__(self, scale: float) -> Factors:
        return Factors(self.down, scale * self.up)

    def __add__(self, other: Factors) -> Factors:
        return Factors(torch.cat([self.down, other.down.to(self.down)]), torch.cat([self.up, other.up.to(self.up)], dim=1))

    def dense(self, like: Tensor) -> Tensor:
        """The offset itself, shaped like the weight."""
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(like.shape)


@dataclass(frozen=True)
class Offset:
    """What training added to a pipeline's denoisers.

    Attributes:
        layers: low-rank offsets by ``component.layer``.
        tensors: differences from the base by ``component.parameter``, from folders of whole components.
    """

    layers: Mapping[str, Factors] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def merge_offsets(eta: Offset, delta: Offset, a: float = 1.0, b: float = 1.0) -> Offset:
    """``a eta + b delta``.

    Raises:
        ValueError: a or b outside [0, 1].
    """
    if not (0 <= a <= 1 and 0 <= b <= 1):
        raise ValueError(f"merge weights lie in [0, 1], got {a} for the positive offset and {b} for the negative one")
    return Offset(_sum({name: part * a for name, part in eta.layers.items()}, {name: part * b for name, part in delta.layers.items()}),
                  _sum({name: part * a for name, part in eta.tensors.items()}, {name: part * b for name, part in delta.tensors.items()}))


def read_offset(policy: PipelinePolicy, folder: Path) -> Offset:
    """The offset an adapter folder holds: LoRA of the pipeline or of peft, or whole denoisers, as ``save_adapter`` writes them.

    Raises:
        ValueError: nothing in the folder fits the denoisers, or its LoRA is of a kind that is no plain product of two factors.
    """
    layers: dict[str, Factors] = {}
    tensors: dict[str, Tensor] = {}
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        layers |= _read_lora(folder / "pytorch_lora_weights.safetensors", "", {})
    for name, module in policy.denoisers.items():
        if (folder / name / "adapter_config.json").is_file():
            config = json.loads((folder / name / "adapter_config.json").read_text(encoding="utf-8"))
            layers |= _read_lora(folder / name / "adapter_model.safetensors", f"{name}.", config)
        elif (folder / name / "config.json").is_file():
            if policy.roles.mode == "lora":
                raise ValueError(f"{folder} holds the whole {name}, which a policy with LoRA cannot carry; use a policy without trained "
                                 "weights")
            trained = type(module).from_pretrained(folder / name).state_dict()  # type: ignore[attr-defined]
            base = policy.snapshots().get("reference", {})
            for key, value in module.named_parameters():
                start = base.get(f"{name}.{key}", value.detach())
                tensors[f"{name}.{key}"] = trained[key].to(start.device).float() - start.float()
    known = tuple(f"{name}." for name in policy.denoisers)
    if strange := sorted(key for key in layers if not key.startswith(known)):
        raise ValueError(f"{folder} changes {strange[0]}, which is no part of the denoiser ({', '.join(policy.denoisers)}); only the "
                         "denoiser can have two sets of weights")
    if not layers and not tensors:
        raise ValueError(f"nothing in {folder} fits {', '.join(policy.denoisers)}: expected pytorch_lora_weights.safetensors, or a folder "
                         "per component with adapter_config.json or config.json; a finished run's is RUN/adapter")
    return Offset(layers, tensors)


def own_offset(policy: PipelinePolicy) -> Offset:
    """What the policy's trained weights add to its reference."""
    trained = {name: parameter.detach().float() for name, parameter in policy.named_trainable().items()}
    if policy.roles.mode == "full":
        base = policy.snapshots()["reference"]
        return Offset(tensors={name: value - base[name].to(value) for name, value in trained.items()})
    return Offset(layers={layer: Factors(trained[down], scale * trained[up]) for down, up, layer, scale in _lora_layers(policy)})


def weights_with(policy: PipelinePolicy, offset: Offset) -> dict[str, Tensor]:
    """The trained tensors with which the denoisers carry ``offset``; LoRA factors take whatever rank it needs.

    Raises:
        ValueError: the offset changes what is not trained.
    """
    trained = {name: parameter.detach() for name, parameter in policy.named_trainable().items()}
    left = {*offset.layers, *offset.tensors}
    values: dict[str, Tensor] = {}
    if policy.roles.mode == "full":
        base = policy.snapshots()["reference"]
        for name, parameter in trained.items():
            layer, total = name.removesuffix(".weight"), base[name].to(parameter.device).float()
            if name in offset.tensors:
                total = total + offset.tensors[name].to(total)
            if layer in offset.layers:
                total = total + offset.layers[layer].dense(total).to(total)
            values[name] = total.to(parameter)
            left -= {name, layer}
    else:
        for down, up, layer, scale in _lora_layers(policy):
            parts = offset.layers.get(layer)
            values[down] = torch.zeros_like(trained[down]) if parts is None else parts.down.to(trained[down])
            values[up] = torch.zeros_like(trained[up]) if parts is None else (parts.up / scale).to(trained[up])
            left.discard(layer)
    if left:
        raise ValueError(f"the offset changes {sorted(left)[0]} and {len(left) - 1} more layers that the policy does not train; use a "
                         "policy without trained weights")
    return values


def _lora_layers(policy: PipelinePolicy) -> Iterator[tuple[str, str, str, float]]:
    """(parameter A, parameter B, ``component.layer``, alpha / rank) of every trained layer."""
    for name in policy.named_trainable():
        if (match := _LORA.fullmatch(name)) and match["side"] == "A":
            config = policy.denoisers[name.partition(".")[0]].peft_config["default"]  # type: ignore[index,union-attr]
            scale = float(config.lora_alpha / config.r)  # type: ignore[union-attr,operator]
            yield name, name.replace(".lora_A.", ".lora_B."), match["layer"], scale


def _read_lora(file: Path, prefix: str, config: Mapping[str, Any]) -> dict[str, Factors]:
    """Factors by ``component.layer``; the scale is ``alpha / rank`` from per-layer alphas, the file's metadata or peft's ``config``."""
    with safe_open(file, framework="pt") as handle:
        tensors = {key.removeprefix("base_model.model."): handle.get_tensor(key).float() for key in handle.keys()}  # noqa: SIM118
        metadata = json.loads((handle.metadata() or {}).get("lora_adapter_metadata", "{}"))
    sides: dict[str, dict[str, Tensor]] = {}
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    for key, value in tensors.items():
        if match := _LORA.fullmatch(key):
            sides.setdefault(match["layer"], {})[match["side"]] = value
        elif not key.endswith(".alpha"):
            raise ValueError(f"{file} holds {key}, which is not lora_A, lora_B or alpha; load it into the pipeline and save it again with "
                             "save_lora_weights")
    found = {}
    for layer, pair in sides.items():
        own = config or {key.removeprefix(start): value for start in (layer.partition(".")[0] + ".",)
                         for key, value in metadata.items() if key.startswith(start)}
        rank = pair["A"].shape[0]
        alpha = alphas.get(layer, _alpha(file, own, rank))
        found[prefix + layer] = Factors(down=pair["A"], up=pair["B"] * (alpha / rank))
    return found


def _alpha(file: Path, config: Mapping[str, Any], rank: int) -> float:
    for option in ("use_rslora", "use_dora", "alpha_pattern", "lora_bias"):
        if config.get(option):
            raise ValueError(f"{file} was trained with {option}, whose offset is not alpha / rank times B A; merge it into the weights "
                             "first")
    return float(config.get("lora_alpha", rank))


def _sum(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {name: first[name] + second[name] if name in first and name in second else first.get(name, second.get(name))
            for name in {**first, **second}}
