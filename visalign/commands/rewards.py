"""``visalign rewards``: what there is to score with, built in and from plug-ins, and how each is set up. No weights are loaded."""

from __future__ import annotations

import inspect
import math
import re
from importlib.metadata import EntryPoint
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from visalign.commands import quiet_libraries
from visalign.plugins import find_reward, requirement, reward_names
from visalign.protocols import ALL_MEDIA, RewardSpec

JUDGED = {"pointwise": "samples", "pairwise": "pairs", "groupwise": "groups", "set": "sets"}


def run(name: str | None) -> None:
    quiet_libraries()
    if name is None:
        Console().print(table())
    else:
        typer.echo(describe(name))


def table() -> Table:
    """One row per name; a reward whose dependencies are missing says what to install."""
    shown = Table(title="rewards", title_justify="left",
                  caption="visalign rewards NAME shows its parameters; your own: package.module:attribute or path/to/file.py:attribute")
    for heading in ("name", "of", "judges", "what"):
        shown.add_column(heading, no_wrap=heading in ("name", "judges"))
    for name, point in sorted(reward_names().items()):
        try:
            found = find_reward(name)
        except ValueError as error:
            shown.add_row(name, "?", "?", escape(str(error)), style="dim")
            continue
        spec, needs = declared(found), f"; needs {requirement(point)}" if from_elsewhere(point) else ""
        shown.add_row(name, "any" if spec is None or spec.modality >= ALL_MEDIA else ", ".join(sorted(spec.modality)),
                      JUDGED.get(arity(found), ""), escape(summary(found) + needs))
    return shown


def describe(target: str) -> str:
    """All there is to know about one reward, as plain text.

    Raises:
        ValueError: no such reward, or its dependencies are not installed.
    """
    found = find_reward(target)
    spec, module = declared(found), inspect.getmodule(found)
    place = f"{found.__module__}:{getattr(found, '__qualname__', type(found).__qualname__)}"
    parts = [f"{target}    {place}", inspect.cleandoc(found.__doc__ or "no description")]
    point = reward_names().get(target)
    if spec is not None:
        parts.append("\n".join(f"{key:<14}{value}" for key, value in facts(spec, arity(found), point).items() if value))
    if module is not None and module.__doc__:
        parts.append(inspect.cleandoc(module.__doc__))
    parts.append("parameters\n" + ("\n".join(parameters(found)) or "  none"))
    if inspect.isclass(found) and found.__init__.__doc__:  # type: ignore[misc]
        parts.append(inspect.cleandoc(found.__init__.__doc__))  # type: ignore[misc]
    return "\n\n".join(parts)


def declared(found: Any) -> RewardSpec | None:
    """What a class or an instance says of itself; a plain function says nothing."""
    spec = getattr(found, "spec", None)
    return spec if isinstance(spec, RewardSpec) else None


def arity(found: Any) -> str:
    """From the specification, else from the methods it has."""
    spec = declared(found)
    if spec is not None:
        return spec.arity
    return "pairwise" if hasattr(found, "compare") else "set" if hasattr(found, "credit") else "pointwise"


def summary(found: Any) -> str:
    """The first sentence of its documentation."""
    text = " ".join(inspect.cleandoc(found.__doc__ or "").split()).replace("``", "")
    found_sentence = re.match(r"(?:\([^()]*\)|[.;:](?![\s]|$)|[^.;:])+", text)
    return found_sentence[0] if found_sentence else ""


def facts(spec: RewardSpec, judged: str, point: EntryPoint | None) -> dict[str, str]:
    """What a specification says, in words; empty where it says nothing."""
    low, high = (f"{bound:g}" if math.isfinite(bound) else "" for bound in spec.raw_range)
    return {"reads": ", ".join(sorted(spec.modality)), "judges": JUDGED.get(judged, judged),
            "prompts need": "" if not spec.requires else ", ".join("text" if key == "prompt" else key for key in sorted(spec.requires)),
            "better": "larger" if spec.direction == 1 else "smaller", "range": f"{low or '-inf'} to {high or 'inf'}" if low or high else "",
            "gradients": "to the media" if spec.differentiable else "", "weights": ", ".join(spec.model_ids), "licence": spec.licence,
            "install": f"pip install '{requirement(point)}'" if point is not None and from_elsewhere(point) else ""}


def from_elsewhere(point: EntryPoint) -> bool:
    """Whether it takes more than a plain ``pip install visalign``."""
    return bool(point.extras) or point.dist is not None


def parameters(found: Any) -> list[str]:
    """A line per parameter with its type and its default; a function's first two, media and prompts, are not the user's."""
    if not callable(found):
        return []
    signature = list(inspect.signature(found).parameters.values())[0 if inspect.isclass(found) else 2:]
    lines = []
    for one in signature:
        kind = "" if one.annotation is one.empty else f": {one.annotation if isinstance(one.annotation, str) else one.annotation.__name__}"
        lines.append(f"  {one.name}{kind}" + (" (required)" if one.default is one.empty else f" = {one.default!r}"))
    return lines
