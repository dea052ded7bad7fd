"""Where things go in a denoiser's call: paths into its arguments, rows of a batch, and gathers found by probing.

A *row* is what one sample contributes to one argument. Batched guidance gives a sample several rows (``copies``), in chunk-major
order ``[u0 u1 | c0 c1]`` or sample-major order ``[u0 c0 | u1 c1]``; an argument holds its rows as a tensor's leading axis or as a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Path = tuple[Any, ...]
Order = Literal["chunk", "sample"]

# Probe digits run from 1 to BASE: exact in bfloat16 (8 significant bits), never zero, recoverable after two roundings of 0.4 %.
BASE = 32


class Unbatchable(Exception):  # noqa: N818 - a finding, not a failure
    """An argument does not grow row by row with the batch; the pipeline is then called one sample at a time."""


@dataclass(frozen=True)
class Rows:
    """How an argument holds its rows: ``copies`` per sample, as a tensor's leading axis or as a list."""

    copies: int
    as_list: bool


@dataclass(frozen=True)
class Gather:
    """``y[i] = scale * x[index[i]]`` where ``index[i] >= 0``; other elements of y do not depend on x.

    Attributes:
        index: int64, the shape of y; -1 where y is independent of x.
        identity: whether y is x itself, reshaped.
    """

    index: Tensor
    identity: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.index.shape)

    @property
    def covers(self) -> bool:
        """Whether every element of y comes from x."""
        return bool((self.index >= 0).all())

    def __call__(self, x: Tensor, background: Tensor | None = None) -> Tensor:
        """Apply to x of shape (B, ...); returns (B, *shape). ``background`` (B, *shape) fills the independent elements."""
        flat = x.reshape(x.shape[0], -1)
        if self.identity:
            return flat.reshape(x.shape[0], *self.shape)
        index = self.index.to(x.device)
        out = flat[:, index.clamp_min(0).flatten()].reshape(x.shape[0], *self.shape)
        if background is None or self.covers:
            return out
        return torch.where(index >= 0, out, background.to(out.dtype))


def digits(numel: int) -> list[Tensor]:
    """Code positions 0..numel-1 as base-32 digits plus one, most significant last; each (numel,) float32."""
    position, coded = torch.arange(numel), []
    while True:
        coded.append((position % BASE + 1).float())
        position = position // BASE
        if not position.any():
            return coded


def decode_gather(codes: Sequence[Tensor], dependent: Tensor, numel: int) -> Gather | None:
    """The gather whose outputs for the inputs `digits(numel)` are ``codes`` (already divided by the scale).

    Returns ``None`` when the codes are not digits, that is, when the elements are mixed and not merely moved.
    """
    index = torch.zeros(dependent.shape, dtype=torch.int64)
    for place, code in enumerate(codes):
        digit = code.double().round()
        if ((code.double() - digit).abs()[dependent] > 0.3).any() or ((digit < 1) | (digit > BASE))[dependent].any():
            return None
        index += (digit.long() - 1).clamp(0, BASE - 1) * BASE**place
    if (index[dependent] >= numel).any():
        return None
    index = torch.where(dependent, index, -1)
    identity = index.numel() == numel and bool(torch.equal(index.flatten(), torch.arange(numel)))
    return Gather(index, identity)


def leaves(value: Any, path: Path = (), stop: Callable[[Path], bool] = lambda path: False) -> Iterator[tuple[Path, Any]]:
    """Every leaf of nested dicts, lists and tuples with its path; ``stop(path)`` keeps a container whole."""
    if path and stop(path):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*path, key), stop)
    elif isinstance(value, list | tuple):
        for position, part in enumerate(value):
            yield from leaves(part, (*path, position), stop)
    else:
        yield path, value


def fill_in(template: Any, values: Mapping[Path, Any], path: Path = ()) -> Any:
    """The template with the leaf at every path replaced by ``values[path]``."""
    if path in values:
        return values[path]
    if isinstance(template, dict):
        return {key: fill_in(part, values, (*path, key)) for key, part in template.items()}
    if isinstance(template, list | tuple):
        parts = [fill_in(part, values, (*path, position)) for position, part in enumerate(template)]
        return tuple(parts) if isinstance(template, tuple) else parts
    return template


def find_rows(one: Any, two: Any, path: Path = ()) -> dict[Path, Rows]:
    """Which arguments hold one row set per sample, from the same call at batch 1 and batch 2.

    Raises:
        Unbatchable: an argument changed in another way than doubling its leading axis or its length.
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape == two.shape:
            return {}
        if one.ndim == two.ndim and one.shape[1:] == two.shape[1:] and two.shape[0] == 2 * one.shape[0]:
            return {path: Rows(one.shape[0], as_list=False)}
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple):
        if len(two) == 2 * len(one) and one:
            return {path: Rows(len(one), as_list=True)}
        if len(one) == len(two):
            parts = [find_rows(a, b, (*path, i)) for i, (a, b) in enumerate(zip(one, two, strict=True))]
            return {key: rows for part in parts for key, rows in part.items()}
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {key: rows for name in one for key, rows in find_rows(one[name], two[name], (*path, name)).items()}
    elif type(one) is type(two) and not (isinstance(one, int | float | str | bool) and one != two):
        return {}
    raise Unbatchable(f"argument {'.'.join(map(str, path))}: {describe(one)} at batch 1, {describe(two)} at batch 2")


def split_rows(value: Any, rows: Rows) -> list[Any]:
    """The rows of one sample's argument."""
    return list(value) if rows.as_list else list(value.unbind(0))


def join_rows(per_sample: Sequence[Sequence[Any]], rows: Rows, order: Order) -> Any:
    """One argument for a batch: ``per_sample[b][c]`` is row c of sample b."""
    if order == "chunk":
        flat = [per_sample[b][c] for c in range(rows.copies) for b in range(len(per_sample))]
    else:
        flat = [row for sample in per_sample for row in sample]
    return flat if rows.as_list else torch.stack(flat)


def describe(value: Any) -> str:
    """A short description of an argument for tables and errors."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value) if isinstance(value, int | float | str | bool | None) else type(value).__name__
