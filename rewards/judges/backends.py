"""Back ends from a configuration: ``{base_urls: ..., model: ...}`` is a server, ``{folder: ...}`` a model in this process."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from visalign.rewards.judges.local import LocalModel
from visalign.rewards.judges.question import Backend
from visalign.rewards.judges.server import ChatServer


def backend_from(given: Backend | Mapping[str, Any]) -> Backend:
    """A back end as it is, or made from its parameters.

    Raises:
        ValueError: says which parameters there are, and whatever the back end says about their values.
    """
    if isinstance(given, Backend):
        return given
    if not isinstance(given, Mapping) or ("base_urls" in given) == ("folder" in given):
        raise ValueError(f"backend {given!r} must be {{base_urls: [http://HOST:PORT/v1], model: NAME}} for a server or "
                         "{folder: PATH_OR_HUB_ID} for a model in this process")
    kind: Any = ChatServer if "base_urls" in given else LocalModel
    parameters = inspect.signature(kind).parameters
    unknown = [key for key in given if key not in parameters]
    missing = [key for key, one in parameters.items() if one.default is one.empty and key not in given]
    if unknown or missing:
        raise ValueError(f"backend: unknown {', '.join(unknown) or 'nothing'}, missing {', '.join(missing) or 'nothing'}; "
                         f"it takes {', '.join(parameters)}")
    made: Backend = kind(**given)
    return made
