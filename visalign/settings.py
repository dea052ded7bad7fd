"""Typed settings from YAML for any pydantic schema: parse, override, validate with messages that teach, dump.

Knows nothing of the schema itself (that is ``config.py``); it owns the rule that nothing is dropped or rewritten silently.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)
Location = Sequence[str | int]


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line per mistake in ``errors``."""

    def __init__(self, errors: Sequence[str], source: str) -> None:
        self.errors = list(errors)
        self.source = source
        noun = "1 mistake" if len(self.errors) == 1 else f"{len(self.errors)} mistakes"
        super().__init__(f"{noun} in {source}:\n" + "\n".join(f"  - {line}" for line in self.errors))


# --- YAML ---------------------------------------------------------------------------------------------------------------------

_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``3e-5`` is a number (YAML 1.1 says string), and a key given twice is an error."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in result:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str) -> Any:
    """Plain data from YAML text.

    Raises:
        ValueError: not YAML, or a key is given twice; with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{where}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


class _Dumper(yaml.SafeDumper):
    """Writes floats in full precision and quotes the strings that :class:`_Loader` would read as numbers."""


def _write_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value) if math.isfinite(value) else {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _write_float)
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {key: _plain(item) for key, item in value}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def dump_yaml(value: BaseModel | Mapping[str, Any]) -> str:
    """YAML of every value, defaults included; parsing and validating it gives the same settings."""
    return yaml.dump(_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it: mappings key by key, everything else as a whole; ``null`` removes a key.

    A part with another ``name`` replaces the one of the base, whose parameters mean nothing to it.
    """
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        before = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(before, Mapping) and value.get("name", before.get("name")) == before.get("name"):
            merged[key] = merge(before, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


# --- overrides ----------------------------------------------------------------------------------------------------------------


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``data`` with every ``key.sub=value`` applied in order; values are YAML.

    ``rewards.0.weight=2`` reaches into a list, ``rewards.-1.weight=2`` counts from its end, ``rewards.+={name: jpeg}`` appends.
    Whether a key exists is the schema's business, so that a wrong one gets the same message as in a file.

    Raises:
        ConfigError: every override that cannot be applied.
    """
    result: dict[str, Any] = copy.deepcopy(dict(data))
    errors = []
    for override in overrides:
        try:
            _apply(result, override)
        except ValueError as error:
            errors.append(f"'{override}': {error}")
    if errors:
        raise ConfigError(errors, "the overrides")
    return result


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if override.startswith("-"):
        raise ValueError("overrides have no dashes: write train.learning_rate=1e-4, not --train.learning_rate 1e-4")
    if not equals:
        raise ValueError("write key=value, for example train.learning_rate=1e-4")
    parts = key.strip().split(".")
    if not all(parts):
        raise ValueError(f"'{key}' has an empty part; write section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"the value is not YAML ({error}); put it in quotes: {key}='\"...\"'") from None

    here: Any = data
    for depth, part in enumerate(parts[:-1]):
        here = _step_into(here, part, ".".join(parts[:depth]), opens_list=parts[depth + 1] == "+")
    reached, part = ".".join(parts[:-1]), parts[-1]
    if isinstance(here, list) and part == "+":
        here.append(value)
    elif isinstance(here, list):
        here[_index(here, part, reached)] = value
    elif isinstance(here, dict):
        here[part] = value
    else:
        raise _not_inside(here, part, reached)


def _step_into(here: Any, part: str, reached: str, opens_list: bool) -> Any:
    if isinstance(here, list):
        if part == "+":
            here.append({})
            return here[-1]
        return here[_index(here, part, reached)]
    if isinstance(here, dict):
        if here.get(part) is None:
            here[part] = [] if opens_list else {}
        return here[part]
    raise _not_inside(here, part, reached)


def _not_inside(here: Any, part: str, reached: str) -> ValueError:
    return ValueError(f"{reached} is the single value {here!r}, it has no '{part}' inside; replace it as a whole: {reached}=...")


def _index(here: list[Any], part: str, reached: str) -> int:
    if not re.fullmatch(r"-?\d+", part):
        raise ValueError(f"{reached} is a list of {len(here)}: say which entry ({reached}.0) or append one ({reached}.+)")
    if not -len(here) <= int(part) < len(here):
        raise ValueError(f"{reached} has {len(here)} entries, counted from 0; append one with {reached}.+")
    return int(part)


# --- messages -----------------------------------------------------------------------------------------------------------------


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``"; did you mean 'x'?"`` or nothing, to be put behind a message."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _schemas_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _schemas_in(argument)


def _schemas_at(root: type[BaseModel], location: Location) -> list[type[BaseModel]]:
    """The schemas that may stand at a location below ``root``; list indices do not change the schema."""
    schemas = [root]
    for part in location:
        fields = [schema.model_fields[part] for schema in schemas if isinstance(part, str) and part in schema.model_fields]
        if fields:
            schemas = [found for field in fields for found in _schemas_in(field.annotation)]
    return schemas


def _all_paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for inner in _schemas_in(field.annotation):
            yield from _all_paths(inner, f"{prefix}{name}.")


def _unknown_key(root: type[BaseModel], location: Location) -> str:
    key, known = str(location[-1]), sorted({name for schema in _schemas_at(root, location[:-1]) for name in schema.model_fields})
    elsewhere = [path for path in _all_paths(root) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"unknown key here; it belongs to {' or '.join(elsewhere[:3])}"
    return f"unknown key{did_you_mean(key, known) or '; known here: ' + ', '.join(known)}"


def validation_lines(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line ``path: what is wrong`` per mistake pydantic found."""
    lines = []
    # Union members ('str', 'DatasetConfig', ...) are in the location pydantic gives but not in the path a user knows.
    found = [(item, [part for part in item["loc"] if not _is_union_member(part)]) for item in error.errors()]
    for item, location in found:
        # What is wrong inside a value says more than that the value as a whole did not fit.
        if any(len(other) > len(location) and other[:len(location)] == location for _, other in found) and location:
            continue
        path = ".".join(map(str, location)) or "top level"
        if item["type"] == "extra_forbidden":
            lines.append(f"{path}: {_unknown_key(root, location)}")
        elif item["type"] == "missing":
            lines.append(f"{path}: required, but not given")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            plain = isinstance(item["input"], (str, int, float, bool, type(None)))
            got = f", got {item['input']!r}" if plain and item["type"] != "value_error" else ""
            lines.append(f"{path}: {message}{got}")
    return list(dict.fromkeys(lines))


def _is_union_member(part: str | int) -> bool:
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or part.endswith("Config") or "[" in part)


def validate(schema: type[Model], data: Mapping[str, Any], source: str) -> Model:
    """``data`` as a ``schema``.

    Raises:
        ConfigError: all mistakes at once.
    """
    try:
        return schema.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(validation_lines(error, schema), source) from None
