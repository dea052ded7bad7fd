"""What good pictures of the embedded world look like to its CLIP: statistics of rendered captions, for set-level rewards.

    python -m scripts.build_exemplars [--num 4096]

Writes visalign/playground/weights/exemplars.safetensors (``playground:exemplars``): statistics of embeddings of clean renders of training
captions, and 1,024 of these embeddings, with the encoder's hash.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from visalign.commands.exemplars import write
from visalign.config import resolve_path
from visalign.playground import parse, render, sample_scene, train_prompts
from visalign.rewards.encoders import as_encoder
from visalign.types import Media


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    pictures = render([sample_scene(parse(text), rng) for text in train_prompts(arguments.num, seed=0)])
    encoder = as_encoder({"reward": "clip", "model": str(resolve_path("playground:clip"))})
    encoder.name = "clip:playground:clip"  # not the folder on this machine
    write((Media("image", picture) for picture in pictures), encoder, Path(resolve_path("playground:exemplars")), num_features=1024)


if __name__ == "__main__":
    main()
