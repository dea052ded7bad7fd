"""What makes one pipeline's latents another's or not: the key under which latents may be shared."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from visalign.samplers.policy import PipelinePolicy


def pipeline_identity(policy: PipelinePolicy) -> str:
    """SHA-256 over everything that decides which latents a medium has, and over nothing else.

    The VAE's class, configuration, dtype and every one of its tensors; the latents' shape; and the map from the loop's latents to
    the VAE's (order, scale, offset). Text encoders, denoiser, adapters, guidance and number of steps do not matter.

    Raises:
        CaptureError: the pipeline has no VAE with an encoder, or its decode path cannot be inverted.
    """
    codec = policy.codec
    index, scale, offset, shape = codec.vae_map()
    vae = codec._vae()
    digest = hashlib.sha256()
    config = {key: value for key, value in dict(getattr(vae, "config", {})).items() if not key.startswith("_")}
    facts = [type(vae).__name__, config, list(policy.latent_shape), list(shape)]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in [("index", index), ("scale", scale), ("offset", offset), *sorted(vae.state_dict().items())]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
