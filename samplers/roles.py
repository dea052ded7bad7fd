"""The roles a denoiser's weights can play: policy, reference, and named snapshots (old, ema, negative).

With LoRA the reference is the same network with its adapter off, bit for bit the base model. With full fine-tuning it is a frozen copy
of the trained tensors. A snapshot is a copy of the trained tensors; using one swaps pointers, so leaving it restores exactly.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visalign.samplers.slots import Order
from visalign.samplers.user_attention import UserAttention
from visalign.types import Role
from visalign.users import Mixture

# Attention projections under the names diffusers gives them, joint (add_*) ones included: the targets of Flow-GRPO, arXiv:2505.05470.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Roles:
    """Trained weights of one or more denoisers of a pipeline, and the other weights they can be exchanged for.

    Args:
        modules: denoisers by component name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self.mode: str | None = None
        self.users: UserAttention | None = None
        self._snapshots: dict[str, dict[str, Tensor]] = {}
        for module in self.modules.values():
            module.requires_grad_(False)

    def add_lora(
        self, rank: int = 32, alpha: int | None = None, target_modules: Sequence[str] | str | None = None, init: bool | str = "gaussian"
    ) -> None:
        """Train LoRA adapters (peft), the base weights stay frozen.

        Args:
            rank, alpha: LoRA rank and scaling numerator; ``alpha`` defaults to ``2 * rank`` (Flow-GRPO).
            target_modules: suffixes of module names; ``None`` takes attention projections, or every linear layer where there are none.
            init: peft's ``init_lora_weights``; B starts at zero, so that policy equals reference.
        Raises:
            ValueError: trained weights were chosen already, or no module matches.
        """
        self._choose("lora")
        for name, module in self.modules.items():
            targets = self._targets(name, module, target_modules)
            config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, init_lora_weights=init)  # type: ignore[arg-type]
            if hasattr(module, "add_adapter"):
                module.add_adapter(config)  # type: ignore[operator]
            else:
                inject_adapter_in_model(config, module)
                module.peft_config = {"default": config}  # type: ignore[assignment]
            for key, parameter in module.named_parameters():
                parameter.requires_grad_("lora_" in key)
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def train_full(self, offload_reference: bool = False) -> None:
        """Train every weight of the denoisers; a frozen copy is the reference, on the CPU if ``offload_reference``."""
        self._choose("full")
        for module in self.modules.values():
            module.requires_grad_(True)
        self.snapshot("reference", offload=offload_reference)

    def add_users(self, users: UserAttention) -> None:
        """Train attention to users, beside an adapter or alone. The reference is without it.

        Raises:
            ValueError: there are users already.
        """
        if self.users is not None:
            raise ValueError("the policy has users already; build a new policy for other users")
        self.users = users
        added = {f"users.{key}": parameter for key, parameter in users.named_parameters() if parameter.requires_grad}
        for kept in self._snapshots.values():
            kept.update({name: parameter.detach().clone() for name, parameter in added.items()})

    def given_users(self, mixtures: Sequence[Mixture], copies: int, order: Order) -> AbstractContextManager[None]:
        """Inside, denoiser calls are for these users, see `UserAttention.given`."""
        return nullcontext() if self.users is None else self.users.given(mixtures, copies, order)

    def recompute(self, module: nn.Module, *inputs: Any) -> Any:
        """Gradient checkpointing of a module whose second forward pass is for the users of the first."""
        function = module.__call__ if self.users is None else self.users.recomputing(module.__call__)
        return checkpoint(function, *inputs, use_reentrant=False)

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """The trained tensors by stable name, ``component.parameter``."""
        users = {} if self.users is None else {"users": self.users}
        return {
            f"{name}.{key}": parameter
            for name, module in {**self.modules, **users}.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def has_role(self, role: Role) -> bool:
        return role == "policy" or role in self._snapshots or (role == "reference" and self._switches())

    def _switches(self) -> bool:
        """Whether everything trained can be switched off."""
        return self.mode == "lora" or (self.mode is None and self.users is not None)

    def snapshot(self, role: Role, values: Mapping[str, Tensor] | None = None, offload: bool = False) -> None:
        """Keep a copy of the trained tensors (or of ``values``) under ``role``.

        Raises:
            ValueError: ``values`` does not name exactly the trained tensors.
        """
        source = self.named_trainable() if values is None else values
        if values is not None and values.keys() != self.named_trainable().keys():
            raise ValueError(
                f"snapshot {role!r} names {len(values)} tensors, the policy trains {len(self.named_trainable())}; they must agree: "
                f"{sorted(values.keys() ^ self.named_trainable().keys())[:4]}"
            )
        self._snapshots[role] = {
            name: tensor.detach().to("cpu" if offload else tensor.device, copy=True) for name, tensor in source.items()
        }

    def snapshots(self) -> dict[str, dict[str, Tensor]]:
        """The tensors kept for each role."""
        return dict(self._snapshots)

    @contextmanager
    def use(self, role: Role) -> Iterator[None]:
        """Inside, the denoisers carry this role's weights; afterwards exactly what they carried before.

        Raises:
            ValueError: the role has no weights.
        """
        if role == "policy":
            yield
        elif role == "reference" and self._switches() and role not in self._snapshots:
            with nullcontext() if self.users is None else self.users.off(), self._adapters_off() if self.mode == "lora" else nullcontext():
                yield
        elif role in self._snapshots:
            trained = self.named_trainable()
            before = {name: parameter.data for name, parameter in trained.items()}
            try:
                for name, parameter in trained.items():
                    parameter.data = self._snapshots[role][name].to(parameter.device)
                yield
            finally:
                for name, parameter in trained.items():
                    parameter.data = before[name]
        elif self.mode is None and role == "reference":
            yield
        else:
            raise ValueError(
                f"role {role!r} has no weights; snapshot() them first (there are: policy, {', '.join(self._snapshots) or 'nothing else'})"
            )

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        layers = [layer for module in self.modules.values() for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        if not layers:
            raise ValueError(
                "the reference needs LoRA layers to switch off, but the denoiser has none: its adapters were removed or merged"
            )
        before = [layer._disable_adapters for layer in layers]
        # The flag itself: peft's enable_adapters() also flips requires_grad, which would silently freeze the policy.
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, flag in zip(layers, before, strict=True):
                layer._disable_adapters = flag

    def save(self, pipe: Any, folder: Path) -> dict[str, str]:
        """Write what was trained in the form its own library loads; returns the line that loads each component.

        LoRA goes through ``pipe.save_lora_weights`` for the components it knows; the others (a second transformer, a pipeline without
        LoRA loading) become peft folders. Full fine-tuning writes whole modules.
        """
        folder.mkdir(parents=True, exist_ok=True)
        users = {} if self.users is None else {"users": self.users.save(folder)}
        if self.mode == "full":
            for name, module in self.modules.items():
                module.save_pretrained(folder / name)  # type: ignore[operator]
            loads = {name: f"pipe.{name} = type(pipe.{name}).from_pretrained(ADAPTER, subfolder={name!r})" for name in self.modules}
            return {**loads, **users}
        if self.mode is None and users:
            return users
        known = inspect.signature(pipe.save_lora_weights).parameters if hasattr(pipe, "save_lora_weights") else {}
        through_pipe = {f"{name}_lora_layers": _portable(module) for name, module in self.modules.items() if f"{name}_lora_layers" in known}
        if through_pipe:
            pipe.save_lora_weights(folder, **through_pipe)
        loads = {name: "pipe.load_lora_weights(ADAPTER)" for name in self.modules if f"{name}_lora_layers" in through_pipe}
        for name, module in self.modules.items():
            if name not in loads:
                config = module.peft_config["default"]  # type: ignore[index,union-attr]
                (folder / name).mkdir(exist_ok=True)
                replace(config, lora_alpha=config.r).save_pretrained(folder / name)  # type: ignore[union-attr,type-var]
                tensors = {f"base_model.model.{key}": value.contiguous() for key, value in _portable(module).items()}
                save_file(tensors, folder / name / "adapter_model.safetensors")
                loads[name] = f"pipe.{name} = peft.PeftModel.from_pretrained(pipe.{name}, ADAPTER + '/{name}')"
        return {**loads, **users}

    def _choose(self, mode: str) -> None:
        if self.users is not None:
            raise ValueError(f"choose {mode} weights before add_users, so that users are added to the weights that are trained")
        if self.mode is not None:
            raise ValueError(f"the policy already trains {self.mode} weights; build a new policy to train {mode} weights")
        self.mode = mode

    @staticmethod
    def _targets(name: str, module: nn.Module, wanted: Sequence[str] | str | None) -> list[str]:
        linear = [key for key, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)]
        suffixes = [wanted] if isinstance(wanted, str) else list(wanted or ATTENTION)
        chosen = [key for key in linear if any(key == suffix or key.endswith("." + suffix) for suffix in suffixes)]
        if not chosen and wanted is None:
            chosen = [key for key, part in module.named_modules() if isinstance(part, nn.Linear)]
        if not chosen:
            raise ValueError(
                f"no layer of {name} ends in {', '.join(suffixes)}; its layers end in "
                f"{', '.join(sorted({key.rsplit('.', 1)[-1] for key in linear}))}: name some of these in target_modules"
            )
        return chosen


def _portable(module: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors for loaders that assume ``alpha == rank``, as all do that read no metadata: B carries the scale."""
    config = module.peft_config["default"]  # type: ignore[index,union-attr]
    scale = config.lora_alpha / config.r  # type: ignore[union-attr]
    state = get_peft_model_state_dict(module, adapter_name="default")
    return {key: value.detach() * scale if "lora_B" in key else value.detach() for key, value in state.items()}
