"""Train the playground's models and write them to visalign/playground/weights, with their recipe and scores.

    python -m scripts.build_playground vae                 10 minutes on one CPU thread
    python -m scripts.build_playground flow --steps 3300   under an hour on an idle core; resumes from its last checkpoint
    cp runs/playground/flow.pt runs/playground/flow_clean.pt
    python -m scripts.build_playground flow --steps 3700 --misread 0.25 --ema 0.99     five minutes with imperfect captions
    python -m scripts.build_playground blend runs/playground/flow_clean.pt --share 0.5 halfway between the two
    python -m scripts.build_playground clip                2 minutes
    python -m scripts.build_playground export              checkpoints -> package folder, scores -> README.md and scores.json
    python -m scripts.build_playground grid FILE.png       64 held-out prompts as the shipped pipeline draws them

Checkpoints live in ``runs/playground`` (ignored by git). One seed, one thread; the stages are separate processes.
"""

import argparse
import json
import logging
import random
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from scripts.playground_models import CLIP_CONFIG, FlowModels, new_silent_t5, new_tokenizer
from scripts.playground_training import RUN_DIR, SEED, load_vae, sample_pictures, train_clip, train_flow, train_vae
from visalign import playground
from visalign.playground import world

logger = logging.getLogger(__name__)
WEIGHTS = playground.pipeline_path().parent


def build_pipeline(use_ema: bool = True) -> tuple[StableDiffusion3Pipeline, dict[str, Any]]:
    """The pipeline of the newest checkpoints and the record of how they were made."""
    saved = torch.load(RUN_DIR / "flow.pt", weights_only=True)
    vae, vae_saved = load_vae()
    vae.register_to_config(scaling_factor=saved["scale"], shift_factor=saved["shift"])
    tokenizer = new_tokenizer()
    models = FlowModels(tokenizer)
    if use_ema:
        ema = AveragedModel(models)
        ema.load_state_dict(saved["ema"])
        models = ema.module
    else:
        models.load_state_dict(saved["models"])
    text_encoder_3, tokenizer_3 = new_silent_t5()
    pipe = StableDiffusion3Pipeline(
        transformer=models.transformer.eval(),
        # Ten steps visit 1.0, 0.9, ..., 0.1, 0; without shift_terminal the last step would go from 0.001 to 0.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=0.1),
        vae=vae,
        text_encoder=models.text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=models.text_encoder_2.eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3.eval(),
        tokenizer_3=tokenizer_3,
    )
    record = {key: value for key, value in saved.items() if isinstance(value, (int, float))}
    return pipe, record | {"vae_steps": vae_saved["steps"], "vae_cpu_s": vae_saved["cpu_s"]}


def blend(clean: Path, share: float) -> None:
    """Move the checkpoint's EMA weights back towards an earlier checkpoint of the same run: clean + share (now - clean).

    Both ends lie on one low-rate trajectory, where interpolation of weights interpolates behaviour (arXiv:2109.01903).
    """
    saved, earlier = (torch.load(path, weights_only=True) for path in (RUN_DIR / "flow.pt", clean))
    for name, value in saved["ema"].items():
        if value.is_floating_point():
            saved["ema"][name] = torch.lerp(earlier["ema"][name], value, share)
    torch.save(saved | {"blend": share}, RUN_DIR / "flow.pt")


