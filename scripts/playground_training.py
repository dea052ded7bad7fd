"""Training of the playground's models: autoencoder, flow model and CLIP, each with a checkpoint in ``runs/playground``."""

import logging
import math
import random
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripts.playground_models import CLIP_CONFIG, CountedNullTokens, FlowModels, new_tokenizer, new_vae
from visalign.playground import world

logger = logging.getLogger(__name__)
RUN_DIR = Path(__file__).resolve().parent.parent / "runs" / "playground"
SEED = 0


def sample_pictures(captions: list[world.Caption], num: int, rng: random.Random) -> tuple[list[world.Caption], Tensor]:
    """Captions in the family proportions and one picture of each, in [-1, 1], shape (num, 3, 32, 32)."""
    drawn = world.sample_captions(captions, num, rng)
    images = world.render([world.sample_scene(caption, rng) for caption in drawn])
    return drawn, images.float() / 127.5 - 1


def train_vae(num_steps: int = 2400, batch: int = 32, lr: float = 3e-3) -> None:
    """Autoencoder with noisy latents: the decoder learns to forgive the errors a generator makes.

    loss = |x' - x| + 4 (x' - x)^2 + 0.01 (mean_c(z)^2 + (std_c(z) - 1)^2), z + 0.15 noise decoded.
    """
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    captions = world.all_captions()
    vae = new_vae()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    started = time.process_time()
    for step in range(num_steps):
        scale = min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
        _, images = sample_pictures(captions, batch, rng)
        latents = vae.encoder(images)
        decoded = vae.decoder(latents + 0.15 * torch.randn_like(latents))
        error = decoded - images
        moments = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        loss = error.abs().mean() + 4 * error.square().mean() + 0.01 * moments
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        ema.update_parameters(vae)
        if step % 100 == 99:
            cpu_s = time.process_time() - started
            logger.info("vae step %d loss %.4f mse %.5f cpu %.0f s", step + 1, loss.item(), error.detach().square().mean(), cpu_s)
            torch.save({"vae": ema.module.state_dict(), "cpu_s": cpu_s, "steps": step + 1}, RUN_DIR / "vae.pt")


def load_vae() -> tuple[AutoencoderTiny, dict[str, Any]]:
    saved = torch.load(RUN_DIR / "vae.pt", weights_only=True)
    vae = new_vae()
    vae.load_state_dict(saved["vae"])
    return vae.eval(), saved


