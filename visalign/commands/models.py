"""MODEL on the command line: a diffusers pipeline, or a run's folder, which stands for its pipeline with its adapter and its call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visalign.commands.pipelines import call_arguments, call_pipeline, check_call, load_pipeline
from visalign.config import load_config
from visalign.samplers.user_attention import SETTINGS, load_users
from visalign.types import Media, Prompt
from visalign.users import mixture_of

Draw = Callable[[Prompt, int], Media]


@dataclass(frozen=True)
class ModelSource:
    """What samples are drawn from.

    Attributes:
        path: a diffusers folder, a hub id or ``playground:pipeline``.
        adapter: a run's adapter folder, or the pipeline as it is.
        call: arguments of the pipeline's call.
        dtype: of its weights.
    """

    path: str
    adapter: Path | None
    call: dict[str, Any]
    dtype: str

    @property
    def identity(self) -> dict[str, Any]:
        """Everything a sample depends on besides its prompt and seed."""
        return {"model": self.path, "adapter": adapter_digest(self.adapter), "call": self.call, "dtype": self.dtype}


def is_run(model: str) -> bool:
    """Whether MODEL is a run's folder."""
    return (Path(model) / "config.yaml").is_file()


def model_source(model: str, words: Sequence[str], adapter: Path | None, dtype: str | None) -> ModelSource:
    """MODEL with its ``key=value`` words; a run brings its model, its evaluation call and, if no other is given, its adapter."""
    given = call_arguments(words)
    if not is_run(model):
        return ModelSource(model, adapter, given, dtype or "float32")
    config = load_config(Path(model) / "config.yaml")
    return ModelSource(config.model.path, adapter or Path(model) / "adapter", {**config.model.call, **config.model.eval_call, **given},
                       dtype or config.model.dtype)


def pipeline_draw(source: ModelSource, device: str, prompts: Sequence[Prompt]) -> Draw:
    """One sample per call by the pipeline's own call, once the arguments and users that the prompts need are known to it.

    Raises:
        ValueError: the pipeline, the adapter, an argument of the call or a user is not there.
    """
    pipeline = load_pipeline(source.path, source.dtype, device, source.adapter)
    implied = {"negative_prompt": any(prompt.negative is not None for prompt in prompts), "image": any(prompt.images for prompt in prompts)}
    check_call(pipeline, [*source.call, *(name for name, needed in implied.items() if needed)])
    if source.adapter is None or not (source.adapter / SETTINGS).is_file():
        return lambda prompt, seed: call_pipeline(pipeline, prompt, seed, source.call)
    users = load_users(pipeline.components, source.adapter)
    for prompt in prompts:
        users.table.check(mixture_of(prompt))

    def draw(prompt: Prompt, seed: int) -> Media:
        with users.given([mixture_of(prompt)]):
            return call_pipeline(pipeline, prompt, seed, source.call)

    return draw


def adapter_digest(adapter: Path | None) -> str | None:
    """An adapter's path and content: a run that went on has another one under the same path.

    Raises:
        ValueError: there is no such folder.
    """
    if adapter is None:
        return None
    if not adapter.is_dir():
        raise ValueError(f"adapter '{adapter}': no such folder; a finished run's is RUN/adapter")
    digest = hashlib.sha256()
    for file in sorted(adapter.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return f"{adapter} ({digest.hexdigest()[:16]})"
