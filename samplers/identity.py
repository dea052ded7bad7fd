"""What makes one pipeline's latents another's or not: the key under which latents may be shared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from visalign.samplers.observe import CaptureError
from visalign.samplers.policy import PipelinePolicy


def pipeline_identity(policy: PipelinePolicy) -> str:
    """SHA-256 over everything that decides which latents a medium has, and over nothing else.

    The VAE's class, configuration, dtype and every one of its tensors; the latents' shape; and the map from the loop's latents to
    the VAE's (order, scale, offset). Text encoders, denoiser, adapters, guidance and number of steps do not matter. Without an
    encoder, or where the map cannot be found, media cannot be encoded, and the pipeline's class stands for what is missing.
    """
    digest = hashlib.sha256()
    try:
        vae: Any = policy.codec.vae()
        index, scale, offset, shape = policy.codec.vae_map()
        tensors = [("index", index), ("scale", scale), ("offset", offset), *sorted(vae.state_dict().items())]
        config = {key: value for key, value in dict(getattr(vae, "config", {})).items() if not key.startswith("_")}
        facts = [type(vae).__name__, config, list(policy.latent_shape), list(shape)]
    except CaptureError:
        tensors, facts = [], [type(policy.pipe).__name__, list(policy.latent_shape)]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