@torch.no_grad()
def encode_training_set(vae: AutoencoderTiny, num: int, rng: random.Random) -> tuple[list[world.Caption], Tensor]:
    """Captions and raw latents of ``num`` training pictures, (num, 4, 16, 16)."""
    captions: list[world.Caption] = []
    latents = []
    training = world.train_captions()
    for _ in range(num // 256):
        drawn, images = sample_pictures(training, 256, rng)
        captions += drawn
        latents.append(vae.encoder(images))
    return captions, torch.cat(latents)


def misread(caption: world.Caption, rng: random.Random) -> world.Caption:
    """The caption with one colour or shape replaced: the label noise that web captions have."""
    index = rng.randrange(len(caption.things))
    thing = caption.things[index]
    for _ in range(100):
        if rng.random() < 0.5:
            changed = world.Thing(rng.choice(world.COLOURS), thing.shape, thing.size)
        else:
            changed = world.Thing(thing.colour, rng.choice(world.SHAPES), thing.size)
        things = (*caption.things[:index], changed, *caption.things[index + 1 :])
        if changed != thing and changed.combination not in world.HELD_OUT_COMBINATIONS and len(set(things)) == len(things):
            return world.Caption(things, caption.count, caption.relation)
    raise AssertionError(caption)


def train_flow(
    num_steps: int, misread_share: float = 0.0, batch: int = 64, lr: float = 2e-3, ema_decay: float = 0.999, num_pictures: int = 16384
) -> None:
    """Flow matching |v - (x1 - x0)|^2 with logit-normal sigma, 10 % empty captions, Muon for the blocks and AdamW for the rest.

    Warm-up of 200 steps, constant, cosine decay to zero over the last 40 %. ``misread_share`` of the captions carry one wrong
    attribute: the label noise of web captions, and what alignment then removes. Continues from the checkpoint if there is one.
    """
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = new_tokenizer()
    vae, _ = load_vae()
    captions, latents = encode_training_set(vae, num_pictures, rng)
    shift, scale = float(latents.mean()), float(1 / latents.std())
    latents = (latents - shift) * scale
    logger.info("encoded %d pictures: shift %.3f scale %.3f", len(captions), shift, scale)
    ids = tokenizer([c.text for c in captions], padding="max_length", return_tensors="pt").input_ids
    wrong = tokenizer([misread(c, rng).text for c in captions], padding="max_length", return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    models = FlowModels(tokenizer)
    null_tokens = CountedNullTokens()
    models.transformer.set_attn_processor(null_tokens)
    hidden = {name: p for name, p in models.named_parameters() if "transformer_blocks" in name and p.ndim == 2}
    other = [p for name, p in models.named_parameters() if name not in hidden]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden.values(), lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=lr, weight_decay=0.0, betas=(0.9, 0.99)),
    ]
    ema = AveragedModel(models, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    path = RUN_DIR / "flow.pt"
    first, spent = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        models.load_state_dict(saved["models"])
        ema.load_state_dict(saved["ema"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        first, spent = saved["steps"], saved["cpu_s"]
        rng.seed(SEED + first)
        torch.manual_seed(SEED + first)
        logger.info("resumed at step %d", first)
    forward = torch.compile(models)
    started, running = time.process_time(), 0.0
    for step in range(first, num_steps):
        remaining = (num_steps - step) / (0.4 * num_steps)
        factor = min(1.0, (step + 1) / 200) * (0.5 * (1 - math.cos(math.pi * remaining)) if remaining < 1 else 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
        rows = torch.randint(len(captions), (batch,))
        x0 = latents[rows]
        x1 = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(batch))
        noisy = torch.lerp(x0, x1, sigma.view(-1, 1, 1, 1))
        labels = torch.where(torch.rand(batch, 1) < misread_share, wrong[rows], ids[rows])
        labels = torch.where(torch.rand(batch, 1) < 0.1, empty, labels)
        null_tokens.set_count(rng.choice((0, 1, 8, 77, 256)))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = forward(noisy, sigma, labels)
        loss = (velocity.float() - (x1 - x0)).square().mean()
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        if step < 2000:  # A long memory would keep the first, bad weights for the whole warm-up.
            ema.multi_avg_fn = get_ema_multi_avg_fn(min(ema_decay, (step + 1) / (step + 10)))
        ema.update_parameters(models)
        running += loss.item()
        if step % 100 == 99:
            cpu_s = spent + time.process_time() - started
            logger.info("flow step %d loss %.4f cpu %.0f s", step + 1, running / 100, cpu_s)
            running = 0.0
        if step % 500 == 499 or step + 1 == num_steps:
            state = {"models": models.state_dict(), "ema": ema.state_dict(), "optimisers": [o.state_dict() for o in optimisers]}
            record = {"steps": step + 1, "num_steps": num_steps, "cpu_s": spent + time.process_time() - started}
            record |= {"shift": shift, "scale": scale, "misread_share": misread_share, "num_pictures": num_pictures}
            record |= {"batch": batch, "lr": lr}
            torch.save(state | record, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)


def train_clip(num_steps: int = 1000, batch: int = 64, lr: float = 2e-3) -> None:
    """A small CLIP on the training captions: the proxy reward, good but not exact.

    Symmetric cross-entropy over the batch; equal captions share the target. It never sees a held-out colour-shape pair.
    """
    torch.manual_seed(SEED + 1)
    rng = random.Random(SEED + 1)
    tokenizer = new_tokenizer()
    config = CLIP_CONFIG["model_cfg"]
    model = open_clip.CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=open_clip.CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=open_clip.CLIPTextCfg(**config["text_cfg"]),
    )
    mean, std = (torch.tensor(CLIP_CONFIG["preprocess_cfg"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    training = world.train_captions()
    started = time.process_time()
    for step in range(num_steps):
        scale = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
        captions, images = sample_pictures(training, batch, rng)
        images = (images + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(images)).clamp(-1, 1)
        ids = tokenizer([caption.text for caption in captions], padding="max_length", return_tensors="pt").input_ids
        same = (ids.unsqueeze(0) == ids.unsqueeze(1)).all(2).float()
        target = same / same.sum(1, keepdim=True)
        image, text, temperature = model((images.add(1) / 2 - mean) / std, ids)[:3]
        logits = temperature * image @ text.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            cpu_s = time.process_time() - started
            logger.info("clip step %d loss %.3f cpu %.0f s", step + 1, loss.item(), cpu_s)
            torch.save({"clip": model.state_dict(), "cpu_s": cpu_s, "steps": step + 1}, RUN_DIR / "clip.pt")
