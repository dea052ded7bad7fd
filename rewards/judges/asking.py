"""Questions about samples: a template's words, a prompt's caption and source image, and the samples' pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visalign.media import load_media
from visalign.rewards.judges.captions import fill
from visalign.rewards.judges.images import png
from visalign.rewards.judges.inquiry import Inquiry, Reading
from visalign.rewards.judges.question import Question
from visalign.rewards.judges.templates import Template
from visalign.types import Prompt


def ask_about(inquiry: Inquiry, template: Template, images: Sequence[tuple[bytes, ...]], prompts: Sequence[Prompt]) -> list[Reading]:
    """One reading per row of pictures and its prompt."""
    questions = [Question(text=fill(template.wording, prompt.text), images=shown, max_tokens=template.max_tokens,
                          top_logprobs=template.top_logprobs) for shown, prompt in zip(images, prompts, strict=True)]
    return inquiry.ask(questions, template.read, template.reminder)


def check_source(template: Template, prompts: Sequence[Prompt], name: str) -> None:
    """Raise ValueError, naming the row, for a prompt without the source image that the template shows."""
    for row, prompt in enumerate(prompts):
        if template.source and not prompt.images:
            raise ValueError(f"reward '{name}', prompt {row} ({prompt.text[:60]!r}): template '{template.name}' shows the source image, "
                             'and the prompt has none; add "images": ["SOURCE.png"] to its line in the prompt file')


def sources(template: Template, prompts: Sequence[Prompt], max_side: int | None) -> list[tuple[bytes, ...]]:
    """Per prompt its source image, or nothing where the template shows none; each file is read once."""
    if not template.source:
        return [()] * len(prompts)
    read = {path: png(load_media(Path(path)).data, max_side) for path in dict.fromkeys(prompt.images[0] for prompt in prompts)}
    return [(read[prompt.images[0]],) for prompt in prompts]
