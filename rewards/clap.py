"""CLAP score: cosine of audio and text embedding, from any ``ClapModel`` of transformers.

    raw = <audio / |audio|, text / |text|>     in [-1, 1], typically -0.1 to 0.7; never multiplied by the logit scale
    audio = sum_w length_w window_w            unit embeddings of the windows, weighted by how much of each is sound

The audio is averaged over channels, resampled (soxr) and cut into windows of the model's own length, so nothing is cropped at
random: the feature extractors of transformers crop what is longer than a window, and mark a random clip as longer for the models
with feature fusion. Everything is float32. The windows' embeddings are also features for distribution rewards
(``encoders.Encoder``): ``encoder: {reward: clap, model: ...}``.

Source: CLAP, arXiv:2211.06687.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

from visalign.maths.loudness import rms_dbfs
from visalign.protocols import RewardSpec
from visalign.rewards.dual_encoder import default_device
from visalign.rewards.licences import licence_of
from visalign.rewards.pretrained import pretrained, pretrained_model
from visalign.rewards.weights import weights_hash
from visalign.types import Media, MediaKind, Prompt, Scores

MODEL = "laion/larger_clap_general"


class ClapScore:
    """Prompt-audio agreement of one CLAP model."""

    spec = RewardSpec(name="clap", modality=frozenset({"audio"}), requires=frozenset({"prompt"}), raw_range=(-1.0, 1.0),
                      model_ids=(MODEL,), licence=licence_of(MODEL))

    def __init__(self, model: str = MODEL, *, hop_seconds: float | None = None,
                 padding: Literal["repeatpad", "repeat"] = "repeatpad", silence: float = -60.0, silence_value: float | None = None,
                 batch_size: int = 16, device: str | torch.device | None = None, cache_dir: str | None = None,
                 name: str = "clap") -> None:
        """
        Args:
            model: a folder with weights, feature extractor and tokenizer, or a hub id.
            hop_seconds: from one window to the next; ``None`` is the window's length, 10 s for the published models.
            padding: what fills a window that is longer than the sound left. "repeatpad", as in training, repeats it as often as
                it fits and ends in silence (7 s get 3 s of it); "repeat" fills the window.
            silence: level in dBFS below which audio is silent: its embedding would be arbitrary.
            silence_value: the score of silent audio; ``None`` makes it invalid ("silent").
            batch_size: windows per forward pass; does not change the scores.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
        Raises:
            ValueError: a value out of range, no soxr, a model that is not found or incomplete, or a tokenizer that turns different texts
                into the same tokens.
        """
        if padding not in ("repeatpad", "repeat"):
            raise ValueError(f"padding '{padding}' is neither 'repeatpad' nor 'repeat'")
        if silence_value is not None and not -1 <= silence_value <= 1:
            raise ValueError(f"silence_value {silence_value} is no cosine; it must lie in [-1, 1]")
        try:
            import soxr
        except ImportError:
            raise ValueError(f"reward '{name}' resamples with soxr, which is not installed: pip install 'visalign[audio]'") from None
        self._resample = soxr.resample
        self.device = default_device(device)
        owner = f"reward '{name}'"
        self.model = pretrained_model(ClapModel, model, owner=owner, cache_dir=cache_dir).to(self.device)
        self.extractor = pretrained(AutoFeatureExtractor, model, owner=owner, cache_dir=cache_dir)
        self.tokenizer = pretrained(AutoTokenizer, model, owner=owner, cache_dir=cache_dir)
        text_config: Any = self.model.config.text_config
        _check_tokenizer(self.tokenizer, text_config.vocab_size, model)
        self.max_tokens: int = text_config.max_position_embeddings - 2  # RoBERTa counts positions from 2

        self.rate: int = self.extractor.sampling_rate
        self.window: int = self.extractor.nb_max_samples
        self.hop = self.window if hop_seconds is None else round(hop_seconds * self.rate)
        if not 0 < self.hop <= self.window:
            raise ValueError(f"hop_seconds {hop_seconds} must lie above 0 and not beyond a window of {self.window / self.rate:g} s")
        self.padding, self.silence, self.silence_value, self.batch_size = padding, silence, silence_value, batch_size
        self.name = f"clap:{model}"
        self.modality: frozenset[MediaKind] = frozenset({"audio"})
        self.spec = replace(self.spec, name=name, model_ids=(model,), licence=licence_of(model),
                            version=f"hop{self.hop / self.rate:g}-{padding}-silence{silence:g}")

    @cached_property
    def hash(self) -> str:
        """Of the weights and of how audio is cut into windows."""
        return weights_hash(f"{self.extractor.to_json_string()} {self.hop} {self.padding}", self.model.state_dict())

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """
        Raises:
            ValueError: a text is longer than the model reads.
        """
        for row, prompt in enumerate(prompts):
            length = len(self.tokenizer(prompt.text)["input_ids"])
            if length > self.max_tokens:
                raise ValueError(f"reward '{self.spec.name}', prompt {row} ({prompt.text[:60]!r}): {length} tokens, and the model reads "
                                 f"{self.max_tokens}; shorten it")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Cosine of each sample with its own prompt; each distinct prompt is encoded once."""
        self.check_prompts(prompts)
        levels = [rms_dbfs(sample.data.mean(dim=0)) for sample in media]
        heard = [row for row, level in enumerate(levels) if level >= self.silence]
        answers: dict[int, float] = {}
        if heard:
            audio = self.embed_audio([media[row] for row in heard])
            text = self.embed_texts([prompts[row].text for row in heard])
            answers = dict(zip(heard, (audio * text).sum(dim=1).tolist(), strict=True))
        values = [math.nan if math.isnan(level) else answers.get(row, self.silence_value) for row, level in enumerate(levels)]
        return Scores.from_values(values, details={"rms_dbfs": torch.tensor(levels, dtype=torch.float32)}, reason="silent")

    def embed_audio(self, media: Sequence[Media]) -> Tensor:
        """Unit embedding of each sample, its windows weighted by how much of each is sound, (n, d); gradients to the weights."""
        return torch.stack([normalize((windows * lengths[:, None]).sum(dim=0), dim=0) for windows, lengths in self._embed(media)])

    @torch.no_grad()
    def encode(self, media: Sequence[Media]) -> list[Tensor]:
        """Unit embeddings of each sample's windows, float64 (windows, d) on the CPU: ``encoders.Encoder``."""
        return [windows.double().cpu() for windows, _ in self._embed(media)]

    def _embed(self, media: Sequence[Media]) -> list[tuple[Tensor, Tensor]]:
        """Per sample its windows' unit embeddings (k, d) and the share of each window that is sound, (k,)."""
        cut = [self._windows(sample) for sample in media]
        flat = [window for windows in cut for window in windows]
        rows = [self._encode_audio(flat[i:i + self.batch_size]) for i in range(0, len(flat), self.batch_size)]
        lengths = torch.tensor([len(window) / self.window for window in flat], device=self.device)
        sizes = [len(windows) for windows in cut]
        return list(zip(torch.cat(rows).split(sizes), lengths.split(sizes), strict=True))

    def _windows(self, sample: Media) -> list[Any]:
        """Mono windows at the model's rate, at most ``window`` long, one every ``hop`` until the end is covered."""
        if not sample.rate:
            raise ValueError(f"reward '{self.spec.name}': audio without a rate; set Media.rate to its samples per second")
        mono = sample.data.float().mean(dim=0).cpu().numpy()
        if sample.rate != self.rate:
            mono = self._resample(mono, sample.rate, self.rate, quality="HQ")
        num_windows = 1 + max(0, math.ceil((len(mono) - self.window) / self.hop))
        return [mono[k * self.hop:k * self.hop + self.window] for k in range(num_windows)]

    def _encode_audio(self, windows: Sequence[Any]) -> Tensor:
        fused = bool(self.model.config.audio_config.enable_fusion)
        features = self.extractor(list(windows), truncation="fusion" if fused else "rand_trunc", padding=self.padding,
                                  sampling_rate=self.rate, return_tensors="pt")["input_features"]
        never = torch.zeros(len(windows), 1, dtype=torch.bool, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            pooled = self.model.audio_model(input_features=features.float().to(self.device), is_longer=never).pooler_output
            return normalize(self.model.audio_projection(pooled), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings, one row per text, each distinct text encoded once; gradients to the weights."""
        row = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        tokens = self.tokenizer(list(row), padding=True, return_tensors="pt").to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            pooled = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
            distinct = normalize(self.model.text_projection(pooled), dim=-1)
        return distinct[torch.tensor([row[text] for text in texts], device=self.device)]


def _check_tokenizer(tokenizer: Any, vocab_size: int, model: str) -> None:
    """Offline, a tokenizer may load without its vocabulary (2 to 5 entries, no error) and map every text to the same tokens."""
    probes = tokenizer(["a dog barks", "rain on a tin roof"])["input_ids"]
    if len(tokenizer) < 32 or probes[0] == probes[1]:
        raise ValueError(f"the tokenizer of '{model}' is empty ({len(tokenizer)} entries): its files were not found; put the "
                         "vocabulary files beside the weights or connect to the hub once")
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer of '{model}' has {len(tokenizer)} entries, its model {vocab_size}; they do not belong together")
