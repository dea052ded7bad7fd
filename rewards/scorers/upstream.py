"""Another project's package, or the message that says which environment it wants."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

ENVIRONMENTS = Path(__file__).parent / "environments"


def upstream(module: str, environment: str, folder: str | Path | None = None) -> Any:
    """The module, found on the import path or, for projects that are no packages, in ``folder``.

    Raises:
        ValueError: it, or something that it imports, is not there; names the environment file.
    """
    if folder is not None:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ValueError(f"{path} is no folder; clone the project that {environment}.txt names, and give its path")
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} cannot be imported here: {error}. It wants an environment of its own: pip install -r "
                         f"{ENVIRONMENTS / f'{environment}.txt'}, then pip install --no-deps visalign, and serve it there with visalign "
                         "serve-reward") from error


def check_vocabulary(tokenizer: Any, at_least: int, reward: str) -> None:
    """Refuse a tokenizer that could not be loaded: without a network some come up empty instead of failing.

    Raises:
        ValueError: fewer entries than expected.
    """
    if len(tokenizer) < at_least:
        raise ValueError(f"{reward}: its tokenizer has {len(tokenizer)} entries, expected {at_least} or more; it could not be loaded. "
                         "Fetch it once with a network, or put it into the hub's cache")
