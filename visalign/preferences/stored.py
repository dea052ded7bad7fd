"""Latents in files that are complete or not there, and that say which pipeline can use them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visalign.preferences.candidates import Candidate, StoredLatent
from visalign.preferences.records import RowError
from visalign.tensorfile import write_tensors

NAME = "latents"


def write_latents(path: Path, latents: Tensor, identity: str | None) -> None:
    """Latents (n, *latent_shape) as a file that is complete or not there; ``identity`` says which pipeline can use them."""
    write_tensors(path, {NAME: latents.float()}, None if identity is None else {"identity": identity})


def load_latents(candidates: Sequence[Candidate]) -> Tensor:
    """The K candidates' latents, float32 (K, *latent_shape).

    Raises:
        ValueError: one of them is not stored as a latent, or its file is missing or damaged.
    """
    rows = []
    for candidate in candidates:
        if not isinstance(candidate, StoredLatent):
            raise ValueError(f"{candidate.name} is a medium, not a latent; encode the data set first with cached_latents")
        try:
            with safe_open(candidate.path, framework="pt") as file:
                rows.append(file.get_slice(NAME)[candidate.row:candidate.row + 1])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{candidate.name}: cannot be read ({error}); run cached_latents again to make it anew") from error
    return torch.cat(rows).float()


def check_stored(candidate: StoredLatent, shape: tuple[int, ...], identity: str) -> StoredLatent:
    """The candidate, if a pipeline of this latent shape and identity can use it.

    Raises:
        RowError: it cannot.
    """
    try:
        stored, made_by = header(candidate.path)
    except (SafetensorError, OSError, KeyError) as error:
        raise RowError("latents", f"{candidate.name}: not a readable file of latents ({error})") from None
    if stored[1:] != shape:
        raise RowError("latents", f"{candidate.name}: latents of shape {stored[1:]}, the pipeline's are {shape}")
    if candidate.row >= stored[0]:
        raise RowError("latents", f"{candidate.name}: the file has {stored[0]} rows, counted from 0")
    if made_by is not None and made_by.removesuffix("+resize") != identity:
        raise RowError("latents", f"{candidate.name}: latents of another pipeline (another VAE, size or scaling)")
    return candidate


def header(path: Path) -> tuple[tuple[int, ...], Any]:
    """Shape of the stored latents, and the identity of the pipeline they are for, if the file says so."""
    with safe_open(path, framework="pt") as file:
        return tuple(file.get_slice(NAME).get_shape()), (file.metadata() or {}).get("identity")
