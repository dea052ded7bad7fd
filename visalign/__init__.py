"""visalign: align any diffusion or rectified-flow generator with any preference signal.

    from visalign import train            # visalign.loop.train: run a configuration, return the run folder
    from visalign import load_config      # a recipe's name or a YAML file, with key=value overrides
"""

from typing import Any

__version__ = "0.1.0.dev0"
__all__ = ["__version__", "load_config", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and diffusers take seconds, and ``visalign --help`` needs neither."""
    if name == "train":
        from visalign.loop import train

        return train
    if name == "load_config":
        from visalign.config import load_config

        return load_config
    raise AttributeError(f"module 'visalign' has no attribute {name!r}")
