"""What every set-level metric says of sets that are known: equal to its reference, worse, or a model's; and what its credit is worth.

    python benchmarks/set_metrics.py [--draws 8]        rows to benchmarks/results/set_metrics.jsonl (4 minutes of one core)
    python benchmarks/set_metrics.py --table            docs/set_metrics.md from the rows

Pictures of the embedded world, features of its CLIP (64 dimensions, unit length). Every draw has exemplars and samples of its own:

clean         renders of training captions, as the exemplars are: the null, 0 for an unbiased metric
blurred       the same kind of renders, blurred by 1.5 pixels
recoloured    red, green and blue exchanged cyclically
guidance 1, 3 the pipeline's samples of such captions, disjoint subsets of one pool

"CMMD, i = j" is CMMD as published, with the terms i = j, computed here for comparison. The last rows correlate each sample's exact
leave-one-out credit in a set of 1,024 samples of guidance 1 with the gold verifier, the captions of which the metrics never see.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from visalign.maths.frechet import Moments
from visalign.maths.mmd import GaussianKernel, median_distance
from visalign.playground import clip_path, parse, pipeline_path, render, sample_scene, train_prompts, verify
from visalign.rewards.distribution import FrechetDistance, VendiScore
from visalign.rewards.encoders import Encoder, as_encoder, sample_features
from visalign.rewards.exemplars import Exemplars, save_exemplars
from visalign.rewards.kernel_distance import CMMD, KAD, KID
from visalign.rewards.set_level import SetLevelReward
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import generate
from visalign.types import Media, Prompt

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "set_metrics.jsonl"
TABLE = ROOT.parent / "docs" / "set_metrics.md"
EXEMPLARS, SIZES, SETS = 1024, (64, 256, 1024), ("clean", "blurred", "recoloured", "guidance 1", "guidance 3")
METRICS = ("FD", "FD-inf", "KID", "KAD", "CMMD", "CMMD, i = j", "Vendi")
POOL_SEED, NOISE_SEED = 9_000, 7_000_000  # of rendered captions, and of the model's samples


@dataclass(frozen=True)
class Pool:
    """Samples of the pipeline with what the verifier thinks of them: features (n, d), gold (n,)."""

    features: Tensor
    gold: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        TABLE.write_text(table(), encoding="utf-8")
        return
    torch.set_num_threads(1)
    encoder = as_encoder({"reward": "clip", "model": str(clip_path())})
    pools = {f"guidance {scale:g}": sampled(encoder, scale, max(SIZES)) for scale in (1.0, 3.0)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        found: dict[tuple[str, str, int], list[float]] = {}
        for draw in range(arguments.draws):
            rewards = made(encoder, rendered(encoder, EXEMPLARS, 2 * draw), Path(folder) / f"{draw}.safetensors")
            for name in SETS:
                for size, features in subsets(encoder, name, pools, draw):
                    for metric, value in measured(rewards, features):
                        found.setdefault((metric, name, size), []).append(value)
            if draw == 0:
                rows += [credits(reward, pools["guidance 1"]) for reward in rewards]
        rows = [summary(*key, values) for key, values in found.items()] + rows
    record(rows, arguments.draws)


def pictures(count: int, seed: int) -> Tensor:
    """Clean renders of training captions, uint8 (n, 3, 32, 32)."""
    rng = random.Random(POOL_SEED + seed)
    return render([sample_scene(parse(text), rng) for text in train_prompts(count, seed=POOL_SEED + seed)])


def rendered(encoder: Encoder, count: int, seed: int, degrade: str = "clean") -> Tensor:
    """Features of renders, (n, d)."""
    images = pictures(count, seed)
    if degrade == "blurred":
        images = gaussian_blur(images, [9, 9], [1.5, 1.5])
    elif degrade == "recoloured":
        images = images[:, [1, 2, 0]]
    return sample_features(encoder, [Media("image", image) for image in images])


def sampled(encoder: Encoder, scale: float, count: int) -> Pool:
    """The pipeline's samples of training captions that were not rendered."""
    policy = PipelinePolicy.from_pretrained(str(pipeline_path()), num_inference_steps=8, guidance_scale=scale, max_sequence_length=12)
    prompts = [Prompt(text) for text in train_prompts(count, seed=POOL_SEED - 1)]
    media = []
    for start in range(0, count, 64):
        part = prompts[start:start + 64]
        with torch.no_grad():
            media += policy.decode(generate(policy, part, range(NOISE_SEED + start, NOISE_SEED + start + len(part))), part)
    verdict = verify(torch.stack([one.data for one in media]), [prompt.text for prompt in prompts])
    return Pool(sample_features(encoder, media), verdict.mean.double())


def made(encoder: Encoder, features: Tensor, path: Path) -> list[SetLevelReward]:
    """The rewards beside these exemplars."""
    kept = features.float()
    save_exemplars(Exemplars(Moments.of(features).gaussian(), len(features), len(features), "sample", encoder.name, encoder.hash, kept,
                             median_distance(kept)), path)
    rule: Any = {"credit": "leave_one_out"}
    kid = KID(encoder, path, num_subsets=10, **rule)  # of 1,000 of 1,024: there is not much to average over
    return [FrechetDistance(encoder, path, **rule), kid, KAD(encoder, path, **rule), CMMD(encoder, path, **rule),
            VendiScore(encoder, **rule)]