def save_pipeline(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Transformer and autoencoder in float16, the small text encoders in float32.

    Without ``torch_dtype`` diffusers loads its modules in float32 but transformers keeps the stored type: half-precision encoders
    would not fit the rest.
    """
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["block_out_channels"]  # AutoencoderTiny writes it and warns when it reads it back.
    (folder / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def export(folder: Path) -> None:
    """Write pipeline and CLIP (float16), measure what was written, record recipe and scores beside it."""
    pipe, record = build_pipeline()
    save_pipeline(pipe, folder / "pipeline")
    saved = torch.load(RUN_DIR / "clip.pt", weights_only=True)
    (folder / "clip").mkdir(parents=True, exist_ok=True)
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=2) + "\n")
    save_file({name: value.half().contiguous() for name, value in saved["clip"].items()}, folder / "clip" / "open_clip_model.safetensors")
    new_tokenizer().save_pretrained(folder / "clip")
    record |= {"clip_steps": saved["steps"], "clip_cpu_s": saved["cpu_s"]}
    scores = {"clip_retrieval": clip_retrieval(folder / "clip"), "pipeline": pipeline_scores()}
    (folder / "scores.json").write_text(json.dumps({"recipe": record, **scores}, indent=2) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only their owner may read.
    (folder / "README.md").write_text(readme(record, scores, sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())))


def pipeline_scores(num: int = 256) -> list[dict[str, Any]]:
    """Gold scores of the shipped pipeline on held-out prompts, one row per setting."""
    pipe = playground.load_pipeline()
    prompts = playground.heldout_prompts(num)
    compositional = torch.tensor([playground.is_compositional(prompt) for prompt in prompts])
    rows = []
    for guidance, num_steps, num_null_tokens in ((1.0, 8, 12), (1.0, 6, 12), (3.0, 8, 12), (1.0, 8, 256)):
        count = num if num_null_tokens < 256 else 64  # The default number of null tokens is four times slower.
        verdict = playground.verify(sample(pipe, prompts[:count], guidance, num_steps, num_null_tokens), prompts[:count])
        row = {"guidance": guidance, "steps": num_steps, "max_sequence_length": num_null_tokens, "prompts": count}
        row |= {"mean": verdict.mean.mean().item(), "strict": verdict.strict.mean().item()}
        for name, kind in (("strict_seen", ~compositional[:count]), ("strict_new", compositional[:count])):
            row[name] = verdict.strict[kind].mean().item()
        row |= {skill: right.nanmean().item() for skill, right in verdict.skills.items()}
        logger.info("%s", row)
        rows.append(row)
    return rows


def readme(record: dict[str, Any], scores: dict[str, Any], num_bytes: int) -> str:
    columns = list(scores["pipeline"][0])
    table = [columns, ["---"] * len(columns)]
    table += [[f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in columns] for row in scores["pipeline"]]
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    retrieval = ", ".join(f"{value:.3f} on {name} captions" for name, value in scores["clip_retrieval"].items())
    return f"""# The playground's weights

Written by `python -m scripts.build_playground export`; {num_bytes / 1e6:.1f} MB. The numbers below are also in `scores.json`.

- `pipeline/`: a `StableDiffusion3Pipeline` for 32x32 pictures; 8 Euler steps are plenty, guidance 1 leaves room for alignment and
  guidance 3 is sharper
- `clip/`: an open_clip model, `open_clip.create_model_and_transforms("local-dir:PATH")`

## Scores

Gold verifier on held-out prompts (half of them with a colour-shape pair that training never showed: `strict_new`), float32, one noise
seed; the standard error of `strict` is about 0.03 with 256 prompts and 0.06 with 64.

{lines}

CLIP, clean pictures, own caption against seven captions of other things: {retrieval}.

## Recipe

Seed {SEED}, one CPU thread per stage on a shared machine; CPU seconds include the contention of its neighbours.

| stage | steps | batch | CPU s |
|---|---|---|---|
| autoencoder | {record["vae_steps"]} | 32 | {record["vae_cpu_s"]:.0f} |
| flow | {record["steps"]} of {record["num_steps"]} | {record["batch"]} | {record["cpu_s"]:.0f} |
| CLIP | {record["clip_steps"]} | 64 | {record["clip_cpu_s"]:.0f} |

- Autoencoder: L1 + MSE, latents pulled to mean 0 and variance 1 and decoded with noise of 0.15.
- Flow: velocity MSE, logit-normal sigma, 10 % empty captions, Muon for the blocks and AdamW for the rest at {record["lr"]:g}, EMA,
  cosine decay over the last 40 %, text encoders trained jointly.
- CLIP: symmetric cross-entropy on noisy pictures, training captions only.

The flow run has three parts: 1500 steps on 32768 pictures, to step 3300 on {record["num_pictures"]} with the decay (EMA 0.999),
and a last low-rate part to step {record["steps"]} in which {100 * record["misread_share"]:g} % of the captions carry one wrong colour
or shape (EMA 0.99). The shipped weights are clean + {record.get("blend", 1):g} (noisy - clean), the weights before and after that part.
On 128 held-out prompts (mean, strict) at guidance 1: clean (0.80, 0.52), noisy (0.57, 0.20); at guidance 3: (0.89, 0.69), (0.78, 0.51). The
label noise of web captions leaves alignment something to remove, while the shapes stay clean.

## Choices that matter

- The scheduler has `shift_terminal=0.1`, so that ten steps visit 1.0, 0.9, ..., 0.1, 0; without it the last step is wasted.
- The tokenizer holds 12 tokens, enough for every caption of the grammar.
- The third text encoder is silent: a one-layer T5 whose last norm is zero, exactly what the pipeline substitutes for a missing one.
  The transformer was trained with 0 to 256 of its zero tokens; `max_sequence_length=12` is the fast choice.
"""


def sample(pipe: StableDiffusion3Pipeline, prompts: list[str], guidance: float, num_steps: int, num_null_tokens: int = 12) -> Tensor:
    """Pictures of the shipped pipeline, uint8 (B, 3, 32, 32)."""
    images = pipe(
        prompts,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        max_sequence_length=num_null_tokens,
        output_type="np",
        generator=torch.Generator().manual_seed(SEED),
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)


def clip_retrieval(folder: Path, num: int = 512, choices: int = 8, seed: int = 7) -> dict[str, float]:
    """Share of clean pictures whose own caption scores highest of ``choices`` captions, on seen and on held-out captions."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    mean, std = (torch.tensor(CLIP_CONFIG["preprocess_cfg"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    accuracy = {}
    for name, pool in (("training", world.train_captions()), ("held-out", world.heldout_captions())):
        rng = random.Random(seed)
        captions, images = sample_pictures(pool, num, rng)
        texts = [[caption.text, *_distractors(caption, pool, choices - 1, rng)] for caption in captions]
        with torch.no_grad():
            image = model.eval().encode_image((images.add(1) / 2 - mean) / std, normalize=True)
            text = model.encode_text(tokenizer([line for row in texts for line in row]), normalize=True).unflatten(0, (num, choices))
        accuracy[name] = float(((image.unsqueeze(1) * text).sum(-1).argmax(1) == 0).float().mean())
    return accuracy


def _distractors(caption: world.Caption, pool: list[world.Caption], num: int, rng: random.Random) -> list[str]:
    """Other captions of the same family that the picture does not fit."""
    others: set[str] = set()
    while len(others) < num:
        other = world.sample_captions(pool, 1, rng)[0]
        if set(other.things) != set(caption.things) and other.text != caption.text:
            others.add(other.text)
    return sorted(others)


def grid(path: Path, guidance: float = 1.0, num_steps: int = 8) -> None:
    """64 held-out prompts, eight per row, enlarged four times; the prompts go to the log."""
    prompts = playground.heldout_prompts(64)
    images = sample(playground.load_pipeline(), prompts, guidance, num_steps)
    sheet = images.view(8, 8, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(256, 256, 3)
    Image.fromarray(sheet.numpy()).resize((1024, 1024), Image.Resampling.NEAREST).save(path)
    for row in range(0, 64, 8):
        logger.info(" | ".join(prompts[row : row + 8]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("vae", "clip", "export"):
        stages.add_parser(name)
    flow = stages.add_parser("flow")
    flow.add_argument("--steps", type=int, default=3300)
    flow.add_argument("--misread", type=float, default=0.0, help="share of captions with one wrong attribute")
    flow.add_argument("--ema", type=float, default=0.999)
    blending = stages.add_parser("blend")
    blending.add_argument("clean", type=Path)
    blending.add_argument("--share", type=float, default=0.5)
    drawing = stages.add_parser("grid")
    drawing.add_argument("path", type=Path)
    drawing.add_argument("--guidance", type=float, default=1.0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    RUN_DIR.mkdir(parents=True, exist_ok=True)
    match arguments.stage:
        case "vae":
            train_vae()
        case "flow":
            train_flow(arguments.steps, arguments.misread, ema_decay=arguments.ema)
        case "clip":
            train_clip()
        case "export":
            export(WEIGHTS)
        case "blend":
            blend(arguments.clean, arguments.share)
        case "grid":
            grid(arguments.path, arguments.guidance)


if __name__ == "__main__":
    main()
