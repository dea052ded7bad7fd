"""Any audio model of transformers as an encoder, by its path: wav2vec 2.0, HuBERT, WavLM, AST, Whisper's encoder, EnCodec, ...

    window    the mean over time of one layer's hidden states (EnCodec: of the encoder's output), one row per window
    frame     every time step is a row, as FAD is computed on EnCodec or MERT features

Sound is averaged over channels, resampled (soxr) to the rate that the model's feature extractor declares, and cut into windows of equal
length that cover it to its end, the last one moved back where it would be shorter. Nothing is padded but what the extractor itself
fills up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor

from visalign.rewards.dual_encoder import default_device
from visalign.rewards.encoders import by_shape
from visalign.rewards.encoders.pretrained import load_model
from visalign.rewards.pretrained import pretrained
from visalign.rewards.weights import weights_hash
from visalign.types import Media, MediaKind


class AudioEncoder:
    """Hidden states of one layer, float32 inside."""

    def __init__(self, path: str, layer: int = -1, *, rows: Literal["window", "frame"] = "window", window_seconds: float | None = None,
                 rate: int | None = None, batch_size: int = 16, device: str | torch.device | None = None,
                 cache_dir: str | None = None) -> None:
        """
        Args:
            path: a folder with weights and ``preprocessor_config.json``, or a hub id.
            layer: which hidden states, 0 before the first layer, -1 after the last one; EnCodec has -1 only.
            rows: see the module.
            window_seconds: ``None`` is what the extractor fills (30 s for Whisper), 10 s where it takes any length.
            rate: samples per second the model was trained on, where its extractor does not say; otherwise they must agree.
            batch_size: windows per forward pass.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
        Raises:
            ValueError: no soxr, no such layer, no rate or two, or windows that the extractor would cut.
        """
        try:
            import soxr
        except ImportError:
            raise ValueError("audio encoders resample with soxr, which is not installed: pip install 'visalign[audio]'") from None
        if rows not in ("window", "frame"):
            raise ValueError(f"rows '{rows}' is neither 'window' nor 'frame'")
        self._resample = soxr.resample
        self.name = f"hf_audio:{path}:{layer}:{rows}"
        self.modality: frozenset[MediaKind] = frozenset({"audio"})
        self.layer, self.rows, self.batch_size, self.device = layer, rows, batch_size, default_device(device)
        model = load_model(path, unused=("decoder.", "quantizer.", "masked_spec_embed"), cache_dir=cache_dir)
        self.codec = model.config.model_type == "encodec"
        self.model: Any = model.encoder if self.codec else model.get_encoder() if model.config.is_encoder_decoder else model
        self.model.to(self.device)
        self.channels: int = model.config.audio_channels if self.codec else 1
        self.extractor: Any = pretrained(AutoFeatureExtractor, path, owner="encoder", cache_dir=cache_dir)
        self.rate = self._rate(rate)
        filled = getattr(self.extractor, "n_samples", None)
        self.window = filled if window_seconds is None and filled else round((10 if window_seconds is None else window_seconds) * self.rate)
        self._check()
        declared = f"{type(self.model).__name__} {layer} {rows} {self.window} {self.rate} {self.extractor.to_json_string()}"
        self.hash = weights_hash(declared, self.model.state_dict())

    @torch.no_grad()
    def encode(self, media: Sequence[Media]) -> list[Tensor]:
        """Rows of each sample, float64 (k, d) on the CPU."""
        cut = [self._windows(sample) for sample in media]
        rows = by_shape([self._inputs(window) for windows in cut for window in windows], self.batch_size, self._states)
        ends = list(itertools.accumulate((len(windows) for windows in cut), initial=0))
        return [torch.cat(rows[start:end]).double().cpu() for start, end in itertools.pairwise(ends)]

    def _windows(self, sample: Media) -> list[Tensor]:
        """Stretches of ``window`` samples at the model's rate, float32 (channels, window), or all of a shorter sound."""
        if not sample.rate:
            raise ValueError(f"encoder {self.name}: audio without a rate; set Media.rate to its samples per second")
        sound = sample.data.float().cpu()
        if self.channels == 1 or sound.shape[0] != self.channels:
            sound = sound.mean(dim=0, keepdim=True).expand(self.channels, -1)
        if sample.rate != self.rate:
            sound = torch.from_numpy(self._resample(sound.T.numpy(), sample.rate, self.rate, quality="HQ")).T
        last = max(sound.shape[1] - self.window, 0)
        return [sound[:, start:start + self.window] for start in [*range(0, last, self.window), last]]

    def _inputs(self, window: Tensor) -> Tensor:
        """What the model is fed for one window."""
        raw = window.contiguous().numpy()
        inputs = self.extractor(raw if self.channels > 1 else raw[0], sampling_rate=self.rate, return_tensors="pt")
        return inputs[self.extractor.model_input_names[0]][0]

    def _states(self, inputs: Tensor) -> Tensor:
        """Rows of every window, (n, 1, d) or (n, steps, d)."""
        with torch.autocast(self.device.type, enabled=False):
            states = self._hidden(inputs.float().to(self.device))
        return states.mean(dim=1, keepdim=True) if self.rows == "window" else states

    def _hidden(self, inputs: Tensor) -> Tensor:
        if self.codec:
            return self.model(inputs).transpose(1, 2)
        return self.model(inputs, output_hidden_states=True).hidden_states[self.layer]

    def _rate(self, given: int | None) -> int:
        declared = getattr(self.extractor, "sampling_rate", None)
        if declared is None and given is None:
            raise ValueError(f"the feature extractor of {self.name} declares no sampling rate; give rate: that of its training data")
        if None not in (declared, given) and declared != given:
            raise ValueError(f"the feature extractor of {self.name} declares {declared} samples per second, not {given}; leave rate out")
        return int(declared or given or 0)

    @torch.no_grad()
    def _check(self) -> None:
        """Ask once, with noise.

        Raises:
            ValueError: there is no such layer, or the extractor cuts a window off.
        """
        noise = 0.1 * torch.randn(self.channels, self.window, generator=torch.Generator().manual_seed(0))
        changed = noise.clone()
        changed[:, -max(self.window // 20, 1):] = 0
        if self.window < 1 or torch.equal(self._inputs(noise), self._inputs(changed)):
            raise ValueError(f"the feature extractor of {self.name} ignores the end of windows of {self.window / self.rate:g} s; give "
                             "a smaller window_seconds")
        inputs = self._inputs(noise)[None].to(self.device)
        num_layers = 1 if self.codec else len(self.model(inputs, output_hidden_states=True).hidden_states)
        if not -num_layers <= self.layer < num_layers:
            raise ValueError(f"{self.name}: layer {self.layer} does not exist; hidden states are 0 to {num_layers - 1}, -1 is the last")