def subsets(encoder: Encoder, name: str, pools: dict[str, Pool], draw: int) -> Iterator[tuple[int, Tensor]]:
    """Sets of this draw; renders are new every time, a pool of samples is cut into parts that do not overlap, as far as it goes."""
    if name not in pools:
        features = rendered(encoder, max(SIZES), 2 * draw + 1, name)
        yield from ((size, features[:size]) for size in SIZES)
        return
    for size in SIZES:
        part = pools[name].features[draw * size:(draw + 1) * size]
        if len(part) == size:
            yield size, part


def measured(rewards: list[SetLevelReward], features: Tensor) -> Iterator[tuple[str, float]]:
    for reward in rewards:
        for one in reward.measure(features):
            yield one.name, one.value
        if isinstance(reward, CMMD):
            kernel, exemplars = GaussianKernel(10.0), reward.reference.features
            within = kernel(features, features).mean() + kernel(exemplars, exemplars).mean()
            yield "CMMD, i = j", 1000 * float(within - 2 * kernel(features, exemplars).mean())


def summary(metric: str, name: str, size: int, values: list[float]) -> dict[str, Any]:
    found = torch.tensor(values, dtype=torch.float64)
    spread = float(found.std()) if len(values) > 1 else None
    return {"metric": metric, "set": name, "n": size, "draws": len(values), "mean": round(float(found.mean()), 6),
            "std": None if spread is None else round(spread, 6)}


def credits(reward: SetLevelReward, pool: Pool) -> dict[str, Any]:
    """How exact leave-one-out credit goes with the verifier."""
    credit = reward.credit(pool.features, torch.arange(len(pool.gold))).double()
    known = torch.isfinite(pool.gold)
    together = torch.corrcoef(torch.stack([credit[known], pool.gold[known]]))[0, 1]
    return {"metric": reward.spec.name, "set": "guidance 1", "n": len(pool.gold), "credit": reward.rule, "correlation_with_gold": round(
        float(together), 4)}


def record(rows: list[dict[str, Any]], draws: int) -> None:
    """Replace the file by this run's rows."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    used = resource.getrusage(resource.RUSAGE_SELF)
    common = {"exemplars": EXEMPLARS, "seeds": [POOL_SEED, POOL_SEED + 2 * draws - 1], "noise_seed": NOISE_SEED,
              "cpu_s": round(used.ru_utime + used.ru_stime), "hardware": f"cpu, {platform.machine()}, 1 thread", "torch": torch.__version__,
              "commit": commit, "date": date.today().isoformat()}
    RESULTS.write_text("".join(json.dumps({"op": "set_metrics", **row, **common}) + "\n" for row in rows), encoding="utf-8")
    for row in rows:
        print(json.dumps(row))


def table() -> str:
    """docs/set_metrics.md from the rows."""
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    values = {(row["metric"], row["set"], row["n"]): row for row in found if "mean" in row}
    lines = [HEAD.format(draws=max(row["draws"] for row in values.values()), exemplars=EXEMPLARS), f"| metric | n | {' | '.join(SETS)} |",
             "|---|---|" + "---|" * len(SETS)]
    for metric in METRICS:
        for size in SIZES:
            if (null := values.get((metric, "clean", size))) is not None:
                told = [f"{null['mean']:.4g} ± {null['std']:.2g}"]
                for name in SETS[1:]:
                    row = values[metric, name, size]
                    told.append(f"{row['mean']:.4g} ({(row['mean'] - null['mean']) / null['std']:+.1f})")
                lines.append(f"| {metric} | {size:,} | {' | '.join(told)} |")
    credit = ", ".join(f"`{row['metric']}` {row['correlation_with_gold']:+.2f}" for row in found if "correlation_with_gold" in row)
    return "\n".join(lines) + "\n\n" + FOOT.format(credit=credit, cpu=found[0]["cpu_s"], commit=found[0]["commit"])


HEAD = """# What set-level metrics can tell

Generated by `python benchmarks/set_metrics.py --table` from `benchmarks/results/set_metrics.jsonl`: pictures of the embedded world in the
64 dimensions of its CLIP, {exemplars:,} exemplars and n samples per set. *clean* is the null, mean ± standard deviation over {draws} draws
of exemplars and samples; the others are means, and how many of the null's standard deviations they lie from its mean. *guidance* is the
pipeline's own samples: a pool of 1,024, cut into as many sets as it gives (4 of 256, one of 1,024).
"""
FOOT = """- A Fréchet distance of few samples is mostly bias: compare sets of one size, or its extrapolation, which leaves the bias of the
  exemplars. `kid`, `kad` and `cmmd` are 0 on average for equal distributions at any size; CMMD with the terms i = j, as it was
  published, is not.
- As credit, a set-level reward says which samples make the *set* more like its exemplars, which is not whether a picture shows its own
  caption. Correlation of exact leave-one-out credit with the gold verifier, 1,024 samples at guidance 1:
  {credit}.

{cpu} CPU seconds, one torch thread, commit {commit}.
"""


if __name__ == "__main__":
    main()
