"""Capture every tiny family, verify it, and check it independently; write the published table.

    python -m scripts.capture_families                     all families; writes docs/capture.md and the rows in benchmarks/results
    python -m scripts.capture_families "Flux" "Wan 2.2"     some families, prints only

The independent check does without the observer. For two prompts and two step counts it runs plain ``pipe(**call)`` with a recorder
around ``scheduler.step``, and compares its first state, last state and media with `PipelinePolicy`. Where the pipeline's scheduler has
memory or adds noise, the plain run uses the same scheduler configured to first order (or DDIM on the same timesteps).
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor

from scripts.tiny_families import FAMILIES, Family
from visalign.samplers.observe import CaptureError
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.verify import relative, replay
from visalign.types import Prompt

logger = logging.getLogger("capture_families")
ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What became of one family.

    Attributes:
        verdict: "passed"; "refused" (a CaptureError or ValueError says why); "wrong" (accepted, but the independent check disagrees);
            "crashed" (any other exception).
        parity: relative error of the final latents, worst over prompts and step counts, of capture's own verification.
        independent: the same against plain runs; ``None`` if the family's scheduler has no first-order form to compare with.
        decode: our decode of the plain run's latents against its media.
        initial: our initial latents for a seed against the plain run's first state.
        roundtrip: ``from_vae(to_vae(z))`` against z, relative; ``None`` where there is no VAE map.
        message: why a family was refused, wrong or crashed; otherwise how it was compared.
    """

    family: str
    pipeline: str
    verdict: str
    special: str
    parity: float | None = None
    independent: float | None = None
    decode: float | None = None
    initial: float | None = None
    roundtrip: float | None = None
    mode: str = ""
    message: str = ""
    seconds: float = 0.0


def judge(family: Family) -> Verdict:
    """Build, capture, verify and check one family."""
    begin, pipe = time.perf_counter(), family.build()
    try:
        found = check(family, pipe)
    except (CaptureError, ValueError) as error:
        found = {"verdict": "refused", "message": str(error)}
        logger.debug("%s", traceback.format_exc())
    except Exception as error:  # a crash is a verdict of its own, and the sweep goes on
        logger.warning("%s crashed:\n%s", family.name, traceback.format_exc())
        found = {"verdict": "crashed", "message": f"{type(error).__name__}: {error}"}
    return Verdict(family.name, type(pipe).__name__, special=family.special, seconds=round(time.perf_counter() - begin, 2), **found)


def check(family: Family, pipe: Any) -> dict[str, Any]:
    """Capture and verify at two step counts, and compare with plain runs of two prompts.

    Raises:
        CaptureError: the family was refused.
    """
    errors: dict[str, list[float]] = {"parity": [], "independent": [], "decode": [], "initial": [], "roundtrip": []}
    for more_steps in (0, 1):
        call = {**family.call, "num_inference_steps": family.call["num_inference_steps"] + more_steps}
        policy = PipelinePolicy(pipe, call, probe=prompts_of(family)[0])
        report = policy.verify()
        errors["parity"].append(report.latent_error)
        plain = plain_scheduler(pipe.scheduler) if report.parity != "own scheduler" else pipe.scheduler
        for number, prompt in enumerate(prompts_of(family)):
            seed = 0 if family.sampled_condition else 5 + number
            for what, error in compare(policy, plain, prompt, seed).items():
                errors[what].append(error)
        if not more_steps:
            errors["roundtrip"] += roundtrip(policy)
    worst = {what: max(values) if values else None for what, values in errors.items()}
    off = [f"{what} {worst[what]:.2g}" for what in ("independent", "decode", "roundtrip") if (worst[what] or 0) > TOLERANCE]
    drawn = "" if (worst["initial"] or 0) < TOLERANCE else "initial noise of the right law, but not the pipeline's own draw for a seed"
    return {**worst, "verdict": "wrong" if off else "passed", "mode": report.parity, "message": ", ".join(off) or drawn}


