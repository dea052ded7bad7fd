"""The model card beside an adapter: what it is, how to load it, what it was trained on, what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from visalign.config import Config, resolve_path
from visalign.report.numbers import Compared
from visalign.versions import versions


def write_card(run: Path, config: Config, compared: Mapping[str, Compared], references: Mapping[str, Mapping[str, float]]) -> Path:
    """Write ``adapter/README.md``, in the form model hubs show, with the run's configuration beside it."""
    trained = ", ".join(f"{reward.name} (weight {reward.weight:g})" for reward in config.rewards)
    base = config.model.path
    call = ", ".join(f"{key}={value!r}" for key, value in {**config.model.call, **config.model.eval_call}.items())
    train = config.train
    lines = [
        "---", f"base_model: {base}", "library_name: diffusers", "tags: [visalign, reinforcement-learning, grpo, lora]", "---", "",
        f"# {config.recipe.description or run.resolve().name}", "",
        f"Weights trained with visalign {versions()['visalign']} on `{base}`: "
        f"{config.algorithm.name}, {train.iterations} iterations of {train.groups} prompts x {train.group_size} samples, "
        f"seed {train.seed}. "
        f"Trained on: {trained}. Prompts: `{config.data.prompts}`.", "",
        *_loading(run, config, call), "## Measured", "", *_table(compared, references),
        "## Limits", "",
        "These weights favour what the rewards above measure, and may have lost what they do not: compare pictures and the guard metrics "
        "before you use them. The licence of the base model and of the reward models applies.", "",
        "`config.yaml` beside this file is the run's full configuration.", "",
    ]
    path = run / "adapter" / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    shutil.copyfile(run / "config.yaml", run / "adapter" / "config.yaml")
    return path


def _loading(run: Path, config: Config, call: str) -> list[str]:
    """The lines that load the adapter without visalign, as the policy that saved it wrote them."""
    path = run / "adapter" / "loading.json"
    if not path.exists():
        return []
    loads = list(dict.fromkeys(json.loads(path.read_text(encoding="utf-8")).values()))
    imports = ["import peft"] if any("peft." in line for line in loads) else []
    return ["## Use", "", "```python", *imports, "from diffusers import DiffusionPipeline", "", 'ADAPTER = "path/to/this/folder"',
            f'pipe = DiffusionPipeline.from_pretrained("{resolve_path(config.model.path)}")', *loads,
            f'image = pipe("a prompt", {call}).images[0]', "```", "",
            *(["diffusers may say \"No LoRA keys associated to CLIPTextModel found\" while loading: the text encoders were not trained, "
               "and the message is harmless.", ""] if any("load_lora_weights" in line for line in loads) else [])]


def _table(compared: Mapping[str, Compared], references: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not compared:
        return ["Nothing yet: the run has no evaluation after training.", ""]
    rows = [f"| {' | '.join(('metric', 'before', 'after', 'gain [95 %]', *references))} |", "|---|" + "---|" * (3 + len(references))]
    for name, row in sorted(compared.items()):
        beside = [f"{means[name]:.4g}" if name in means else "" for means in references.values()]
        cells = (name, f"{row.before['mean']:.4g}", f"{row.after['mean']:.4g}",
                 f"{row.gain['mean']:+.3g} [{row.gain['low']:+.3g}, {row.gain['high']:+.3g}]", *beside)
        rows.append(f"| {' | '.join(cells)} |")
    count = max(int(row.gain["count"]) for row in compared.values())
    return [f"On {count} evaluation prompts with fixed seeds, before and after training.", "", *rows, ""]
