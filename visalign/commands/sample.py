"""``visalign sample``: the pipeline's own call, prompt by prompt and seed by seed, with or without an adapter or guidance."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.progress import track

from visalign.commands import quiet_libraries
from visalign.commands.guided import GuidanceOptions, guided_draw
from visalign.commands.models import Draw, model_source, pipeline_draw
from visalign.data import load_prompts
from visalign.media import INDEX, Sample, append_index, save_media
from visalign.types import Prompt


def run(model: str, call: list[str], *, adapter: Path | None, texts: list[str], source: str | None, seeds: str, dtype: str | None,
        device: str, out: Path, guidance: GuidanceOptions | None = None) -> None:
    prompts = [Prompt(text) for text in texts] + (load_prompts(source) if source else [])
    if not prompts:
        raise ValueError("nothing to draw: give -p 'a prompt' (several times if you like) or --prompts FILE")
    if (out / INDEX).exists():
        raise ValueError(f"{out} already holds samples; choose another --out")
    jobs = [(prompt, seed) for prompt in prompts for seed in parse_seeds(seeds)]
    drawn = model_source(model, call, adapter, dtype)
    quiet_libraries()
    console = Console(stderr=True)
    if guidance is not None and guidance.wanted:
        draw: Draw = guided_draw(drawn.path, drawn.dtype, device, drawn.adapter, drawn.call, prompts[0], guidance)
    else:
        draw = pipeline_draw(drawn, device, prompts)
    out.mkdir(parents=True, exist_ok=True)
    digits, made = max(4, len(str(len(jobs) - 1))), 0
    try:
        for prompt, seed in track(jobs, description="sample", console=console, disable=not console.is_terminal):
            append_index(out, Sample(file=save_media(draw(prompt, seed), out / f"{made:0{digits}d}"), prompt=prompt, seed=seed))
            made += 1
    finally:  # also after Ctrl-C or an error: what was made is on disk
        if made:
            console.print(f"{made} of {len(jobs)} samples in {out}" if made < len(jobs) else f"{made} samples in {out}", highlight=False)


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
