"""Tokens and keys come from the environment: they are never in a configuration, a command line or a run's folder."""

from __future__ import annotations

import os


def read_secret(variable: str, what: str) -> str:
    """What an environment variable holds, without spaces and line ends around it.

    Args:
        what: belongs there, for the message.
    Raises:
        ValueError: the variable is empty, or holds what an HTTP header cannot.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ValueError(f"the environment variable {variable} is empty; export {what} in it")
    if not (value.isascii() and value.isprintable()):
        raise ValueError(f"the environment variable {variable} holds letters that an HTTP header cannot carry; use printable ASCII")
    return value
