"""``visalign sample``: the pipeline's own call, prompt by prompt and seed by seed, with or without an adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from visalign.commands import quiet_libraries
from visalign.commands.pipelines import call_arguments, call_pipeline, load_pipeline
from visalign.config import load_config
from visalign.data import load_prompts
from visalign.media import INDEX, save_samples
from visalign.types import Prompt


def run(model: str, call: list[str], *, adapter: Path | None, texts: list[str], source: str | None, seeds: str, dtype: str | None,
        device: str, out: Path) -> None:
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
    pipeline = load_pipeline(model, dtype or "float32", device, adapter)
    arguments |= call_arguments(call)
    console = Console(stderr=True)
    media = [call_pipeline(pipeline, prompt, seed, arguments)
             for prompt, seed in track(jobs, description="sample", console=console, disable=not console.is_terminal)]
    save_samples(out, media, [prompt for prompt, _ in jobs], [seed for _, seed in jobs])
    console.print(f"{len(media)} samples in {out}", highlight=False)


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
