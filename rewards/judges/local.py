"""A vision-language model in this process, any that transformers loads as image-text-to-text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from visalign.rewards.dual_encoder import default_device
from visalign.rewards.judges.question import Answer, Question, Reply
from visalign.rewards.pretrained import pretrained, pretrained_model


class LocalModel:
    """Answers one question at a time by greedy decoding; log-probabilities are the model's own, before any processing."""

    def __init__(self, folder: str, *, device: str | None = None, dtype: str = "auto") -> None:
        """
        Args:
            folder: with weights, processor and chat template, or a hub id.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
            dtype: "auto" as stored, or a torch name such as "bfloat16".
        Raises:
            ValueError: the model is not found, its processor has no chat template, or weights are missing.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = folder
        self.device = default_device(device)
        self._processor = pretrained(AutoProcessor, folder, owner="judge")
        if not getattr(self._processor, "chat_template", None):
            raise ValueError(f"the processor of '{folder}' has no chat template; use an instruction-tuned model or put "
                             "chat_template.jinja into its folder")
        self._network = pretrained_model(AutoModelForImageTextToText, folder, owner="judge", dtype=dtype).to(self.device)

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One answer per question, none of which can fail but for want of memory."""
        return [self._reply(question) for question in questions]

    def ask_afresh(self, questions: Sequence[Question]) -> list[Reply]:
        """The same: nothing is remembered."""
        return self.ask(questions)

    @torch.no_grad()
    def _reply(self, question: Question) -> Reply:
        started = time.monotonic()
        inputs = self._processor.apply_chat_template(self._messages(question), add_generation_prompt=True, tokenize=True,
                                                     return_dict=True, return_tensors="pt").to(self.device, self._network.dtype)
        out = self._network.generate(**inputs, do_sample=False, max_new_tokens=question.max_tokens, output_logits=True,
                                     return_dict_in_generate=True)
        tokens = out.sequences[0, inputs["input_ids"].shape[1]:]
        first = self._alternatives(out.logits[0][0], question.top_logprobs) if question.top_logprobs else None
        text = self._processor.decode(tokens, skip_special_tokens=True).strip()
        cut = len(tokens) >= question.max_tokens and int(tokens[-1]) not in self._ends()
        return Reply(answer=Answer(text=text, first_token=first, truncated=cut, refused=not text and not cut), attempts=1,
                     seconds=time.monotonic() - started)

    def _messages(self, question: Question) -> list[dict[str, Any]]:
        pictures = [{"type": "image", "image": Image.open(BytesIO(image)).convert("RGB")} for image in question.images]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*pictures, {"type": "text", "text": question.text}]}]
        for answer, remark in question.exchanges:
            messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]},
                         {"role": "user", "content": [{"type": "text", "text": remark}]}]
        return messages

    def _alternatives(self, logits: torch.Tensor, count: int) -> dict[str, float]:
        values, rows = torch.log_softmax(logits.float(), dim=-1).topk(min(count, len(logits)))
        found: dict[str, float] = {}
        for value, row in zip(values.tolist(), rows.tolist(), strict=True):
            word = self._processor.decode([row])
            found[word] = max(value, found.get(word, value))
        return found

    def _ends(self) -> set[int]:
        ends = self._network.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

