"""Condition a denoiser on users by attention of its own queries to users' tokens, beside what it attends to already.

    out = to_out( Attn(Q, K, V) + strength Attn(Q, K_u U, V_u U) )          Q = to_q(image tokens)

K_u and V_u are the only new weights, and V_u starts at zero: before the first update the denoiser answers as without users, bit for bit.
The sum is taken between a module's ``to_q`` and its ``to_out``, so that one hook serves cross-attention (UNets, PixArt, Wan) and the
joint attention of image and text (SD3, Flux) alike. Users condition every branch of guidance: what was learned without guidance
keeps its meaning with it.

Sources: PPD, arXiv:2501.06655; decoupled cross-attention of IP-Adapter, arXiv:2308.06721.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visalign.samplers.slots import Order
from visalign.samplers.users import UserTable
from visalign.users import Mixture

WEIGHTS, SETTINGS = "users.safetensors", "users.json"


class UserLayer(nn.Module):
    """K_u and V_u of one attention module.

    Args:
        width: of user tokens.
        queries, values: columns of the module's ``to_q`` and of what its ``to_out`` takes.
        heads: both are cut into.
        normalised: whether the module normalises its queries; then so are these queries and keys, per head, to root mean square 1.
    """

    def __init__(self, width: int, queries: int, values: int, heads: int, normalised: bool) -> None:
        super().__init__()
        self.heads, self.normalised = heads, normalised
        self.key = nn.Linear(width, queries, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        nn.init.zeros_(self.value.weight)

    def forward(self, queries: Tensor, users: Tensor) -> Tensor:
        """What queries (R, L, C) find in users' tokens (R, m, d): (R, L, C')."""
        users = users.to(self.key.weight.dtype)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (queries, self.key(users), self.value(users)))
        if self.normalised:
            q, k = (F.rms_norm(part.float(), part.shape[-1:]) for part in (q, k))
        found = F.scaled_dot_product_attention(q.to(queries.dtype), k.to(queries.dtype), v.to(queries.dtype))
        return found.transpose(1, 2).flatten(2)


class UserAttention(nn.Module):
    """User tokens and the layers that read them, hooked into the denoisers' attention modules.

    It is not part of a denoiser: a pipeline's own saving and loading see nothing of it.

    Args:
        denoisers: by component name.
        readers: per component, the names of the attention modules users are added to (`text_readers` finds them).
        table: the users.
        strength: factor of the added attention.
    Raises:
        ValueError: no readers.
    """

    def __init__(self, denoisers: Mapping[str, nn.Module], readers: Mapping[str, Sequence[str]], table: UserTable,
                 strength: float = 1.0) -> None:
        super().__init__()
        self.table, self.strength = table, strength
        self.readers = {name: tuple(found) for name, found in readers.items()}
        self.layers = nn.ModuleDict()
        self._off = False
        self._users: tuple[Tensor, Tensor] | None = None
        self._queries: dict[str, Tensor] = {}
        for component, names in self.readers.items():
            for name in names:
                module = denoisers[component].get_submodule(name)
                shape = _shape(module)
                assert shape is not None
                key = f"{component}/{name.replace('.', '/')}"  # a module's name may hold no dot
                self.layers[key] = UserLayer(table.width, *shape, normalised=getattr(module, "norm_q", None) is not None)
                module.to_q.register_forward_hook(self._keep_queries(key))  # type: ignore[union-attr,operator]
                module.to_out[0].register_forward_pre_hook(self._add_users(key))  # type: ignore[index,union-attr]
        if not self.layers:
            raise ValueError(f"no attention module to add users to in {', '.join(self.readers)}; they need modules with to_q, to_out and "
                             "heads, as most of diffusers' have")
        self.to(next(next(iter(denoisers.values())).parameters()).device)

    @contextmanager
    def given(self, mixtures: Sequence[Mixture], copies: int = 1, order: Order = "chunk") -> Iterator[None]:
        """Inside, denoiser calls are for these users, one per sample, each sample with ``copies`` rows in this order.

        One mixture serves calls with any number of rows. With nobody present nothing is computed, unless gradients are: then they are 0,
        where nothing but users is trained and a loss would else have none.

        Raises:
            ValueError: an unknown user.
        """
        users = None
        if (any(mixtures) or torch.is_grad_enabled()) and not self._off:
            tokens, present = self.table(mixtures)
            repeat = torch.arange(len(mixtures), device=tokens.device)
            repeat = repeat.repeat(copies) if order == "chunk" else repeat.repeat_interleave(copies)
            users = tokens[repeat], present[repeat]
        with self._holding(users):
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, nobody conditions anything, whatever is given."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def recomputing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the users of now: activations recomputed in a backward pass must be those of the forward pass."""
        users = self._users

        def again(*args: Any) -> Any:
            with self._holding(users):
                return function(*args)

        return again

    @contextmanager
    def _holding(self, users: tuple[Tensor, Tensor] | None) -> Iterator[None]:
        before, self._users = self._users, users
        try:
            yield
        finally:
            self._users = before
            self._queries.clear()

    def _keep_queries(self, key: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._users is not None:
                self._queries[key] = output

        return hook

    def _add_users(self, key: str) -> Callable[..., Any]:
        layer = self.layers[key]

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            if self._users is None:
                return None
            hidden, *rest = inputs
            queries = self._queries.pop(key, None)
            tokens, present = self._users
            if queries is None or queries.shape[:2] != hidden.shape[:2] or hidden.shape[0] % len(present):
                got = "no queries" if queries is None else f"queries {tuple(queries.shape)}"
                raise ValueError(f"users cannot be added in {key}: {got} for an output of {tuple(hidden.shape)} and {len(present)} rows of "
                                 "users; users need unfused projections (unfuse_qkv_projections) and a pipeline that gives every row of a "
                                 "batch the same attention (no perturbed attention)")
            # Frames as rows of the batch: every frame of a sample is for the sample's user.
            frames = hidden.shape[0] // len(present)
            tokens, present = tokens.repeat_interleave(frames, 0), present.repeat_interleave(frames, 0)
            added = self.strength * layer(queries, tokens).to(hidden.dtype)
            total = hidden + torch.where(present.reshape(-1, 1, 1), added, 0.0)
            if total.stride() != hidden.stride():
                # The layout decides which kernel to_out runs, and kernels round differently: added zeros must change nothing.
                total = torch.empty_strided(hidden.shape, hidden.stride(), dtype=total.dtype, device=total.device).copy_(total)
            return (total, *rest)

        return hook

    def save(self, folder: Path) -> str:
        """Write all users and layers; returns the line that puts them into a pipeline."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        settings = {"format": 1, "users": list(self.table.names), "learned": self.table.learned, "strength": self.strength,
                    "readers": {name: list(found) for name, found in self.readers.items()}}
        folder.joinpath(SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        return ("users = visalign.samplers.user_attention.load_users(pipe.components, ADAPTER)  "
                "# with users.given([((NAME, 1.0),)]): pipe(...)")


def load_users(denoisers: Mapping[str, Any], folder: Path | str) -> UserAttention:
    """What `UserAttention.save` wrote, in these denoisers (further entries do not matter); after an adapter is loaded into them.

    Raises:
        ValueError: the folder holds no users, or those of other denoisers.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} holds no {SETTINGS}; a run that trains users leaves one in RUN/adapter")
    settings, tensors = json.loads((folder / SETTINGS).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    table = UserTable(settings["users"], tensors["table.tokens"], settings["learned"])
    denoisers = {name: module.get_base_model() if isinstance(module, PeftModel) else module for name, module in denoisers.items()}
    for component, names in settings["readers"].items():
        known = dict(denoisers[component].named_modules()) if isinstance(denoisers.get(component), nn.Module) else {}
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"{folder} adds users to {component}.{missing[0]}, which this pipeline does not have; load the adapter into "
                             "the pipeline it was trained for")
    modules = {name: denoisers[name] for name in settings["readers"]}
    users = UserAttention(modules, settings["readers"], table, settings["strength"])
    users.load_state_dict(tensors)
    return users


