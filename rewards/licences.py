"""Licences of published reward weights, as their authors state them; a local copy is known by its file's name.

What a checkpoint was made from binds as well. Judges and heads on Qwen2-VL or Qwen2.5-VL come under their base's licence too, which differs
by size: nothing is claimed for them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

LICENCES: Mapping[str, str] = {
    "openai": "MIT",                                    # tags of open_clip
    "laion400m_e31": "MIT", "laion400m_e32": "MIT", "laion2b_e16": "MIT", "laion2b_s34b_b79k": "MIT", "laion2b_s32b_b82k": "MIT",
    "laion2b_s32b_b79k": "MIT", "laion2b_s39b_b160k": "MIT",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "MIT",
    "yuvalkirstain/PickScore_v1": "MIT",
    "sac+logos+ava1-l14-linearMSE.pth": "Apache-2.0",
    "HPS_v2_compressed.pt": "Apache-2.0", "HPS_v2.1_compressed.pt": "Apache-2.0",
    "ImageReward.pt": "Apache-2.0", "bert-base-uncased": "Apache-2.0",
    "laion/larger_clap_general": "Apache-2.0", "laion/larger_clap_music": "Apache-2.0", "laion/clap-htsat-unfused": "Apache-2.0",
    "rapidocr": "Apache-2.0",
}


def licence_of(*weights: str) -> str:
    """The licences of these weights, each once; empty if one of them is not known.

        licence_of("openai", "/data/sac+logos+ava1-l14-linearMSE.pth")      "MIT, Apache-2.0"
    """
    known = [LICENCES.get(one) or LICENCES.get(PurePosixPath(one).name, "") for one in weights]
    return ", ".join(dict.fromkeys(known)) if all(known) else ""
