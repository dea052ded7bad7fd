"""Dataclasses by name, with errors that say which names and parameters there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def build_named(what: str, registry: Mapping[str, type[Any]], name: str, params: Mapping[str, Any]) -> Any:
    """The part of ``registry`` called ``name``; ``what`` it is, for messages.

    Raises:
        ValueError: an unknown name, an unknown or missing parameter, or a value out of range.
    """
    if name not in registry:
        raise ValueError(f"unknown {what} {name!r}; use one of {', '.join(registry)}")
    known = [f.name for f in fields(registry[name])]
    unknown = [param for param in params if param not in known]
    if unknown:
        raise ValueError(f"{what} {name!r} has no parameter {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")
    try:
        return registry[name](**params)
    except TypeError as error:
        raise ValueError(f"{what} {name!r} takes {', '.join(known)}; got {dict(params)}: {error}") from error
