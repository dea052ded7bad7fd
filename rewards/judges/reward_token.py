"""A language model with a reward head: the hidden states at special tokens go through a small network (HPSv3, VideoReward).

    raw = sum_k (head(h_k)[r_k] - mean_k) / std_k        h_k: last hidden state at the k-th token, r_k: 0, or k for "diagonal"

Attention is causal, so an axis whose token comes before the caption cannot depend on the caption: VideoReward's visual and motion quality
do not. Its head has one output for all axes (readout "first") or one for each ("diagonal"), the means and stds of its axes stand in its
model_config.json, and it was trained on videos at 2 frames per second: ``as_video: true, fps: 2``.

Sources: HPSv3, arXiv:2508.03789 (one token; the head gives mu and sigma, of which mu is the score); VideoReward, arXiv:2501.13918 (one
token per axis).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from visalign.media import evenly_spaced
from visalign.protocols import RewardSpec
from visalign.rewards.dual_encoder import default_device
from visalign.rewards.frames import at_rate
from visalign.rewards.judges.captions import fill
from visalign.rewards.judges.images import picture_of
from visalign.rewards.judges.inquiry import scores_of
from visalign.rewards.judges.question import Verdict
from visalign.rewards.pretrained import pretrained, pretrained_model
from visalign.types import Media, Prompt, Scores


class RewardTokenScore:
    """Scores images, or videos as frames, by a regression head in this process, in float32 after the language model."""

    spec = RewardSpec(name="reward_token", modality=frozenset({"image", "video"}), requires=frozenset({"prompt"}))

    def __init__(self, folder: str, head: str, tokens: Mapping[str, str], wording: str, *, readout: Literal["first", "diagonal"] = "first",
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None, modality: Literal["image", "video"] = "image",
                 as_video: bool = False, num_frames: int = 8, fps: float | None = None, device: str | None = None, dtype: str = "auto",
                 name: str = "reward_token") -> None:
        """
        Args:
            folder: the language model with its adapters merged, its processor with the special tokens, and a chat template.
            head: safetensors file with the head's tensors under ``rm_head.``: one linear layer, or several with ReLU between them.
            tokens: axis -> special token, in the order of the head's columns, e.g. {"preference": "<|Reward|>"}.
            wording: the text after the picture(s) with every token once and ``{prompt}``. Heads are fitted to exact words: take those of
                the checkpoint.
            readout: "first" takes the head's first output at every token, "diagonal" the k-th at the k-th.
            mean, std: per axis, of the z-score; ``None`` leaves the head's scale.
            modality: what is scored.
            as_video: a video is one video to the model, through its processor's video part, instead of a row of pictures.
            num_frames: of a video, evenly spaced.
            fps: so many frames per second instead, an even number of at least 4.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
            dtype: of the language model, "auto" as stored.
        Raises:
            ValueError: a token is not one entry of the vocabulary or not once in the wording, the head does not fit, or a processor without
                a video part.
        """
        from transformers import AutoModel, AutoProcessor

        self.device = default_device(device)
        owner = f"reward '{name}'"
        self._processor = pretrained(AutoProcessor, folder, owner=owner)
        self._network = pretrained_model(AutoModel, folder, owner=owner, dtype=dtype).to(self.device)
        self.wording, self.readout = wording, readout
        self.as_video, self.num_frames, self.fps = as_video, num_frames, fps
        if as_video and modality != "video":
            raise ValueError("as_video shows videos as such; set modality: video")
        if as_video and getattr(self._processor, "video_processor", None) is None:
            raise ValueError(f"{owner}: the processor in {folder} has no part for videos; leave as_video out to show frames as pictures")
        if as_video:
            self._processor.video_processor.do_sample_frames = False  # they are chosen here
        self.axes = tuple(tokens)
        self._token_ids = [_token_id(self._processor.tokenizer, token, wording) for token in tokens.values()]
        if "{prompt}" not in wording:
            raise ValueError("the wording has no {prompt}: scores would not depend on the caption")
        self._layers = [(weight.to(self.device), bias.to(self.device)) for weight, bias in _layers(head)]
        columns, needed = len(self._layers[-1][0]), len(tokens) if readout == "diagonal" else 1
        if columns < needed:
            raise ValueError(f"{head}: the head has {columns} outputs, {len(tokens)} tokens read diagonally need {needed}")
        self.mean, self.std = list(mean or [0.0] * len(tokens)), list(std or [1.0] * len(tokens))
        if len(self.mean) != len(tokens) or len(self.std) != len(tokens) or not all(value > 0 for value in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} need one number for each of {', '.join(tokens)}, std above 0")
        self.spec = replace(self.spec, name=name, modality=frozenset({modality}), model_ids=(folder, head),
                            version=f"{readout}-{'video' if as_video else 'pictures'}-{num_frames if fps is None else f'{fps:g}fps'}")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per sample, its axes as details."""
        return scores_of([self._verdict(self._pictures(sample), prompt.text) for sample, prompt in zip(media, prompts, strict=True)])

    def _pictures(self, sample: Media) -> list[Image.Image]:
        if sample.kind == "image":
            return [picture_of(sample.data)]
        if self.fps is None:
            rows = evenly_spaced(len(sample.data), self.num_frames)
        elif sample.rate:
            rows = at_rate(len(sample.data), sample.rate, self.fps)
        else:
            raise ValueError(f"reward '{self.spec.name}': a video without a rate; set Media.rate to its frames per second")
        return [picture_of(frame) for frame in sample.data[rows]]

    def _verdict(self, pictures: Sequence[Image.Image], caption: str) -> Verdict:
        content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in pictures]
        if self.as_video:
            content = [{"type": "video", "video": list(pictures)}]
        content.append({"type": "text", "text": fill(self.wording, caption)})
        inputs = self._processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True,
                                                     return_tensors="pt").to(self.device, self._network.dtype)
        tokens = inputs["input_ids"][0]
        places = [(tokens == token).nonzero() for token in self._token_ids]
        if not all(len(place) == 1 for place in places):  # as_data breaks special tokens in captions: it is the chat template
            raise ValueError(f"reward '{self.spec.name}': the chat template makes {[len(place) for place in places]} of the tokens of "
                             f"{', '.join(self.axes)}, expected one of each; use the template that was saved with the checkpoint")
        hidden = self._network(**inputs).last_hidden_state[0]
        values = self._head(hidden[torch.cat(places)[:, 0]].float())
        read = values.diagonal() if self.readout == "diagonal" else values[:, 0]
        scores = [(value - mean) / std for value, mean, std in zip(read.tolist(), self.mean, self.std, strict=True)]
        return Verdict(sum(scores), dict(zip(self.axes, scores, strict=True)))

    def _head(self, hidden: Tensor) -> Tensor:
        for index, (weight, bias) in enumerate(self._layers):
            hidden = (hidden.relu() if index else hidden) @ weight.T + bias
        return hidden