def text_readers(denoisers: Mapping[str, nn.Module], call: Callable[[], Any]) -> dict[str, list[str]]:
    """The attention modules that are given text when ``call`` runs the denoisers, by component.

    A denoiser that reads image and text as one sequence gives text to none; there, all attention modules that are called.
    """
    reads: dict[tuple[str, str], bool] = {}
    hooks = []

    def watch(key: tuple[str, str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            text = given.get("encoder_hidden_states")
            reads[key] = reads.get(key, False) or (isinstance(text, Tensor) and text is not given.get("hidden_states"))

        return hook

    for component, denoiser in denoisers.items():
        for name, module in denoiser.named_modules():
            if _shape(module) is not None:
                hooks.append(module.register_forward_pre_hook(watch((component, name)), with_kwargs=True))
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in hooks:
            handle.remove()
    found = {component: [name for (part, name), text in reads.items() if part == component and text] for component in denoisers}
    called = {component: [name for part, name in reads if part == component] for component in denoisers}
    return {component: found[component] or called[component] for component in denoisers}


def _shape(module: nn.Module) -> tuple[int, int, int] | None:
    """Columns of queries and of the attention's result, and heads, where this is an attention module with both projections."""
    to_q, to_out, heads = (getattr(module, name, None) for name in ("to_q", "to_out", "heads"))
    if not (isinstance(to_out, nn.ModuleList | nn.Sequential) and len(to_out) and isinstance(heads, int)):
        return None
    columns, rows = getattr(to_q, "out_features", None), getattr(to_out[0], "in_features", None)
    if not (isinstance(columns, int) and isinstance(rows, int)) or columns % heads or rows % heads:
        return None
    return columns, rows, heads
