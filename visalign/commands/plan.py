"""``visalign train --plan``: what a configuration would do and need, from headers and arithmetic, before any weight is loaded."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from visalign.config import Config, GrpoConfig, resolve_path
from visalign.geometry import Geometry
from visalign.samplers.dynamics import build_dynamics
from visalign.samplers.steps import build_selection

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# Values one transformer block keeps for its backward pass, in units of tokens x width, without attention maps (flash attention):
# inputs of norms, projections and the 4x feed-forward. Korthikanti et al., arXiv:2205.05198, eq. 2 counts 34 bytes at 2 bytes each.
BLOCK_ACTIVATIONS = 17


@dataclass(frozen=True)
class Weights:
    """A component's tensors, from safetensors headers: name -> shape."""

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def num_params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_headers(folder: Path) -> Weights:
    """Shapes of every tensor of a component, without reading one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return Weights(shapes)


def model_folder(path: str) -> Path | None:
    """The model's local folder: as given, of the playground, or from the hub's cache; ``None`` when it was not downloaded yet."""
    folder = Path(resolve_path(path))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def steps_per_iteration(config: Config) -> tuple[int, float] | None:
    """Sampler steps and the mean number of stochastic ones; ``None`` when the call leaves the number of steps to the pipeline."""
    build_dynamics(config.sampler.dynamics.name, **config.sampler.dynamics.params)
    selection = build_selection(config.sampler.steps.name, **config.sampler.steps.params)
    if "num_inference_steps" not in config.model.call and "sigmas" not in config.model.call:
        return None
    call = config.model.call
    num_steps = len(call["sigmas"]) if call.get("sigmas") else int(call["num_inference_steps"])
    counts = [len(selection.select(num_steps, iteration, config.train.seed)) for iteration in range(min(config.train.iterations, 100))]
    return num_steps, sum(counts) / len(counts)


def compute(config: Config, world: int) -> list[tuple[str, str]]:
    """Rows (what, how much) of batch geometry and work per iteration."""
    train = config.train
    geometry = Geometry(groups=train.groups, group_size=train.group_size, updates=train.updates, microbatch=train.microbatch, world=world)
    rows = [(name, f"{value}") for name, value in geometry.describe().items()]
    rows.append(("iterations", f"{train.iterations}, {train.iterations * train.updates} optimizer steps in all"))
    if (steps := steps_per_iteration(config)) is None:
        return [*rows, ("sampler steps", "the pipeline's default; set model.call.num_inference_steps to plan them")]
    num_steps, stochastic = steps
    guided = " (times 2 if the pipeline runs guidance as a second call)" if float(config.model.call.get("guidance_scale", 1.0)) > 1 else ""
    if config.data.offline is not None:
        return [*rows, ("samples", f"{geometry.samples} per iteration from {config.data.offline.path}; nothing is sampled or scored")]
    if not isinstance(config.algorithm, GrpoConfig):
        return [*rows, ("sampler steps", f"{num_steps}"), ("forwards to sample", f"{geometry.samples * num_steps} per iteration{guided}"),
                ("reward calls", f"{geometry.samples} samples x {len(config.rewards)} rewards per iteration")]
    passes = 1 + (config.algorithm.kl_weight > 0) + (config.algorithm.old_log_prob == "recomputed")
    return [*rows,
            ("sampler steps", f"{num_steps}, of which {stochastic:g} stochastic and trained"),
            ("forwards to sample", f"{geometry.samples * num_steps} per iteration{guided}"),
            ("forwards to train", f"{round(geometry.samples * stochastic * passes)} per iteration, "
                                  f"{round(geometry.samples * stochastic)} of them with a backward pass"),
            ("reward calls", f"{geometry.samples} samples x {len(config.rewards)} rewards per iteration")]


def memory(config: Config, folder: Path, world: int) -> list[tuple[str, str]]:
    """Rows (what, bytes per process) for weights, training state, stored trajectories and an estimate of activations."""
    weights = {part.name: read_headers(part) for part in sorted(folder.iterdir()) if part.is_dir() and any(part.glob("*.safetensors"))}
    if not weights:
        return [("memory", f"{folder} holds no safetensors; nothing to estimate from")]
    denoiser = next((name for name in ("transformer", "unet") if name in weights), None)
    frozen = sum(part.num_params for part in weights.values()) * BYTES[config.model.dtype]
    total = float(frozen)
    rows = [("weights", f"{_gib(frozen)} ({', '.join(f'{name} {part.num_params / 1e6:.3g}M' for name, part in weights.items())})")]
    if denoiser is None:
        return [*rows, ("training state", "no transformer or unet folder; not estimated")]
    trained = _num_trained(config, weights[denoiser])
    copies = 4 * (3 + 1 + (config.ema is not None))  # float32: weight, two moments, gradient, average
    state = trained * copies + (weights[denoiser].num_params * BYTES[config.model.dtype] if config.trainable.mode == "full" else 0)
    rows.append(("training state", f"{_gib(state)} ({trained / 1e6:.3g}M trained: weights, gradients, AdamW"
                                   f"{', EMA' if config.ema else ''}{', frozen reference' if config.trainable.mode == 'full' else ''})"))
    total += state
    shape = _latent_shape(config, folder)
    steps = steps_per_iteration(config)
    if shape is None or steps is None:
        return [*rows, ("trajectories, activations", "not estimated: the latent's size is not in the call and the model's configuration")]
    samples = config.train.groups * config.train.group_size // world
    stored = samples * math.prod(shape) * (2 * steps[1] * BYTES[config.sampler.storage_dtype] + 4 * (steps[1] + 1))
    rows.append(("trajectories", f"{_gib(stored)} ({samples} samples x {steps[1]:g} steps of {' x '.join(map(str, shape))})"))
    total += stored
    activations = _activations(config, _json(folder / denoiser / "config.json"), shape)
    if activations is None:
        return [*rows, ("activations", "not estimated for this kind of denoiser"), ("sum without activations", _gib(total))]
    rows.append(("activations", f"about {_gib(activations)} (micro-batch of {config.train.microbatch}, gradient checkpointing "
                                f"{'on' if config.train.gradient_checkpointing else 'off'}; text tokens, decoder and rewards not counted)"))
    return [*rows, ("sum", f"about {_gib(total + activations)} per process")]


def show(config: Config) -> None:
    """Print the plan.

    Raises:
        ValueError: the geometry or the sampler's parts do not fit together.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    folder = model_folder(config.model.path)
    needs = (memory(config, folder, world) if folder else
             [("memory", f"{config.model.path} is not on this machine; download it once to see an estimate")])
    table = Table(title=f"plan: {config.model.path}", show_header=False, title_justify="left")
    for what, value in compute(config, world):
        table.add_row(what, value)
    table.add_section()
    for what, value in needs:
        table.add_row(what, value)
    Console().print(table)