def _token_id(tokenizer: Any, token: str, wording: str) -> int:
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"'{token}' is no token of the model's vocabulary; use the tokenizer that was saved with the checkpoint")
    if wording.count(token) != 1:
        raise ValueError(f"the wording has '{token}' {wording.count(token)} times; it must be there once")
    return int(ids[0])


def _layers(head: str) -> list[tuple[Tensor, Tensor]]:
    """Weights (out, in) and biases (out,) in order, float32."""
    if not Path(head).is_file():
        raise ValueError(f"no file {head}; head must be a safetensors file with rm_head.* tensors")
    tensors = {name.rpartition("rm_head.")[2]: tensor.float() for name, tensor in load_file(head).items() if "rm_head." in name}
    names = sorted((name for name in tensors if name.endswith("weight")), key=lambda name: [int(one) for one in re.findall(r"\d+", name)])
    if not names:
        raise ValueError(f"{head} has no rm_head.*weight")
    found = [(tensors[name], tensors.get(name.removesuffix("weight") + "bias", torch.zeros(len(tensors[name])))) for name in names]
    for (before, _), (after, _) in pairwise(found):
        if after.shape[1] != before.shape[0]:
            raise ValueError(f"{head}: layers of {tuple(before.shape)} and {tuple(after.shape)} do not follow one another")
    return found
