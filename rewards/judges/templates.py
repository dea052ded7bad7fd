"""What judges are asked and how their answers are read, by name.

The wordings are ours; the forms of the answers are those their models were trained to give. A checkpoint that was tuned on exact words
judges best by them: pass that text as ``wording``, with ``{prompt}`` where the caption goes.

Sources: UnifiedReward, arXiv:2503.05236; UnifiedReward-Think, arXiv:2505.03318; UnifiedReward-Flex and the win-rate use, arXiv:2508.20751;
VideoReward, arXiv:2501.13918; HPSv3, arXiv:2508.03789; VQAScore, arXiv:2404.01291.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from visalign.rewards.judges import parsers
from visalign.rewards.judges.captions import CLOSE, NOTICE, OPEN
from visalign.rewards.judges.inquiry import Read
from visalign.rewards.judges.question import Answer, Verdict
from visalign.rewards.judges.tokens import probability, share

_CAPTION = f"Caption: {OPEN}{{prompt}}{CLOSE}\n{NOTICE}"
_INSTRUCTION = f"Editing instruction: {OPEN}{{prompt}}{CLOSE}\n{NOTICE}"


@dataclass(frozen=True)
class Template:
    """A way to ask.

    Attributes:
        subject: "one" sample per question or a "pair".
        modality: what it shows; frames of a video are sent as images, a pair's first all before the second's.
        wording: the question, with ``{prompt}`` for the caption.
        read: an answer to a verdict or the reason there is none.
        max_tokens: of an answer.
        source: the prompt's first condition image is shown before the sample(s), for edits.
        top_logprobs: alternatives of the first token it reads; 0 for templates that read text.
        reminder: what a judge is told whose answer could not be read.
    """

    name: str
    subject: Literal["one", "pair"]
    modality: Literal["image", "video"]
    wording: str
    read: Read
    max_tokens: int
    source: bool = False
    top_logprobs: int = 0
    reminder: str = ""

    @property
    def version(self) -> str:
        """Name and hash of the words."""
        return f"{self.name}-{hashlib.sha256(self.wording.encode()).hexdigest()[:8]}"


def template(name: str, subject: Literal["one", "pair"], wording: str | None = None, max_tokens: int | None = None,
             top_logprobs: int | None = None) -> Template:
    """The template of that name, with other words, longer answers or fewer alternatives if given.

    Raises:
        ValueError: an unknown name, a template for the other subject, a wording without ``{prompt}`` where the caption matters, or numbers
            that the template has no use for.
    """
    known = {one.name: one for one in TEMPLATES if one.subject == subject}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        other = next((one.subject for one in TEMPLATES if one.name == name), None)
        raise ValueError(f"template '{name}' judges a {other}; use the other judge or one of {', '.join(sorted(known))}" if other else
                         f"unknown template '{name}'{hint}; known: {', '.join(sorted(known))}")
    found = known[name]
    if max_tokens is not None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens} must be at least 1")
        found = replace(found, max_tokens=max_tokens)
    if top_logprobs is not None:
        if not found.top_logprobs or top_logprobs < 2:
            raise ValueError(f"top_logprobs {top_logprobs}: template '{name}' reads " +
                             ("at least 2 alternatives" if found.top_logprobs else "words, no log-probabilities"))
        found = replace(found, top_logprobs=top_logprobs)
    if wording is None:
        return found
    if "{prompt}" in found.wording and "{prompt}" not in wording:
        raise ValueError(f"the wording for template '{name}' has no {{prompt}}: the judge would not see the caption")
    return replace(found, wording=wording)


def _text(parse: Callable[[str], Verdict | None]) -> Read:
    return lambda answer: parse(answer.text) or "parse"


def _token(measure: Callable[..., float | str], wanted: str, against: str) -> Read:
    def read(answer: Answer) -> Verdict | str:
        value = measure(answer.first_token, (wanted,), (against,))
        return value if isinstance(value, str) else Verdict(value)

    return read


def _frames(noun: str) -> str:
    return "" if noun == "image" else ("The pictures are frames of two videos in order: the first half shows Video 1, the second half "
                                       "Video 2.\n")


def _think(noun: Literal["image", "video"]) -> Template:
    third = "aesthetics" if noun == "image" else "temporal coherence"
    suffix = "" if noun == "image" else "_video"
    form = f"<answer>{noun.title()} 1 is better</answer> or <answer>{noun.title()} 2 is better</answer>"
    return Template(
        f"unified_reward_think{suffix}", "pair", noun, max_tokens=4096,
        wording=f"You are an objective evaluator of generated {noun}s. {_frames(noun)}{_CAPTION}\nReason inside <think> and </think>: "
                f"score both {noun}s from 1 to 10 on semantic consistency, {third} and authenticity, and on up to two further dimensions "
                f"that matter here, with a short reason each, and add the scores up. Then conclude with exactly one of {form}.",
        read=_text(lambda text: parsers.tagged_better(text, noun)), reminder=f"Give the conclusion alone, as {form}.")


def _flex(noun: Literal["image", "video"]) -> Template:
    name, suffix = noun.title(), "" if noun == "image" else "_video"
    return Template(
        f"unified_reward_flex{suffix}", "pair", noun, max_tokens=4096,
        wording=f"Compare {name} 1 and {name} 2, generated for one caption. {_frames(noun)}{_CAPTION}\nJudge three categories in this "
                "order: A. semantic alignment, B. quality and realism, C. aesthetics and composition. Choose 3 to 5 dimensions for each "
                f"that tell these two apart; the scores of {name} 1 and {name} 2 in a dimension sum to 10. Answer with one JSON object:\n"
                '{"categories": [{"name": ..., "dims": [{"name": ..., "reason_1": ..., "reason_2": ..., "score_1": ..., "score_2": ...}], '
                f'"cat_reason": ..., "cat_winner": "{name} 1" or "{name} 2"}}], "reason": ..., "winner": "{name} 1" or "{name} 2"}}',
        read=_text(lambda text: parsers.categories(text, noun, overall_weight=0.3, category_weights=(1.0, 0.7, 0.7))),
        reminder="Repeat the whole answer as one valid JSON object and nothing else.")


def _axes(name: str, modality: Literal["image", "video"], axes: tuple[str, ...], meaning: str, caption: str = _CAPTION) -> Template:
    form = "\n".join(f"{axis} Score (1-5): x" for axis in axes)
    return Template(name, "one", modality, max_tokens=512,
                    wording=f"Rate the generated {modality} from 1 to 5 (fractions are allowed) on each axis: {meaning}\n{caption}\n"
                            f"Answer in this form:\n{form}",
                    read=_text(lambda text: parsers.axis_scores(text, axes, 1, 5)), reminder=f"Give the scores alone, like this:\n{form}")


_PAIR_FORM = '"Image 1 is better.", "Image 2 is better." or "Both images are equally good."'
_VQA = f"{_CAPTION}\nDoes the image show what the caption says? Answer yes or no."
_EDIT_FORM = '{"reasoning": "...", "score": [a, b]}'

TEMPLATES: tuple[Template, ...] = (
    Template("verdict_token", "pair", "image", max_tokens=1, top_logprobs=20, read=_token(share, "1", "2"),
             wording=f"Two images, Image 1 and Image 2, were generated for one caption.\n{_CAPTION}\nWhich one fits the caption better and "
                     "looks better? Answer with the digit 1 or 2 and nothing else."),
    Template("unified_reward_pair", "pair", "image", max_tokens=512,
             wording=f"You are given a caption and two images generated from it. Compare them by their alignment with it (objects, "
                     f"relations, attributes) and by their quality (clarity, detail, colours, appeal).\n{_CAPTION}\nConclude with "
                     f"{_PAIR_FORM}",
             read=_text(lambda text: parsers.better(text, "image")), reminder=f"Give the conclusion alone: {_PAIR_FORM}"),
    Template("unified_reward_pair_score", "pair", "image", max_tokens=512,
             wording="You are given a caption and two images generated from it. Share one point between them on each axis: alignment with "
                     f"the caption, coherence (no glitches or distortions) and style (appeal, whatever the caption says).\n{_CAPTION}\n"
                     "Answer in this form, where the two numbers of an axis add up to 1:\n"
                     + "\n".join(f"{axis} Score:\n Image 1: x\n Image 2: y" for axis in ("Alignment", "Coherence", "Style")),
             read=_text(lambda text: parsers.axis_shares(text, ("Alignment", "Coherence", "Style"), "image")),
             reminder="Give the scores alone, in the form asked for."),
    _think("image"), _think("video"), _flex("image"), _flex("video"),
    Template("unified_reward_edit_pair", "pair", "image", source=True, max_tokens=4096,
             wording="The first image is the source, the second is edited image 1, the third is edited image 2. Compare them by how "
                     f"faithfully they carry out the instruction and nothing else, and by their visual integrity.\n{_INSTRUCTION}\n"
                     'Conclude with "Edited image 1 is better" or "Edited image 2 is better".',
             read=_text(lambda text: parsers.better(text, "edited image")),
             reminder='Give the conclusion alone: "Edited image 1 is better" or "Edited image 2 is better".'),
    Template("unified_reward_edit_pair_score", "pair", "image", source=True, max_tokens=512,
             wording="The first image is the source, the second is edited image 1, the third is edited image 2. Score each edit by how "
                     "faithfully it carries out the instruction and nothing else, and by its visual integrity. Higher is better; serious "
                     f"failures are negative.\n{_INSTRUCTION}\nAnswer in this form:\nEdited image 1: x\nEdited image 2: y",
             read=_text(lambda text: parsers.signed_scores(text, "image")),
             reminder="Give the two scores alone:\nEdited image 1: x\nEdited image 2: y"),
    Template("unified_reward_point", "one", "image", max_tokens=512,
             wording="You are given a caption and an image generated from it. Rate the image from 1 to 5 by its alignment with the caption "
                     f"and its overall quality.\n{_CAPTION}\nConclude with a line Final Score: x",
             read=_text(lambda text: parsers.final_score(text, 1, 5)), reminder="Give one line alone: Final Score: x, from 1 to 5."),
    Template("unified_reward_point_video", "one", "video", max_tokens=512,
             wording="The images are frames of a video generated from a caption, in order. Rate visual quality, temporal consistency, "
                     "dynamic degree, text alignment and factual consistency from 1 to 4, one line each (axis: n), then the video as a "
                     f"whole from 1 to 10.\n{_CAPTION}\nConclude with a line Final Score: x",
             read=_text(lambda text: parsers.final_score(text, 1, 10)), reminder="Give one line alone: Final Score: x, from 1 to 10."),
    _axes("unified_reward_acs", "image", ("Alignment", "Coherence", "Style"),
          "Alignment (does the content match the caption), Coherence (is it free of glitches and distortions), Style (is it appealing, "
          "whatever the caption says)."),
    _axes("unified_reward_aps_video", "video", ("Alignment", "Physics", "Style"),
          "Alignment (does the content match the caption), Physics (do things move as they would), Style (is it appealing, whatever the "
          "caption says). The images are the video's frames in order."),
    _axes("video_axes", "video", ("Visual Quality", "Motion Quality", "Text Alignment"),
          "Visual Quality and Motion Quality, which have nothing to do with the caption, and Text Alignment, which has. The images are the "
          "video's frames in order."),
    _axes("human_preference", "image", ("Visual Quality", "Text Alignment"),
          "Visual Quality (reasonable, clear, detailed, appealing, safe) and Text Alignment (subject, style, context, attributes)."),
    Template("unified_reward_edit_quality", "one", "image", max_tokens=512,
             wording="You are given one edited image. Rate it from 0 to 25 on naturalness (a: the scene looks natural) and on freedom from "
                     f"artifacts (b).\nAnswer with one JSON object: {_EDIT_FORM}",
             read=_text(lambda text: parsers.listed_scores(text, ("naturalness", "artifacts"), 25, "mean")),
             reminder=f"Give the JSON object alone: {_EDIT_FORM}"),
    Template("unified_reward_edit_instruction", "one", "image", source=True, max_tokens=512,
             wording="The first image is the source, the second is an edit of it. Rate it from 0 to 25 on success (a: the instruction "
                     f"was carried out) and on restraint (b: nothing else was changed).\n{_INSTRUCTION}\nAnswer with one JSON object: "
                     f"{_EDIT_FORM}",
             read=_text(lambda text: parsers.listed_scores(text, ("success", "restraint"), 25, "geometric")),
             reminder=f"Give the JSON object alone: {_EDIT_FORM}"),
    # Two different numbers: P(yes) / (P(yes) + P(no)), and P(yes), which is VQAScore's.
    Template("vqa", "one", "image", max_tokens=1, top_logprobs=20, read=_token(share, "yes", "no"), wording=_VQA),
    Template("vqascore", "one", "image", max_tokens=1, top_logprobs=20, read=_token(probability, "yes", "no"), wording=_VQA),
)
