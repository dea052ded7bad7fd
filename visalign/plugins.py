"""Rewards by name: built-in ones, installed plug-ins, dotted paths and plain files.

    load_reward("clip", model="ViT-H-14", pretrained="laion2b_s32b_b79k")     built in, or an entry point of ``visalign.rewards``
    load_reward("my_package.scores:Sharpness", radius=2)                      class, instance or function on the import path
    load_reward("./my_scores.py:sharpness", direction=-1)                     the same from a file

A built-in name, an entry point and a dotted path are all ``module:attribute [extra]`` and are loaded by the same few lines.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from visalign.notes import noting
from visalign.protocols import PairwiseReward, Reward, SetReward

GROUP = "visalign.rewards"


def reward_names() -> dict[str, EntryPoint]:
    """Every name ``load_reward`` knows: the built-in ones and those of installed packages, which cannot replace them.

    Raises:
        ValueError: two packages claim one name.
    """
    builtin: Mapping[str, str] = importlib.import_module(GROUP).BUILTIN
    names = {name: EntryPoint(name, value, GROUP) for name, value in builtin.items()}
    for point in entry_points(group=GROUP):
        known = names.setdefault(point.name, point)
        if known.value != point.value:
            raise ValueError(f"the reward name '{point.name}' is claimed by {point.value} and by {known.value}; "
                             "uninstall one of the packages")
    return names


def load_reward(target: str, /, **params: Any) -> Reward | PairwiseReward | SetReward:
    """The reward that ``target`` names, made with ``params``.

    A class is instantiated; an instance is returned; a function ``f(media, prompts, ...)`` becomes a ``FunctionReward``, to which
    ``name``, ``modality``, ``direction`` and ``requires`` go while the function's own keyword arguments are bound.
    A parameter that is itself ``{"reward": target, ...params}`` is loaded first, which is how judges and ensembles nest.

    Raises:
        ValueError: the name, a parameter, the module, the attribute or a dependency is unknown; says what would have worked.
        TypeError: what was found is no reward.
    """
    params = {key: _load_nested(value) for key, value in params.items()}
    found = find_reward(target)
    if inspect.isclass(found):
        check_params(f"reward '{target}'", _parameters(found), params)
        with noting(f"while reward '{target}' was made"):
            reward = found(**params)
    elif isinstance(found, (Reward, PairwiseReward, SetReward)):
        check_params(f"reward '{target}'", [], params)
        reward = found
    elif callable(found):
        reward = _wrap_function(target, found, params)
    else:
        reward = found
    if not isinstance(reward, (Reward, PairwiseReward, SetReward)):
        raise TypeError(f"{target} is a {type(reward).__name__}, not a reward: it needs `spec` (a RewardSpec) and "
                        "`score(media, prompts, group_id)` or `compare(first, second, prompts)`")
    return reward


def _load_nested(value: Any) -> Any:
    if isinstance(value, Mapping) and isinstance(value.get("reward"), str):
        return load_reward(value["reward"], **{key: inner for key, inner in value.items() if key != "reward"})
    if isinstance(value, Mapping):
        return {key: _load_nested(inner) for key, inner in value.items()}
    return value


def find_reward(target: str) -> Any:
    """What ``target`` names, not made yet: a class, an instance or a function.

    Raises:
        ValueError: the name, the module, the attribute or a dependency is unknown; says what would have worked.
    """
    if target.rpartition(":")[0].endswith(".py") or target.endswith(".py"):
        return _from_file(target)
    names = reward_names()
    if target in names:
        return _from_entry_point(names[target])
    if "." in target or ":" in target:
        dotted = target if ":" in target else ":".join(target.rpartition(".")[::2])
        return _from_entry_point(EntryPoint(target, dotted, GROUP))
    raise ValueError(f"unknown reward '{target}'{_suggest(target, names)}; known: {', '.join(sorted(names))}; "
                     "your own: package.module:attribute or path/to/file.py:attribute")


def _from_entry_point(point: EntryPoint) -> Any:
    try:
        module = importlib.import_module(point.module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{point.module}.".startswith(f"{missing}."):
            raise ValueError(f"reward '{point.name}': no module '{missing}' on the import path; install its package, "
                             "or give a file as path/to/file.py:attribute") from error
        raise ValueError(f"reward '{point.name}' needs the module '{missing}', which is not installed: "
                         f"pip install '{requirement(point)}'") from error
    return _attribute(module, point.attr, point.name)


def requirement(point: EntryPoint) -> str:
    """What ``pip install`` brings a reward and its dependencies, such as ``visalign[audio]``."""
    package = point.dist.name if point.dist else point.module.partition(".")[0]
    return f"{package}[{','.join(point.extras)}]" if point.extras else package


def _from_file(target: str) -> Any:
    path_text, _, attribute = (target, "", "") if target.endswith(".py") else target.rpartition(":")
    path = Path(path_text).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"reward '{target}': no file {path}")
    name = f"visalign_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before execution: dataclasses and pickle look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return _attribute(sys.modules[name], attribute, target)


def _attribute(module: Any, attribute: str, target: str) -> Any:
    if attribute and hasattr(module, attribute):
        return getattr(module, attribute)
    public = [name for name, value in vars(module).items()
              if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__]
    where = module.__file__ or module.__name__
    if attribute:
        problem = f"{where} has no '{attribute}'{_suggest(attribute, public)}"
    else:
        problem = f"which attribute of {where}? Write FILE.py:NAME"
    raise ValueError(f"reward '{target}': {problem}; it defines: {', '.join(public) or 'nothing public'}")


def _wrap_function(target: str, function: Callable[..., Any], params: Mapping[str, Any]) -> Any:
    wrapper = _from_entry_point(reward_names()["function"])
    own = _parameters(function)[2:]
    options = [parameter for parameter in _parameters(wrapper) if parameter.name != "function"]
    check_params(f"reward '{target}'", [*options, *own], params)
    for_wrapper = {parameter.name for parameter in options} - {parameter.name for parameter in own}
    bound = {key: value for key, value in params.items() if key not in for_wrapper}
    rest = {key: value for key, value in params.items() if key in for_wrapper}
    return wrapper(functools.partial(function, **bound), **{"name": getattr(function, "__name__", target), **rest})


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(factory).parameters.values())


def check_params(what: str, parameters: Iterable[inspect.Parameter], params: Mapping[str, Any]) -> None:
    """All unknown and missing parameters at once, before anything is built.

    Args:
        what: is to be built, "reward 'clip'".
    Raises:
        ValueError: names them, with suggestions, and what would be taken.
    """
    parameters = list(parameters)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named |= {key: inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in params if key not in named}
    problems = [f"unknown parameter '{key}'{_suggest(key, named)}" for key in params if key not in named]
    problems += [f"missing parameter '{name}'" for name, p in named.items() if p.default is p.empty and name not in params]
    if problems:
        accepts = ", ".join(str(p.replace(annotation=p.empty)) for p in named.values())
        raise ValueError(f"{what}: {'; '.join(problems)}; it takes: {accepts or 'no parameters'}")


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""