def _num_trained(config: Config, denoiser: Weights) -> int:
    if config.trainable.mode == "full":
        return denoiser.num_params
    targets = config.trainable.target_modules or ATTENTION
    layers = [shape for name, shape in denoiser.shapes.items()
              if name.endswith(".weight") and any(f".{name}".endswith(f".{target}.weight") for target in targets)]
    return sum(config.trainable.rank * (shape[0] + math.prod(shape[1:])) for shape in layers)


def _latent_shape(config: Config, folder: Path) -> tuple[int, ...] | None:
    """(channels, [frames,] height, width) of the VAE's latents for the call; ``None`` where the call does not say."""
    vae, model = _json(folder / "vae" / "config.json"), _json(folder / _denoiser_folder(folder) / "config.json")
    channels = vae.get("latent_channels") or vae.get("z_dim")
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or vae.get("dim_mult")
    if not channels or not blocks:
        return None
    factor = vae.get("scale_factor_spatial") or 2 ** (len(blocks) - 1)
    sample = model.get("sample_size")
    default = sample * factor if isinstance(sample, int) else None
    height, width = (config.model.call.get(side, default) for side in ("height", "width"))
    if not height or not width:
        return None
    frames = config.model.call.get("num_frames")
    time = () if frames is None else ((int(frames) - 1) // int(vae.get("scale_factor_temporal") or 4) + 1,)
    return (channels, *time, int(height) // factor, int(width) // factor)


def _activations(config: Config, model: Mapping[str, Any], shape: tuple[int, ...]) -> float | None:
    """Bytes one micro-batch keeps for the backward pass of a transformer denoiser."""
    heads, head_dim = model.get("num_attention_heads"), model.get("attention_head_dim")
    layers = (model.get("num_layers") or 0) + (model.get("num_single_layers") or 0)
    if not (isinstance(heads, int) and isinstance(head_dim, int) and layers):
        return None
    patch = model.get("patch_size")
    per_side = (patch[-1] if isinstance(patch, list) else patch) or 1
    per_side = 2 if per_side == 1 and model.get("in_channels") == 4 * shape[0] else per_side  # packed 2 x 2 before the network (Flux)
    tokens = math.prod(shape[1:]) / per_side**2
    kept = 1 if config.train.gradient_checkpointing else BLOCK_ACTIVATIONS
    blocks = layers * kept + (BLOCK_ACTIVATIONS if config.train.gradient_checkpointing else 0)
    guided = 2 if float(config.model.call.get("guidance_scale", 1.0)) > 1 and not model.get("guidance_embeds") else 1
    return config.train.microbatch * guided * tokens * heads * head_dim * blocks * BYTES[config.train.precision]


def _denoiser_folder(folder: Path) -> str:
    return "transformer" if (folder / "transformer").is_dir() else "unet"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
