"""A function of one's own as an encoder."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.types import Media, MediaKind


class FunctionEncoder:
    """Wraps ``function(media)``, which returns an array (n, d) or, for several frames or windows per sample, n arrays (k, d).

    Its hash is that of its name and source text: editing the function asks for new statistics. What the function itself loads is
    not seen; put a version into its text when its weights change.
    """

    def __init__(self, function: Callable[[Sequence[Media]], Any], modality: Iterable[MediaKind] = ("image",)) -> None:
        """
        Raises:
            ValueError: the function has no source file to tell versions apart.
        """
        if isinstance(modality, str):
            raise ValueError(f'modality is a list of kinds: write ["{modality}"]')
        self.function = function
        self.modality = frozenset(modality)
        self.name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
        try:
            self.hash = hashlib.sha256(f"{self.name}\n{inspect.getsource(function)}".encode()).hexdigest()
        except (OSError, TypeError) as error:
            raise ValueError(f"encoder {function!r} has no source to hash; write a function in a module, or an object with name, hash, "
                             "modality and encode(media)") from error

    def encode(self, media: Sequence[Media]) -> list[Tensor]:
        """
        Raises:
            ValueError: not one array of one width per sample.
        """
        returned = self.function(media)
        if len(returned) != len(media):
            raise ValueError(f"encoder {self.name} returned {len(returned)} features for {len(media)} samples; return one row, or one "
                             "array of rows, per sample")
        rows = [torch.atleast_2d(torch.as_tensor(row).detach().cpu().double()) for row in returned]
        if any(row.dim() != 2 or 0 in row.shape or row.shape[1] != rows[0].shape[1] for row in rows):
            raise ValueError(f"encoder {self.name} returned features of shapes {sorted({tuple(row.shape) for row in rows})}; expected "
                             "(frames, d) with one d for all")
        return rows
