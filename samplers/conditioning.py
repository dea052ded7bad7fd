"""Encoded prompts: what a captured pipeline prepared for its denoiser, kept per prompt, joined per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from visalign.samplers.sites import Site
from visalign.samplers.slots import Path, join_rows
from visalign.users import Mixture


@dataclass(frozen=True)
class Family:
    """What prompts that can share one batch have in common: the shapes of their rows and, per site, the shared arguments."""

    shapes: Any
    shared: tuple[Mapping[Path, Any], ...]

    def fits(self, shapes: Any, shared: Sequence[Mapping[Path, Any]]) -> bool:
        """Whether a prompt with these arguments belongs to this family."""
        return bool(self.shapes == shapes) and _equal(self.shared, shared)


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt's conditioning, as the pipeline prepared it: per site, the rows of its per-sample arguments; and whose taste it is for."""

    rows: tuple[dict[Path, list[Any]], ...]
    family: Family
    user: Mixture = ()


class PipelineConditioning:
    """Encoded prompts, one per row. Rows repeat by reference: a group of G samples stores its prompt once."""

    def __init__(self, prompts: Sequence[EncodedPrompt]) -> None:
        self.prompts = tuple(prompts)
        self._joined: dict[tuple[int, tuple[int, ...]], dict[Path, Any]] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> PipelineConditioning:
        return PipelineConditioning([self.prompts[row] for row in rows])

    def shared(self, index: int, members: tuple[int, ...]) -> Mapping[Path, Any]:
        """The arguments of one site that all rows of this family share."""
        return self.prompts[members[0]].family.shared[index]

    def joined(self, index: int, site: Site, members: tuple[int, ...]) -> dict[Path, Any]:
        """The per-sample arguments of one site for some rows as one batch; kept for the next step."""
        key = (index, members)
        if key not in self._joined:
            self._joined[key] = {
                path: join_rows([self.prompts[m].rows[index][path] for m in members], site.rows[path], site.order)
                for path in self.prompts[members[0]].rows[index]
            }
        return self._joined[key]


def row_shapes(rows: Sequence[Mapping[Path, Sequence[Any]]]) -> Any:
    """Shapes of the per-sample arguments, comparable with ``==``."""
    def shape(row: Any) -> Any:
        return tuple(row.shape) if isinstance(row, Tensor) else repr(row)

    return [{path: [shape(row) for row in part] for path, part in site.items()} for site in rows]


def _equal(one: Sequence[Mapping[Path, Any]], two: Sequence[Mapping[Path, Any]]) -> bool:
    """Whether shared arguments of all sites agree."""
    for a, b in zip(one, two, strict=True):
        if a.keys() != b.keys():
            return False
        for path in a:
            x, y = a[path], b[path]
            if isinstance(x, Tensor) != isinstance(y, Tensor):
                return False
            if isinstance(x, Tensor) and (x.shape != y.shape or not x.equal(y)):
                return False
            if isinstance(x, int | float | str | bool) and x != y:
                return False
    return True
