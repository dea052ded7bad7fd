"""Frozen dataclasses from plain configuration values: the part's own fields are its schema.

    assemble(NFT, {"beta": 0.1, "times": {"name": "grid"}}, "algorithm")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from visalign.settings import ConfigError, did_you_mean

Part = TypeVar("Part")


def assemble(part: type[Part], params: Mapping[str, Any], path: str, given: Mapping[str, Any] | None = None) -> Part:
    """``part(**params, **given)`` with every value checked against its field's type; nested dataclasses take mappings.

    Args:
        params: what the user wrote under ``path``; a nested part may also be its name alone.
        given: fields that are not the user's to set, already of their types.
    Raises:
        ConfigError: all unknown keys, missing keys and wrong values at once, each with its path.
    """
    given, errors, values = given or {}, list[str](), dict[str, Any]()
    hints = get_type_hints(part)
    known = {field.name: field for field in fields(part) if field.init and field.name not in given}  # type: ignore[arg-type]
    for key, value in params.items():
        if key not in known:
            errors.append(f"{path}.{key}: unknown key{did_you_mean(key, list(known)) or '; known here: ' + ', '.join(sorted(known))}")
            continue
        try:
            values[key] = _value(hints[key], value, f"{path}.{key}")
        except ConfigError as error:
            errors += error.errors
        except ValidationError as error:
            wrong = error.errors()[0]
            errors.append(f"{path}.{key}: {wrong['msg'].removeprefix('Value error, ').removeprefix('Input ')}, got {value!r}")
    for name, field in known.items():
        if name not in params and field.default is MISSING and field.default_factory is MISSING:
            errors.append(f"{path}.{name}: required, but not given")
    if errors:
        raise ConfigError(errors, f"the section {path}")
    try:
        return part(**values, **given)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"], f"the section {path}") from None


def _value(hint: Any, value: Any, path: str) -> Any:
    options = get_args(hint) or (hint,)
    nested = next((option for option in options if is_dataclass(option) and isinstance(option, type)), None)
    if nested is not None and not (value is None and type(None) in options):
        if isinstance(value, str) and "name" in {field.name for field in fields(nested)}:
            value = {"name": value}
        if not isinstance(value, Mapping):
            raise ConfigError([f"{path}: expected a mapping with {', '.join(field.name for field in fields(nested))}, got {value!r}"], path)
        return assemble(nested, value, path)
    return TypeAdapter(hint).validate_python(value)
