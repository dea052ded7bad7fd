"""The model card beside a trained adapter: what it was trained on and the lines that load it without visalign."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = """---
library_name: diffusers
base_model: {base}
tags:
- {tag}
- visalign
---

# Adapter for {name}

{what} of {components}, trained with visalign on `{pipeline}`.
The run that made it is described by `config.yaml`, `metrics.jsonl` and `report.html` of its run folder.

```python
from diffusers import {pipeline}
{extra}
ADAPTER = "path/to/this/folder"
pipe = {pipeline}.from_pretrained({base!r})
{loads}
image = pipe("your prompt"{call})
```

Sample with the settings above: the adapter was trained under them.
"""


def write_card(folder: Path, *, base: str, pipeline: str, call: Mapping[str, Any], loads: Mapping[str, str], mode: str) -> None:
    """Write ``README.md`` into ``folder``."""
    lines = list(dict.fromkeys(loads.values()))
    folder.joinpath("README.md").write_text(
        CARD.format(
            base=base,
            name=Path(base).name,
            tag="lora" if mode == "lora" else "full-fine-tune",
            what="LoRA weights" if mode == "lora" else "Fine-tuned weights",
            components=" and ".join(loads),
            pipeline=pipeline,
            extra="import peft\n" if any("peft." in line for line in lines) else "",
            loads="\n".join(lines),
            call="".join(f", {key}={value!r}" for key, value in call.items()),
        ),
        encoding="utf-8",
    )
