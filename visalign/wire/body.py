"""One safetensors file holds everything: the JSON head as bytes under ``head``, and the arrays it speaks of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

VERSION: Literal[1] = 1
CONTENT_TYPE = "application/vnd.safetensors"
HEAD = "head"

Array = NDArray[Any]
Head = TypeVar("Head", bound=BaseModel)


class WireError(ValueError):
    """A body that is not one, or not one of ours."""


class VersionError(WireError):
    """Both sides speak, but not the same version."""

    def __init__(self, other: object) -> None:
        super().__init__(f"this side speaks version {VERSION} of the reward protocol, the other side {other!r}; install the same version "
                         "of visalign on both")


class TooLargeError(WireError):
    """More bytes than one request may hold, as it came or decoded."""


def pack(head: BaseModel, arrays: Mapping[str, Array]) -> bytes:
    """The file.

    Raises:
        WireError: the head has values that JSON has not.
    """
    try:
        text = json.dumps(head.model_dump(mode="python"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WireError(f"cannot be written as JSON: {error}") from error
    return save({HEAD: np.frombuffer(text.encode("utf-8"), dtype=np.uint8), **arrays})


def unpack(body: bytes, schema: type[Head]) -> tuple[Head, dict[str, Array]]:
    """The head, checked, and the arrays, which are read-only.

    Raises:
        VersionError: the other side speaks another version.
        WireError: says what is not as it should be.
    """
    try:
        arrays = load(body)
    except (SafetensorError, KeyError, ValueError) as error:
        raise WireError(f"the body is no safetensors file: {error}") from error
    text = arrays.pop(HEAD, None)
    if text is None or text.dtype != np.uint8:
        raise WireError(f"the body has no array '{HEAD}' of uint8 with the JSON head; it has {', '.join(sorted(arrays)) or 'nothing'}")
    return read_head(text.tobytes(), schema), arrays


def read_head(text: bytes, schema: type[Head]) -> Head:
    """A JSON head, checked; its version first, so that the rest may look otherwise in another one.

    Raises:
        VersionError, WireError: as ``unpack``.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the head is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError(f"the head is no JSON object but {type(value).__name__}")
    if value.get("version") != VERSION:
        raise VersionError(value.get("version"))
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise WireError(f"{'.'.join(map(str, wrong['loc'])) or 'the head'}: {wrong['msg']}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
