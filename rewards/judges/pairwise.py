"""Two samples before one judge, by one of these templates:

    verdict_token                                          the probabilities of "1" and "2" as the answer's first token
    unified_reward_pair, unified_reward_pair_score         UnifiedReward: a sentence, with ties; shares of a point by axis
    unified_reward_think, unified_reward_think_video       reasoning, then a verdict without ties
    unified_reward_flex, unified_reward_flex_video         JSON with a winner by category
    unified_reward_edit_pair, unified_reward_edit_pair_score     edits of the prompt's first condition image

Sources: UnifiedReward, arXiv:2503.05236; its Think and Flex forms and win rates over them, arXiv:2505.03318, arXiv:2508.20751.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from visalign.protocols import RewardSpec
from visalign.rewards.judges.asking import ask_about, check_source, sources
from visalign.rewards.judges.backends import backend_from
from visalign.rewards.judges.images import files
from visalign.rewards.judges.inquiry import Inquiry, Reading
from visalign.rewards.judges.question import Backend, Verdict
from visalign.rewards.judges.templates import template as named
from visalign.rewards.judges.tokens import log_odds
from visalign.types import Comparisons, Media, Prompt


class PairwiseJudge:
    """``P(first is better)`` as a vision-language model says it, 0.5 for a tie; ``WinRate`` makes a reward of it.

    Templates that read words answer in the order given, and ``WinRate`` asks both orders. For those that read log-probabilities
    (``verdict_token``) ``both_orders`` averages the log-odds, which cancels a position bias that is added to them exactly; averaging
    probabilities does not:

        p = sigmoid((log_odds(P(1 | first, second)) - log_odds(P(1 | second, first))) / 2)

    Both directions of a pair share their two questions, so ``WinRate`` around it asks nothing twice.
    """

    spec = RewardSpec(name="pairwise_judge", arity="pairwise", modality=frozenset({"image", "video"}), requires=frozenset({"prompt"}),
                      raw_range=(0.0, 1.0))

    def __init__(self, backend: Backend | Mapping[str, Any], template: str = "unified_reward_pair", *, wording: str | None = None,
                 max_tokens: int | None = None, top_logprobs: int | None = None, both_orders: bool = False, num_frames: int = 8,
                 max_side: int | None = None, repairs: int = 1, rechecks: int = 2, name: str = "pairwise_judge") -> None:
        """
        Args:
            backend: {base_urls: ..., model: ...} (see ``judges.server:ChatServer``) or {folder: ...} (``judges.local:LocalModel``).
            template: how to ask and read, see ``templates``.
            wording: other words for the template, with ``{prompt}``.
            max_tokens, top_logprobs: of an answer, other than the template's; some servers give 5 alternatives at most.
            both_orders: average the log-odds of both orders; for templates that read log-probabilities.
            num_frames: shown of each video.
            max_side: pictures are reduced to it; ``None`` sends them as they are.
            repairs: how often an unreadable answer is asked about again.
            rechecks: questions of a call that are asked twice, past any cache, to see whether the judge repeats itself.
        Raises:
            ValueError: a parameter is wrong.
        """
        self.template = named(template, "pair", wording, max_tokens, top_logprobs)
        if both_orders and not self.template.top_logprobs:
            raise ValueError(f"both_orders averages log-odds, which template '{template}' does not read; use template verdict_token, or "
                             "leave the swap to win_rate")
        self.inquiry = Inquiry(backend_from(backend), repairs, rechecks)
        self.both_orders = both_orders
        self.num_frames, self.max_side = num_frames, max_side
        self._inconsistency: dict[str, float] = {}
        self.spec = replace(
            self.spec, name=name, modality=frozenset({self.template.modality}), model_ids=(self.inquiry.backend.model,),
            version=f"{self.template.version}{'-both' if both_orders else ''}")

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without the source image that an edit is judged against."""
        check_source(self.template, prompts, self.spec.name)

    def telemetry(self) -> dict[str, float]:
        """Of the latest ``compare``: questions, valid rate, reasons, latency, and how far the two orders contradicted each other."""
        return {**self.inquiry.telemetry, **self._inconsistency}

    def compare(self, first: Sequence[Media], second: Sequence[Media], prompts: Sequence[Prompt]) -> Comparisons:
        """One answer per pair, invalid with its reason where there is none.

        Raises:
            ValueError: the back end's set-up is wrong, or a prompt lacks its source image.
        """
        self.check_prompts(prompts)
        distinct = {id(sample): sample for sample in (*first, *second)}
        shown = {key: files(sample, self.num_frames, self.max_side) for key, sample in distinct.items()}
        pairs = [(shown[id(a)], shown[id(b)]) for a, b in zip(first, second, strict=True)]
        before = sources(self.template, prompts, self.max_side)
        swapped = [(b, a) for a, b in pairs] if self.both_orders else []
        images = [(*source, *a, *b) for source, (a, b) in zip([*before, *(before if swapped else ())], [*pairs, *swapped], strict=True)]
        readings = ask_about(self.inquiry, self.template, images, [*prompts, *(prompts if swapped else ())])
        if swapped:
            forth, back = readings[:len(pairs)], readings[len(pairs):]
            readings = [_averaged(a, b) for a, b in zip(forth, back, strict=True)]
            gaps = [abs(a.value + b.value - 1) for a, b in zip(forth, back, strict=True)
                    if isinstance(a, Verdict) and isinstance(b, Verdict)]
            self._inconsistency = {"swap_inconsistency": sum(gaps) / len(gaps)} if gaps else {}
        values = [math.nan if isinstance(reading, str) else reading.value for reading in readings]
        return Comparisons(prob_first=torch.tensor(values, dtype=torch.float32),
                           valid=torch.tensor([not isinstance(reading, str) for reading in readings], dtype=torch.bool),
                           reasons=tuple(reading if isinstance(reading, str) else None for reading in readings))


def _averaged(forth: Reading, back: Reading) -> Reading:
    """Mean of the log-odds of both orders; half a swap is the bias itself, so both must be there."""
    if isinstance(forth, str) or isinstance(back, str):
        return forth if isinstance(forth, str) else back
    return Verdict(1 / (1 + math.exp((log_odds(back.value) - log_odds(forth.value)) / 2)))
