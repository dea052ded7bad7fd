"""What good pictures of the embedded world look like to its CLIP: statistics of rendered captions, for set-level rewards.

    python -m scripts.build_exemplars [--num 4096]

Writes visalign/playground/weights/exemplars.safetensors (``playground:exemplars``): mean and covariance of embeddings of clean renders of
training captions, with the encoder's hash.
"""

from __future__ import annotations

import argparse
import random

import torch

from visalign.config import resolve_path
from visalign.playground import parse, render, sample_scene, train_prompts
from visalign.plugins import load_reward
from visalign.rewards.encoders import as_encoder
from visalign.rewards.exemplars import reference_statistics, save_exemplars
from visalign.types import Media


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    scenes = [sample_scene(parse(text), rng) for text in train_prompts(arguments.num, seed=0)]
    pictures = render(scenes)
    encoder = as_encoder(load_reward("clip", model=str(resolve_path("playground:clip"))))
    path = resolve_path("playground:exemplars")
    save_exemplars(reference_statistics([Media("image", picture) for picture in pictures], encoder), path)
    print(f"{path}: {len(pictures)} pictures")


if __name__ == "__main__":
    main()
