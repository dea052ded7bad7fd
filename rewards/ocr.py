"""Is the text that was asked for written in the image: character recognition and edit distance.

    t, o = target and recognised text, case folded, without whitespace;   d = edit distance(o, t)

    raw = 1 - min(d, |t|) / |t|                 in [0, 1]
    raw = min(1, c |t| / |o|)                   where o contains t

The second line keeps surrounding text from counting as error, as published rewards do, but not a page of it: beyond c times the target's
length the score falls, so that writing everything is no strategy. c = infinity gives the published rule, 1 wherever the target occurs.
No text at all is a true 0, not a missing score.

The target is ``metadata["target_text"]`` (a text, or several in reading order), else what the prompt has between double quotes.
The models inside the rapidocr wheel (PP-OCR, Latin and Chinese) work offline.

Source: Flow-GRPO, arXiv:2505.05470, section 4 (OCR accuracy as a reward).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from visalign.protocols import RewardSpec
from visalign.rewards.licences import licence_of
from visalign.types import Media, Prompt, Scores

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class WrittenText:
    """How much of the wanted text stands in the image. Details: ``contained`` (0 or 1), ``length_ratio`` |o| / |t|."""

    spec = RewardSpec(name="ocr", requires=frozenset({"prompt"}), raw_range=(0.0, 1.0), model_ids=("rapidocr",),
                      licence=licence_of("rapidocr"))

    def __init__(self, max_length_ratio: float = 3.0, *, config_path: str | None = None, name: str = "ocr") -> None:
        """
        Args:
            max_length_ratio: c, at least 1.
            config_path: rapidocr's own configuration, for other languages, engines or numbers of threads; ``None`` is what it comes
                with, on as many threads as torch uses.
        Raises:
            ValueError: rapidocr is not installed, or c is below 1.
        """
        if not max_length_ratio >= 1:
            raise ValueError(f"max_length_ratio {max_length_ratio} must be at least 1: the target itself has ratio 1")
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ValueError(f"reward '{name}' needs rapidocr and onnxruntime ({error}): pip install 'visalign[ocr]'") from error
        # onnxruntime takes every core it sees; processes that share a machine would wait for one another.
        threads = {} if config_path else {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
                                          "EngineConfig.onnxruntime.inter_op_num_threads": 1}
        self.engine: Any = RapidOCR(config_path=config_path, params={"Global.log_level": "critical", **threads})
        self.max_length_ratio = max_length_ratio
        models = config_path or "rapidocr"
        self.spec = replace(self.spec, name=name, model_ids=(models,), licence=licence_of(models), version=f"ratio-{max_length_ratio:g}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per image.

        Raises:
            ValueError: a prompt that names no text.
        """
        targets = [fold(target_text(prompt)) for prompt in prompts]
        found = [fold("".join(self.read(sample))) for sample in media]
        pairs = list(zip(targets, found, strict=True))
        return Scores.from_values(
            [text_accuracy(target, text, self.max_length_ratio) for target, text in pairs],
            details={"contained": torch.tensor([float(target in text) for target, text in pairs]),
                     "length_ratio": torch.tensor([len(text) / len(target) for target, text in pairs])})

    def read(self, sample: Media) -> list[str]:
        """The lines of text in an image, from top to bottom; none is an empty list."""
        answer = self.engine(Image.fromarray(sample.data.permute(1, 2, 0).contiguous().cpu().numpy()))
        return list(answer.txts or ())

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that name no text, before anything is generated."""
        for row, prompt in enumerate(prompts):
            try:
                target_text(prompt)
            except ValueError as error:
                raise ValueError(f"reward '{self.spec.name}', prompt {row}: {error}") from error


def target_text(prompt: Prompt) -> str:
    """What a prompt wants written.

    Raises:
        ValueError: it does not say, or says nothing but spaces.
    """
    given = prompt.metadata.get("target_text")
    if given is None:
        given = [straight or curly for straight, curly in _QUOTED.findall(prompt.text)]
    parts = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(part, str) for part in parts) or not fold("".join(parts)):
        raise ValueError(f"{prompt.text[:60]!r} names no text to write; add it to the line in the prompt file, "
                         '{"prompt": ..., "target_text": "SALE"}, or write it in double quotes in the prompt')
    return " ".join(parts)


def fold(text: str) -> str:
    """Compatibility forms unified, case folded, all whitespace removed."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_accuracy(target: str, recognised: str, max_length_ratio: float) -> float:
    """The formula at the head of this file, for folded texts; in [0, 1]."""
    if target in recognised:
        return min(1.0, max_length_ratio * len(target) / len(recognised))
    return 1 - min(edit_distance(recognised, target), len(target)) / len(target)


def edit_distance(first: str, second: str) -> int:
    """Least number of insertions, deletions and replacements of one character that turn one text into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
