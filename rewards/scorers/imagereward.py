"""ImageReward from its own package ``image-reward`` 1.5; ``visalign.rewards.imagereward`` is the same model without it.

The package loads a checkpoint with ``strict=False``, so that a wrong one leaves random weights, and on a torch before 2.6 unpickles
whatever it holds; here it is read as tensors, and what does not fit is an error. Prompts are cut at 35 tokens. Source: arXiv:2304.05977.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from visalign.protocols import RewardSpec
from visalign.rewards.scorers.pictures import pil
from visalign.rewards.scorers.upstream import check_vocabulary, upstream
from visalign.types import Media, Prompt, Scores

VOCABULARY = 30_522


class OriginalImageReward:
    """Scores images, roughly -2.3 to 2; larger is better."""

    def __init__(self, checkpoint: str | None = None, med_config: str | None = None, device: str = "cuda") -> None:
        """
        Args:
            checkpoint, med_config: paths of ``ImageReward.pt`` and ``med_config.json``; by default from the hub.
        Raises:
            ValueError: the checkpoint is of another model.
        """
        package = upstream("ImageReward.ImageReward", "imagereward")
        files = {"ImageReward.pt": checkpoint, "med_config.json": med_config}
        if None in files.values():
            hub = upstream("huggingface_hub", "imagereward")
            files = {name: path or hub.hf_hub_download("THUDM/ImageReward", name) for name, path in files.items()}
        self.model = package.ImageReward(med_config=files["med_config.json"], device=device)
        check_vocabulary(self.model.blip.tokenizer, VOCABULARY, "imagereward")
        load_strictly(self.model, Path(str(files["ImageReward.pt"])))
        self.model.to(device).eval()
        self.spec = RewardSpec(name="imagereward", requires=frozenset({"prompt"}), model_ids=(checkpoint or "THUDM/ImageReward",),
                               licence="Apache-2.0", version="1.5")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One image at a time, as the package does itself; for a single one it returns a number, for several a list."""
        return Scores.from_values([float(self.model.score(prompt.text, pil(sample.data)))
                                   for sample, prompt in zip(media, prompts, strict=True)])


def load_strictly(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load a state dict; only position ids, which some versions of transformers keep and others compute, may differ.

    Raises:
        ValueError: names the tensors that differ.
    """
    found = model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True), strict=False)
    differing = [name for name in (*found.missing_keys, *found.unexpected_keys) if not name.endswith("position_ids")]
    if differing:
        raise ValueError(f"{checkpoint} is no checkpoint of this model: {len(differing)} tensors differ, for example "
                         f"{', '.join(differing[:3])}")