def prompts_of(family: Family) -> tuple[Prompt, Prompt]:
    """Two prompts that differ in text, in condition images and, where the family takes one, in their negative prompt."""
    second = "ugly, low quality" if "negative_prompt" in family.call else None
    return (Prompt(family.prompts[0], images=family.condition_images(0)),
            Prompt(family.prompts[1], negative=second, images=family.condition_images(1)))


def compare(policy: PipelinePolicy, scheduler: Any, prompt: Prompt, seed: int) -> dict[str, float]:
    """Errors of our initial state, replayed final state and decoded media against one plain run."""
    first, last, media = plain_run(policy.pipe, scheduler, policy.call.one(prompt, seed))
    shape = (1, *policy.latent_shape)
    with torch.no_grad():
        errors = {"decode": float((policy.decode_tensor(last.reshape(shape), [prompt]).float() - media).abs().max())}
        if scheduler is not None:
            errors["initial"] = relative(policy.initial_latents([seed]), first.reshape(shape))
            errors["independent"] = relative(replay(policy, prompt, first.reshape(shape)), last.reshape(shape))
    return errors


@torch.no_grad()
def plain_run(pipe: Any, scheduler: Any, call: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(first state, last state, media) of the pipeline's own call; only the scheduler is exchanged, if one is given."""
    original = pipe.scheduler
    stepping = original if scheduler is None else scheduler
    states: list[Tensor] = []
    step: Callable[..., Any] = type(stepping).step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        states.append((kwargs["sample"] if "sample" in kwargs else args[2]).clone())
        out = step(stepping, *args, **kwargs)
        states.append((out[0] if isinstance(out, tuple) else out.prev_sample).clone())
        return out

    torch.manual_seed(0)
    stepping.step = recorded
    pipe.scheduler = stepping
    try:
        result = pipe(**{**call, **({"output_type": "np"} if "output_type" in _parameters(pipe) else {})})
    finally:
        pipe.scheduler = original
        del stepping.step
    return states[0].float(), states[-1].float(), media_tensor(result)


def _parameters(pipe: Any) -> tuple[str, ...]:
    code = getattr(type(pipe).__call__, "__wrapped__", type(pipe).__call__).__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def media_tensor(result: Any) -> Tensor:
    """A pipeline's result in the layout of `PipelinePolicy.decode_tensor`: channels before height and width."""
    value = next(iter(result.values()))
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = [np.stack([np.asarray(frame) for frame in one]) for one in value]
    array = np.stack([np.asarray(one) for one in value]) if isinstance(value, list) else np.asarray(value)
    array = array / 255 if array.dtype == np.uint8 else array
    tensor = torch.from_numpy(np.ascontiguousarray(array)).float()
    if tensor.ndim >= 4 and tensor.shape[-1] == 3:
        return tensor.movedim(-1, -3)
    return tensor[:, None] if tensor.ndim == 2 else tensor


def plain_scheduler(scheduler: Any) -> Any:
    """The same noise levels with a deterministic first-order step of diffusers' own, or ``None`` if it ships none."""
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    name = type(scheduler).__name__
    if "solver_order" in config:
        return type(scheduler).from_config({**config, "solver_order": 1, "disable_corrector": list(range(100))})
    if name in ("PNDMScheduler", "DDPMScheduler"):
        extra = {"clip_sample": False} if name == "PNDMScheduler" else {}
        return diffusers.DDIMScheduler.from_config(config, **extra)
    if name in ("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"):
        return diffusers.EulerDiscreteScheduler.from_config(config)
    if name == "CogVideoXDPMScheduler":
        return diffusers.CogVideoXDDIMScheduler.from_config(config)
    return None


def roundtrip(policy: PipelinePolicy) -> list[float]:
    """``from_vae(to_vae(z)) = z``; nothing to check where the pipeline has no invertible VAE map."""
    z = policy.initial_latents([1, 2])
    try:
        return [relative(policy.codec.from_vae(policy.codec.to_vae(z)), z)]
    except CaptureError as error:
        logger.info("%s: %s", policy.call.name, error)
        return []


_PAGE = """# Which pipelines can be captured

Generated by `python -m scripts.capture_families` with diffusers {version} on tiny random weights: {counts} of {total} configurations.
*Wrong* means that capture accepted a pipeline and the independent check disagrees; *crashed* that capture failed without saying why.
Both must be 0.

- *Verification* is `PipelinePolicy.verify()`: our loop against the pipeline's own, relative error of the final latents. "First order" marks
  schedulers with memory or noise: their step was replaced by the deterministic first-order step of the same process.
- *Plain run* is a check without the observer: denoising and decoding against `pipe(**call)` with a recorder around `scheduler.step`, for
  two prompts and two step counts; multistep and noisy schedulers are exchanged for a first-order scheduler of diffusers with the same noise
  levels. Empty where diffusers ships none: there only verification speaks for the latents.
- *Decode* is the largest difference between media decoded from the plain run's latents and its result, on [0, 1].
- A star: the pipeline samples its condition latents with the call's generator; capture takes the draw of seed 0 for every seed.

| family | pipeline | verdict | verification | plain run | decode | what is special |
| --- | --- | --- | --- | --- | --- | --- |
"""


def table(verdicts: list[Verdict]) -> str:
    """The page ``docs/capture.md``."""
    counts = {name: sum(v.verdict == name for v in verdicts) for name in ("passed", "refused", "wrong", "crashed")}
    summary = ", ".join(f"**{count} {name}**" for name, count in counts.items())
    text = _PAGE.format(version=diffusers.__version__, total=len(verdicts), counts=summary)
    starred = {family.name for family in FAMILIES if family.sampled_condition}
    for v in verdicts:
        parity = _number(v.parity) + (", first order" if v.mode == "first-order run" else "")
        text += (f"| {v.family}{'*' if v.family in starred else ''} | {v.pipeline} | {v.verdict} | {parity} | {_number(v.independent)} | "
                 f"{_number(v.decode)} | {v.special} |\n")
    if others := [v for v in verdicts if v.verdict != "passed"]:
        text += "\n## What the others say\n\n" + "".join(f"- **{v.family}** ({v.pipeline}), {v.verdict}: {v.message}\n" for v in others)
    return text


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"


def write(verdicts: list[Verdict]) -> None:
    """The table and the result rows."""
    (ROOT / "docs" / "capture.md").write_text(table(verdicts))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    common = {"op": "capture_families", "metric": "relative error of final latents", "unit": "1", "hardware": f"CPU {platform.machine()}",
              "versions": versions, "commit": commit, "date": date.today().isoformat()}
    rows = [{**common, **asdict(v)} for v in verdicts]
    results = ROOT / "benchmarks" / "results" / "capture_families.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Capture every tiny family and write docs/capture.md")
    parser.add_argument("families", nargs="*", help="names of families (default: all; only then files are written)")
    parser.add_argument("--trace", action="store_true", help="log the traceback of refusals")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if arguments.trace else logging.WARNING, format="%(message)s")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    verdicts = []
    for family in FAMILIES:
        if not arguments.families or family.name in arguments.families:
            verdicts.append(judge(family))
            v = verdicts[-1]
            errors = " ".join(f"{_number(error):6s}" for error in (v.parity, v.independent, v.decode))
            print(f"{v.family:40s} {v.verdict:8s} {errors} {v.seconds:6.1f}s  {v.message[:300]}", flush=True)
    if not arguments.families:
        write(verdicts)
    expected = {family.name: family.expected for family in FAMILIES}
    if worse := [v.family for v in verdicts if v.verdict != "passed" and v.verdict != expected[v.family]]:
        raise SystemExit(f"worse than expected: {', '.join(worse)}")


if __name__ == "__main__":
    main()
