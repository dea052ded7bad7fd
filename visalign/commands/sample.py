"""``visalign sample``: the pipeline's own call, prompt by prompt and seed by seed, with or without an adapter or guidance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from visalign.commands import quiet_libraries
from visalign.commands.guided import GuidanceOptions, guided_draw
from visalign.commands.pipelines import call_arguments, call_pipeline, check_call, load_pipeline
from visalign.config import load_config
from visalign.data import load_prompts
from visalign.media import INDEX, Sample, append_index, save_media
from visalign.samplers.user_attention import SETTINGS, load_users
from visalign.types import Media, Prompt
from visalign.users import mixture_of


def run(model: str, call: list[str], *, adapter: Path | None, texts: list[str], source: str | None, seeds: str, dtype: str | None,
        device: str, out: Path, guidance: GuidanceOptions | None = None) -> None:
    prompts = [Prompt(text) for text in texts] + (load_prompts(source) if source else [])
    if not prompts:
        raise ValueError("nothing to draw: give -p 'a prompt' (several times if you like) or --prompts FILE")
    if (out / INDEX).exists():
        raise ValueError(f"{out} already holds samples; choose another --out")
    jobs = [(prompt, seed) for prompt in prompts for seed in parse_seeds(seeds)]
    arguments: dict[str, Any] = {}
    if (Path(model) / "config.yaml").is_file():  # a run's folder: its model, its evaluation call, its adapter
        config = load_config(Path(model) / "config.yaml")
        arguments = {**config.model.call, **config.model.eval_call}
        adapter = adapter or Path(model) / "adapter"
        model, dtype = config.model.path, dtype or config.model.dtype
    quiet_libraries()
    arguments |= call_arguments(call)
    console = Console(stderr=True)
    draw: Callable[[Prompt, int], Media]
    if guidance is not None and guidance.wanted:
        draw = guided_draw(model, dtype or "float32", device, adapter, arguments, prompts[0], guidance)
    else:
        draw = _plain_draw(load_pipeline(model, dtype or "float32", device, adapter), arguments, prompts, adapter)
    out.mkdir(parents=True, exist_ok=True)
    digits, made = max(4, len(str(len(jobs) - 1))), 0
    try:
        for prompt, seed in track(jobs, description="sample", console=console, disable=not console.is_terminal):
            append_index(out, Sample(file=save_media(draw(prompt, seed), out / f"{made:0{digits}d}"), prompt=prompt, seed=seed))
            made += 1
    finally:  # also after Ctrl-C or an error: what was made is on disk
        if made:
            console.print(f"{made} of {len(jobs)} samples in {out}" if made < len(jobs) else f"{made} samples in {out}", highlight=False)


def _plain_draw(pipeline: Any, arguments: dict[str, Any], prompts: Sequence[Prompt],
                adapter: Path | None) -> Callable[[Prompt, int], Media]:
    implied = {"negative_prompt": any(prompt.negative is not None for prompt in prompts), "image": any(prompt.images for prompt in prompts)}
    check_call(pipeline, [*arguments, *(name for name, needed in implied.items() if needed)])
    if adapter is None or not (adapter / SETTINGS).is_file():
        return lambda prompt, seed: call_pipeline(pipeline, prompt, seed, arguments)
    users = load_users(pipeline.components, adapter)
    for prompt in prompts:
        users.table.check(mixture_of(prompt))

    def draw(prompt: Prompt, seed: int) -> Media:
        with users.given([mixture_of(prompt)]):
            return call_pipeline(pipeline, prompt, seed, arguments)

    return draw


def parse_seeds(text: str) -> list[int]:
    """``0-3`` or ``1,5,9`` or both, ends included.

    Raises:
        ValueError: neither.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--seeds '{text}': write 7, 0-3 (both ends included) or 1,5,9")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return seeds
