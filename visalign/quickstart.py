"""``visalign quickstart``: the whole path on the embedded pipeline, and an honest table at its end.

The gain is set beside what guidance 3 gives the untrained model for free (at twice the cost per step), beside a proxy that was never
trained on, and beside diversity, so that it is not oversold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from visalign import loop
from visalign.build import build
from visalign.commands import quiet_libraries
from visalign.commands.train import default_folder, refuse_used_folder
from visalign.config import Config, load_config, resolve_path
from visalign.distributed import Processes
from visalign.diversity import pairwise_difference
from visalign.evaluation import Evaluation, evaluate
from visalign.maths.bootstrap import bootstrap_gain, bootstrap_mean
from visalign.maths.seeds import derive_seed
from visalign.progress import Bars
from visalign.protocols import Policy, Sampler
from visalign.report import write_report
from visalign.samplers.policy import PipelinePolicy
from visalign.types import Prompt

GUIDED = "base with guidance 3"
GUIDANCE = 3.0
DIVERSITY_PROMPTS, DIVERSITY_SAMPLES = 32, 4
# What the table calls the metrics, in its order; skills that no evaluation prompt tests are left out.
ROWS = {"captions/mean": "gold mean", "captions/strict": "gold strict", "captions/colour": "  colour", "captions/count": "  count",
        "captions/shape": "  shape", "captions/size": "  size", "captions/relation": "  relation", "clip": "proxy CLIP",
        "diversity": "diversity"}


def run(overrides: Sequence[str], *, seed: int, out: Path | None) -> Path:
    """Train, evaluate, print the table and where everything is; returns the run folder."""
    config = load_config("quickstart", [f"train.seed={seed}", *overrides])
    folder = out or default_folder("quickstart")
    refuse_used_folder(folder)
    quiet_libraries()
    console = Console()
    console.print(f"aligning the embedded pipeline with its exact verifier; run folder: {folder}", highlight=False)
    processes = Processes.start(config.model.device)
    parts = build(config, processes)
    loop.run(parts, config, folder, processes, callback=Bars(Console(stderr=True)))
    compare_with_base(config, parts, folder, processes)
    write_report(folder)
    console.print(table(folder))
    for what, path in (("report", folder / "report.html"), ("adapter", folder / "adapter")):
        console.print(f"{what:<8} {path}", highlight=False)
    return folder


def compare_with_base(config: Config, parts: loop.Parts, folder: Path, processes: Processes) -> None:
    """Add to a finished run: the untrained model with guidance, and the diversity of all three."""
    model, settings = config.model, config.evaluation
    call = {**model.call, **model.eval_call}
    base = PipelinePolicy.from_pretrained(str(resolve_path(model.path)), dtype=getattr(torch, model.dtype), device=str(processes.device),
                                          **call)
    guided = base.with_call(guidance_scale=GUIDANCE)
    prompts = parts.eval_prompts[:settings.num_prompts]
    found = evaluate(guided, parts.sampler, parts.eval_rewards, prompts, seed=settings.seed, batch=settings.batch,
                     processes=processes, folder=folder / "samples" / GUIDED)
    assert found is not None, "the quick start runs on one process"
    before, after, beside = (diversity(policy, parts.sampler, parts.eval_prompts[:DIVERSITY_PROMPTS], settings.seed)
                             for policy in (base, parts.eval_policy, guided))
    Evaluation({**found.values, "diversity": beside}, found.seeds).write(folder / "evaluations" / f"{GUIDED}.json")
    path = folder / "evaluation.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows["diversity"] = {"before": vars(bootstrap_mean(before)), "after": vars(bootstrap_mean(after)),
                         "gain": vars(bootstrap_gain(before, after))}
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def diversity(policy: Policy, sampler: Sampler, prompts: Sequence[Prompt], seed: int) -> Tensor:
    """How different the pictures of one prompt are: mean RMS pixel difference over pairs of samples, per prompt, float64 (P,).

    0 means that every seed gives the same picture; 1 would be black against white.
    """
    repeated = [prompt for prompt in prompts for _ in range(DIVERSITY_SAMPLES)]
    seeds = [derive_seed(seed, 1, k) for k in range(len(repeated))]
    media = policy.decode(sampler.generate(policy, repeated, seeds), repeated)
    return pairwise_difference(media, DIVERSITY_SAMPLES)


def table(folder: Path) -> Table:
    """Before -> after with 95 % bootstrap intervals, and the guided base beside them; from the run's files alone."""
    rows: Mapping[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    guided = Evaluation.read(folder / "evaluations" / f"{GUIDED}.json").intervals()
    count = max(row["gain"]["count"] for row in rows.values())
    shown = Table(title=f"before -> after on {count} held-out prompts, 95 % bootstrap intervals", title_justify="left", box=None,
                  pad_edge=False, caption=f"guided: the {GUIDED}, which costs twice the work per step", caption_justify="left")
    for heading in ("", "before", "after", "gain", "guided"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, title in ROWS.items():
        if name in rows:
            before, after, gain = (rows[name][side] for side in ("before", "after", "gain"))
            colour = "green" if gain["low"] > 0 else "red" if gain["high"] < 0 else "default"
            shown.add_row(title, _number(before), _number(after), f"[{colour}]{_number(gain, '+')}[/]",
                          f"{guided[name].mean:.3f}" if name in guided else "")
    return shown


def _number(side: Mapping[str, float], sign: str = "") -> str:
    """Mean and interval, short enough for a terminal of 80 columns."""
    low, high = (f"{side[bound]:{sign}.2f}".replace("0.", ".") for bound in ("low", "high"))
    return f"{side['mean']:{sign}.3f} [dim]\\[{low}, {high}][/]"
