"""The playground: a small world of coloured shapes with a pretrained pipeline, a proxy reward and an exact verifier.

    from visalign import playground

    pipe = playground.load_pipeline()                              # a StableDiffusion3Pipeline for 32x32 pictures, 5 MB
    images = pipe(["a red circle above a blue square"], num_inference_steps=8, guidance_scale=1.0, max_sequence_length=12).images
    verdict = playground.verify(uint8_images, captions)            # gold: verdict.mean, verdict.strict, verdict.skills

The folder at ``clip_path()`` is an open_clip model of the same world, good but not exact: a proxy reward whose over-optimisation the
verifier can see. ``world`` holds the grammar and the renderer, ``verifier`` the judge; ``weights/README.md`` says how the models
were trained and how well they do.

``max_sequence_length=12`` only saves time: the pipeline's third text encoder is silent (it says zero for every text), and the
transformer was trained to be indifferent to the number of its tokens, 256 by default.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from visalign.playground.geneval import geneval_rows
from visalign.playground.verifier import SKILLS, Verdict, verify
from visalign.playground.world import (
    Caption,
    family,
    heldout_captions,
    is_held_out_combination,
    parse,
    render,
    sample_captions,
    sample_scene,
    train_captions,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

__all__ = [
    "SKILLS",
    "Caption",
    "Verdict",
    "clip_path",
    "exemplars_path",
    "family",
    "geneval_rows",
    "heldout_prompts",
    "is_compositional",
    "load_pipeline",
    "parse",
    "pipeline_path",
    "render",
    "sample_scene",
    "train_prompts",
    "verify",
]

_WEIGHTS = Path(__file__).parent / "weights"


def pipeline_path() -> Path:
    """The folder of the pretrained pipeline, for ``StableDiffusion3Pipeline.from_pretrained``."""
    return _WEIGHTS / "pipeline"


def clip_path() -> Path:
    """The folder of the proxy reward: ``open_clip.create_model_and_transforms(f"local-dir:{clip_path()}")``."""
    return _WEIGHTS / "clip"


def exemplars_path() -> Path:
    """Statistics of clean renders in the embedding of ``clip_path()``, for ``frechet_distance`` and ``exemplar_distance``."""
    return _WEIGHTS / "exemplars.safetensors"


def load_pipeline(dtype: torch.dtype = torch.float32) -> "StableDiffusion3Pipeline":
    """The pretrained pipeline on the CPU, without a progress bar."""
    from diffusers import StableDiffusion3Pipeline  # Takes seconds to import; the renderer and the verifier do not need it.

    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_prompts(num: int | None = None, seed: int = 0) -> list[str]:
    """Prompts of the training split: each of them once, or ``num`` of them drawn with a seed.

    A draw takes the families (single, sized, counted, relation, conjunction) in the proportions of ``world.FAMILY_WEIGHTS``, with
    replacement, because the pairs outnumber the rest twenty to one in the grammar.
    """
    captions = train_captions()
    drawn = captions if num is None else sample_captions(captions, num, random.Random(seed))
    return [caption.text for caption in drawn]


def heldout_prompts(num: int = 512, seed: int = 0) -> list[str]:
    """Evaluation prompts, none of which is a training prompt, in the proportions of ``world.FAMILY_WEIGHTS``.

    Odd entries contain a colour-shape pair that training never showed (``is_compositional``), even ones are new captions of seen
    pairs. Short captions are few, so that they come several times; give each entry its own noise.
    """
    rng = random.Random(seed)
    seen = [caption for caption in heldout_captions() if not is_held_out_combination(caption)]
    unseen = [caption for caption in heldout_captions() if is_held_out_combination(caption)]
    pairs = zip(sample_captions(seen, (num + 1) // 2, rng), sample_captions(unseen, (num + 1) // 2, rng), strict=True)
    return [caption.text for pair in pairs for caption in pair][:num]


def is_compositional(prompt: str) -> bool:
    """Whether the prompt names a colour-shape pair that is in no training prompt.

    Raises:
        ValueError: the prompt is not in the grammar.
    """
    return is_held_out_combination(parse(prompt))
